"""Numbers of the agents benchmark, from its runs: table and targets."""

import itertools
from typing import Any

import numpy as np

from benchmarks.agents.records import Made
from benchmarks.agents.run import METHODS, Run
from benchmarks.report import Target, content_of, together, with_spread

REACHED = 0.5  # the held-out success whose price is shown
COLUMNS = [
    "method", "runs", "success at first", "at the end", "seeds, sorted", "thousand environment steps", "seconds",
    "runs that reach 0.5", "environment steps until then", "seconds until then",
]  # fmt: skip


def until(curve: list[dict[str, Any]], success: float, axis: str) -> float | None:
    """Where a curve first reaches a success, between its points; `None` if it does not."""
    for before, after in itertools.pairwise(curve):
        if after["success"] >= success:
            share = (success - before["success"]) / (after["success"] - before["success"])
            return float(before[axis] + max(share, 0.0) * (after[axis] - before[axis]))
    return None


def of_methods(runs: list[Run], made: Made) -> dict[str, dict[str, Any]]:
    """What the runs of each method came to."""
    summary = {}
    for method in METHODS:
        results = [made[run] for run in runs if run.method == method and run in made]
        if not results:
            continue
        curves = [result["curve"] for result in results]
        summary[method] = {
            "learning_rate": results[0]["run"]["learning_rate"],
            "seeds": [result["run"]["seed"] for result in results],
            "before": [curve[0]["success"] for curve in curves],
            "success": [curve[-1]["success"] for curve in curves],
            "environment_steps": [curve[-1]["environment_steps"] for curve in curves],
            "seconds": [curve[-1]["seconds"] for curve in curves],
        } | {
            f"{axis}_until_{REACHED}": [until(curve, REACHED, axis) for curve in curves]
            for axis in ("environment_steps", "seconds")
        }
    return summary


def table_rows(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row per method, of what `of_methods` gives."""
    rows = []
    for method, numbers in summary.items():
        prices = [
            [value for value in numbers[f"{axis}_until_{REACHED}"] if value is not None]
            for axis in ("environment_steps", "seconds")
        ]
        rows.append(
            [
                method, str(len(numbers["seeds"])),
                with_spread(numbers["before"], 3), with_spread(numbers["success"], 3),
                " ".join(f"{value:.2f}" for value in sorted(numbers["success"])),
                with_spread(np.array(numbers["environment_steps"]) / 1000, 1), with_spread(numbers["seconds"], 0),
                str(len(prices[0])), *(with_spread(price, 0) if price else "-" for price in prices),
            ]
        )  # fmt: skip
    return rows


def targets_of(summary: dict[str, dict[str, Any]]) -> list[Target]:
    """Replay against GRPO at the end, on average."""
    if "grpo" not in summary:
        return []
    plain = summary["grpo"]["success"]
    targets = []
    for method in ("shaped", "balanced"):
        if method in summary:
            replayed = summary[method]["success"]
            by_seed = dict(zip(summary["grpo"]["seeds"], plain, strict=True))
            pairs = [
                (value, by_seed[seed])
                for seed, value in zip(summary[method]["seeds"], replayed, strict=True)
                if seed in by_seed
            ]
            targets.append(
                Target(
                    f"held-out success of agents, {method}",
                    "above GRPO",
                    f"{with_spread(replayed, 3)} against {with_spread(plain, 3)}",
                    bool(np.mean(replayed) > np.mean(plain)),
                    f"ahead with the same mazes in {sum(a > b for a, b in pairs)} of {len(pairs)} seeds",
                )
            )
    return targets


def summarized(runs: list[Run], made: Made) -> dict[str, Any]:
    """Everything that is reported of the runs that have been made, in the form of a file of results."""
    summary = of_methods(runs, made)
    return content_of(
        settings={"methods": METHODS, "runs": sum(run in made for run in runs)},
        results=summary,
        targets=targets_of(summary),
        about=together(made[run]["machine"] for run in runs if run in made),
    )
