"""
How the buffer scales: insertion, draws, eviction, saving, loading and memory from 10^4 to 10^6 stored completions.

    python -m benchmarks.buffer_scale --output benchmarks/results/buffer_scale.json
    python -m benchmarks.buffer_scale --short

Beside it, what a straightforward implementation of the paper's description costs (lists in a dictionary, filtered when
something is asked of them), and torchrl's replay buffer where it can do the job. Every measurement has a process of
its own. Completions have 250 to 750 tokens; 10^6 of them take 4 GB of memory, and 6 GB with torchrl's padding.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from pathlib import Path

from benchmarks.buffer_scale.buffers import BUFFERS
from benchmarks.buffer_scale.measure import DRAWN, OURS, PER_QUESTION, SIZES, measured
from benchmarks.buffer_scale.picture import draw_buffer_scale
from benchmarks.buffer_scale.summary import COLUMNS, by_task, table_rows, targets_of
from benchmarks.report import machine, picture_of, show, show_targets, write

# Buffer, completions, completions of a question.
FULL = [(name, size, PER_QUESTION) for size in SIZES for name in BUFFERS] + [(OURS, 10**6, 1)]
SHORT = [(name, size, PER_QUESTION) for size in SIZES for name in BUFFERS if name == OURS or size == min(SIZES)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="once, and the others at 10^4 only")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/buffer_scale.json"))
    arguments = parser.parse_args()
    tasks = SHORT if arguments.short else FULL
    repetitions = 1 if arguments.short else arguments.repetitions
    results = [measured(task) for _ in range(repetitions) for task in tasks]

    show(f"{DRAWN} questions drawn, completions of 250 to 750 tokens", COLUMNS, table_rows(results))
    targets = targets_of({task[1:]: runs for task, runs in by_task(results).items() if task[0] == OURS})
    show_targets(targets)
    settings = {"short": arguments.short, "repetitions": repetitions, "questions_drawn": DRAWN}
    write(arguments.output, settings=settings, results=results, targets=targets)
    draw_buffer_scale(results, picture_of(arguments.output))
    about = machine()
    print(f"{about['processor']}, numpy {about['numpy']}, pyarrow {about['pyarrow']}, written to {arguments.output}")


if __name__ == "__main__":
    main()
