"""Numbers of the buffer's scale: tables and targets."""

from typing import Any

import numpy as np

from benchmarks.buffer_scale.measure import PER_QUESTION, SIZES
from benchmarks.report import Target, with_spread


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
