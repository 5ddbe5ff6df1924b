"""Parquet files written byte by byte, so that they can declare what no library writes."""

from rewriting import seal

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12


def varint(number):
    content = bytearray()
    while number > 127:
        content.append(number & 127 | 128)
        number >>= 7
    return bytes([*content, number])


def encoded(kind, value):
    """A value in the compact protocol of Thrift; structs are `{number: (kind, value)}`, lists `(kind, items)`."""
    if kind in (I32, I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == BINARY:
        return varint(len(value)) + value
    if kind == LIST:
        of, items = value
        head = bytes([len(items) << 4 | of]) if len(items) < 15 else bytes([0xF0 | of]) + varint(len(items))
        return head + b"".join(encoded(of, item) for item in items)
    content, before = b"", 0
    for number, (of, item) in value.items():
        content += bytes([(number - before) << 4 | of]) + encoded(of, item)
        before = number
    return content + b"\0"


def page(values=(b"a", b"b"), *, num_values=None, decoded=None, encoding=0, kind=0, levels=None, **more):
    """A page of texts, none of them null, with its header."""
    count = len(values) if num_values is None else num_values
    levels = varint(len(values) << 1) + b"\1" if levels is None else levels
    content = len(levels).to_bytes(4, "little") + levels
    content += b"".join(len(value).to_bytes(4, "little") + value for value in values)
    about = {1: (I32, count), 2: (I32, encoding), 3: (I32, 3), 4: (I32, 3)}
    header = {1: (I32, kind), 2: (I32, len(content) if decoded is None else decoded), 3: (I32, len(content))}
    return encoded(STRUCT, header | {5: (STRUCT, about)} | more) + content


def retired_file(
    pages=None, *, num_rows=2, group_rows=None, num_values=None, schema=None, about=None, chunk=None, groups=1,
    footer=b"", metadata=None,
):  # fmt: skip
    """A file with the column of retired ids; by default a right one of the rows "a" and "b"."""
    pages = page() if pages is None else pages
    group_rows = num_rows if group_rows is None else group_rows
    column = {
        1: (I32, 6),
        2: (LIST, (I32, [0, 3])),
        3: (LIST, (BINARY, [b"question_id"])),
        4: (I32, 0),
        5: (I64, group_rows if num_values is None else num_values),
        6: (I64, len(pages)),
        7: (I64, len(pages)),
        9: (I64, 4),
        **(about or {}),
    }
    column = dict(sorted(column.items()))
    chunk = dict(sorted({2: (I64, 4), 3: (STRUCT, column), **(chunk or {})}.items()))
    group = {1: (LIST, (STRUCT, [chunk])), 2: (I64, len(pages)), 3: (I64, group_rows)}
    root = {4: (BINARY, b"schema"), 5: (I32, 1)}
    leaf = {1: (I32, 6), 3: (I32, 1), 4: (BINARY, b"question_id"), 6: (I32, 0)}
    content = {
        1: (I32, 2),
        2: (LIST, (STRUCT, [root, leaf] if schema is None else schema)),
        3: (I64, num_rows),
        4: (LIST, (STRUCT, [group] * groups)),
        **(metadata or {}),
    }
    footer = encoded(STRUCT, content)[:-1] + footer + b"\0"
    return b"PAR1" + pages + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def put(path, name, content):
    """Put a file into a saved buffer, with checksums that match."""
    (path / name).write_bytes(content)
    seal(path)
