"""
What replay costs: seconds per optimizer step of ExGRPO beside TRL's GRPO, by phase, and peak memory.

    python -m benchmarks.step_cost --output benchmarks/results/step_cost.json
    python -m benchmarks.step_cost --short

All trainers live in one process and take their steps in turn, so that whatever slows the machine down slows all of
them down alike; the ratio of each turn is taken by itself. Every completion has the same length, and the buffer holds
the same number of stored completions for every question throughout. Peak memory is that of a process of its own.
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
from benchmarks.steps import PHASES, Method, Size, make_trainer, steps_in_turn

GRPO = Method()
FRACTIONS = [GRPO, *(Method(fraction, 4) for fraction in (0.0, 0.25, 0.5, 0.75))]
CANDIDATES = [GRPO, *(Method(0.5, candidates) for candidates in (1, 2, 4, 8))]
TINY, SMOLLM2 = Size("tiny", num_questions=8, length=32), Size("SmolLM2-135M", num_questions=4, length=16)
# Size, methods that take turns, steps of each that count.
FULL = [(size, methods, steps) for size, steps in ((TINY, 40), (SMOLLM2, 6)) for methods in (FRACTIONS, CANDIDATES)]
SHORT = [(TINY, FRACTIONS, 8), (TINY, CANDIDATES, 8), (SMOLLM2, [GRPO, Method(0.5, 1), Method(0.5, 4)], 2)]
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


def seconds_of(steps: dict[str, list[dict[str, float]]], name: str, phase: str) -> np.ndarray:
    """Seconds of a phase, step by step."""
    return np.array([step.get(phase, 0.0) for step in steps[name]])


def ratios(steps: dict[str, list[dict[str, float]]], name: str) -> np.ndarray:
    """Seconds of a method over those of GRPO, turn by turn."""
    return seconds_of(steps, name, "total") / seconds_of(steps, str(GRPO), "total")


def difference(steps: dict[str, list[dict[str, float]]], name: str, phase: str) -> np.ndarray:
    """Seconds that a phase takes more than with GRPO, turn by turn."""
    return seconds_of(steps, name, phase) - seconds_of(steps, str(GRPO), phase)


COLUMNS = ["method", "seconds", "of GRPO", *PHASES]


def table_rows(steps: dict[str, list[dict[str, float]]]) -> list[list[str]]:
    """A row per method: seconds, ratio to GRPO, milliseconds by phase."""
    rows = []
    for name in steps:
        seconds = f"{np.median(seconds_of(steps, name, 'total')):.3f}"
        by_phase = [f"{1000 * np.median(seconds_of(steps, name, phase)):.1f}" for phase in PHASES]
        rows.append([name, seconds, middle(ratios(steps, name), 3), *by_phase])
    return rows


def targets_of(results: list[dict[str, Any]]) -> list[Target]:
    """The aims for replaying half of the questions. Several measurements of one method count together."""
    together: dict[tuple[str, str], list[dict[str, list[dict[str, float]]]]] = {}
    for result in results:
        for name in result.get("steps", ()):
            together.setdefault((result["size"]["model"], name), []).append(result["steps"])
    targets = []
    for model, candidates in ((size.model, candidates) for size in (TINY, SMOLLM2) for candidates in (1, 2, 4, 8)):
        name = str(Method(0.5, candidates))
        measured = together.get((model, name), [])
        if not measured:
            continue
        ratio = np.concatenate([ratios(steps, name) for steps in measured])
        step_seconds = np.median([step["total"] for steps in measured for step in steps[str(GRPO)]])
        more = {
            phase: np.median(np.concatenate([difference(steps, name, phase) for steps in measured])) / step_seconds
            for phase in PHASES
        }
        largest = sorted(more.items(), key=lambda item: -abs(item[1]))[:3]
        cause = ", ".join(f"{phase} {share:+.1%} of a step" for phase, share in largest)
        targets.append(
            Target(
                f"step, {model}, half replayed, {candidates} stored of each question",
                f"at most {STEP_AIM:.2f} of GRPO", middle(ratio, 3), bool(np.median(ratio) <= STEP_AIM),
                cause,
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
        "--short", action="store_true", help="fewer steps: some seven minutes instead of three quarters of an hour"
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
    targets = targets_of(results)
    show_targets(targets)
    write(arguments.output, settings={"short": arguments.short, "warm_up": WARM_UP}, results=results, targets=targets)
    draw_step_cost(results, arguments.output.with_suffix(".png"))
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, trl {about['trl']}")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
