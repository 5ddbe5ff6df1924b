"""Stored completions as Arrow tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..records import MAX_LOG_PROBABILITY, MIN_LOG_PROBABILITY, UNKNOWN_PROMPT, Experience
from ..rollout_details import RolloutDetails
from .detail_columns import DETAIL_SCHEMA, num_bytes, numbers_of, require, valid_in
from .reuse_columns import NO_REUSE

T = TypeVar("T")

EXPERIENCE_SCHEMA = pa.schema(
    [
        # Large lists: one row group stays small, but a whole table may hold more than 2^31 tokens.
        ("token_ids", pa.large_list(pa.int32())),
        ("behavior_per_token_logps", pa.large_list(pa.float32())),
        ("policy_version", pa.int64()),
        ("reward", pa.float64()),
        ("entropy", pa.float64()),
        ("prompt_hash", pa.int64()),
        ("is_scored", pa.bool_()),
    ]
)
# A number that completions of one group share; null where single completions are kept.
GROUP_SCHEMA = pa.schema([("group", pa.int64())])
# Columns that files of an earlier version lack, with what stands for them.
LATER_COLUMNS = {
    "prompt_hash": UNKNOWN_PROMPT,
    **dict.fromkeys(DETAIL_SCHEMA.names),
    **NO_REUSE,
    "group": None,
    "is_scored": False,
}
QUESTION_SCHEMA = pa.schema([("question_id", pa.string()), ("example", pa.large_string()), ("bucket", pa.int32())])

# Bounds of one batch, so that memory use while saving and loading does not grow with the buffer.
BYTES_PER_BATCH = 2**24
ROWS_PER_BATCH = 2**14


def bounded(rows: Iterable[T], bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Split rows so that no batch holds much more than `BYTES_PER_BATCH` or `ROWS_PER_BATCH`."""
    batch: list[T] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += bytes_of(row)
        if size >= BYTES_PER_BATCH or len(batch) >= ROWS_PER_BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def bytes_of(experience: Experience) -> int:
    """About how many bytes a completion takes in a table; images count as their digests."""
    return 8 * experience.num_tokens + num_bytes(experience.details)


def experiences_to_arrays(experiences: Sequence[Experience]) -> list[pa.Array]:
    """Columns of `EXPERIENCE_SCHEMA`, without a Python loop over tokens; details have columns of their own."""
    offsets = np.zeros(len(experiences) + 1, dtype=np.int64)
    np.cumsum([experience.num_tokens for experience in experiences], out=offsets[1:])

    def column(kind: pa.DataType, parts: Iterable[bytes]) -> pa.Array:
        values = pa.Array.from_buffers(kind, int(offsets[-1]), [None, pa.py_buffer(b"".join(parts))])
        return pa.LargeListArray.from_arrays(pa.array(offsets), values)

    return [
        column(pa.int32(), (experience.token_bytes for experience in experiences)),
        column(pa.float32(), (experience.logp_bytes for experience in experiences)),
        pa.array([experience.policy_version for experience in experiences], pa.int64()),
        pa.array([experience.reward for experience in experiences], pa.float64()),
        pa.array([experience.entropy for experience in experiences], pa.float64()),
        pa.array([experience.prompt_hash for experience in experiences], pa.int64()),
        pa.array([experience.is_scored for experience in experiences], pa.bool_()),
    ]


def group_numbers(first: int, num_rows: int, group_size: int | None) -> pa.Array:
    """Column of `GROUP_SCHEMA` for the rows from number `first` on, group after group; null without groups."""
    if group_size is None:
        return pa.nulls(num_rows, pa.int64())
    return pa.array(np.arange(first, first + num_rows) // group_size)


def experiences_from_table(
    table: pa.Table | pa.RecordBatch, details: Iterable[RolloutDetails | None]
) -> list[Experience]:
    """
    Experiences of a table with the columns of `EXPERIENCE_SCHEMA`; the inverse of [`experiences_to_arrays`].

    Args:
        table (`pyarrow.Table` or `pyarrow.RecordBatch`):
            A completion in every row.
        details (`Iterable[RolloutDetails]`):
            Details of each, `None` where it has none.

    Raises:
        ValueError: if a value is null or out of range, or tokens and log-probabilities differ in number.
    """
    token_offsets, tokens = _lists(table, "token_ids")
    logp_offsets, logps = _lists(table, "behavior_per_token_logps")
    versions, rewards, entropies = (_numbers(table, name) for name in ("policy_version", "reward", "entropy"))
    hashes = _numbers(table, "prompt_hash")
    lengths = np.diff(token_offsets)
    require(np.array_equal(lengths, np.diff(logp_offsets)), "completions have as many log-probabilities as tokens")
    require(bool((lengths > 0).all()), "every completion has a token")
    require(bool((tokens >= 0).all()), "token ids are not negative")
    require(
        bool(((logps >= MIN_LOG_PROBABILITY) & (logps <= MAX_LOG_PROBABILITY)).all()),
        "log-probabilities are finite and at most 0",
    )
    require(bool((versions >= 0).all()), "policy versions are not negative")
    require(bool(np.isfinite(rewards).all()), "rewards are finite")
    require(not np.isinf(entropies).any(), "entropies are finite or NaN")
    # Views: a copy of a whole row group costs as much as all the parts that are taken of it.
    token_bytes, logp_bytes = tokens.view(np.uint8).data, logps.view(np.uint8).data
    bounds = (4 * token_offsets).tolist()
    # One int object per version and per prompt, not one per completion.
    shared: dict[int, int] = {}
    shared_version, shared_hash = (
        [shared.setdefault(number, number) for number in numbers.tolist()] for numbers in (versions, hashes)
    )
    is_scored = table.column("is_scored")
    require(not is_scored.null_count, "`is_scored` is never null")
    columns = (shared_version, rewards.tolist(), entropies.tolist(), shared_hash, details, is_scored.to_pylist())
    return [
        Experience(bytes(token_bytes[start:end]), bytes(logp_bytes[start:end]), *of_row)
        for start, end, *of_row in zip(bounds, bounds[1:], *columns, strict=False)
    ]


def row_groups(file: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    """
    Row groups of a Parquet file whose layout was checked, see [`layout_of`].

    The next one is read while its user is busy with this one.

    Raises:
        ValueError: if the file has other columns.
    """
    with pq.ParquetFile(file) as parquet:
        if not parquet.schema_arrow.equals(schema):
            raise ValueError(f"it has the columns {parquet.schema_arrow.names}, expected {schema.names}")
        groups = (parquet.read_row_group(index, use_threads=False) for index in range(parquet.num_row_groups))
        yield from _ahead(groups)


def _ahead(values: Iterator[T]) -> Iterator[T]:
    """The values, none of them `None`, each made in a thread while its user is busy with the one before."""
    with ThreadPoolExecutor(1) as executor:
        following = executor.submit(next, values, None)
        while (value := following.result()) is not None:
            following = executor.submit(next, values, None)
            yield value


def numbers_in(table: pa.Table, name: str, least: int, end: int) -> NDArray[Any]:
    """
    A column of integers, none of them null, all in `least..end - 1`.

    Raises:
        ValueError: if one is not.
    """
    numbers = _numbers(table, name)
    require(
        not len(numbers) or (numbers.min() >= least and numbers.max() < end), f"`{name}` lies in {least}..{end - 1}"
    )
    return numbers


def num_tokens_in(table: pa.Table | pa.RecordBatch) -> NDArray[Any]:
    """Tokens of every completion of a table."""
    return numbers_of(pc.list_value_length(array_of(table, "token_ids")))


def with_later_columns(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with the columns of a schema that an earlier version did not write."""
    for field in schema:
        if field.name in LATER_COLUMNS and field.name not in table.column_names:
            value = pa.scalar(LATER_COLUMNS[field.name], field.type)
            table = table.append_column(field, pa.repeat(value, len(table)))
    return table


def array_of(table: pa.Table | pa.RecordBatch, name: str) -> pa.Array:
    """A column in one piece."""
    column = table.column(name)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _lists(table: pa.Table | pa.RecordBatch, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Offsets and values of a list column; offsets count from 0."""
    array = array_of(table, name)
    values = array.flatten()
    require(not array.null_count and not values.null_count, f"`{name}` is never null")
    offsets = numbers_of(array.offsets)
    return offsets - offsets[0], numbers_of(values)


def _numbers(table: pa.Table | pa.RecordBatch, name: str) -> np.ndarray[Any, Any]:
    column = array_of(table, name)
    require(not column.null_count or name == "entropy", f"`{name}` is never null")
    return np.where(valid_in(column), numbers_of(column), np.nan) if column.null_count else numbers_of(column)
