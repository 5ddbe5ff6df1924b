"""Codecs of values that hold no others: bytes, dates, times, NumPy arrays, torch tensors, pandas values."""

from __future__ import annotations

import base64
import datetime as dt
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

# What a text that no codec wrote raises on its way back.
MALFORMED = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)
# NumPy parses more as the text of a dtype than we ever write.
_DTYPE_TEXT = re.compile(r"[<>|=]?[?A-Za-z]\d{0,10}(\[\d{0,10}[A-Za-z]{1,2}\])?")
# Those of torch; other names may be those of modules, which it imports when asked.
_TENSOR_DTYPE = re.compile(r"bool|bfloat16|(u?int|float|complex)\d{1,3}\w{0,20}")
# Items without a byte, which cost nothing in a text.
_MOST_EMPTY_ITEMS = 2**16
# Dtypes that NumPy and torch give the same name.
_COMMON_DTYPES = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")


@dataclass(frozen=True, slots=True, eq=False)
class Codec:
    """
    How the values of one kind become JSON and come back.

    Args:
        name (`str`):
            Tag of these values in JSON.
        fields_of (`Callable[[Any, str | None], dict]`):
            What stands beside the tag, from the value and the name of its column.
        value_of (`Callable[[dict], Any]`):
            The value, from these fields; raises one of `MALFORMED` where they are not what the codec writes.
    """

    name: str
    fields_of: Callable[[Any, str | None], dict[str, Any]]
    value_of: Callable[[dict[str, Any]], Any]


# Bytes and shapes


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def bytes_of(fields: Mapping[str, Any]) -> bytes:
    return base64.b64decode(fields["value"], validate=True)


def shape_of(fields: Mapping[str, Any], num_items: int) -> tuple[int, ...]:
    """Shape of as many items as there are."""
    shape = tuple(fields["shape"])
    if not all(type(length) is int and length >= 0 for length in shape) or math.prod(shape) != num_items:
        raise ValueError(f"the shape {shape} does not fit {num_items} items")
    return shape


def _num_items(content: bytes, itemsize: int, fields: Mapping[str, Any]) -> int:
    if itemsize == 0:  # an array of empty strings has no bytes
        num_items = math.prod(fields["shape"])
        if content or num_items > _MOST_EMPTY_ITEMS:
            raise ValueError(f"{num_items} items without a byte are too many")
        return num_items
    if len(content) % itemsize:
        raise ValueError(f"{len(content)} bytes are no whole number of items of {itemsize} bytes")
    return len(content) // itemsize


def _check_booleans(content: bytes) -> None:
    if content.translate(None, b"\0\1"):
        raise ValueError("a boolean is neither true nor false")


# Dates and times


def zone_of(value: dt.datetime | dt.time) -> dict[str, Any]:
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
    if value.tzinfo is not None and "zone" in (zone := zone_of(value)):
        fields |= zone
    return fields | {"fold": 1} if value.fold else fields


def time_codec(kind: type[dt.datetime] | type[dt.time]) -> Codec:
    def value_of(fields: dict[str, Any]) -> Any:
        value = kind.fromisoformat(fields["value"]).replace(fold=fields.get("fold", 0))
        return value.replace(tzinfo=ZoneInfo(fields["zone"])) if "zone" in fields else value

    return Codec(kind.__name__, _time_fields, value_of)


TIMEDELTA = Codec(
    "timedelta",
    lambda value, column: {"value": [value.days, value.seconds, value.microseconds]},
    lambda fields: dt.timedelta(*fields["value"]),
)


def list_of(fields: Mapping[str, Any]) -> list[Any]:
    items = fields["value"]
    if not isinstance(items, list):
        raise TypeError(f"{items!r} is no list")
    return items


# NumPy


def dtype_to_json(dtype: np.dtype[Any]) -> Any:
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
        if not _DTYPE_TEXT.fullmatch(described):
            raise ValueError(f"{described[:40]!r} is no dtype")
        dtype = np.dtype(described)
    else:
        dtype = np.lib.format.descr_to_dtype([field(part) for part in described])
    if dtype.hasobject:
        raise ValueError(f"{described} holds objects")
    return dtype


def _array_fields(value: Any, column: str | None) -> dict[str, Any]:
    array = np.asarray(value)
    return {"dtype": dtype_to_json(array.dtype), "shape": array.shape, "value": to_base64(_content(array))}


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
    dtype, content = _dtype_from_json(fields["dtype"]), bytes_of(fields)
    shape = shape_of(fields, _num_items(content, dtype.itemsize, fields))
    if dtype.kind == "b":
        _check_booleans(content)
    if dtype.kind == "U" and np.frombuffer(content, f"{dtype.byteorder}u4").max(initial=0) > sys.maxunicode:
        raise ValueError("a number stands for no character")
    return np.ndarray(shape, dtype, buffer=bytearray(content))


def _scalar_of(fields: dict[str, Any]) -> Any:
    return _array_of(fields | {"shape": ()})[()]


def object_array(items: list[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array.reshape(shape)


def _string_array_of(fields: dict[str, Any]) -> np.ndarray[Any, Any]:
    items = list_of(fields)
    if not all(isinstance(item, str) for item in items):
        raise TypeError("an item is no text")
    return np.array(items, dtype=np.dtypes.StringDType()).reshape(shape_of(fields, len(items)))


SCALAR = Codec("numpy_scalar", lambda value, column: {**_array_fields(value, column), "shape": []}, _scalar_of)
ARRAY = Codec("numpy_array", _array_fields, _array_of)
STRING_ARRAY = Codec(
    "numpy_strings", lambda value, column: {"shape": value.shape, "value": value.flatten().tolist()}, _string_array_of
)


# torch, which is never imported here


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and type(value) is getattr(torch, "Tensor", None)


def is_dense(tensor: Any) -> bool:
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
    return {"dtype": name, "shape": list(value.shape), "value": to_base64(content)}


def _tensor_of(fields: dict[str, Any]) -> Any:
    torch, name, content = sys.modules.get("torch"), fields["dtype"], bytes_of(fields)
    if name == "bool":
        _check_booleans(content)
    if torch is None:
        return _tensor_as_array(fields, content)
    dtype = getattr(torch, name) if _TENSOR_DTYPE.fullmatch(name) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"torch.{name} is no dtype")
    shape = shape_of(fields, _num_items(content, dtype.itemsize, fields))
    # `frombuffer` takes no empty one.
    flat = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    tensor = flat.view(dtype).reshape(shape)
    if not is_dense(tensor):
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
    return array.reshape(shape_of(fields, array.size))


TENSOR = Codec("tensor", _tensor_fields, _tensor_of)


# pandas, which datasets depends on, and which is imported only to bring its own values back


def _pandas_fields(value: Any, column: str | None) -> dict[str, Any]:
    exact = value.asm8  # UTC
    fields = {"unit": np.datetime_data(exact.dtype)[0], "value": int(exact.astype(np.int64))}
    return fields if getattr(value, "tzinfo", None) is None else fields | zone_of(value)


def _timestamp_of(fields: dict[str, Any]) -> Any:
    import pandas

    stamp = pandas.Timestamp(np.datetime64(fields["value"], fields["unit"]))
    zone = _zone_from(fields)
    return stamp if zone is None else stamp.tz_localize("UTC").tz_convert(zone)


def _pandas_timedelta_of(fields: dict[str, Any]) -> Any:
    import pandas

    return pandas.Timedelta(np.timedelta64(fields["value"], fields["unit"]))


def _missing_codec(name: str) -> Codec:
    def value_of(fields: dict[str, Any]) -> Any:
        import pandas

        return getattr(pandas, name)

    return Codec(f"pandas_{name}", lambda value, column: {}, value_of)


TIMESTAMP = Codec("pandas_Timestamp", _pandas_fields, _timestamp_of)
PANDAS_TIMEDELTA = Codec("pandas_Timedelta", _pandas_fields, _pandas_timedelta_of)
NAT, NA = _missing_codec("NaT"), _missing_codec("NA")
