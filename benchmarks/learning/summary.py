"""Numbers of the learning benchmark, from its runs: series, finals, tables and targets."""

from typing import Any

import numpy as np

from benchmarks.learning.records import Made
from benchmarks.learning.run import EQUAL_TIME_STEPS, EXTENDED_STEPS, ROWS, SETTINGS, Run
from benchmarks.report import Target, content_of, together, with_spread

COMPARED = ("grpo", "shaped", "balanced")
# Where replay is to be ahead of GRPO in every seed, not only on average.
TO_BE_APART = ("bimodal", "even-0.5", "even-0.9", "even-0.97")

Series = dict[str, np.ndarray]
Results = list[dict[str, Any]]
Groups = dict[str, dict[str, Results]]


def grouped(runs: list[Run], made: Made) -> tuple[Groups, dict[str, Results], Results]:
    """
    The runs that have been made.

    Args:
        runs: Of a setting and method, the ones with the tuned learning rate come first.
        made: What they have left.

    Returns:
        Compared runs by setting and method, ablated ones by method, and those of equal time. Methods with another
        learning rate than the tuned one have it in their name.
    """
    compared: Groups = {}
    ablated: dict[str, Results] = {}
    longer: Results = []
    tuned: dict[tuple[str, str], float] = {}
    for run in runs:
        learning_rate = tuned.setdefault((label(run), run.method), run.learning_rate)
        result = made.get(run)
        if result is None:
            continue
        if run.method not in COMPARED:
            ablated.setdefault(run.method, []).append(result)
        elif run.steps == EQUAL_TIME_STEPS:
            longer.append(result)
        else:
            method = run.method if run.learning_rate == learning_rate else f"{run.method} at {run.learning_rate:g}"
            compared.setdefault(label(run), {}).setdefault(method, []).append(result)
    return compared, ablated, longer


def label(run: Run) -> str:
    """Setting, warm-up unless it is the first, and steps where they are more than elsewhere."""
    warm_up = f", warm-up {run.warm_up + 1}" if run.warm_up else ""
    return run.setting + warm_up + (f", {run.steps} steps" if run.steps == EXTENDED_STEPS else "")


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


def final(results: Results, name: str = "pass_at_1") -> np.ndarray:
    """The last point of every run."""
    return np.array([series(result)[0][name][-1] for result in results])


def at_equal_time(longer: Results, seconds: float) -> np.ndarray:
    """Pass@1 of longer runs when they have trained for so many seconds; the last point where they end before."""
    curves = [series(result)[0] for result in longer]
    return np.array([np.interp(seconds, curve["seconds"], curve["pass_at_1"]) for curve in curves])


def of_compared(compared: Groups) -> dict[str, dict[str, dict[str, Any]]]:
    """Learning rate, seeds and the last point of each, by setting and method."""
    return {
        name: {
            method: {
                "learning_rate": results[0]["run"]["learning_rate"],
                "seeds": [result["run"]["seed"] for result in results],
                **{
                    quantity: final(results, quantity).round(5).tolist()
                    for quantity in ("pass_at_1", "pass_at_8", "tokens", "seconds")
                },
            }
            for method, results in by_method.items()
        }
        for name, by_method in compared.items()
    }


def of_ablated(compared: Groups, ablated: dict[str, Results], longer: Results) -> dict[str, list[float]]:
    """Final pass@1 on bimodal by method, for the seeds that all methods have."""
    of_three = {method: results[:3] for method, results in compared.get("bimodal", {}).items()}
    finals = {method: final(results) for method, results in (of_three | ablated).items()}
    if longer and "balanced" in of_three:
        seconds = float(final(of_three["balanced"], "seconds").mean())
        finals[f"grpo for {seconds:.0f} seconds, as balanced"] = at_equal_time(longer, seconds)
        finals["grpo, 450 steps"] = final(longer)
    return {method: values.round(5).tolist() for method, values in finals.items()}


def of_tuned(results: Results) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Final pass@1 of every tuning run, by setting, method and learning rate."""
    tuned: dict[str, dict[str, dict[str, list[float]]]] = {}

    def order(result: dict[str, Any]) -> tuple[Any, ...]:
        run = result["run"]
        return run["setting"], COMPARED.index(run["method"]), run["learning_rate"], run["seed"]

    for result in sorted(results, key=order):
        run = result["run"]
        rates = tuned.setdefault(run["setting"], {}).setdefault(run["method"], {})
        rates.setdefault(f"{run['learning_rate']:g}", []).append(float(final([result])[0]))
    return tuned


def comparison_rows(compared: dict[str, dict[str, dict[str, Any]]]) -> list[list[str]]:
    """A row per setting and method, of what `of_compared` gives."""
    return [
        [
            name, method, f"{numbers['learning_rate']:g}",
            with_spread(numbers["pass_at_1"], 3), " ".join(f"{value:.2f}" for value in sorted(numbers["pass_at_1"])),
            with_spread(numbers["pass_at_8"], 3), f"{np.mean(numbers['tokens']):,.0f}",
            with_spread(numbers["seconds"], 0),
        ]
        for name, by_method in compared.items()
        for method, numbers in by_method.items()
    ]  # fmt: skip


COMPARISON_COLUMNS = [
    "setting", "method", "learning rate", "pass@1", "seeds, sorted", "pass@8", "thousand tokens", "seconds",
]  # fmt: skip


def ablation_rows(ablated: dict[str, list[float]]) -> list[list[str]]:
    """A row per method, of what `of_ablated` gives."""
    return [
        [method, with_spread(values, 3), " ".join(f"{value:.2f}" for value in sorted(values))]
        for method, values in ablated.items()
    ]


ABLATION_COLUMNS = ["method", "pass@1", "seeds, sorted"]


def seed_by_seed(balanced: dict[str, Any], plain: dict[str, Any]) -> str:
    """How many seeds are ahead of GRPO on the same questions, and the two that decide whether all seeds are apart."""
    ahead, behind = (dict(zip(of["seeds"], of["pass_at_1"], strict=True)) for of in (balanced, plain))
    both = sorted(ahead.keys() & behind.keys())
    if not both:
        return "no seed of both methods"
    lowest, highest = min(both, key=lambda seed: ahead[seed]), max(both, key=lambda seed: behind[seed])
    num_ahead = sum(ahead[seed] > behind[seed] for seed in both)
    return (
        f"ahead on the same questions in {num_ahead} of {len(both)} seeds; lowest {ahead[lowest]:.2f}, where GRPO has "
        f"{behind[lowest]:.2f}; highest of GRPO {behind[highest]:.2f}, where balanced has {ahead[highest]:.2f}"
    )


def targets_of(compared: dict[str, dict[str, dict[str, Any]]]) -> list[Target]:
    """Balanced weighting against GRPO, of what `of_compared` gives."""
    targets = []
    for name, by_method in compared.items():
        if not {"grpo", "balanced"} <= by_method.keys():
            continue
        plain, balanced = (np.array(by_method[method]["pass_at_1"]) for method in ("grpo", "balanced"))
        to_be_apart = name.split(",")[0] in TO_BE_APART
        is_met = bool(balanced.min() > plain.max()) if to_be_apart else bool(balanced.mean() > plain.mean())
        targets.append(
            Target(
                f"pass@1, {name}",
                "balanced above GRPO" + (" in all seeds" if to_be_apart and len(plain) > 1 else ""),
                f"{with_spread(balanced, 3)} against {with_spread(plain, 3)}",
                is_met,
                seed_by_seed(by_method["balanced"], by_method["grpo"]),
            )
        )
    return targets


def summarized(runs: list[Run], tuning_runs: list[Run], made: Made) -> dict[str, Any]:
    """
    Everything that is reported of the runs that have been made, in the form of a file of results.

    Args:
        runs: Runs to report.
        tuning_runs: Runs that chose the learning rates.
        made: What they have left.
    """
    compared, ablated, longer = grouped(runs, made)
    tuned = [made[run] for run in tuning_runs if run in made]
    # The runs may have been made on several machines, and none of them on the one that reports them.
    by_part = {
        "tuned": tuned,
        "compared": [result for of in compared.values() for results in of.values() for result in results],
        "ablated": [result for results in ablated.values() for result in results] + longer,
    }
    summary = {
        "tuned": of_tuned(tuned),
        "compared": of_compared(compared),
        "ablated": of_ablated(compared, ablated, longer) if ablated else {},
        "machines": {part: together(result["machine"] for result in results) for part, results in by_part.items()},
    }
    return content_of(
        settings={"settings": SETTINGS, "runs": sum(run in made for run in runs)},
        results=summary,
        targets=targets_of(summary["compared"]),
        about=together(result["machine"] for results in by_part.values() for result in results),
    )
