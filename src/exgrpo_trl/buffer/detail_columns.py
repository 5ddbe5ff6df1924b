"""Arrow columns of what a completion has beyond tokens, see [`RolloutDetails`]; all null where it has nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..images import StoredImage
from ..rollout_details import RolloutDetails

# Columns and attributes, in the order of the latter.
_TEXTS = {
    "messages": "messages_text",
    "shown_prompt": "prompt_text",
    "fields": "fields_text",
    "rewards": "rewards_text",
}
DETAIL_SCHEMA = pa.schema(
    [
        # Null where a completion has no details at all.
        ("run_lengths", pa.large_list(pa.int32())),
        ("messages", pa.large_string()),
        ("shown_prompt", pa.large_string()),
        ("prompt_ids", pa.large_list(pa.int32())),
        ("fields", pa.large_string()),
        ("rewards", pa.large_string()),
        ("images", pa.list_(pa.string())),  # digests
    ]
)


def num_bytes(details: RolloutDetails | None) -> int:
    """About how many bytes the details take in the columns; images count as their digests."""
    if details is None:
        return 0
    texts = (getattr(details, name) for name in _TEXTS.values())
    numbers = len(details.run_bytes) + len(details.prompt_bytes)
    return numbers + 64 * len(details.images) + sum(map(len, filter(None, texts)))


def details_to_arrays(all_details: Sequence[RolloutDetails | None]) -> list[pa.Array]:
    """Columns of `DETAIL_SCHEMA`."""
    if not any(all_details):
        return [pa.nulls(len(all_details), kind) for kind in DETAIL_SCHEMA.types]
    arrays = {
        "run_lengths": _numbers_array([None if of is None else of.run_bytes for of in all_details]),
        "prompt_ids": _numbers_array([of.prompt_bytes or None if of else None for of in all_details]),
        "images": pa.array(
            [[image.digest for image in of.images] if of and of.images else None for of in all_details],
            pa.list_(pa.string()),
        ),
    }
    for column, attribute in _TEXTS.items():
        texts = [None if of is None else getattr(of, attribute) for of in all_details]
        arrays[column] = pa.array(texts, pa.large_string())
    return [arrays[name] for name in DETAIL_SCHEMA.names]


def details_from_columns(
    columns: Mapping[str, pa.Array], num_tokens: NDArray[Any], images: Mapping[str, StoredImage]
) -> list[RolloutDetails | None]:
    """
    Details of every row; the inverse of [`details_to_arrays`].

    Args:
        columns (`Mapping[str, pyarrow.Array]`):
            Columns of `DETAIL_SCHEMA`, not chunked.
        num_tokens (array of shape `(num_rows,)`):
            Tokens of each completion.
        images (`Mapping[str, StoredImage]`):
            By digest.

    Raises:
        ValueError: if the runs of a row do not add up to its tokens, or an image is missing.
    """
    is_stored = valid_in(columns["run_lengths"])
    if not is_stored.any():
        require(all(column.null_count == len(column) for column in columns.values()), "details have run lengths")
        return [None] * len(is_stored)
    run_offsets, run_lengths = _lists(columns["run_lengths"])
    sums = np.concatenate(([0], np.cumsum(run_lengths, dtype=np.int64)))[run_offsets]
    is_right = (np.diff(run_offsets) == 0) | (np.diff(sums) == num_tokens)
    require(bool((run_lengths >= 0).all() and is_right.all()), "the lengths of runs add up to the number of tokens")
    rows = zip(
        is_stored.tolist(),
        _parts(run_offsets, run_lengths),
        _parts(*_lists(columns["prompt_ids"])),
        columns["images"].to_pylist(),
        *(columns[name].to_pylist() for name in _TEXTS),
        strict=True,
    )
    details: list[RolloutDetails | None] = []
    for has_details, runs, prompt_ids, digests, messages, prompt, fields, rewards in rows:
        own = tuple(image_of(digest, images) for digest in digests or ())
        made = RolloutDetails(runs, messages, prompt, prompt_ids, fields, rewards, own) if has_details else None
        details.append(made)
    return details


def numbers_of(array: pa.Array) -> NDArray[Any]:
    """The numbers of an array, as a view; in the place of a null there is anything."""
    # Not `to_numpy`, which imports pandas first: 0.2 s of a load.
    dtype = np.dtype(array.type.to_pandas_dtype())
    if not len(array):  # may have no buffer
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def valid_in(array: pa.Array) -> NDArray[np.bool_]:
    """Which values are not null."""
    return numbers_of(array.is_valid().cast(pa.uint8())).view(np.bool_)


def require(condition: bool, rule: str) -> None:
    """Refuse a table that breaks a rule."""
    if not condition:
        raise ValueError(f"Stored completions break a rule: {rule}.")


def image_of(digest: str | None, images: Mapping[str, StoredImage]) -> StoredImage:
    """
    The image of a digest.

    Raises:
        ValueError: if it is not there.
    """
    image = images.get(digest or "")
    if image is None:
        raise ValueError(f"A stored completion or question refers to the image {digest}, which is not there.")
    return image


def _numbers_array(parts: list[bytes | None]) -> pa.Array:
    """Lists of int32, null where there is `None`; without a Python loop over numbers."""
    offsets = np.zeros(len(parts) + 1, dtype=np.int64)
    np.cumsum([len(part or b"") // 4 for part in parts], out=offsets[1:])
    values = pa.Array.from_buffers(pa.int32(), int(offsets[-1]), [None, pa.py_buffer(b"".join(filter(None, parts)))])
    is_null = np.array([part is None for part in parts] + [False])
    return pa.LargeListArray.from_arrays(pa.array(offsets, mask=is_null), values)


def _lists(column: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Offsets and numbers of a column of lists; a null counts as an empty one."""
    numbers = column.flatten()
    require(not numbers.null_count, "lengths of runs and token ids are never null")
    # Not its own offsets, which may enclose what a null hides.
    lengths = np.where(valid_in(column), numbers_of(pc.list_value_length(column)), 0)
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64))), numbers_of(numbers)


def _parts(offsets: NDArray[np.int64], numbers: NDArray[np.int32]) -> list[bytes]:
    content, bounds = numbers.tobytes(), (4 * offsets).tolist()
    return [content[start:end] for start, end in pairwise(bounds)]
