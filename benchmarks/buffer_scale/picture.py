"""Picture of how the buffer scales."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.plots import save


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
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="tight")
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
