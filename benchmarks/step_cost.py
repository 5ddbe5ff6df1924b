"""
What replay costs: seconds per optimizer step of ExGRPO beside TRL's GRPO, by phase, and peak memory.

    python -m benchmarks.step_cost --output benchmarks/results/step_cost.json
    python -m benchmarks.step_cost --short

All trainers live in one thread of one process and take their steps in turn, so that whatever slows the machine down
slows all of them down alike; the ratio of each turn is taken by itself. Every completion has the same length, and the
buffer holds the same number of stored completions for every question throughout. Peak memory is that of a process of
its own.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not __package__:  # run as a file: this folder would come first, and its profile.py would hide Python's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import tempfile
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.plots import draw_step_cost
from benchmarks.report import Target, machine, middle, show, show_targets, with_spread, write
from benchmarks.steps import GROUP_SIZE, PHASES, Method, Size, make_trainer, steps_in_turn

Steps = dict[str, list[dict[str, float]]]  # seconds by phase of every step, by method

GRPO = Method()
FRACTIONS = [GRPO, *(Method(fraction, 4) for fraction in (0.0, 0.25, 0.5, 0.75))]
CANDIDATES = [GRPO, *(Method(0.5, candidates) for candidates in (1, 2, 4, 8))]
TINY, TINY_128, TINY_384 = (Size("tiny", num_questions=8, length=length) for length in (32, 128, 384))
SMOLLM2, SMOLLM2_64 = (Size("SmolLM2-135M", num_questions=4, length=length) for length in (16, 64))
# Size, methods that take turns, steps of each that count.
FULL = [
    (TINY, FRACTIONS, 40), (TINY, CANDIDATES, 40), (TINY_128, CANDIDATES, 20), (TINY_384, CANDIDATES, 10),
    (SMOLLM2, FRACTIONS, 5), (SMOLLM2, CANDIDATES, 10), (SMOLLM2_64, CANDIDATES, 5),
]  # fmt: skip
SHORT = [
    (TINY, FRACTIONS, 8), (TINY, CANDIDATES, 8), (TINY_128, [GRPO, Method(0.5, 1), Method(0.5, 4)], 4),
    (SMOLLM2, [GRPO, Method(0.5, 1), Method(0.5, 4)], 3),
]  # fmt: skip
WARM_UP = 1
STEP_AIM, MEMORY_AIM = 1.00, 1.02


def peak_memory(size: Size, method: Method, steps: int) -> float:
    """GiB of resident memory at the most, of a process that takes a few steps. Call it in a process of its own."""
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(size, method, steps, folder).train()
    # Not `ru_maxrss`: it begins with the memory of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def measure_memory(size: Size, methods: list[Method], repetitions: int) -> dict[str, list[float]]:
    """Peak memory by method, in turn."""
    peaks: dict[str, list[float]] = {str(method): [] for method in methods}
    for _ in range(repetitions):
        for method in methods:
            peaks[str(method)].append(in_a_fresh_process(peak_memory, size, method, 2))
    return peaks


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
    scored = method.num_replayed(size) * method.candidates
    return float(np.median(generation)) / (size.num_questions * GROUP_SIZE), float(np.median(scoring)) / scored


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
    saved = method.num_replayed(size)
    total = np.median([step["total"] for steps in measured for step in steps[str(GRPO)]])

    def more(*phases: str) -> float:
        """Share of a step that phases take more, turn by turn."""
        differences = [
            sum(seconds_of(steps, str(method), phase) - seconds_of(steps, str(GRPO), phase) for phase in phases)
            for steps in measured
        ]
        return float(np.median(np.concatenate(differences)) / total)

    return (
        (f"{saved * method.candidates} scored at {scored:.3g} ms" if method.candidates > 1 else "nothing scored")
        + f", {saved} not generated at {generated:.3g} ms; bookkeeping {more('collection', 'selection', 'rest'):+.1%},"
        f" loss and optimizer {more('loss', 'optimizer'):+.1%} of a step"
    )


def targets_of(results: list[dict[str, Any]]) -> list[Target]:
    """The aims for replaying half of the questions. Several measurements of one method count together."""
    targets = []
    for size, all_measured in by_size(results).items():
        for method in CANDIDATES[1:]:
            measured = [steps for steps in all_measured if str(method) in steps]
            if not measured:
                continue
            ratio = np.concatenate([ratios(steps, str(method)) for steps in measured])
            targets.append(
                Target(
                    f"step, {size.model}, {size.length} tokens, half replayed, {method.candidates} stored of each",
                    f"at most {STEP_AIM:.2f} of GRPO", middle(ratio, 3), bool(np.median(ratio) <= STEP_AIM),
                    cause_of(size, method, measured),
                )
            )  # fmt: skip
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="fewer steps: some five minutes instead of three quarters of an hour"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/step_cost.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()

    results: list[dict[str, Any]] = []
    for size, methods, num_steps in SHORT if arguments.short else FULL:
        with tempfile.TemporaryDirectory() as folder:
            steps = steps_in_turn(size, methods, num_steps, WARM_UP, folder)
        batch = f"{size.num_questions} questions of 8 completions of {size.length} tokens"
        show(f"{size.model}: {batch}, {num_steps} steps; milliseconds by phase", COLUMNS, table_rows(steps))
        results.append({"size": vars(size), "steps": steps})
    for size in (TINY, SMOLLM2):
        repetitions = 1 if arguments.short else 2
        memory = measure_memory(size, [GRPO, Method(0.5, 8)], repetitions)
        results.append({"size": vars(size), "peak_memory_gib": memory})
    show("What a completion costs, half replayed, 8 stored of each", PRICE_COLUMNS, price_rows(results))
    targets = targets_of(results)
    show_targets(targets)
    write(arguments.output, settings={"short": arguments.short, "warm_up": WARM_UP}, results=results, targets=targets)
    draw_step_cost(results, arguments.output.with_suffix(".png"))
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, trl {about['trl']}")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
