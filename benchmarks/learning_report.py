"""Tables and plots of the learning benchmark, and the file of its summary."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning_run import SETTINGS, Run
from benchmarks.learning_summary import (
    ABLATION_COLUMNS,
    COMPARISON_COLUMNS,
    Results,
    ablation_rows,
    comparison_rows,
    final,
    grouped,
    load,
    of_ablated,
    of_compared,
    of_tuned,
    series,
    targets_of,
)
from benchmarks.plots import save
from benchmarks.report import show, show_targets, together, write

COLORS = {"grpo": "#999999", "shaped": "#d95f02", "balanced": "#1b7db8"}
OTHER = "#222222"
# Name of a quantity in a series, and its label.
QUANTITIES = {
    "pass_at_1": "held-out pass@1",
    "pass_at_8": "held-out pass@8",
    "entropy": "entropy, nats",
    "without_signal": "groups without a signal",
    "completions": "stored completions",
    "retired": "retired questions",
}
AXES = {"step": "optimizer steps", "tokens": "generated tokens, thousands", "seconds": "seconds of training"}


def draw_curves(by_method: dict[str, Results], title: str, file: Path) -> None:
    """Every quantity against steps, generated tokens and seconds: thin lines are seeds, thick ones their mean."""
    figure, axes = plt.subplots(len(QUANTITIES), len(AXES), figsize=(11, 13), squeeze=False)
    for method, results in by_method.items():
        drawn = [series(result) for result in results]
        for row, quantity in zip(axes, QUANTITIES, strict=True):
            found = [part for pair in drawn for part in pair if quantity in part]
            for axis, horizontal in zip(row, AXES, strict=True):
                for part in found:
                    axis.plot(
                        part[horizontal], part[quantity], color=COLORS.get(method, OTHER), linewidth=0.6, alpha=0.45
                    )
                if found:
                    means = [np.mean([part[name] for part in found], axis=0) for name in (horizontal, quantity)]
                    axis.plot(*means, color=COLORS.get(method, OTHER), linewidth=2, label=method)
    for row, label in zip(axes, QUANTITIES.values(), strict=True):
        row[0].set_ylabel(label)
        for axis in row:
            axis.grid(alpha=0.2)
    for axis, label in zip(axes[-1], AXES.values(), strict=True):
        axis.set_xlabel(label)
    axes[0][0].legend(frameon=False)
    figure.suptitle(title)
    save(figure, file)


def draw_finals(groups: dict[str, dict[str, np.ndarray]], title: str, file: Path) -> None:
    """Final pass@1 of every seed, by group and method."""
    figure, axis = plt.subplots(figsize=(1.5 + 1.6 * len(groups), 4))
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
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.32 * len(of_method)))
    for position, (method, values) in enumerate(of_method.items()):
        color = COLORS.get(method, OTHER)
        axis.scatter(values, [position] * len(values), s=16, color=color, alpha=0.7)
        axis.vlines(np.mean(values), position - 0.28, position + 0.28, color=color, linewidth=2)
    axis.set_yticks(range(len(of_method)), list(of_method))
    axis.invert_yaxis()
    axis.set_xlabel("held-out pass@1 at the end, bimodal")
    axis.grid(axis="x", alpha=0.2)
    save(figure, file)


def report(runs: list[Run], tuning_runs: list[Run], folder: Path, output: Path, *, plots: Path) -> None:
    """
    Print tables, draw plots and write a summary of the runs that have been made.

    Args:
        runs: Runs to report.
        tuning_runs: Runs that chose the learning rates.
        folder: Where their files are.
        output: JSON file of the summary.
        plots: Folder of the plots.
    """
    num_made = sum(run.file(folder).exists() for run in runs)
    if num_made < len(runs):
        print(f"{len(runs) - num_made} of {len(runs)} runs have not been made yet.")
    compared, ablated, longer = grouped(runs, folder)
    tuned = [result for run in tuning_runs if (result := load(run, folder))]
    # The runs may have been made on several machines, and none of them on the one that reports them.
    made = {
        "tuned": tuned,
        "compared": [result for of in compared.values() for results in of.values() for result in results],
        "ablated": [result for results in ablated.values() for result in results] + longer,
    }
    machines = {part: together(result["machine"] for result in results) for part, results in made.items()}
    summary = {
        "tuned": of_tuned(tuned),
        "compared": of_compared(compared),
        "ablated": of_ablated(compared, ablated, longer) if ablated else {},
        "machines": machines,
    }
    show("Held-out questions at the end", COMPARISON_COLUMNS, comparison_rows(summary["compared"]))
    for name, by_method in compared.items():
        file = name.replace(", warm-up ", "_").replace(", ", "_").replace(" steps", "")
        draw_curves(by_method, f"Hidden operations, {name}", plots / f"learning_{file}.png")
    draw_finals(
        {name: {method: final(results) for method, results in of.items()} for name, of in compared.items()},
        "Hidden operations", plots / "learning.png",
    )  # fmt: skip
    if ablated:
        show("Bimodal, three seeds", ABLATION_COLUMNS, ablation_rows(summary["ablated"]))
        draw_ablations(summary["ablated"], plots / "learning_ablations.png")
    targets = targets_of(summary["compared"])
    show_targets(targets)
    about = together(result["machine"] for results in made.values() for result in results)
    write(output, settings={"settings": SETTINGS, "runs": num_made}, results=summary, targets=targets, about=about)
    print(f"Written to {output} and {plots}")
