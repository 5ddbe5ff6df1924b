"""Wrong values of every kind: JSON literals, texts of encoded rows, columns of tables."""

import base64
import json
import math

import pyarrow as pa

INTEGERS = [
    0,
    -1,
    1,
    2,
    7,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
]
NUMBERS = [math.inf, -math.inf, math.nan, 0.5, -0.0, 1e308, -1e308, 5e-324, 1e-4, 2e-4, -3.5e38]
STRINGS = [
    "",
    " ",
    "q0",
    "\0",
    "\x1b[2J\x1b]0;x\x07",
    "\ud800",
    "[red]x[/red]",
    "../../x",
    "x" * 10**4,
    "ü\u202e",
    "1",
]
DEEP = [100, 300, 900, 990, 10**5]


def json_literal(chance, depth=0):
    """Text of a JSON value that is hardly ever right."""
    roll = chance.random()
    if roll < 0.3:
        return str(chance.choice(INTEGERS))
    if roll < 0.4:
        return chance.choice(["1e400", "-1e400", "NaN", "Infinity", "-Infinity", "0.5", "1.0", "-0", "1" + "0" * 5000])
    if roll < 0.5:
        return chance.choice(["null", "true", "false"])
    if roll < 0.65:
        return json.dumps(chance.choice(STRINGS))
    if roll < 0.75:
        levels = chance.choice(DEEP)
        opened, closed = chance.choice([("[", "]"), ('{"a": ', "}")])
        return opened * levels + "1" + closed * levels
    if roll < 0.78:
        return chance.choice(["", "{", "]", "\x00", "'", "undefined", "ü"])
    if depth > 2:
        return "[]"
    items = [json_literal(chance, depth + 1) for _ in range(chance.randrange(4))]
    if roll < 0.88:
        return f"[{', '.join(items)}]"
    keys = ["state", "inc", "bytes", "sha256", "group_size", "__exgrpo_type__", "a"]
    return "{" + ", ".join(f"{json.dumps(chance.choice(keys))}: {item}" for item in items) + "}"


_CODECS = [
    "bytes", "complex", "Decimal", "datetime", "time", "date", "timedelta", "dict", "image", "image_reference",
    "tuple", "set", "frozenset", "numpy_str", "numpy_bytes", "numpy_scalar", "numpy_array", "numpy_objects",
    "numpy_strings", "tensor", "pandas_Timestamp", "pandas_Timedelta", "pandas_NaT", "pandas_NA", "pickle",
    "__reduce__",
]  # fmt: skip
_DTYPES = [
    "<f4", "|O", "|V0", "<U0", "<U1", "<U99999999", "|S2147483647", "M8[ns]", "|b1", "g", "<c16", "O", "f4,O",
    "bfloat16", "load", "_C", "qint8", [["a", "<f4"], ["b", "|O"]], [["a", "<i8", [2**40]]], 5, None,
    "V" + "9" * 20, "(2,)f4", ",",
]  # fmt: skip
_VALUES = [
    base64.b64encode(bytes(8)).decode(), "", "=", "A" * 7, [], [1, 2], [[1], 2], [[[], 1]], "1e999999999", "sNaN",
    "NaN", "2024-01-01", "9999-12-31T23:59:59.999999+23:59", "0001-01-01T00:00:00-23:59", [10**9, 0, 0],
    [1e308, 1e308, 1e308], [math.inf, 0, 0], 2**63, -(2**63), 10**400, None, True, {"a": 1}, "\ud800", "x\0y",
]  # fmt: skip
_SHAPES = [
    [],
    [0],
    [2],
    [1, 2],
    [2**62, 4],
    [2**63],
    [-1],
    [0, 2**62],
    [0, 2**63],
    [1] * 65,
    "2",
    None,
    [True],
    [2.0],
    {},
]
_ZONES = [
    "UTC",
    "../../../../etc/passwd",
    "/etc/passwd",
    "\0",
    "",
    "Europe/Berlin",
    "x" * 5000,
    "\ud800",
    5,
    None,
    ".",
]


def encoded_value(chance):
    """What stands for a value that is not plain JSON, with wrong fields."""
    fields = {"__exgrpo_type__": chance.choice(_CODECS), "value": chance.choice(_VALUES)}
    for name, options in (
        ("dtype", _DTYPES),
        ("shape", _SHAPES),
        ("zone", _ZONES),
        ("unit", ["ns", "s", "Y", "x", "", 5, None, "[ns]", "10ns"]),
        ("offset", INTEGERS),
        ("fold", [0, 1, 2, 2**64, None]),
        ("digest", ["", "x", None, "\x1b[2J", [1]]),
    ):
        if chance.random() < (0.7 if name in ("dtype", "shape") else 0.3):
            fields[name] = chance.choice(options)
    if chance.random() < 0.2:
        fields["value"] = [encoded_value(chance), encoded_value(chance)]
    if chance.random() < 0.05:
        del fields["value"]
    return fields


def hostile_text(chance, before):
    """JSON of a row, of messages or of rewards that is hardly ever right."""
    roll = chance.random()
    if roll < 0.4:
        prompt = chance.choice(['"a"', "null", '[{"role": "user", "content": "a"}]'])
        return f'{{"prompt": {prompt}, "answer": {json.dumps(encoded_value(chance))}}}'
    if roll < 0.7:
        literal = json_literal(chance)
        return chance.choice(
            [f'{{"prompt": {literal}}}', f'{{"prompt": "a", "b": {literal}}}', f'{{"correct": {literal}}}', literal]
        )
    if roll < 0.8:
        levels = chance.choice(DEEP)
        inner = '{"__exgrpo_type__": "tuple", "value": ['
        return '{"prompt": "a", "b": ' + inner * levels + "]}" * levels + "}"
    if roll < 0.9 and isinstance(before, str) and before:
        at = chance.randrange(len(before))
        return before[:at] + chance.choice(["", "\0", '"', "}", "]", "\\", "ü", "9" * 5000]) + before[at + 1 :]
    return chance.choice(["", "null", "[]", "{}", "1", '"x"', '{"prompt": 1}', '[["a"]]', '[{"role": 5}]', '{"": {}}'])


def hostile_column(chance, field, values):
    """A column of a table, changed in some rows or as a whole: its field and array."""
    roll = chance.random()
    if roll < 0.15:
        kind = chance.choice(
            [pa.int32(), pa.int64(), pa.float64(), pa.string(), pa.large_list(pa.int64()), pa.bool_(), pa.null()]
        )
        array = (
            pa.nulls(len(values), kind)
            if chance.random() < 0.5
            else pa.array([_any(chance, kind)] * len(values), kind)
        )
        return pa.field(field.name, kind), array
    changed = list(values)
    for at in range(len(changed)) if roll < 0.3 else [chance.randrange(len(changed))] if changed else []:
        changed[at] = chance.choice([*values, None]) if chance.random() < 0.4 else _any(chance, field.type)
    return field, pa.array(changed, field.type)


def _any(chance, kind):
    """A value of a type, at the end of its range as often as not."""
    if pa.types.is_integer(kind):
        bound = 2 ** (kind.bit_width - 1)
        return chance.choice([number for number in INTEGERS if -bound <= number < bound])
    if pa.types.is_floating(kind):
        numbers = [*NUMBERS, -0.5, 0.0]
        return chance.choice(numbers if kind.bit_width == 64 else [max(min(n, 3e38), -3.4e38) for n in numbers])
    if pa.types.is_boolean(kind):
        return chance.choice([True, False])
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return chance.choice([b"", b"x", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_any(chance, kind.value_type) for _ in range(chance.randrange(4))]
    if pa.types.is_struct(kind):
        names = [kind.field(index) for index in range(kind.num_fields)]
        return {each.name: _any(chance, each.type) for each in names if chance.random() < 0.8}
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return chance.choice([text for text in STRINGS if text != "\ud800"])
    return None
