"""Stored completions as Arrow tables and datasets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa

from .experience import (
    MAX_LOG_PROBABILITY,
    MIN_LOG_PROBABILITY,
    Experience,
    Question,
    decode_example,
    encode_example,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from .buffer import ExperienceBuffer

T = TypeVar("T")

EXPERIENCE_SCHEMA = pa.schema(
    [
        # Large lists: one row group stays small, but a whole table may hold more than 2^31 tokens.
        ("token_ids", pa.large_list(pa.int32())),
        ("behavior_per_token_logps", pa.large_list(pa.float32())),
        ("policy_version", pa.int64()),
        ("reward", pa.float64()),
        ("entropy", pa.float64()),
    ]
)
QUESTION_SCHEMA = pa.schema([("question_id", pa.string()), ("example", pa.large_string()), ("bucket", pa.int32())])
DATASET_SCHEMA = pa.unify_schemas([QUESTION_SCHEMA, EXPERIENCE_SCHEMA])

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
    ]


def experiences_from_table(table: pa.Table | pa.RecordBatch) -> list[Experience]:
    """
    Experiences of a table with the columns of `EXPERIENCE_SCHEMA`; the inverse of [`experiences_to_arrays`].

    Raises:
        ValueError: if a value is null or out of range, or tokens and log-probabilities differ in number.
    """
    token_lists, token_offsets, tokens = _lists(table, "token_ids")
    logp_lists, logp_offsets, logps = _lists(table, "behavior_per_token_logps")
    versions, rewards, entropies = (_numbers(table, name) for name in ("policy_version", "reward", "entropy"))
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
    bounds = (4 * (token_offsets - token_offsets[0])).tolist()
    # One int object per version, not one per completion.
    shared: dict[int, int] = {}
    return [
        Experience(token_bytes[start:end], logp_bytes[start:end], shared.setdefault(version, version), reward, entropy)
        for start, end, version, reward, entropy in zip(
            bounds, bounds[1:], versions.tolist(), rewards.tolist(), entropies.tolist(), strict=False
        )
    ]
