"""Pictures of the learning benchmark: curves, and where they end."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning.summary import Groups, Results, final, series
from benchmarks.plots import save

COLORS = {"grpo": "#999999", "shaped": "#d95f02", "balanced": "#1b7db8"}
OTHER = "#222222"
# Name of a quantity in a series, and its label.
PASS_RATES = {"pass_at_1": "held-out pass@1", "pass_at_8": "held-out pass@8"}
OTHERS = {
    "entropy": "entropy, nats",
    "without_signal": "groups without a signal",
    "completions": "stored completions",
    "retired": "retired questions",
}
AXES = {"step": "optimizer steps", "tokens": "generated tokens, thousands", "seconds": "seconds of training"}


def draw_curves(by_method: dict[str, Results], title: str, file: Path) -> None:
    """
    Pass rates against steps, generated tokens and seconds, everything else against steps.

    Thin lines are seeds, thick ones their mean.
    """
    figure = plt.figure(figsize=(10, 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[1.9, 1])
    rows, last = above.subplots(len(PASS_RATES), len(AXES)), below.subplots(1, len(OTHERS))
    axes = {
        (name, over): axis
        for name, row in zip(PASS_RATES, rows, strict=True)
        for over, axis in zip(AXES, row, strict=True)
    }
    axes |= {(name, "step"): axis for name, axis in zip(OTHERS, last, strict=True)}
    for method, results in by_method.items():
        drawn = [series(result) for result in results]
        color = COLORS.get(method, OTHER)
        for (quantity, horizontal), axis in axes.items():
            found = [part for pair in drawn for part in pair if quantity in part]
            for part in found:
                axis.plot(part[horizontal], part[quantity], color=color, linewidth=0.6, alpha=0.45)
            if found:
                means = [np.mean([part[name] for part in found], axis=0) for name in (horizontal, quantity)]
                axis.plot(*means, color=color, linewidth=2, label=method)
    for (quantity, horizontal), axis in axes.items():
        axis.grid(alpha=0.2)
        if quantity != "pass_at_1":
            axis.set_xlabel(AXES[horizontal])
        if horizontal == "step":
            axis.set_ylabel((PASS_RATES | OTHERS)[quantity])
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.suptitle(title, x=0.01, horizontalalignment="left")
    figure.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside upper right")
    save(figure, file)


def draw_finals(groups: dict[str, dict[str, np.ndarray]], title: str, file: Path) -> None:
    """Final pass@1 of every seed, by group and method."""
    figure, axis = plt.subplots(figsize=(1.5 + 1.6 * len(groups), 4), layout="tight")
    methods = list(dict.fromkeys(method for group in groups.values() for method in group))
    for position, group in enumerate(groups.values()):
        for number, method in enumerate(methods):
            if method not in group:
                continue
            place = position + 0.24 * (number - (len(methods) - 1) / 2)
            color = COLORS.get(method, OTHER)
            label = method if position == 0 else None
            axis.scatter([place] * len(group[method]), group[method], s=14, color=color, alpha=0.7, label=label)
            axis.hlines(group[method].mean(), place - 0.09, place + 0.09, color=color, linewidth=2)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel("held-out pass@1 at the end")
    axis.grid(axis="y", alpha=0.2)
    axis.legend(frameon=False, ncols=len(methods))
    axis.set_title(title)
    save(figure, file)


def draw_ablations(of_method: dict[str, list[float]], file: Path) -> None:
    """Final pass@1 of every seed, a line per method."""
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.32 * len(of_method)), layout="tight")
    for position, (method, values) in enumerate(of_method.items()):
        color = COLORS.get(method, OTHER)
        axis.scatter(values, [position] * len(values), s=16, color=color, alpha=0.7)
        axis.vlines(np.mean(values), position - 0.28, position + 0.28, color=color, linewidth=2)
    axis.set_yticks(range(len(of_method)), list(of_method))
    axis.invert_yaxis()
    axis.set_xlabel("held-out pass@1 at the end, bimodal")
    axis.grid(axis="x", alpha=0.2)
    save(figure, file)


def draw_all(compared: Groups, ablated: dict[str, list[float]], folder: Path) -> None:
    """All pictures, of what `grouped` and `of_ablated` give."""
    for name, by_method in compared.items():
        file = name.replace(", warm-up ", "_").replace(", ", "_").replace(" steps", "")
        draw_curves(by_method, f"Hidden operations, {name}", folder / f"learning_{file}.png")
    draw_finals(
        {name: {method: final(results) for method, results in of.items()} for name, of in compared.items()},
        "Hidden operations", folder / "learning.png",
    )  # fmt: skip
    if ablated:
        draw_ablations(ablated, folder / "learning_ablations.png")
