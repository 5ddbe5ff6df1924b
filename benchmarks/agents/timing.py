"""
Seconds of the agents benchmark by method: whole runs in one thread, one step of each in turn.

    python -m benchmarks.agents.timing --output benchmarks/results/agents_seconds.json

The runs of the benchmark are made on machines that have other things to do meanwhile; here, whatever slows one method
down slows all of them down. Held-out mazes are not played.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging as transformers_logging

from benchmarks.agents.run import METHODS, STEPS, Run, imitation_folder, make_trainer
from benchmarks.report import middle, show, write
from benchmarks.step_cost.steps import StepTimes, take_turns
from examples.train_agent import DEFAULTS

LEARNING_RATE = DEFAULTS["learning_rate"]  # as all recorded runs


def seconds_in_turn(seed: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every step by method."""
    imitation_folder(seed)

    def train(method: str, pause: Callable[[], Any]) -> list[float]:
        times = StepTimes(pause)
        with tempfile.TemporaryDirectory() as folder:
            run = Run(method, LEARNING_RATE, seed, steps)
            make_trainer(run, folder, [times], eval_strategy="no", eval_on_start=False).train()
        return [step["total"] for step in times.steps]

    return take_turns(train, tuple(METHODS), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/agents_seconds.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    seconds = [seconds_in_turn(seed, arguments.steps) for seed in range(arguments.seeds)]
    for seed, of_seed in enumerate(seconds):
        grpo = np.array(of_seed["grpo"])
        rows = [
            [method, f"{sum(of_one):.1f}", f"{sum(of_one) / grpo.sum():.3f}", middle(np.array(of_one) / grpo, 3)]
            for method, of_one in of_seed.items()
        ]
        columns = ["method", f"seconds of {arguments.steps} steps", "of GRPO's", "a step of GRPO's"]
        show(f"Mazes, seed {seed}", columns, rows)
    write(
        arguments.output,
        settings={"steps": arguments.steps, "seeds": arguments.seeds, "learning_rate": LEARNING_RATE},
        results=[{"seed": seed, "seconds": of_seed} for seed, of_seed in enumerate(seconds)],
        targets=[],
    )


if __name__ == "__main__":
    main()
