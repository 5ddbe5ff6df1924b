"""Plots of step cost and buffer scale."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.steps import PHASES


def save(figure: Any, file: Path) -> None:
    """Write a picture."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(file, dpi=80, metadata={"Software": None})
    plt.close(figure)


def draw_step_cost(results: list[dict[str, Any]], file: Path) -> None:
    """Milliseconds of each phase, a bar per method, a panel per measurement."""
    panels = [result for result in results if "steps" in result]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.9 + sum(0.42 * (len(panel["steps"]) + 1.6) for panel in panels)),
        height_ratios=[len(panel["steps"]) + 1 for panel in panels], squeeze=False,
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


def draw_buffer_scale(results: list[dict[str, Any]], file: Path) -> None:
    """Insertion, draw, eviction, saving, loading and memory against the number of stored completions."""
    quantities = {
        "insert_microseconds": "insert, µs a completion",
        "draw_milliseconds": "draw of 64 questions, ms",
        "evict_microseconds": "evict by age, µs a completion",
        "save_seconds": "save, s",
        "load_seconds": "load, s",
        "bytes_per_completion": "bytes a completion",
    }
    figure, axes = plt.subplots(2, 3, figsize=(11, 6))
    for axis, (quantity, label) in zip(axes.flat, quantities.items(), strict=True):
        for name in dict.fromkeys(result["buffer"] for result in results):
            of_name = [r for r in results if r["buffer"] == name and r["completions_per_question"] > 1]
            sizes = sorted({r["completions"] for r in of_name if r[quantity] is not None})
            values = [[np.median(r[quantity]) for r in of_name if r["completions"] == size] for size in sizes]
            if sizes:
                means, lows, highs = (np.array([of(v) for v in values]) for of in (np.mean, np.min, np.max))
                axis.errorbar(sizes, means, yerr=[means - lows, highs - means], marker="o", capsize=2, label=name)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_ylabel(label)
        axis.grid(alpha=0.2)
    for axis in axes[1]:
        axis.set_xlabel("stored completions")
    axes[0, 0].legend(frameon=False, fontsize=8)
    save(figure, file)
