"""Values of dataset rows: which of them can be stored, copies of them, and codecs to JSON and back."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from .images import ImageReference, StoredImage, images_in, is_image
from .value_codecs import (
    ARRAY,
    MALFORMED,
    NA,
    NAT,
    PANDAS_TIMEDELTA,
    SCALAR,
    STRING_ARRAY,
    TENSOR,
    TIMEDELTA,
    TIMESTAMP,
    Codec,
    bytes_of,
    dtype_to_json,
    is_dense,
    is_tensor,
    list_of,
    object_array,
    shape_of,
    time_codec,
    to_base64,
    zone_of,
)

# Levels of a JSON text: everything that walks a value calls itself once or twice for each of them.
MAX_DEPTH = 200
_TYPE_KEY = "__exgrpo_type__"
# With texts as a whole, as brackets in them are none.
_BRACKETS = re.compile(r'[\[\]{}]|"(?:[^"\\]|\\.)*+"')
# What a reference to an image is as text. Quotes inside of JSON strings are escaped: no text is taken for one.
_REFERENCE = re.compile(rf'{{"{_TYPE_KEY}": "image_reference", "digest": "([^"]*)"}}')
# The same with a digest in which nothing is escaped or forbidden, and what takes its place in a text that is checked.
# It is no message and no object, as a reference is none, and opens with a quote: where the text is inside of a JSON
# string, that ends here, and what follows is as malformed as the reference is.
_PLAIN_REFERENCE = re.compile(rf'{{"{_TYPE_KEY}": "image_reference", "digest": "([0-9a-f]*)"}}')
_PLACEHOLDER = '[""]'
# Start of each escape of an ASCII letter, by which a text could spell the key.
_ASCII_ESCAPE = "\\u00"


def to_json(value: Any, column: str | None = None) -> Any:
    """
    What stands for a value in JSON; [`from_json`] is the way back.

    Args:
        value (`Any`):
            Value of a column, or a whole row.
        column (`str` or `None`):
            The column; `None` for a row.

    Raises:
        TypeError: if the value cannot be stored; the message names the column.
    """
    kind = type(value)
    if kind in _JSON_TYPES:
        return value
    if kind is list:
        return [to_json(item, column) for item in value]
    # A dict that happens to use our own key is tagged, too, so that it is never taken for a tagged value.
    if kind is dict and _TYPE_KEY not in value and all(type(key) is str for key in value):
        return {key: to_json(item, key if column is None else column) for key, item in value.items()}
    codec = _required_codec_of(value, column)
    return {_TYPE_KEY: codec.name, **codec.fields_of(value, column)}


def from_json(text: str) -> Any:
    """
    Value of a JSON text that [`to_json`] gave.

    Raises:
        ValueError: if the text is anything else, or nested more than `MAX_DEPTH` levels deep.
    """
    if is_too_deep(text):
        raise ValueError(f"An encoded example is nested more than {MAX_DEPTH} levels deep.")
    return _decoded(text, _DECODER if _TYPE_KEY in text else _PLAIN_DECODER)


def _decoded(text: str, decoder: json.JSONDecoder) -> Any:
    try:
        # What `decode` does, which looks for spaces around the value first; ours has none.
        value, end = decoder.raw_decode(text) if text[:1] in _STARTS else (None, -1)
        return value if end == len(text) else decoder.decode(text)
    except RecursionError as error:
        raise ValueError("An encoded example is nested too deeply.") from error


def value_and_digests(text: str) -> tuple[Any, set[str]]:
    """
    What a check of a JSON text needs: its value, and the digests of the images in it, or that it refers to.

    Where the text holds nothing unusual but references, it is read three times faster: other values stand for these,
    which are neither text nor objects.

    Raises:
        ValueError: where [`from_json`] raises it.
    """
    if _TYPE_KEY not in text:
        return from_json(text), set()
    parts = _PLAIN_REFERENCE.split(text)
    rest = _PLACEHOLDER.join(parts[::2])
    if _TYPE_KEY not in rest and _ASCII_ESCAPE not in rest and not is_too_deep(text):
        with suppress(ValueError):  # it is raised again below, and tells the place in the text
            return _decoded(rest, _PLAIN_DECODER), set(parts[1::2])
    value = from_json(text)
    return value, {image.digest for image in images_in(value)}


def to_text(value: Any, column: str | None = None) -> str:
    """
    JSON text of a value; [`from_json`] is the way back.

    Raises:
        TypeError: if the value cannot be stored, see [`to_json`], or is nested too deeply.
    """
    text = json.dumps(to_json(value, column))
    if is_too_deep(text):
        raise TypeError(
            f"{'A row' if column is None else f'Column {column!r}'} is nested more than {MAX_DEPTH} levels deep as "
            "JSON, which an experience buffer cannot save."
        )
    return text


def is_too_deep(text: str) -> bool:
    """Whether a JSON text is nested more than `MAX_DEPTH` levels deep."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return False
    depth = 0
    for token in _BRACKETS.findall(text):
        depth += 1 if token in ("[", "{") else -1 if token in ("]", "}") else 0
        if depth > MAX_DEPTH:
            return True
    return False


def may_refer(text: str) -> bool:
    """Whether there may be references to images in the value of a JSON text."""
    return _TYPE_KEY in text


def referenced_digests(text: str) -> list[str]:
    """Digests of the images that a JSON text of [`to_json`] refers to, in its order."""
    return _REFERENCE.findall(text) if "image_reference" in text else []


def copied(value: Any, column: str | None = None) -> Any:
    """
    Copy that shares no memory with the value; tensors come to the CPU, stored images are decoded.

    Args:
        value (`Any`):
            Value of a column, or a whole row.
        column (`str` or `None`):
            The column; `None` for a row.

    Raises:
        TypeError: if the value cannot be stored; the message names the column.
    """
    kind = type(value)
    if kind in _JSON_TYPES:
        return value
    if kind is StoredImage:
        return value.open()
    if is_image(value):
        return value.copy()
    if kind is dict:
        return {copied(key, column): copied(item, key if column is None else column) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        return kind(copied(item, column) for item in value)
    codec = _required_codec_of(value, column)
    if codec is _OBJECT_ARRAY:
        return object_array([copied(item, column) for item in value.flat], value.shape)
    if codec is TENSOR:
        # Not `deepcopy`: a value of a formatted row is a view, and would bring the memory of the whole batch along.
        return value.detach().cpu().clone()
    return value.copy() if isinstance(value, np.ndarray | np.generic) else value


def plain(value: Any) -> Any:
    """What an unformatted dataset holds in the place of NumPy values, tensors and tuples, nested to any depth."""
    if type(value) in _JSON_TYPES:
        return value
    if isinstance(value, np.generic | np.ndarray) or is_tensor(value):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def _from_fields(fields: dict[str, Any]) -> Any:
    if _TYPE_KEY not in fields:
        return fields
    name = fields[_TYPE_KEY]
    if not isinstance(name, str) or name not in _CODECS:
        raise ValueError(f"An encoded example holds the unknown type {name!r}.")
    try:
        return _CODECS[name].value_of(fields)
    except MALFORMED as error:
        raise ValueError(f"An encoded example holds a malformed value of type {name!r}: {error}") from error


# Of texts that are an object, a list or a text.
_STARTS = ("{", "[", '"')
# Made once: `json.loads` makes a decoder for every text. Most hold plain JSON, which is read several times faster.
_PLAIN_DECODER = json.JSONDecoder()
_DECODER = json.JSONDecoder(object_hook=_from_fields)


def _required_codec_of(value: Any, column: str | None) -> Codec:
    codec = _codec_of(value)
    if codec is None:
        kind = type(value)
        raise TypeError(
            f"Column {column!r} holds a value of type {kind.__module__}.{kind.__qualname__}, which an experience "
            "buffer cannot save. Drop the column from the dataset, convert it to plain Python values, NumPy arrays or "
            "torch tensors, set remove_unused_columns=True if no reward function needs it, or set replay_fraction=0."
        )
    return codec


def _codec_of(value: Any) -> Codec | None:
    # Exact types on purpose: an enum, a named tuple or a masked array would come back as something else.
    kind = type(value)
    if kind in _CODEC_OF_TYPE:
        has_lasting_zone = kind not in (dt.datetime, dt.time) or value.tzinfo is None or zone_of(value)
        return _CODEC_OF_TYPE[kind] if has_lasting_zone else None
    if isinstance(value, np.generic):
        return SCALAR if kind is value.dtype.type and dtype_to_json(value.dtype) is not None else None
    if kind is np.ndarray:
        if value.dtype == object:
            return _OBJECT_ARRAY
        if value.dtype.kind == "T":
            return STRING_ARRAY if value.dtype == np.dtypes.StringDType() else None
        return ARRAY if dtype_to_json(value.dtype) is not None else None
    if is_tensor(value):
        return TENSOR if is_dense(value) else None
    if is_image(value):
        return _IMAGE
    pandas = sys.modules.get("pandas")
    if pandas is not None:
        of_pandas = {pandas.Timestamp: TIMESTAMP, pandas.Timedelta: PANDAS_TIMEDELTA}
        missing = {type(pandas.NaT): NAT, type(pandas.NA): NA}
        return (of_pandas | missing).get(kind)
    return None


# Collections


def _items_codec(kind: type) -> Codec:
    def fields_of(value: Any, column: str | None) -> dict[str, Any]:
        items = [to_json(item, column) for item in value]
        # The order of a set differs from process to process.
        return {"value": items if kind is tuple else sorted(items, key=json.dumps)}

    return Codec(kind.__name__, fields_of, lambda fields: kind(list_of(fields)))


def _object_array_of(fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    items = list_of(fields)
    return object_array(items, shape_of(fields, len(items)))


_OBJECT_ARRAY = Codec(
    "numpy_objects",
    lambda value, column: {"shape": value.shape, "value": [to_json(item, column) for item in value.flat]},
    _object_array_of,
)


# Images


def _image_fields(value: Any, column: str | None) -> dict[str, Any]:
    image = value if isinstance(value, StoredImage) else StoredImage.of(value)
    return {"value": to_base64(image.content), "digest": image.digest}


_IMAGE = Codec("image", _image_fields, lambda fields: StoredImage(bytes_of(fields), str(fields["digest"])))

_JSON_TYPES = (type(None), str, int, float, bool)
_CODEC_OF_TYPE = {
    bytes: Codec("bytes", lambda value, column: {"value": to_base64(value)}, bytes_of),
    complex: Codec(
        "complex", lambda value, column: {"value": [value.real, value.imag]}, lambda fields: complex(*fields["value"])
    ),
    decimal.Decimal: Codec(
        "Decimal", lambda value, column: {"value": str(value)}, lambda fields: decimal.Decimal(fields["value"])
    ),
    dt.datetime: time_codec(dt.datetime),
    dt.time: time_codec(dt.time),
    dt.date: Codec(
        "date",
        lambda value, column: {"value": value.isoformat()},
        lambda fields: dt.date.fromisoformat(fields["value"]),
    ),
    dt.timedelta: TIMEDELTA,
    dict: Codec(
        "dict",
        lambda value, column: {
            "value": [
                [to_json(key, column), to_json(item, key if column is None else column)] for key, item in value.items()
            ]
        },
        lambda fields: dict(list_of(fields)),
    ),
    StoredImage: _IMAGE,
    ImageReference: Codec(
        "image_reference",
        lambda value, column: {"digest": value.digest},
        lambda fields: ImageReference(str(fields["digest"])),
    ),
    tuple: _items_codec(tuple),
    set: _items_codec(set),
    frozenset: _items_codec(frozenset),
    # As text and bytes: an array would cut off zeros at their end.
    np.str_: Codec("numpy_str", lambda value, column: {"value": str(value)}, lambda fields: np.str_(fields["value"])),
    np.bytes_: Codec(
        "numpy_bytes",
        lambda value, column: {"value": to_base64(bytes(value))},
        lambda fields: np.bytes_(bytes_of(fields)),
    ),
}
_CODECS = {
    codec.name: codec
    for codec in (
        *_CODEC_OF_TYPE.values(),
        *(SCALAR, ARRAY, _OBJECT_ARRAY, STRING_ARRAY, TENSOR),
        *(TIMESTAMP, PANDAS_TIMEDELTA, NAT, NA),
    )
}
