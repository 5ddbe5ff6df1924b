"""Picture of the cost of a step."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.plots import save
from benchmarks.step_cost.steps import PHASES


def draw_step_cost(results: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds of each phase, a bar per method, a panel per measurement."""
    panels = [result for result in results if "steps" in result]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.9 + sum(0.42 * (len(panel["steps"]) + 1.6) for panel in panels)),
        height_ratios=[len(panel["steps"]) + 1 for panel in panels], squeeze=False, layout="tight",
    )  # fmt: skip
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        names = list(panel["steps"])
        left = np.zeros(len(names))
        for number, phase in enumerate(PHASES):
            width = np.array([1000 * np.median([s.get(phase, 0.0) for s in panel["steps"][name]]) for name in names])
            axis.barh(names, width, left=left, label=phase, color=plt.get_cmap("tab10")(number))
            left += width
        axis.invert_yaxis()
        size = panel["size"]
        axis.set_title(f"{size['model']}, {size['num_questions']} x 8 completions of {size['length']} tokens")
        axis.set_xlabel("milliseconds a step")
    axes[0, 0].legend(frameon=False, ncols=4, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1.12))
    save(figure, file)
