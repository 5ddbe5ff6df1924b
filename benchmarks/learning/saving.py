"""What ways to save have saved: tokens and seconds until a method is where GRPO ends."""

from typing import Any

import numpy as np

from benchmarks.learning.records import Made
from benchmarks.learning.run import SAVING, STEPS, Run
from benchmarks.learning.summary import final, series
from benchmarks.report import with_spread

COLUMNS = [
    "setting", "method", "seeds", "pass@1", "thousand tokens", "of GRPO's", "to GRPO's pass@1: seeds",
    "thousand tokens", "of GRPO's", "of GRPO's seconds",
]  # fmt: skip


def saving_rows(made: Made, runs: list[Run], seconds: dict[str, list[float]]) -> list[list[str]]:
    """
    A row per setting and method, for the seeds that have been made.

    Args:
        made: The runs that have been made.
        runs: Runs to report, with those of the methods without a way to save.
        seconds: Seconds of a step by method, measured in turn.
    """
    rows = []
    for setting in ("bimodal", "even-0.9"):
        by_rate: dict[str, dict[float, list[dict[str, Any]]]] = {}
        for run in dict.fromkeys(runs):
            is_plain = run.warm_up == 0 and run.steps == STEPS and run.setting == setting
            if run in made and is_plain and run.method in ("grpo", "shaped", "balanced", *SAVING):
                by_rate.setdefault(run.method, {}).setdefault(run.learning_rate, []).append(made[run])
        # Of several learning rates, the better one.
        by_method = {
            method: max(of.values(), key=lambda of_rate: final(of_rate).mean()) for method, of in by_rate.items()
        }
        if "grpo" not in by_method:
            continue
        aim = float(final(by_method["grpo"]).mean())
        all_tokens = float(final(by_method["grpo"], "tokens").mean())
        for method, results in by_method.items():
            tokens = final(results, "tokens")
            found = [(_first_step(result, aim), result) for result in results]
            reached = [steps for steps, _ in found if steps is not None]
            until = [np.interp(steps, *_tokens_by_step(result)) for steps, result in found if steps is not None]
            ratio = np.median(np.array(seconds[method]) / np.array(seconds["grpo"])) if method in seconds else np.nan
            has_most = len(reached) > len(results) / 2
            rows.append(
                [
                    setting, method, str(len(results)), with_spread(final(results), 3),
                    f"{tokens.mean():,.0f}", f"{tokens.mean() / all_tokens:.2f}",
                    f"{len(reached)} of {len(results)}",
                    f"{np.median(until):,.0f}" if has_most else "",
                    f"{np.median(until) / all_tokens:.2f}" if has_most else "",
                    f"{np.median(reached) / STEPS * ratio:.2f}" if has_most and np.isfinite(ratio) else "",
                ]
            )  # fmt: skip
    return rows


def _tokens_by_step(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    curve, _ = series(result)
    return curve["step"], curve["tokens"]


def _first_step(result: dict[str, Any], aim: float) -> float | None:
    """Where the curve of held-out pass@1 first reaches a value, between the points that were measured."""
    curve, _ = series(result)
    steps, values = curve["step"], curve["pass_at_1"]
    above = np.flatnonzero(values >= aim)
    if not len(above):
        return None
    after = int(above[0])
    if after == 0:
        return float(steps[0])
    share = (aim - values[after - 1]) / (values[after] - values[after - 1])
    return float(steps[after - 1] + share * (steps[after] - steps[after - 1]))
