"""Numbers of the step cost: ratios to GRPO, tables and targets."""

from typing import Any

import numpy as np

from benchmarks.report import Target, middle, with_spread
from benchmarks.step_cost.steps import GROUP_SIZE, PHASES, Method, Size

Steps = dict[str, list[dict[str, float]]]  # seconds by phase of every step, by method

GRPO = Method()
CANDIDATES = [GRPO, *(Method(0.5, candidates) for candidates in (1, 2, 4, 8))]
SAVING = [
    GRPO,
    *(Method(0.5, candidates, "last_known") for candidates in (1, 2, 4, 8)),
    Method(0.5, 8, "last_known", per_group=2),
    Method(0.5, 8, "last_known", per_group=4),
    Method(0.5, way="group"),
]
FEWER = [
    GRPO,
    *(method for method in SAVING if method.candidates == 4 or method.per_group == 4 or method.way == "group"),
]
LOGGED, NOT_LOGGED = Method(0.5, 4), Method(0.5, 4, replay_log=False)
STEP_AIM, MEMORY_AIM, LOG_AIM = 1.00, 1.02, 1.005
# Of GRPO's step, where generation is more than half of it.
SEVERAL_AIM, GROUP_AIM = 0.90, 0.75
BOOKKEEPING_AIM = 1.0


def seconds_of(steps: Steps, name: str, phase: str) -> np.ndarray:
    """Seconds of a phase, step by step."""
    return np.array([step.get(phase, 0.0) for step in steps[name]])


def ratios(steps: Steps, name: str, *, same_loss: bool = False) -> np.ndarray:
    """
    Seconds of a method over those of GRPO, turn by turn.

    With `same_loss`, each is given GRPO's seconds for the loss: that is the same work for all, a large part of a step,
    and the phase that a shared machine disturbs most.
    """
    seconds, of_grpo = seconds_of(steps, name, "total"), seconds_of(steps, str(GRPO), "total")
    if same_loss:
        seconds = seconds - seconds_of(steps, name, "loss") + seconds_of(steps, str(GRPO), "loss")
    return seconds / of_grpo


COLUMNS = ["method", "seconds", "of GRPO", "with GRPO's loss", *PHASES]


def table_rows(steps: Steps) -> list[list[str]]:
    """A row per method: seconds, ratios to GRPO, milliseconds by phase."""
    rows = []
    for name in steps:
        seconds = f"{np.median(seconds_of(steps, name, 'total')):.3f}"
        by_phase = [f"{1000 * np.median(seconds_of(steps, name, phase)):.1f}" for phase in PHASES]
        of_grpo = [middle(ratios(steps, name, same_loss=same_loss), 3) for same_loss in (False, True)]
        rows.append([name, seconds, *of_grpo, *by_phase])
    return rows


def by_size(results: list[dict[str, Any]]) -> dict[Size, list[Steps]]:
    """The measurements of each size."""
    grouped: dict[Size, list[Steps]] = {}
    for result in results:
        if "steps" in result:
            grouped.setdefault(Size(**result["size"]), []).append(result["steps"])
    return grouped


def completion_seconds(size: Size, method: Method, measured: list[Steps]) -> tuple[float, float]:
    """Median seconds that GRPO takes to generate a completion, and a method with replay to score one."""
    generation = [step["generation"] for steps in measured for step in steps[str(GRPO)]]
    scoring = [step.get("scoring", 0.0) for steps in measured for step in steps.get(str(method), ())]
    scored = method.num_replayed(size) * method.candidates if method.way == "current" else 0
    return float(np.median(generation)) / (size.num_questions * GROUP_SIZE), (
        float(np.median(scoring)) / scored if scored and scoring else 0.0
    )


PRICE_COLUMNS = ["completions", "one generated, ms", "one scored, ms", "scored at the price of one generated"]


def price_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row per size: what a completion costs to generate and to score, with eight stored of each question."""
    method, rows = Method(0.5, 8), []
    for size, measured in by_size(results).items():
        if any(str(method) in steps for steps in measured):
            generated, scored = completion_seconds(size, method, measured)
            name = f"{size.model}, {size.length} tokens"
            rows.append([name, f"{1000 * generated:.2f}", f"{1000 * scored:.2f}", f"{generated / scored:.1f}"])
    return rows


def cause_of(size: Size, method: Method, measured: list[Steps]) -> str:
    """What is scored and what is not generated, and how the other phases differ from those of GRPO."""
    generated, scored = (1000 * seconds for seconds in completion_seconds(size, method, measured))
    saved = method.num_saved(size)
    total = np.median([step["total"] for steps in measured for step in steps[str(GRPO)]])

    def more(*phases: str) -> float:
        """Share of a step that phases take more, turn by turn."""
        differences = [
            sum(seconds_of(steps, str(method), phase) - seconds_of(steps, str(GRPO), phase) for phase in phases)
            for steps in measured
        ]
        return float(np.median(np.concatenate(differences)) / total)

    return (
        (f"{method.num_replayed(size) * method.candidates} scored at {scored:.3g} ms" if scored else "nothing scored")
        + f", {saved} not generated at {generated:.3g} ms; bookkeeping {more('collection', 'selection', 'rest'):+.1%},"
        f" loss and optimizer {more('loss', 'optimizer'):+.1%} of a step"
    )


def share_of_generation(measured: list[Steps]) -> float:
    """Generation's share of GRPO's step."""
    shares = [step["generation"] / step["total"] for steps in measured for step in steps[str(GRPO)]]
    return float(np.median(shares))


def aim_of(method: Method, share: float) -> float:
    """What a step may take, of GRPO's."""
    if share > 0.5 and method.way == "group":
        return GROUP_AIM
    return SEVERAL_AIM if share > 0.5 and method.per_group >= 4 else STEP_AIM


def bookkeeping_targets(results: list[dict[str, Any]]) -> list[Target]:
    """The aim for what replay does besides models and rewards, where the batch is smallest."""
    method = str(Method(0.5, 4, "last_known"))
    targets = []
    for size, measured in by_size(results).items():
        steps = [step for of_one in measured for step in of_one.get(method, ())]
        if size.model != "tiny" or size.length != 32 or not steps:
            continue
        seconds = np.array([step.get("selection", 0.0) + step.get("collection", 0.0) for step in steps])
        targets.append(
            Target(
                f"bookkeeping of a step, {size.num_questions * GROUP_SIZE} rows of {size.length} tokens, {method}",
                f"at most {BOOKKEEPING_AIM:g} ms", f"{middle(1000 * seconds, 2)} ms",
                bool(1000 * np.median(seconds) <= BOOKKEEPING_AIM),
                "drawing, placing, comparing rows token for token, recording and storing successes, metrics",
            )
        )  # fmt: skip
    return targets


def log_targets(results: list[dict[str, Any]]) -> list[Target]:
    """
    The aim for the log of replays: what the phases that write it take more than without it, turn by turn.

    Whole steps differ by some percent from turn to turn, whatever they log, and would hide half a percent.
    """
    targets = []
    for size, measured in by_size(results).items():
        measured = [steps for steps in measured if str(NOT_LOGGED) in steps]
        if not measured:
            continue

        def seconds(method: Method, *phases: str, measured: list[Steps] = measured) -> np.ndarray:
            of_all = [sum(seconds_of(steps, str(method), phase) for phase in phases) for steps in measured]
            return np.concatenate(of_all)

        writing = "selection", "collection"
        more = (seconds(LOGGED, *writing) - seconds(NOT_LOGGED, *writing)) / seconds(NOT_LOGGED, "total").mean()
        # Of the mean: every tenth second, a step writes the file.
        ratio, error = 1 + more.mean(), more.std() / np.sqrt(len(more))
        targets.append(
            Target(
                f"log of replays, {size.model}, {size.length} tokens, {LOGGED}",
                f"at most {LOG_AIM:.3f} of a step without", f"{ratio:.4f} ± {error:.4f}", bool(ratio <= LOG_AIM),
                "why each completion was chosen, and a file written again every ten seconds",
            )
        )  # fmt: skip
    return targets


def targets_of(results: list[dict[str, Any]]) -> list[Target]:
    """The aims for replaying half of the questions. Several measurements of one method count together."""
    targets = []
    for size, all_measured in by_size(results).items():
        for method in (*CANDIDATES[1:], *SAVING[1:]):
            measured = [steps for steps in all_measured if str(method) in steps]
            if not measured:
                continue
            ratio = np.concatenate([ratios(steps, str(method)) for steps in measured])
            share = share_of_generation(measured)
            aim = aim_of(method, share)
            # What a step would take if everything but generation cost the same.
            limit = 1 - method.num_saved(size) / (size.num_questions * GROUP_SIZE) * share
            targets.append(
                Target(
                    f"step, {size.model}, {size.length} tokens, {method}",
                    f"at most {aim:.2f} of GRPO", f"{middle(ratio, 3)} (limit {limit:.2f})",
                    bool(np.median(ratio) <= aim), cause_of(size, method, measured),
                )
            )  # fmt: skip
    targets += bookkeeping_targets(results) + log_targets(results)
    for result in results:
        if "peak_memory_gib" not in result:
            continue
        plain, replayed = result["peak_memory_gib"].values()
        ratio = np.array(replayed) / np.array(plain)
        cause = f"{np.mean(replayed) - np.mean(plain):+.3f} GiB" + (", measured once" if ratio.size == 1 else "")
        targets.append(
            Target(
                f"peak memory, {result['size']['model']}, half replayed, 8 stored of each question",
                f"at most {MEMORY_AIM:.2f} of GRPO", with_spread(ratio, 3),
                bool(ratio.mean() <= MEMORY_AIM), cause,
            )
        )  # fmt: skip
    return targets
