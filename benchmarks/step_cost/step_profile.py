"""
Where the time of one step goes, so that the next optimisation is chosen by measurement.

    python -m benchmarks.step_cost.step_profile                                   # ExGRPO on a tiny model
    python -m benchmarks.step_cost.step_profile --model SmolLM2-135M --candidates 8
    python -m benchmarks.step_cost.step_profile --replay-fraction 0               # plain GRPO, to compare

Three tables: seconds by phase, torch's operators (torch.profiler), and the package's own functions (cProfile).
Profilers slow down what they watch, Python more than torch: trust the order, and `benchmarks.step_cost` for what a
step costs.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import cProfile
import pstats
import tempfile
from pathlib import Path

from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging as transformers_logging

import exgrpo_trl
from benchmarks.report import show
from benchmarks.step_cost.steps import PHASES, Method, Size, StepTimes, make_trainer, watch_phases

PACKAGE = str(Path(exgrpo_trl.__file__).parent)


def phase_rows(size: Size, method: Method, steps: int, folder: str) -> list[list[str]]:
    """Milliseconds of each phase, and its share of a step."""
    times = StepTimes()
    trainer = make_trainer(size, method, steps + 2, folder)
    watch_phases(trainer, times.stopwatch.watch)
    trainer.add_callback(times)
    trainer.train()
    measured = times.steps[2:]
    total = sum(step["total"] for step in measured)
    by_phase = {phase: sum(step.get(phase, 0.0) for step in measured) for phase in PHASES}
    return [
        [phase, f"{1000 * seconds / len(measured):.2f}", f"{seconds / total:.1%}"]
        for phase, seconds in sorted(by_phase.items(), key=lambda item: -item[1])
    ]


def operator_rows(size: Size, method: Method, steps: int, folder: str, most: int) -> list[list[str]]:
    """The operators of torch that take the most time by themselves."""
    trainer = make_trainer(size, method, steps, folder)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        trainer.train()
    averages = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    by_own_time = sorted(averages, key=lambda event: -event.self_cpu_time_total)
    return [
        [
            event.key,
            f"{event.count / steps:.0f}",
            f"{event.self_cpu_time_total / 1000 / steps:.2f}",
            f"{event.self_cpu_time_total / total:.1%}",
        ]
        for event in by_own_time[:most]
    ]


def function_rows(size: Size, method: Method, steps: int, folder: str, most: int) -> list[list[str]]:
    """The functions of the package that take the most time by themselves."""
    trainer = make_trainer(size, method, steps, folder)
    profiler = cProfile.Profile()
    profiler.runcall(trainer.train)
    stats = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    own = [
        (own_seconds, all_seconds, calls, f"{Path(file).name}:{line} {name}")
        for (file, line, name), (_, calls, own_seconds, all_seconds, _) in stats.items()
        if file.startswith(PACKAGE)
    ]
    return [
        [name, f"{calls / steps:.0f}", f"{1000 * own_seconds / steps:.3f}", f"{1000 * all_seconds / steps:.3f}"]
        for own_seconds, all_seconds, calls, name in sorted(own, reverse=True)[:most]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["tiny", "SmolLM2-135M"], default="tiny")
    parser.add_argument("--questions", type=int, default=8, help="of a batch, 8 completions each")
    parser.add_argument("--length", type=int, default=32, help="tokens of a completion")
    parser.add_argument("--replay-fraction", type=float, default=0.5, help="0 profiles plain GRPO")
    parser.add_argument("--candidates", type=int, default=4, help="stored completions of a question")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--most", type=int, default=20, help="rows of a table")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    size = Size(arguments.model, arguments.questions, arguments.length)
    method = Method(arguments.replay_fraction, arguments.candidates) if arguments.replay_fraction else Method()
    with tempfile.TemporaryDirectory() as folder:
        show(
            f"{method}, {size.model}: phases of a step",
            ["phase", "ms a step", "share"],
            phase_rows(size, method, arguments.steps, folder),
        )
        show(
            "Operators of torch",
            ["operator", "calls a step", "own ms a step", "share"],
            operator_rows(size, method, arguments.steps, folder, arguments.most),
        )
        functions = function_rows(size, method, arguments.steps, folder, arguments.most)
        if functions:
            columns = ["function", "calls a step", "own ms a step", "ms a step"]
            show("Functions of exgrpo_trl, Python's overhead included", columns, functions)


if __name__ == "__main__":
    main()
