"""
How the buffer scales: insertion, draws, eviction, saving, loading and memory from 10^4 to 10^6 stored completions.

    python -m benchmarks.buffer_scale --output benchmarks/results/buffer_scale.json
    python -m benchmarks.buffer_scale --short

Beside it, what a straightforward implementation of the paper's description costs (lists in a dictionary, filtered when
something is asked of them), and torchrl's replay buffer where it can do the job. Every measurement has a process of
its own. Completions have 250 to 750 tokens; 10^6 of them take 4 GB of memory, and 6 GB with torchrl's padding.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
if not __package__:  # run as a file: this folder would come first, and its profile.py would hide Python's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.buffers import BUFFERS, groups, remove, size_on_disk
from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.plots import draw_buffer_scale
from benchmarks.report import Target, machine, show, show_targets, with_spread, write

OURS = "exgrpo-trl"
SIZES = (10**4, 10**5, 10**6)
PER_QUESTION = 4  # the paper's buffer held 202,011 completions of at most 45,000 questions
DRAWN = 64
DRAWS = 200
COLD_DRAWS = 40
CACHE_MIB = 256  # more than any processor's cache
CHUNK = 100  # questions whose insertion is timed together; divides the number of questions
# Buffer, completions, completions of a question.
FULL = [(name, size, PER_QUESTION) for size in SIZES for name in BUFFERS] + [(OURS, 10**6, 1)]
SHORT = [(name, size, PER_QUESTION) for size in SIZES for name in BUFFERS if name == OURS or size == min(SIZES)]


def seconds(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, size: int, per_question: int, folder: str) -> dict[str, Any]:
    """Everything about one buffer of one size. Call it in a process of its own."""
    num_questions = size // per_question
    buffer = BUFFERS[name](size + (DRAWS + 1) * per_question)
    buffer.insert(next(iter(groups(per_question, per_question, num_questions + DRAWS))))  # imports, allocations
    before, num_tokens, inserts = resident(), 0, []
    for start in range(0, num_questions, CHUNK):
        chunk = list(groups(CHUNK * per_question, per_question, start))
        num_tokens += sum(len(tokens) for group in chunk for tokens in group.tokens)
        inserts.append(seconds(lambda chunk=chunk: [buffer.insert(group) for group in chunk]))  # type: ignore[misc]
        del chunk
    memory = resident() - before

    draws: list[float] = []
    begin = time.perf_counter()
    for group in groups(DRAWS * per_question, per_question, num_questions):
        buffer.insert(group)  # as in training, where a draw never finds the buffer as the last one left it
        draws.append(seconds(lambda: buffer.draw(DRAWN)))
        if len(draws) >= 10 and time.perf_counter() - begin > 10:
            break

    cold_draws = []
    if name == OURS:
        others = np.ones(CACHE_MIB * 2**17)
        for _ in range(COLD_DRAWS):
            others += 1  # leaves nothing of the buffer in the caches
            cold_draws.append(seconds(lambda: buffer.draw(DRAWN)))
        del others

    path = Path(folder, "buffer")
    saving = seconds(lambda: buffer.save(path))
    loading = seconds(lambda: buffer.load(path))
    result: dict[str, Any] = {
        "buffer": name,
        "completions": size,
        "completions_per_question": per_question,
        "tokens": num_tokens,
        # At that size: of the last ones that were inserted.
        "insert_microseconds": [1e6 * s / (CHUNK * per_question) for s in inserts[-20:]],
        "draw_milliseconds": [1e3 * s for s in draws],
        "cold_draw_milliseconds": [1e3 * s for s in cold_draws],
        "bytes_per_completion": memory / size,
        "overhead_bytes_per_completion": (memory - 8 * num_tokens) / size,
        "save_seconds": saving,
        "load_seconds": loading,
        "bytes_on_disk": size_on_disk(path),
    }
    if name == OURS:
        result |= file_speed(path)
    remove(path)
    versions = num_questions // 128
    try:
        begin = time.perf_counter()
        evicted = buffer.evict_older_than(max(versions // 100, 1))
        result["evict_microseconds"] = 1e6 * (time.perf_counter() - begin) / evicted
    except NotImplementedError:
        result["evict_microseconds"] = None
    return result


def file_speed(path: Path) -> dict[str, float]:
    """Seconds that pyarrow alone takes for the same completions in the same format, and the disk for the bytes."""
    file, other = path / "completions.parquet", path.with_suffix(".other")
    reading = time.perf_counter()
    table = pq.read_table(file, use_threads=False)
    reading = time.perf_counter() - reading
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    encoding = {"behavior_per_token_logps.list.element": "BYTE_STREAM_SPLIT"}
    writing = seconds(lambda: pq.write_table(table, other, column_encoding=encoding, row_group_size=4096, **options))
    content = file.read_bytes()

    def write_bytes() -> None:
        with open(other, "wb") as raw:
            raw.write(content)
            os.fsync(raw.fileno())

    disk = seconds(write_bytes)
    other.unlink()
    return {"parquet_write_seconds": writing, "parquet_read_seconds": reading, "disk_write_seconds": disk}


def measured(task: tuple[str, int, int]) -> dict[str, Any]:
    """Measure in a fresh process, and print a line."""
    with tempfile.TemporaryDirectory() as folder:
        result = in_a_fresh_process(measure, *task, folder)
    print(
        f"{task}: insert {np.median(result['insert_microseconds']):.1f} us, draw "
        f"{np.median(result['draw_milliseconds']):.2f} ms, save {result['save_seconds']:.1f} s, load "
        f"{result['load_seconds']:.1f} s, {result['overhead_bytes_per_completion']:.0f} bytes besides tokens",
        flush=True,
    )
    return result


def pooled(results: list[dict[str, Any]], name: str) -> np.ndarray:
    """One number of each repetition; the median where a repetition has several, as machines are interrupted."""
    return np.array([np.median(result[name]) for result in results], dtype=float)


def by_task(results: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """The repetitions of every measurement."""
    grouped: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for result in results:
        task = (result["buffer"], result["completions"], result["completions_per_question"])
        grouped.setdefault(task, []).append(result)
    return grouped


COLUMNS = [
    "buffer", "completions", "of a question", "insert, µs", "draw, ms", "evict, µs", "save, s", "load, s",
    "bytes each", "besides tokens",
]  # fmt: skip


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """A row per measurement."""
    return [
        [
            name, f"{size:,}", str(per_question),
            with_spread(pooled(runs, "insert_microseconds"), 1), with_spread(pooled(runs, "draw_milliseconds"), 3),
            "-" if runs[0]["evict_microseconds"] is None else with_spread(pooled(runs, "evict_microseconds"), 1),
            with_spread(pooled(runs, "save_seconds"), 1), with_spread(pooled(runs, "load_seconds"), 1),
            with_spread(pooled(runs, "bytes_per_completion"), 0),
            with_spread(pooled(runs, "overhead_bytes_per_completion"), 0),
        ]
        for (name, size, per_question), runs in by_task(results).items()
    ]  # fmt: skip


def targets_of(of_ours: dict[tuple[int, int], list[dict[str, Any]]]) -> list[Target]:
    """What was aimed at, at the largest size."""
    largest, smallest = of_ours[max(SIZES), PER_QUESTION], of_ours[min(SIZES), PER_QUESTION]
    insert, draw = pooled(largest, "insert_microseconds"), pooled(largest, "draw_milliseconds")
    flat = draw.mean() / pooled(smallest, "draw_milliseconds").mean()
    cold = [pooled(runs, "cold_draw_milliseconds").mean() for runs in (smallest, largest)]
    slower = f"memory in no cache: with cold caches {cold[0]:.2f} ms at 10^4 and {cold[1]:.2f} ms at 10^6"
    low, high = np.quantile([value for run in largest for value in run["insert_microseconds"]], [0.1, 0.9])
    targets = [
        Target(
            "insert at 10^6 completions", "at most 20 µs", f"{with_spread(insert, 1)} µs", insert.mean() <= 20,
            f"{low:.0f} to {high:.0f} µs within a run, as the machine's speed changes",
        ),
        Target("draw of 64 questions at 10^6", "at most 1 ms", f"{with_spread(draw)} ms", draw.mean() <= 1, slower),
        Target("draw at 10^6 over draw at 10^4", "flat: at most 2", f"{flat:.2f}", flat <= 2, slower),
    ]  # fmt: skip
    besides = {task: pooled(runs, "overhead_bytes_per_completion") for task, runs in of_ours.items()}
    cause = "the objects of completions and questions"
    if (max(SIZES), 1) in besides:
        # Both measurements together tell what a question takes, however many completions it has.
        more = besides[max(SIZES), 1].mean() - besides[max(SIZES), PER_QUESTION].mean()
        cause = f"each question takes {more / (1 - 1 / PER_QUESTION):.0f} bytes, its row of the dataset included"
    for (size, per_question), overhead in besides.items():
        if size != max(SIZES):
            continue
        allowed = np.array([0.5 * r["tokens"] / r["completions"] + 200 for r in of_ours[size, per_question]])
        targets.append(
            Target(
                f"memory besides 8 bytes per token, 10^6 completions, {per_question} of each question",
                f"at most {allowed.mean():.0f} bytes each (0.5 per token and 200)",
                f"{with_spread(overhead, 0)} bytes",
                bool((overhead <= allowed).all()),
                cause,
            )
        )
    for what in ("save", "load"):
        alone = pooled(largest, f"parquet_{'write' if what == 'save' else 'read'}_seconds")
        ratio = pooled(largest, f"{what}_seconds") / alone
        targets.append(
            Target(
                f"{what} of 10^6 completions",
                "at the speed of Parquet: at most 2 times pyarrow alone",
                f"{with_spread(pooled(largest, f'{what}_seconds'), 1)} s, {with_spread(ratio)} times",
                bool(ratio.mean() <= 2),
                f"pyarrow takes {with_spread(alone, 1)} s, the rest makes and validates objects",
            )
        )
    return targets


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
    draw_buffer_scale(results, arguments.output.with_suffix(".png"))
    about = machine()
    print(f"{about['processor']}, numpy {about['numpy']}, pyarrow {about['pyarrow']}, written to {arguments.output}")


if __name__ == "__main__":
    main()
