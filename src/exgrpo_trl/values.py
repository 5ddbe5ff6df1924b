"""Values of dataset rows: which of them can be stored, copies of them, and codecs to JSON and back."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

_TYPE_KEY = "__exgrpo_type__"
# What a text that no codec wrote raises on its way back.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Dtypes that NumPy and torch give the same name.
_COMMON_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")


@dataclass(frozen=True, slots=True, eq=False)
class _Codec:
    """
    How the values of one kind become JSON and come back.

    Args:
        name (`str`):
            Tag of these values in JSON.
        fields_of (`Callable[[Any, str | None], dict]`):
            What stands beside the tag, from the value and the name of its column.
        value_of (`Callable[[dict], Any]`):
            The value, from these fields; raises one of `_MALFORMED` where they are not what the codec writes.
    """

    name: str
    fields_of: Callable[[Any, str | None], dict[str, Any]]
    value_of: Callable[[dict[str, Any]], Any]


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
        ValueError: if the text is anything else.
    """
    try:
        return json.loads(text, object_hook=_from_fields)
    except RecursionError as error:
        raise ValueError("An encoded example is nested too deeply.") from error


def copied(value: Any, column: str | None = None) -> Any:
    """
    Copy that shares no memory with the value; tensors come to the CPU.

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
    if kind is dict:
        return {copied(key, column): copied(item, key if column is None else column) for key, item in value.items()}
    if kind in (list, tuple, set, frozenset):
        return kind(copied(item, column) for item in value)
    codec = _required_codec_of(value, column)
    if codec is _OBJECT_ARRAY:
        return _object_array([copied(item, column) for item in value.flat], value.shape)
    if codec is _TENSOR:
        # Not `deepcopy`: a value of a formatted row is a view, and would bring the memory of the whole batch along.
        return value.detach().cpu().clone()
    return value.copy() if isinstance(value, np.ndarray | np.generic) else value


def plain(value: Any) -> Any:
    """What an unformatted dataset holds in the place of NumPy values, tensors and tuples, nested to any depth."""
    if type(value) in _JSON_TYPES:
        return value
    if isinstance(value, np.generic | np.ndarray) or _is_tensor(value):
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
    except _MALFORMED as error:
        raise ValueError(f"An encoded example holds a malformed value of type {name!r}: {error}") from error


def _required_codec_of(value: Any, column: str | None) -> _Codec:
    codec = _codec_of(value)
    if codec is None:
        kind = type(value)
        raise TypeError(
            f"Column {column!r} holds a value of type {kind.__module__}.{kind.__qualname__}, which an experience "
            "buffer cannot save. Drop the column from the dataset, convert it to plain Python values, NumPy arrays or "
            "torch tensors, set remove_unused_columns=True if no reward function needs it, or set replay_fraction=0."
        )
    return codec


def _codec_of(value: Any) -> _Codec | None:
    # Exact types on purpose: an enum, a named tuple or a masked array would come back as something else.
    kind = type(value)
    if kind in _CODEC_OF_TYPE:
        has_lasting_zone = kind not in (dt.datetime, dt.time) or value.tzinfo is None or _zone_of(value)
        return _CODEC_OF_TYPE[kind] if has_lasting_zone else None
    if isinstance(value, np.generic):
        return _SCALAR if kind is value.dtype.type and _dtype_to_json(value.dtype) is not None else None
    if kind is np.ndarray:
        if value.dtype == object:
            return _OBJECT_ARRAY
        if value.dtype.kind == "T":
            return _STRING_ARRAY if value.dtype == np.dtypes.StringDType() else None
        return _ARRAY if _dtype_to_json(value.dtype) is not None else None
    if _is_tensor(value):
        return _TENSOR if _is_dense(value) else None
    pandas = sys.modules.get("pandas")
    if pandas is not None:
        of_pandas = {pandas.Timestamp: _TIMESTAMP, pandas.Timedelta: _PANDAS_TIMEDELTA}
        missing = {type(pandas.NaT): _NAT, type(pandas.NA): _NA}
        return (of_pandas | missing).get(kind)
    return None


# Bytes and shapes


def _to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _bytes_of(fields: Mapping[str, Any]) -> bytes:
    return base64.b64decode(fields["value"], validate=True)


def _shape_of(fields: Mapping[str, Any], num_items: int) -> tuple[int, ...]:
    """Shape of as many items as there are."""
    shape = tuple(fields["shape"])
    if not all(type(length) is int and length >= 0 for length in shape) or math.prod(shape) != num_items:
        raise ValueError(f"the shape {shape} does not fit {num_items} items")
    return shape


def _num_items(content: bytes, itemsize: int, fields: Mapping[str, Any]) -> int:
    if itemsize == 0:  # an array of empty strings has no bytes
        return math.prod(fields["shape"])
    if len(content) % itemsize:
        raise ValueError(f"{len(content)} bytes are no whole number of items of {itemsize} bytes")
    return len(content) // itemsize


def _check_booleans(content: bytes) -> None:
    if content.translate(None, b"\0\1"):
        raise ValueError("a boolean is neither true nor false")


# Dates and times


def _zone_of(value: dt.datetime | dt.time) -> dict[str, Any]:
    """What brings the time zone of an aware date or time back; nothing if it cannot be."""
    zone = value.tzinfo
    if isinstance(zone, ZoneInfo) and zone.key:
        return {"zone": zone.key}
    offset = value.utcoffset()
    return {} if offset is None else {"offset": offset // dt.timedelta(microseconds=1)}


def _zone_from(fields: Mapping[str, Any]) -> dt.tzinfo | None:
    if "zone" in fields:
        return ZoneInfo(fields["zone"])
    return dt.timezone(dt.timedelta(microseconds=fields["offset"])) if "offset" in fields else None


def _time_fields(value: Any, column: str | None) -> dict[str, Any]:
    fields: dict[str, Any] = {"value": value.isoformat()}
    # The ISO format holds an offset, but neither the name of a zone nor which of two equal hours is meant.
    if value.tzinfo is not None and "zone" in (zone := _zone_of(value)):
        fields |= zone
    return fields | {"fold": 1} if value.fold else fields


def _time_codec(kind: type[dt.datetime] | type[dt.time]) -> _Codec:
    def value_of(fields: dict[str, Any]) -> Any:
        value = kind.fromisoformat(fields["value"]).replace(fold=fields.get("fold", 0))
        return value.replace(tzinfo=ZoneInfo(fields["zone"])) if "zone" in fields else value

    return _Codec(kind.__name__, _time_fields, value_of)


_TIMEDELTA = _Codec(
    "timedelta",
    lambda value, column: {"value": [value.days, value.seconds, value.microseconds]},
    lambda fields: dt.timedelta(*fields["value"]),
)


# Collections


def _items_codec(kind: type) -> _Codec:
    def fields_of(value: Any, column: str | None) -> dict[str, Any]:
        items = [to_json(item, column) for item in value]
        # The order of a set differs from process to process.
        return {"value": items if kind is tuple else sorted(items, key=json.dumps)}

    return _Codec(kind.__name__, fields_of, lambda fields: kind(_list_of(fields)))


def _list_of(fields: Mapping[str, Any]) -> list[Any]:
    items = fields["value"]
    if not isinstance(items, list):
        raise TypeError(f"{items!r} is no list")
    return items


# NumPy


def _dtype_to_json(dtype: np.dtype[Any]) -> Any:
    """Text of a dtype, or the fields of a structured one; `None` if it would come back as another."""
    if dtype.hasobject:
        return None
    try:
        described = dtype.str if dtype.names is None else dtype.descr
        is_alias = dtype.names is None and dtype.isnative and np.dtype(described).char != dtype.char
        described = dtype.char if is_alias else described  # `longlong` is no `int64`, however equal they are
        return described if _dtype_from_json(described) == dtype else None
    except (TypeError, ValueError):
        return None


def _dtype_from_json(described: Any) -> np.dtype[Any]:
    def field(described: Any) -> tuple[Any, ...]:
        name, content, *shape = described
        return (
            name if isinstance(name, str) else tuple(name),  # with its title
            content if isinstance(content, str) else [field(part) for part in content],
            *map(tuple, shape),
        )

    if isinstance(described, str):
        dtype = np.dtype(described)
    else:
        dtype = np.lib.format.descr_to_dtype([field(part) for part in described])
    if dtype.hasobject:
        raise ValueError(f"{described} holds objects")
    return dtype


def _array_fields(value: Any, column: str | None) -> dict[str, Any]:
    array = np.asarray(value)
    return {"dtype": _dtype_to_json(array.dtype), "shape": array.shape, "value": _to_base64(_content(array))}


def _content(array: np.ndarray[Any, Any]) -> bytes:
    """Bytes of an array. Equal values give equal ones: what pads a float of 80 bits is set to zero."""
    content = array.tobytes()
    if array.dtype.type not in (np.longdouble, np.clongdouble) or np.finfo(np.longdouble).nmant != 63:
        return content
    items = np.frombuffer(content, np.uint8).reshape(-1, np.dtype(np.longdouble).itemsize).copy()
    padding = slice(10, None) if array.dtype.isnative else slice(0, -10)
    items[:, padding] = 0
    return items.tobytes()


def _array_of(fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    dtype, content = _dtype_from_json(fields["dtype"]), _bytes_of(fields)
    shape = _shape_of(fields, _num_items(content, dtype.itemsize, fields))
    if dtype.kind == "b":
        _check_booleans(content)
    if dtype.kind == "U" and np.frombuffer(content, f"{dtype.byteorder}u4").max(initial=0) > sys.maxunicode:
        raise ValueError("a number stands for no character")
    return np.ndarray(shape, dtype, buffer=bytearray(content))


def _scalar_of(fields: dict[str, Any]) -> Any:
    return _array_of(fields | {"shape": ()})[()]


def _object_array(items: list[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def _object_array_of(fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    items = _list_of(fields)
    return _object_array(items, _shape_of(fields, len(items)))


def _string_array_of(fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    items = _list_of(fields)
    if not all(isinstance(item, str) for item in items):
        raise TypeError("an item is no text")
    return np.array(items, dtype=np.dtypes.StringDType()).reshape(_shape_of(fields, len(items)))


_SCALAR = _Codec("numpy_scalar", lambda value, column: {**_array_fields(value, column), "shape": []}, _scalar_of)
_ARRAY = _Codec("numpy_array", _array_fields, _array_of)
_OBJECT_ARRAY = _Codec(
    "numpy_objects",
    lambda value, column: {"shape": value.shape, "value": [to_json(item, column) for item in value.flat]},
    _object_array_of,
)
_STRING_ARRAY = _Codec(
    "numpy_strings", lambda value, column: {"shape": value.shape, "value": value.flatten().tolist()}, _string_array_of
)


# torch, which is never imported here


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and type(value) is getattr(torch, "Tensor", None)


def _is_dense(tensor: Any) -> bool:
    is_quantized = str(tensor.dtype).startswith("torch.q")  # `torch.qint8` and its like
    is_unusual = is_quantized or tensor.is_nested or tensor.device.type == "meta"
    return not is_unusual and tensor.layout is sys.modules["torch"].strided


def _tensor_fields(value: Any, column: str | None) -> dict[str, Any]:
    torch = sys.modules["torch"]
    tensor = value.detach().cpu().resolve_conj().resolve_neg()
    # Not `contiguous()`, which leaves a single item with any stride, and `view` then refuses it.
    flat = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    content = flat.view(torch.uint8).numpy().tobytes()
    name = str(value.dtype).removeprefix("torch.")
    return {"dtype": name, "shape": list(value.shape), "value": _to_base64(content)}


def _tensor_of(fields: dict[str, Any]) -> Any:
    torch, name, content = sys.modules.get("torch"), fields["dtype"], _bytes_of(fields)
    if name == "bool":
        _check_booleans(content)
    if torch is None:
        return _tensor_as_array(fields, content)
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    shape = _shape_of(fields, _num_items(content, dtype.itemsize, fields))
    # `frombuffer` takes no empty one.
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    if not _is_dense(tensor):
        raise TypeError(f"torch.{name} is no dtype of its own")
    return tensor


def _tensor_as_array(fields: Mapping[str, Any], content: bytes) -> np.ndarray[Any, Any]:
    name = fields["dtype"]
    if name == "bfloat16":
        halves = np.frombuffer(content, dtype=np.uint16)
        # The upper half of a float32.
        array: np.ndarray[Any, Any] = (halves.astype(np.uint32) << 16).view(np.float32)
    elif _COMMON_DTYPES.fullmatch(name):
        array = np.frombuffer(bytearray(content), dtype=name)
    else:
        itemsize = len(content) // max(math.prod(fields["shape"]), 1)
        array = np.frombuffer(bytearray(content), dtype=f"V{max(itemsize, 1)}")
    return array.reshape(_shape_of(fields, array.size))


_TENSOR = _Codec("tensor", _tensor_fields, _tensor_of)


# pandas, which datasets depends on, and which is imported only to bring its own values back


def _pandas_fields(value: Any, column: str | None) -> dict[str, Any]:
    exact = value.asm8  # UTC
    fields = {"unit": np.datetime_data(exact.dtype)[0], "value": int(exact.astype(np.int64))}
    return fields if getattr(value, "tzinfo", None) is None else fields | _zone_of(value)


def _timestamp_of(fields: dict[str, Any]) -> Any:
    import pandas

    stamp = pandas.Timestamp(np.datetime64(fields["value"], fields["unit"]))
    zone = _zone_from(fields)
    return stamp if zone is None else stamp.tz_localize("UTC").tz_convert(zone)


def _pandas_timedelta_of(fields: dict[str, Any]) -> Any:
    import pandas

    return pandas.Timedelta(np.timedelta64(fields["value"], fields["unit"]))


def _missing_codec(name: str) -> _Codec:
    def value_of(fields: dict[str, Any]) -> Any:
        import pandas

        return getattr(pandas, name)

    return _Codec(f"pandas_{name}", lambda value, column: {}, value_of)


_TIMESTAMP = _Codec("pandas_Timestamp", _pandas_fields, _timestamp_of)
_PANDAS_TIMEDELTA = _Codec("pandas_Timedelta", _pandas_fields, _pandas_timedelta_of)
_NAT, _NA = _missing_codec("NaT"), _missing_codec("NA")


_JSON_TYPES = (type(None), str, int, float, bool)
_CODEC_OF_TYPE = {
    bytes: _Codec("bytes", lambda value, column: {"value": _to_base64(value)}, _bytes_of),
    complex: _Codec(
        "complex", lambda value, column: {"value": [value.real, value.imag]}, lambda fields: complex(*fields["value"])
    ),
    decimal.Decimal: _Codec(
        "Decimal", lambda value, column: {"value": str(value)}, lambda fields: decimal.Decimal(fields["value"])
    ),
    dt.datetime: _time_codec(dt.datetime),
    dt.time: _time_codec(dt.time),
    dt.date: _Codec(
        "date",
        lambda value, column: {"value": value.isoformat()},
        lambda fields: dt.date.fromisoformat(fields["value"]),
    ),
    dt.timedelta: _TIMEDELTA,
    dict: _Codec(
        "dict",
        lambda value, column: {
            "value": [
                [to_json(key, column), to_json(item, key if column is None else column)] for key, item in value.items()
            ]
        },
        lambda fields: dict(_list_of(fields)),
    ),
    tuple: _items_codec(tuple),
    set: _items_codec(set),
    frozenset: _items_codec(frozenset),
    # As text and bytes: an array would cut off zeros at their end.
    np.str_: _Codec("numpy_str", lambda value, column: {"value": str(value)}, lambda fields: np.str_(fields["value"])),
    np.bytes_: _Codec(
        "numpy_bytes",
        lambda value, column: {"value": _to_base64(bytes(value))},
        lambda fields: np.bytes_(_bytes_of(fields)),
    ),
}
_CODECS = {
    codec.name: codec
    for codec in (
        *_CODEC_OF_TYPE.values(),
        *(_SCALAR, _ARRAY, _OBJECT_ARRAY, _STRING_ARRAY, _TENSOR),
        *(_TIMESTAMP, _PANDAS_TIMEDELTA, _NAT, _NA),
    )
}
