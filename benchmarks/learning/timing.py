"""
Seconds of a step by method on hidden operations: all trainers in one thread, one step of each in turn.

    python -m benchmarks.learning.timing --output benchmarks/results/learning_seconds.json

The runs of the learning benchmark are made one after the other, on machines that have other things to do meanwhile;
here, whatever slows one method down slows all of them down.
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

from benchmarks.learning.run import SAVING, Run, make_trainer, questions_of
from benchmarks.report import middle, show, write
from benchmarks.step_cost.steps import StepTimes, take_turns

METHODS = ("grpo", "shaped", "balanced", *SAVING)
WARM_UP, STEPS = 20, 60  # the first fill the buffer


def seconds_in_turn(methods: tuple[str, ...], warm_up: int, steps: int) -> dict[str, list[float]]:
    """Seconds of every step that counts, by method."""

    def train(method: str, pause: Callable[[], Any]) -> list[float]:
        run = Run("bimodal", method, 3e-4, 0, steps=warm_up + steps)
        times = StepTimes(pause)
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(run, folder, [times], questions_of(run)[0]).train()
        return [step["total"] for step in times.steps[warm_up:]]

    return take_turns(train, methods, warm_up + steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/learning_seconds.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    seconds = seconds_in_turn(METHODS, WARM_UP, STEPS)
    rows = [
        [method, f"{np.median(of_method):.3f}", middle(np.array(of_method) / np.array(seconds["grpo"]), 3)]
        for method, of_method in seconds.items()
    ]
    show("Seconds of a step on bimodal", ["method", "seconds", "of GRPO"], rows)
    write(arguments.output, settings={"warm_up": WARM_UP, "steps": STEPS}, results=[{"seconds": seconds}], targets=[])


if __name__ == "__main__":
    main()
