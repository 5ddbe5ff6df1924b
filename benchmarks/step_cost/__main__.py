"""
What replay costs: seconds per optimizer step of ExGRPO beside TRL's GRPO, by phase, and peak memory.

    python -m benchmarks.step_cost --output benchmarks/results/step_cost.json
    python -m benchmarks.step_cost --ways --output benchmarks/results/step_cost_ways.json
    python -m benchmarks.step_cost --log --output outputs/benchmarks/step_cost_log.json
    python -m benchmarks.step_cost --short

All trainers live in one thread of one process and take their steps in turn, so that whatever slows the machine down
slows all of them down alike; the ratio of each turn is taken by itself. Every completion has the same length, and the
buffer holds the same number of stored completions for every question throughout. Peak memory is that of a process of
its own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from benchmarks.report import machine, picture_of, show, show_targets, write
from benchmarks.step_cost.memory import measure_memory
from benchmarks.step_cost.picture import draw_step_cost
from benchmarks.step_cost.steps import Method, Size, steps_in_turn
from benchmarks.step_cost.summary import (
    CANDIDATES,
    COLUMNS,
    FEWER,
    GRPO,
    LOGGED,
    NOT_LOGGED,
    PRICE_COLUMNS,
    SAVING,
    price_rows,
    table_rows,
    targets_of,
)

FRACTIONS = [GRPO, *(Method(fraction, 4) for fraction in (0.0, 0.25, 0.5, 0.75))]
TINY, TINY_128, TINY_384 = (Size("tiny", num_questions=8, length=length) for length in (32, 128, 384))
SMOLLM2, SMOLLM2_64 = (Size("SmolLM2-135M", num_questions=4, length=length) for length in (16, 64))
# Size, methods that take turns, steps of each that count.
FULL = [
    (TINY, FRACTIONS, 40), (TINY, CANDIDATES, 40), (TINY_128, CANDIDATES, 20), (TINY_384, CANDIDATES, 10),
    (SMOLLM2, FRACTIONS, 5), (SMOLLM2, CANDIDATES, 10), (SMOLLM2_64, CANDIDATES, 5),
]  # fmt: skip
WAYS = [(TINY, SAVING, 12), (TINY_128, SAVING, 5), (TINY_384, FEWER, 5)]  # fmt: skip
LOG = [(TINY, [GRPO, LOGGED, NOT_LOGGED], 40)]
SHORT = [
    (TINY, FRACTIONS, 8), (TINY, CANDIDATES, 8), (TINY, SAVING, 8),
    (TINY_128, [GRPO, Method(0.5, 1), Method(0.5, 4)], 4),
    (SMOLLM2, [GRPO, Method(0.5, 1), Method(0.5, 4)], 3),
]  # fmt: skip
WARM_UP = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--short", action="store_true", help="fewer steps: some five minutes instead of three quarters of an hour"
    )
    parser.add_argument("--ways", action="store_true", help="the ways to save, in five minutes")
    parser.add_argument("--log", action="store_true", help="the log of replays, in two minutes")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/step_cost.json"))
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()

    results: list[dict[str, Any]] = []
    is_partial = arguments.ways or arguments.log
    for size, methods, num_steps in (
        LOG if arguments.log else WAYS if arguments.ways else SHORT if arguments.short else FULL
    ):
        with tempfile.TemporaryDirectory() as folder:
            steps = steps_in_turn(size, methods, num_steps, WARM_UP, folder)
        batch = f"{size.num_questions} questions of 8 completions of {size.length} tokens"
        show(f"{size.model}: {batch}, {num_steps} steps; milliseconds by phase", COLUMNS, table_rows(steps))
        results.append({"size": vars(size), "steps": steps})
    for size in () if is_partial else (TINY, SMOLLM2):
        repetitions = 1 if arguments.short else 2
        memory = measure_memory(size, [GRPO, Method(0.5, 8)], repetitions)
        results.append({"size": vars(size), "peak_memory_gib": memory})
    if not is_partial:
        show("What a completion costs, half replayed, 8 stored of each", PRICE_COLUMNS, price_rows(results))
    targets = targets_of(results)
    show_targets(targets)
    write(arguments.output, settings={"short": arguments.short, "warm_up": WARM_UP}, results=results, targets=targets)
    draw_step_cost(results, picture_of(arguments.output))
    about = machine()
    print(f"{about['processor']}, {about['threads']} threads, torch {about['torch']}, trl {about['trl']}")
    print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
