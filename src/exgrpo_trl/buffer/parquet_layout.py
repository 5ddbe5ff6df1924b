"""
What a Parquet file declares, looked at before Arrow allocates anything for it.

Only the layout that buffers are written in is read: each value of a page takes its bytes in it, so that what is
declared is what will be decoded. Dictionaries, differences and other ways by which a few bytes become billions of rows
are refused, and so is what refers to other files, is encrypted, or lies anywhere twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from . import thrift

MAGIC = b"PAR1"
_MOST_SCHEMA_ELEMENTS = 200
# Of a page; ours have about 30.
_HEADER_BYTES = 512
_CODECS = {0: "none", 6: "zstd"}
_DATA_PAGE = 0
_PLAIN, _RLE, _BYTE_STREAM_SPLIT = 0, 3, 9
# Levels of nesting and the slot of a null, which pages hold in runs.
_BYTES_PER_VALUE = 8


class Layout(NamedTuple):
    """What a file holds: rows, and about how many bytes they take in memory."""

    num_rows: int
    num_bytes: int


def layout_of(file: Path, spend: Callable[[int], None] = lambda num_bytes: None) -> Layout:
    """
    Check what a file declares.

    Args:
        file (`Path`):
            Parquet file.
        spend (`Callable`):
            Told of the bytes of every page before the next is looked at; raises where it is too much.

    Raises:
        ValueError: if the file is not one that [`ExperienceBuffer.save`] writes.
    """
    with open(file, "rb") as content:
        size = content.seek(0, os.SEEK_END)
        footer, start = _footer(content, size)
        num_rows, num_bytes, position = None, 0, len(MAGIC)
        in_groups = 0
        for number, value in _file_metadata(footer):
            if number == 3:
                num_rows = thrift.integer(value, "rows")
            elif number == 4:
                group_rows = thrift.integer(value.get(3), "rows of a row group")
                in_groups += group_rows
                for chunk in thrift.items(value.get(1), "columns of a row group"):
                    position, num_of_chunk = _check_chunk(content, chunk, group_rows, position, start, spend)
                    num_bytes += num_of_chunk
        if num_rows != in_groups:
            raise ValueError(f"it declares {num_rows} rows and has {in_groups}")
    return Layout(in_groups, num_bytes)


def _footer(content: BinaryIO, size: int) -> tuple[bytes, int]:
    """The footer of a file, and where it starts."""
    content.seek(max(size - 8, 0))
    tail = content.read(8)
    content.seek(0)
    if size < 12 or tail[4:] != MAGIC or content.read(4) != MAGIC:
        raise ValueError("it is no Parquet file, or not all of one")
    length = int.from_bytes(tail[:4], "little")
    start = size - 8 - length
    if start < len(MAGIC):
        raise ValueError(f"its footer declares {length} bytes, more than the file has")
    content.seek(start)
    return content.read(length), start


def _file_metadata(footer: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of the footer; of row groups (4) one after the other."""
    for number, kind, reader in thrift.fields(footer):
        if number == 2:
            count = reader.list_length(kind)
            if count > _MOST_SCHEMA_ELEMENTS:
                raise ValueError(f"its schema has {count} elements")
            for _ in range(count):
                reader.struct()
        elif number == 4:
            for _ in range(reader.list_length(kind)):
                yield number, reader.struct()
        elif number in (8, 9):
            raise ValueError("it is encrypted")
        else:
            yield number, reader.value(kind)


def _check_chunk(
    content: BinaryIO, chunk: Any, num_rows: int, after: int, end: int, spend: Callable[[int], None]
) -> tuple[int, int]:
    """Check a column of a row group; returns where it ends, and how many bytes it takes in memory."""
    about = chunk.get(3) if isinstance(chunk, dict) else None
    if not isinstance(about, dict) or not {2, 3}.issuperset(chunk):
        raise ValueError("a column refers to another file, is encrypted or indexed")
    if about.get(4) not in _CODECS:
        raise ValueError(f"a column is compressed in another way than by {' or '.join(_CODECS.values())}")
    if 10 in about or 11 in about:
        raise ValueError("a column is encoded with a dictionary, which buffers never are")
    num_values = thrift.integer(about.get(5), "values of a column")
    path = thrift.items(about.get(3), "names of a column")
    if num_values < num_rows or (len(path) == 1 and num_values != num_rows):
        raise ValueError(f"a column has {num_values} values for {num_rows} rows")
    length = thrift.integer(about.get(7), "bytes of a column")
    if not num_values and not length:  # is nowhere
        return after, 0
    start = thrift.integer(about.get(9), "as the offset of a column")
    if start < after or start + length > end:
        raise ValueError("a column lies outside of its file, or over another one")
    num_found = num_bytes = 0
    position = start
    while position < start + length:
        content.seek(position)
        header, header_length = thrift.struct(content.read(min(_HEADER_BYTES, start + length - position)))
        of_values, stored, decoded = _checked_page(header, is_compressed=about[4] != 0)
        page_bytes = decoded + _BYTES_PER_VALUE * of_values
        spend(page_bytes)
        num_found, num_bytes = num_found + of_values, num_bytes + page_bytes
        position += header_length + stored
    if position != start + length or num_found != num_values:
        raise ValueError(f"the pages of a column hold {num_found} of {num_values} values, or end elsewhere")
    return position, num_bytes


def _checked_page(header: dict[int, Any], *, is_compressed: bool) -> tuple[int, int, int]:
    """Values of a page, and its bytes in the file and in memory."""
    about = header.get(5)
    if header.get(1) != _DATA_PAGE or not isinstance(about, dict) or 7 in header or 8 in header:
        raise ValueError("a page is encoded with a dictionary or in another way that buffers never are")
    if about.get(2) not in (_PLAIN, _BYTE_STREAM_SPLIT) or about.get(3) != _RLE or about.get(4) != _RLE:
        raise ValueError("a page is encoded in a way that buffers never are")
    decoded = thrift.integer(header.get(2), "bytes of a page")
    stored = thrift.integer(header.get(3), "bytes of a page")
    if not is_compressed and decoded != stored:
        raise ValueError(f"a page declares {decoded} bytes and has {stored}")
    return thrift.integer(about.get(1), "values of a page"), stored, decoded
