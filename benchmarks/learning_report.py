"""Tables, plots and targets of the learning benchmark, from the files of its runs."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.learning_run import ROWS, SETTINGS, STEPS, Run
from benchmarks.plots import save
from benchmarks.report import Target, show, with_spread, write

COLORS = {"grpo": "#888888", "shaped": "#d95f02", "balanced": "#1b7db8"}
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
# Where replay is to be ahead of GRPO in every seed, not only on average.
TO_BE_APART = ("bimodal", "even-0.5", "even-0.9", "even-0.97")

Series = dict[str, np.ndarray]


def load(run: Run, folder: Path) -> dict[str, Any] | None:
    """What a run has left, `None` if it has not been made."""
    file = run.file(folder)
    return json.loads(file.read_text()) if file.exists() else None


def series(result: dict[str, Any]) -> tuple[Series, Series]:
    """Held-out pass rates every 25 steps, and what was logged every 5 steps; each with the three horizontal axes."""
    curve = {name: np.array([point[name] for point in result["curve"]]) for name in result["curve"][0]}
    logs = result["logs"]
    log_steps = np.array([line["step"] for line in logs])
    all_tokens = np.cumsum(np.diff(log_steps, prepend=0) * ROWS * [line["completions/mean_length"] for line in logs])
    is_replayed = result["run"]["method"] not in ("grpo", "questions-only")
    saved = np.array([line.get("replay/tokens_saved", 0.0) if is_replayed else 0.0 for line in logs])
    generated = (all_tokens - saved) / 1000
    curve["tokens"] = np.interp(curve["step"], [0, *log_steps], [0, *generated])
    logged = {
        "step": log_steps,
        "tokens": generated,
        "seconds": np.interp(log_steps, curve["step"], curve["seconds"]),
        "entropy": np.array([line["entropy"] for line in logs]),
        "without_signal": np.array(
            [line.get("fresh/frac_groups_without_signal", line["frac_reward_zero_std"]) for line in logs]
        ),
    }
    if "replay/completions" in logs[-1]:
        logged["completions"] = np.array([line["replay/completions"] for line in logs])
        logged["retired"] = np.array([line["replay/retired"] for line in logs])
    return curve, logged


def final(results: list[dict[str, Any]], name: str = "pass_at_1") -> np.ndarray:
    """The last point of every run."""
    return np.array([result["curve"][-1][name] for result in results])


def draw_curves(by_method: dict[str, list[dict[str, Any]]], title: str, file: Path) -> None:
    """Every quantity against steps, generated tokens and seconds: thin lines are seeds, thick ones their mean."""
    figure, axes = plt.subplots(len(QUANTITIES), len(AXES), figsize=(11, 13), squeeze=False)
    for method, results in by_method.items():
        drawn = [series(result) for result in results]
        for row, quantity in zip(axes, QUANTITIES, strict=True):
            found = [part for pair in drawn for part in pair if quantity in part]
            for axis, horizontal in zip(row, AXES, strict=True):
                for part in found:
                    axis.plot(part[horizontal], part[quantity], color=COLORS[method], linewidth=0.6, alpha=0.45)
                if found:
                    means = [np.mean([part[name] for part in found], axis=0) for name in (horizontal, quantity)]
                    axis.plot(*means, color=COLORS[method], linewidth=2, label=method)
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
            color = COLORS.get(method, "#555555")
            label = method if position == 0 else None
            axis.scatter([place] * len(group[method]), group[method], s=14, color=color, alpha=0.7, label=label)
            axis.hlines(group[method].mean(), place - 0.09, place + 0.09, color=color, linewidth=2)
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylabel("held-out pass@1 at the end")
    axis.grid(axis="y", alpha=0.2)
    axis.legend(frameon=False, ncols=len(methods))
    axis.set_title(title)
    save(figure, file)


def draw_ablations(of_method: dict[str, np.ndarray], file: Path) -> None:
    """Final pass@1 of every seed, a line per method."""
    figure, axis = plt.subplots(figsize=(7.5, 0.9 + 0.32 * len(of_method)))
    for position, (method, values) in enumerate(of_method.items()):
        color = COLORS.get(method, "#555555")
        axis.scatter(values, [position] * len(values), s=16, color=color, alpha=0.7)
        axis.vlines(values.mean(), position - 0.28, position + 0.28, color=color, linewidth=2)
    axis.set_yticks(range(len(of_method)), list(of_method))
    axis.invert_yaxis()
    axis.set_xlabel("held-out pass@1 at the end, bimodal")
    axis.grid(axis="x", alpha=0.2)
    save(figure, file)


def label(run: Run) -> str:
    """Setting and warm-up."""
    return run.setting if run.warm_up == 0 else f"{run.setting}, warm-up {run.warm_up + 1}"


def at_equal_time(longer: list[dict[str, Any]], seconds: float) -> np.ndarray:
    """Pass@1 of longer runs when they have trained for so many seconds; the last point where they end before."""
    curves = [series(result)[0] for result in longer]
    return np.array([np.interp(seconds, curve["seconds"], curve["pass_at_1"]) for curve in curves])


def targets_of(compared: dict[str, dict[str, list[dict[str, Any]]]]) -> list[Target]:
    """Balanced weighting against GRPO."""
    targets = []
    for name, by_method in compared.items():
        if not {"grpo", "balanced"} <= by_method.keys():
            continue
        plain, balanced = final(by_method["grpo"]), final(by_method["balanced"])
        to_be_apart = name.split(",")[0] in TO_BE_APART
        is_met = bool(balanced.min() > plain.max()) if to_be_apart else bool(balanced.mean() > plain.mean())
        targets.append(
            Target(
                f"pass@1, {name}",
                "balanced above GRPO" + (" in all seeds" if to_be_apart and len(plain) > 1 else ""),
                f"{with_spread(balanced, 3)} against {with_spread(plain, 3)}",
                is_met,
                "" if is_met else f"seeds from {balanced.min():.3f} against {plain.max():.3f}",
            )
        )
    return targets


def report(runs: list[Run], folder: Path, output: Path, *, plots: Path) -> None:
    """
    Print tables, draw plots and write a summary of the runs that have been made.

    Args:
        runs: Runs to report.
        folder: Where their files are.
        output: JSON file of the summary.
        plots: Folder of the plots.
    """
    compared: dict[str, dict[str, list[dict[str, Any]]]] = {}
    ablated: dict[str, list[dict[str, Any]]] = {}
    longer: list[dict[str, Any]] = []
    missing = 0
    for run in runs:
        result = load(run, folder)
        if result is None:
            missing += 1
        elif run.method not in COLORS:
            ablated.setdefault(run.method, []).append(result)
        elif run.steps > STEPS:
            longer.append(result)
        else:
            compared.setdefault(label(run), {}).setdefault(run.method, []).append(result)
    if missing:
        print(f"{missing} of {len(runs)} runs have not been made yet.")

    summary: dict[str, Any] = {"compared": {}, "ablated": {}}
    rows = []
    for name, by_method in compared.items():
        draw_curves(by_method, f"Hidden operations, {name}", plots / f"learning_{name.replace(', warm-up ', '_')}.png")
        for method, results in by_method.items():
            last = [series(result)[0] for result in results]
            numbers = {quantity: [float(of[quantity][-1]) for of in last] for quantity in ("tokens", "seconds")}
            numbers |= {quantity: final(results, quantity).tolist() for quantity in ("pass_at_1", "pass_at_8")}
            numbers["learning_rate"] = results[0]["run"]["learning_rate"]
            summary["compared"].setdefault(name, {})[method] = numbers
            rows.append(
                [
                    f"{name}: {method}", f"{numbers['learning_rate']:g}", str(len(results)),
                    with_spread(numbers["pass_at_1"], 3), with_spread(numbers["pass_at_8"], 3),
                    f"{np.mean(numbers['tokens']):,.0f}", with_spread(numbers["seconds"], 0),
                ]
            )  # fmt: skip
    columns = ["setting", "learning rate", "seeds", "pass@1", "pass@8", "generated tokens, thousands", "seconds"]
    show("Held-out questions at the end", columns, rows)
    draw_finals(
        {name: {method: final(results) for method, results in of.items()} for name, of in compared.items()},
        "Hidden operations", plots / "learning.png",
    )  # fmt: skip
    if ablated:
        shown = {method: results[:3] for method, results in compared["bimodal"].items()} | ablated
        finals = {method: final(results) for method, results in shown.items()}
        if longer:
            seconds = float(np.mean([result["curve"][-1]["seconds"] for result in shown["balanced"]]))
            finals[f"grpo for {seconds:.0f} seconds, as balanced"] = at_equal_time(longer, seconds)
            finals["grpo, 450 steps"] = final(longer)
        summary["ablated"] = {method: values.tolist() for method, values in finals.items()}
        rows = [[method, str(len(values)), with_spread(values, 3)] for method, values in finals.items()]
        show("Bimodal, the first three seeds", ["method", "seeds", "pass@1"], rows)
        draw_ablations(finals, plots / "learning_ablations.png")
    targets = targets_of(compared)
    show(
        "Targets",
        ["what", "aim", "measured", "met", "cause"],
        [[t.name, t.aim, t.measured, "yes" if t.is_met else "MISSED", t.cause] for t in targets],
    )
    write(output, settings={"settings": SETTINGS, "runs": len(runs) - missing}, results=summary, targets=targets)
    print(f"Written to {output} and {plots}")
