"""Measurements of one buffer of one size."""

import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.buffer_scale.buffers import BUFFERS, groups, remove, size_on_disk
from benchmarks.fresh_process import in_a_fresh_process

OURS = "exgrpo-trl"
SIZES = (10**4, 10**5, 10**6)
PER_QUESTION = 4  # the paper's buffer held 202,011 completions of at most 45,000 questions
DRAWN = 64
DRAWS = 200
COLD_DRAWS = 40
CACHE_MIB = 256  # more than any processor's cache
CHUNK = 100  # questions whose insertion is timed together; divides the number of questions


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
