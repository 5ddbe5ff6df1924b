"""The compact protocol of Thrift, in which Parquet files say what is in them; strict, and within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# A footer of a buffer has about 30 of them for each column of a row group, one row group at a time.
_MOST_VALUES = 20_000
_MOST_LEVELS = 12
_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)


class Reader:
    """
    Reads values one after the other.

    Args:
        content (`bytes`):
            What is read.
    """

    __slots__ = ("_content", "_num_left", "position")

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._num_left = _MOST_VALUES
        self.position: int = 0

    def fields(self) -> Iterator[tuple[int, int]]:
        """Number and type of each field of a struct; its value has to be read before the next one."""
        number = 0
        while head := self.byte():
            # In the place of the difference to the number before it, 0 announces a number of its own, which ours need
            # never. Numbers that do not grow would be read twice.
            if not head >> 4:
                raise ValueError("its header is malformed: a field is out of order")
            number += head >> 4
            yield number, head & 15

    def struct(self) -> dict[int, Any]:
        """A struct by the numbers of its fields."""
        self._num_left = _MOST_VALUES
        return self._struct(0)

    def value(self, kind: int) -> Any:
        """A value of a type."""
        self._num_left = _MOST_VALUES
        return self._value(kind, 0)

    def list_length(self, kind: int) -> int:
        """Length of a list of structs, whose items have to be read next."""
        if kind != _LIST:
            raise ValueError("its header is malformed: a list is none")
        length, item_kind = self._list_head()
        if item_kind != _STRUCT and length:
            raise ValueError("its header is malformed: a list holds something else")
        return length

    def byte(self) -> int:
        """The next byte."""
        if self.position >= len(self._content):
            raise ValueError("its header is malformed: it ends too early")
        self.position += 1
        return self._content[self.position - 1]

    def _struct(self, level: int) -> dict[int, Any]:
        return {number: self._value(kind, level + 1) for number, kind in self.fields()}

    def _value(self, kind: int, level: int) -> Any:
        self._num_left -= 1
        if level > _MOST_LEVELS or self._num_left < 0:
            raise ValueError("its header is malformed: it is nested too deeply, or holds too much")
        if kind in _INTEGERS:
            number = self._varint()
            return (number >> 1) ^ -(number & 1)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if kind == _STRUCT:
            return self._struct(level)
        if kind in (_LIST, _SET):
            length, item_kind = self._list_head()
            # In lists, a truth value takes a byte.
            item_kind = _BYTE if item_kind in (_TRUE, _FALSE) else item_kind
            return [self._value(item_kind, level + 1) for _ in range(length)]
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_BYTE, _DOUBLE):
            return self._bytes(1 if kind == _BYTE else 8)
        raise ValueError(f"its header is malformed: there is no type {kind}")

    def _list_head(self) -> tuple[int, int]:
        head = self.byte()
        length = head >> 4 if head >> 4 < 15 else self._varint()
        if length > len(self._content) - self.position:
            raise ValueError(f"its header is malformed: it declares a list of {length} items")
        return length, head & 15

    def _bytes(self, length: int) -> bytes:
        if length > len(self._content) - self.position:
            raise ValueError(f"its header is malformed: it declares a text of {length} bytes")
        self.position += length
        return self._content[self.position - length : self.position]

    def _varint(self) -> int:
        number = shift = 0
        while True:
            byte = self.byte()
            number |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
        if number >= 2**64 or shift > 63:
            raise ValueError("its header is malformed: a number has more than 64 bits")
        return number


def fields(content: bytes) -> Iterator[tuple[int, int, Reader]]:
    """Fields of a struct, each with its type and a reader that stands at its value."""
    reader = Reader(content)
    for number, kind in reader.fields():
        yield number, kind, reader
    if reader.position != len(content):
        raise ValueError("its header is malformed: something follows it")


def struct(content: bytes) -> tuple[dict[int, Any], int]:
    """The struct at the start of `content`, and its length."""
    reader = Reader(content)
    return reader.struct(), reader.position


def integer(value: Any, what: str) -> int:
    """A number that cannot be negative."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"its header is malformed: it declares {value!r} {what}")
    return value


def items(value: Any, what: str) -> list[Any]:
    """A list."""
    if not isinstance(value, list):
        raise ValueError(f"its header is malformed: it has no {what}")
    return value
