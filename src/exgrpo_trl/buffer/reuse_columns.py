"""Arrow columns of how stored completions were used, see [`Reuse`]; all null where nothing is recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from ..records import Reuse
from .detail_columns import require

REUSE_SCHEMA = pa.schema(
    [
        ("num_replays", pa.int64()),
        ("known_entropy", pa.float64()),
        ("known_negative_log_likelihood", pa.float64()),
        # Null where a completion has no record.
        ("known_at", pa.int64()),
    ]
)
# A row without a record.
NO_REUSE = {**dict.fromkeys(REUSE_SCHEMA.names), "num_replays": 0}


def reuse_to_arrays(records: Sequence[Reuse | None]) -> list[pa.Array]:
    """Columns of `REUSE_SCHEMA`."""
    if not any(records):
        return [pa.repeat(pa.scalar(NO_REUSE[field.name], field.type), len(records)) for field in REUSE_SCHEMA]
    rows = [
        (record.num_replays, record.entropy, record.negative_log_likelihood, record.scored_at)
        if record is not None
        else tuple(NO_REUSE.values())
        for record in records
    ]
    return [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), REUSE_SCHEMA.types, strict=True)]


def reuse_from_table(table: pa.Table | pa.RecordBatch) -> list[Reuse | None]:
    """
    Record of every row; the inverse of [`reuse_to_arrays`].

    Raises:
        ValueError: if a value is out of range, or something is known of a row and not since when.
    """
    num_replays, *known, known_at = (table.column(name) for name in REUSE_SCHEMA.names)
    without = pc.is_null(known_at)
    # NaN, too, is what a null becomes on its way through other tools.
    is_known = [num_replays.cast(pa.bool_()), *(pc.invert(pc.is_nan(column)) for column in known)]
    require(
        not any(pc.any(pc.and_(without, column)).as_py() for column in is_known),
        "what is known of a completion since its generation has a `known_at`",
    )
    if known_at.null_count == len(table):
        return [None] * len(table)
    rows = zip(*(column.to_pylist() for column in (num_replays, *known, known_at)), strict=True)
    return [
        None if at is None else Reuse(count or 0, _number(entropy), _number(likelihood), at)
        for count, entropy, likelihood, at in rows
    ]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
