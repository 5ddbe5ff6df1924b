"""Stored completions as Arrow tables and datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from ..examples import decode_example, encode_example
from ..records import MAX_LOG_PROBABILITY, MIN_LOG_PROBABILITY, UNKNOWN_PROMPT, Experience, Question

if TYPE_CHECKING:
    from datasets import Dataset

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
    ]
)
# Columns that files of an earlier version lack, with what stands for them.
LATER_COLUMNS = {"prompt_hash": UNKNOWN_PROMPT}
QUESTION_SCHEMA = pa.schema([("question_id", pa.string()), ("example", pa.large_string()), ("bucket", pa.int32())])
DATASET_SCHEMA = pa.unify_schemas([QUESTION_SCHEMA, EXPERIENCE_SCHEMA])
# The same JSON in every row. Datasets drop everything but columns on their way through Parquet files.
PROVENANCE = "provenance"

# Bounds of one batch, so that memory use while saving and loading does not grow with the buffer.
TOKENS_PER_BATCH = 2**21
ROWS_PER_BATCH = 2**14


def in_batches(rows: Iterable[tuple[T, Experience]]) -> Iterator[tuple[list[T], list[Experience]]]:
    """Split rows so that no batch holds much more than `TOKENS_PER_BATCH` tokens or `ROWS_PER_BATCH` rows."""
    keys: list[T] = []
    experiences: list[Experience] = []
    num_tokens = 0
    for key, experience in rows:
        keys.append(key)
        experiences.append(experience)
        num_tokens += experience.num_tokens
        if num_tokens >= TOKENS_PER_BATCH or len(keys) >= ROWS_PER_BATCH:
            yield keys, experiences
            keys, experiences, num_tokens = [], [], 0
    if keys:
        yield keys, experiences


def experiences_to_arrays(experiences: list[Experience]) -> list[pa.Array]:
    """Columns of `EXPERIENCE_SCHEMA`, without a Python loop over tokens."""
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
    ]


def experiences_from_table(table: pa.Table | pa.RecordBatch) -> list[Experience]:
    """
    Experiences of a table with the columns of `EXPERIENCE_SCHEMA`; the inverse of [`experiences_to_arrays`].

    Raises:
        ValueError: if a value is null or out of range, or tokens and log-probabilities differ in number.
    """
    token_offsets, tokens = _lists(table, "token_ids")
    logp_offsets, logps = _lists(table, "behavior_per_token_logps")
    versions, rewards, entropies = (_numbers(table, name) for name in ("policy_version", "reward", "entropy"))
    hashes = _numbers(table, "prompt_hash")
    lengths = np.diff(token_offsets)
    _require(np.array_equal(lengths, np.diff(logp_offsets)), "completions have as many log-probabilities as tokens")
    _require(bool((lengths > 0).all()), "every completion has a token")
    _require(bool((tokens >= 0).all()), "token ids are not negative")
    _require(
        bool(((logps >= MIN_LOG_PROBABILITY) & (logps <= MAX_LOG_PROBABILITY)).all()),
        "log-probabilities are finite and at most 0",
    )
    _require(bool((versions >= 0).all()), "policy versions are not negative")
    _require(bool(np.isfinite(rewards).all()), "rewards are finite")
    _require(not np.isinf(entropies).any(), "entropies are finite or NaN")
    token_bytes, logp_bytes = tokens.tobytes(), logps.tobytes()
    bounds = (4 * token_offsets).tolist()
    # One int object per version and per prompt, not one per completion.
    shared: dict[int, int] = {}
    shared_version, shared_hash = (
        [shared.setdefault(number, number) for number in numbers.tolist()] for numbers in (versions, hashes)
    )
    columns = (shared_version, rewards.tolist(), entropies.tolist(), shared_hash)
    return [
        Experience(token_bytes[start:end], logp_bytes[start:end], *of_row)
        for start, end, *of_row in zip(bounds, bounds[1:], *columns, strict=False)
    ]


def with_later_columns(table: pa.Table) -> pa.Table:
    """The table with the columns that an earlier version did not write."""
    for name, value in LATER_COLUMNS.items():
        if name not in table.column_names:
            kind = EXPERIENCE_SCHEMA.field(name).type
            table = table.append_column(name, pa.repeat(pa.scalar(value, kind), len(table)))
    return table


def completions_to_dataset(
    items: Iterable[tuple[Question, int, Experience]], provenance: Mapping[str, Any]
) -> Dataset:
    """
    Dataset of the stored completions, one per row.

    Columns: `question_id`, `example` (JSON, see [`encode_example`]), `bucket`, `token_ids`,
    `behavior_per_token_logps` (nats), `policy_version` (optimizer steps), `reward`, `entropy` (nats, NaN if unknown)
    `prompt_hash` (0 if unknown) and `provenance` (JSON, null if unknown, the same in every row). Rows go by bucket,
    question and age.

    Args:
        items (`Iterable[tuple]`):
            Question, bucket and completion of each row, see [`ExperienceBuffer.items`].
        provenance (`Mapping[str, Any]`):
            What the tokens depend on, see [`ExperienceBuffer`].
    """
    from datasets import Dataset

    rows = (
        ((question.question_id, encode_example(question.example), bucket), experience)
        for question, bucket, experience in items
    )
    batches = []
    for keys, experiences in in_batches(rows):
        columns = [
            pa.array(values, kind) for values, kind in zip(zip(*keys, strict=True), QUESTION_SCHEMA.types, strict=True)
        ]
        batches.append(pa.record_batch(columns + experiences_to_arrays(experiences), schema=DATASET_SCHEMA))
    table = pa.Table.from_batches(batches, schema=DATASET_SCHEMA)
    text = pa.scalar(json.dumps(provenance, sort_keys=True) if provenance else None, pa.string())
    return Dataset(table.append_column(PROVENANCE, pa.repeat(text, len(table))))


def completions_from_dataset(dataset: Dataset) -> Iterator[tuple[Question, Experience, int]]:
    """
    Question, completion and bucket of every row of a dataset; the inverse of [`completions_to_dataset`].

    Args:
        dataset (`datasets.Dataset`):
            Dataset with the columns of [`completions_to_dataset`].

    Raises:
        TypeError: if it is not a dataset.
        ValueError: if a column is missing or holds something else.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}; pick one split of a DatasetDict.")
    needed = [name for name in DATASET_SCHEMA.names if name not in LATER_COLUMNS]
    if missing := [name for name in needed if name not in dataset.column_names]:
        raise ValueError(
            f"The dataset lacks the columns {missing}; it has {dataset.column_names}. ExperienceBuffer.to_dataset() "
            "shows what is expected."
        )
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        try:
            batch = with_later_columns(table).select(DATASET_SCHEMA.names).cast(DATASET_SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"The dataset does not hold stored completions: {error}. ExperienceBuffer.to_dataset() shows the "
                "expected types."
            ) from error
        for name in QUESTION_SCHEMA.names:
            _require(not batch.column(name).null_count, f"`{name}` is never null")
        for experience, question_id, example, bucket in zip(
            experiences_from_table(batch),
            *(batch.column(name).to_pylist() for name in QUESTION_SCHEMA.names),
            strict=True,
        ):
            yield Question(question_id, decode_example(example)), experience, bucket


def provenance_from_dataset(dataset: Dataset) -> dict[str, Any]:
    """
    What the stored tokens of a dataset depend on, as far as it says so.

    Raises:
        ValueError: if it is not JSON, or completions of different provenance are in the dataset.
    """
    if PROVENANCE not in dataset.column_names:
        return {}
    provenance: dict[str, Any] = {}
    texts = dataset.select_columns([PROVENANCE]).with_format(None).unique(PROVENANCE)
    for text in filter(None, texts):
        try:
            found = json.loads(text)
            pairs = found.items()
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The column {PROVENANCE!r} must hold a JSON object, got {text!r}.") from error
        for name, value in pairs:
            if provenance.setdefault(name, value) != value:
                raise ValueError(
                    f"The dataset mixes completions of different provenance: {name}={provenance[name]!r} and "
                    f"{name}={value!r}. Import those of one alone, for example dataset.filter(lambda row: "
                    f"row[{PROVENANCE!r}] == dataset[0][{PROVENANCE!r}])."
                )
    return provenance


def _lists(table: pa.Table | pa.RecordBatch, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Offsets and values of a list column; offsets count from 0."""
    column = table.column(name)
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values = array.flatten()
    _require(not array.null_count and not values.null_count, f"`{name}` is never null")
    offsets = array.offsets.to_numpy()
    return offsets - offsets[0], values.to_numpy()


def _numbers(table: pa.Table | pa.RecordBatch, name: str) -> np.ndarray[Any, Any]:
    column = table.column(name)
    _require(not column.null_count or name == "entropy", f"`{name}` is never null")
    return np.asarray(column.fill_null(np.nan) if column.null_count else column)


def _require(condition: bool, rule: str) -> None:
    if not condition:
        raise ValueError(f"Stored completions break a rule: {rule}.")
