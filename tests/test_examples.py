import copy
import datetime as dt
import enum
import json
import math
import subprocess
import sys
from collections import OrderedDict, namedtuple
from decimal import Decimal
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
import torch
from same_values import object_array, same

from exgrpo_trl.examples import decode_example, encode_example, question_id_of, question_of_row


def test_question_id_depends_on_the_prompt_only():
    conversation = [{"role": "user", "content": "2 + 2?"}]
    ids = [
        question_id_of(prompt)
        for prompt in ("2 + 2?", "2 + 2? ", conversation, [*conversation, {"role": "user", "content": ""}], "ü", "")
    ]
    assert len(set(ids)) == len(ids)
    assert all(len(question_id) == 32 and int(question_id, 16) >= 0 for question_id in ids)
    assert question_id_of([{"content": "2 + 2?", "role": "user"}]) == question_id_of(conversation)
    # Fixed for good: a saved buffer must find its questions again.
    assert question_id_of("2 + 2?") == "c8b1ddca44974f9c48d30aed533d9f68"


def test_question_id_refuses():
    with pytest.raises(TypeError, match="NoneType"):
        question_id_of(None)
    with pytest.raises(TypeError, match=r"prompt.*object"):
        question_id_of([{"role": "user", "content": object()}])


@pytest.mark.parametrize("prompt", [np.str_("2 + 2?"), np.array("2 + 2?")], ids=["scalar", "array"])
def test_a_formatted_prompt_has_the_id_of_the_plain_one(prompt):
    assert question_id_of(prompt) == question_id_of("2 + 2?")


@pytest.mark.parametrize("collect", [tuple, lambda messages: object_array(*messages)], ids=["tuple", "array"])
def test_formatted_messages_have_the_id_of_the_plain_ones(collect):
    image, text = {"type": "image"}, {"type": "text", "text": "2 + 2?", "weights": [1, 2], "flag": True}
    system = {"role": "system", "content": "Count."}
    messages = [system, {"role": "user", "content": [image, text]}]
    formatted_text = {"type": np.str_("text"), "text": np.str_("2 + 2?"), "flag": np.bool_(True)}
    for weights in (torch.tensor([1, 2]), np.array([1, 2]), (1, 2), [np.int64(1), torch.tensor(2)]):
        content = collect([image, formatted_text | {"weights": weights}])
        formatted = collect([{np.str_("role"): "system", "content": "Count."}, {"role": "user", "content": content}])
        assert question_id_of(formatted) == question_id_of(messages)
    assert question_id_of(collect([system])) == question_id_of([system])


def test_example_round_trip_is_exact():
    example = {
        "prompt": [{"role": "user", "content": "a\n\u2028\ud800 ü 😀"}],
        "numbers": [0, -1, 10**40, True, False, None, 0.1, -0.0, 1e-320, math.nan, math.inf, -math.inf],
        "nested": {"a": {"b": [[], {}, ""]}, "": [{"c": b"\x00\xff"}]},
        "when": dt.datetime(2026, 2, 28, 23, 59, 58, 7),
        "zoned": dt.datetime(2026, 2, 28, tzinfo=dt.timezone(dt.timedelta(hours=-3))),
        "day": dt.date(1, 1, 1),
        "bytes": b"",
        "looks_tagged": {"__exgrpo_type__": "date", "value": "2020-01-01", "x": b"y"},
        "__exgrpo_type__": "bytes",
        "value": "AA==",
    }
    assert same(decode_example(encode_example(example)), example)


PARIS = ZoneInfo("Europe/Paris")
VALUES = {
    "timedelta": [dt.timedelta(0), dt.timedelta.min, dt.timedelta.max, -dt.timedelta(microseconds=1)],
    "time": [dt.time(12, 30, 1, 7), dt.time(0, tzinfo=dt.UTC), dt.time(3, tzinfo=PARIS), dt.time(2, 30, fold=1)],
    "datetime": [
        dt.datetime(2026, 7, 1, tzinfo=PARIS),
        *(dt.datetime(2025, 10, 26, 2, 30, tzinfo=PARIS, fold=fold) for fold in (0, 1)),
        dt.datetime(2026, 7, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3, seconds=1, microseconds=1))),
    ],
    "Decimal": [Decimal(text) for text in ("1.50", "-0", "0E-30", "NaN", "-sNaN12", "-Infinity", f"1.{'3' * 60}e99")],
    "complex": [1j, complex(-0.0, math.nan)],
    "tuple": [(), (1,), ((), [(b"x", None)])],
    "set": [set(), {1, "a", (2, 3)}, frozenset({frozenset(), "b"}), {Decimal(1), 2.5, None, b"c"}],
    "dict": [{1: "a", 2.5: "b", None: "c", (1, 2): "d", "e": 0}, {True: {False: ()}}, {"__exgrpo_type__": 1, 2: (3,)}],
    "numpy scalars": [
        np.dtype(kind).type(value)
        for kind, value in [
            *((kind, 7) for kind in "bhilqBHILQ"),
            *((kind, 0.1) for kind in "efdgFDG"),
            *((kind, -math.nan) for kind in "efdg"),
            *((kind, True) for kind in "?"),
        ]
    ]
    + [np.str_("a\0\ud800"), np.str_(""), np.bytes_(b"a\0"), np.void(b"abc")]
    + [np.datetime64("2020-01-01T00:00:00.000000001"), np.datetime64("NaT"), np.datetime64("2020")]
    + [np.timedelta64(3, "m")]
    + [np.array((1, "x"), dtype=[("a", ">i4"), ("b", "U3")])[()]],
    "numpy arrays": [
        *(np.arange(6).reshape(2, 3).astype(kind) for kind in "?bhilqBHILQefdgFDG"),
        np.zeros((0, 3)),
        np.zeros((2, 0), dtype="U0"),
        np.array(5),
        np.array([["a\u2028", "bcd"], ["", "\U0001f600"]]),
        np.array([b"a", b"\0b"]),
        np.array([1, 2], dtype=">u2"),
        np.array(["NaT", "2020-01-01"], dtype="M8[25us]"),
        np.arange(3).astype("m8[ns]"),
        np.arange(24.0, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)[::-2],
        np.zeros((2, 2), dtype=np.dtype([("a", "i1"), ("b", "f8", (2, 3)), ("c", [("d", "M8[s]")])], align=True)),
        np.zeros(1, dtype=[(("title", "a"), "i4")]),
    ],
    "object arrays": [
        np.array(dt.time(1), dtype=object),
        object_array([1], [2], np.zeros(2), np.zeros(2), None),
        object_array(np.array(True), None),
        object_array(torch.ones(2), torch.ones(2), {"a": (1,)}),
        np.array([[Decimal(1), "a"], [None, {1: 2}]], dtype=object),
        np.zeros((0, 2), dtype=object),
    ],
    "tensors": [
        torch.tensor(3),
        torch.tensor(True),
        torch.zeros(2, 0),
        torch.tensor([math.nan, -0.0, math.inf], dtype=torch.bfloat16),
        torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)[:, 1],
        torch.ones(1).expand(3, 2),
        torch.ones(()).expand(1),
        torch.tensor([1 + 2j]).conj(),
        *(
            torch.arange(6, dtype=torch.uint8).reshape(2, 3).to(getattr(torch, dtype))
            for dtype in (
                "bool", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32",
                "float64", "bfloat16", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2",
            )
        ),
    ],
    "pandas": [
        pd.NaT,
        pd.NA,
        pd.Timestamp("2020-01-01 00:00:00.123456789"),
        *(pd.Timestamp(f"2025-10-26 {hour}:30").tz_localize("UTC").tz_convert(PARIS) for hour in ("00", "01")),
        pd.Timestamp("2020-01-01", tz="UTC"),
        pd.Timestamp("9999-01-01").as_unit("s"),
        pd.Timedelta("-1 days 00:00:00.000000001"),
        pd.Timedelta(3, "D").as_unit("s"),
    ],
}  # fmt: skip
if hasattr(np.dtypes, "StringDType"):
    VALUES["numpy arrays"].append(np.array([["a\0", ""]], dtype=np.dtypes.StringDType()))


@pytest.mark.skipif(np.finfo(np.longdouble).nmant != 63, reason="no floats of 80 bits here")
@pytest.mark.parametrize("dtype", ["longdouble", "clongdouble", ">f16"])
def test_what_pads_a_float_of_80_bits_is_no_part_of_it(dtype):
    value = np.array([0.1, -2.5], dtype=dtype)
    padded = value.copy()
    items = padded.view(np.uint8).reshape(-1, np.dtype(np.longdouble).itemsize)
    items[:, slice(10, None) if value.dtype.isnative else slice(0, 6)] = 77
    assert (padded == value).all()
    assert encode_example({"prompt": "a", "x": padded}) == encode_example({"prompt": "a", "x": value})
    assert (decode_example(encode_example({"prompt": "a", "x": value}))["x"] == value).all()


@pytest.mark.parametrize("kind", VALUES)
def test_values_come_back_with_their_types(kind):
    for value in VALUES[kind]:
        row = {"prompt": "a", "column": value, "nested": [{"deep": ([value], {"deeper": (value,)})}]}
        text = encode_example(row)
        assert same(decode_example(text), row), repr(value)
        assert encode_example(decode_example(text)) == text
        question = question_of_row(row, "q")
        assert same(question.example, row), repr(value)
        assert same(copy.deepcopy(question.example), row), repr(value)


def test_rows_without_tensors_import_neither_torch_nor_pandas():
    code = """
import sys, datetime, decimal, numpy as np
from exgrpo_trl.examples import decode_example, encode_example, question_id_of, question_of_row
row = {"prompt": "a", "x": [(np.arange(3), np.str_("b"), decimal.Decimal(1)), {1: datetime.time(1)}, {2, 3}]}
assert repr(decode_example(encode_example(row))) == repr(row) == repr(question_of_row(row, 'q').example)
question_id_of([{"role": "user", "content": np.str_("a")}])
print({"torch", "pandas"} & set(sys.modules))
"""
    assert in_a_new_process(code) == "set()"


def in_a_new_process(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_tensors_are_arrays_where_torch_is_not_imported():
    row = {
        "prompt": "a",
        "int": torch.tensor([[1, 2]]),
        "bool": torch.tensor(True),
        "bfloat16": torch.tensor([0.1, -math.inf], dtype=torch.bfloat16),
        "float8": torch.ones(2, 3).to(torch.float8_e4m3fn),
        "empty": torch.zeros(0, 3),
    }
    code = """
import sys
from exgrpo_trl.examples import decode_example
row = decode_example(sys.argv[1])
print({name: (str(value.dtype), value.shape, value.tolist()) for name, value in row.items() if name != "prompt"})
print("torch" in sys.modules)
"""
    printed, is_torch_imported = in_a_new_process(code, encode_example(row)).splitlines()
    assert is_torch_imported == "False"
    as_float32 = row["bfloat16"].float()
    assert printed == repr(
        {
            "int": ("int64", (1, 2), [[1, 2]]),
            "bool": ("bool", (), True),
            "bfloat16": ("float32", (2,), as_float32.tolist()),
            "float8": ("|V1", (2, 3), [[b"8"] * 3] * 2),
            "empty": ("float32", (0, 3), []),
        }
    )


def test_a_question_shares_no_memory_with_its_row():
    batch = torch.arange(1000.0)
    structure = np.array([(1,)], dtype=[("a", "i4")])
    row = {"prompt": "a", "x": batch[:2], "y": ({"z": [np.arange(3)]}, object_array([1])), "v": structure[0]}
    question = question_of_row(row, "q")
    row["x"].fill_(-1)
    row["y"][0]["z"][0][:] = -1
    row["y"][1][0].append(-1)
    structure["a"] = -1
    x, (y, objects), v = (question.example[name] for name in "xyv")
    assert x.tolist() == [0, 1]
    assert x.untyped_storage().nbytes() == 8, "a view would keep the whole batch alive"
    assert y["z"][0].tolist() == [0, 1, 2]
    assert objects.tolist() == [[1]]
    assert v["a"] == 1


def test_the_text_of_plain_values_stays_what_it_was():
    """Checkpoints of all versions hold such text."""
    row = {
        "prompt": "a",
        "d": dt.datetime(2026, 2, 28, 1, tzinfo=dt.timezone(dt.timedelta(hours=-3))),
        "b": [b"x", dt.date(1, 1, 1)],
        "t": {"__exgrpo_type__": "date", "x": 1},
    }
    assert encode_example(row) == (
        '{"prompt": "a", "d": {"__exgrpo_type__": "datetime", "value": "2026-02-28T01:00:00-03:00"}, '
        '"b": [{"__exgrpo_type__": "bytes", "value": "eA=="}, {"__exgrpo_type__": "date", "value": "0001-01-01"}], '
        '"t": {"__exgrpo_type__": "dict", "value": [["__exgrpo_type__", "date"], ["x", 1]]}}'
    )


def test_the_text_of_a_set_does_not_depend_on_the_process():
    code = "from exgrpo_trl.examples import encode_example; print(encode_example({'x': set('abcdefgh')}))"
    assert in_a_new_process(code) == in_a_new_process(code)


class Colour(enum.IntEnum):
    RED = 1


class Message(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")
UNSAVABLE = [
    object(),
    Colour.RED,
    Message("a"),
    Pair(1, 2),
    OrderedDict(a=1),
    np.ma.masked_array([1], [True]),
    np.array([object()], dtype=object),
    np.zeros(1, dtype=[("a", object)]),
    torch.nn.Parameter(torch.zeros(1)),
    torch.eye(2).to_sparse(),
    torch.zeros(1, device="meta"),
    {"a": {(1, object()): 2}},
    pd.Series([1]),
    range(3),
]


@pytest.mark.parametrize("value", UNSAVABLE, ids=lambda value: type(value).__name__)
def test_encode_names_the_column_of_what_it_cannot_save(value):
    row = {"prompt": "a", "picture": [{"deep": value}]}
    for refuse in (encode_example, lambda row: question_of_row(row, "q")):
        with pytest.raises(TypeError, match=r"'picture'.*[Dd]rop the column"):
            refuse(row)


def test_encode_and_decode_refuse():
    with pytest.raises(TypeError, match="strings"):
        encode_example({1: "a"})
    with pytest.raises(ValueError, match="object"):
        decode_example("[1]")
    with pytest.raises(ValueError, match=r"unknown.*picture"):
        decode_example('{"a": {"__exgrpo_type__": "picture", "value": 1}}')


HOSTILE = [
    ("datetime", {"value": "yesterday"}),
    ("datetime", {"value": 1}),
    ("datetime", {"value": "2020-01-01", "zone": "../../etc/passwd"}),
    ("datetime", {"value": "2020-01-01", "zone": "Atlantis"}),
    ("time", {"value": "1", "fold": 7}),
    ("timedelta", {"value": [10**20, 0, 0]}),
    ("timedelta", {"value": "abc"}),
    ("Decimal", {"value": "1e99999999999999999999"}),
    ("Decimal", {"value": []}),
    ("complex", {"value": ["a", "b"]}),
    ("bytes", {"value": "%"}),
    ("bytes", {}),
    ("dict", {"value": [[[], 1]]}),
    ("set", {"value": [[]]}),
    ("tuple", {"value": "ab"}),
    ("numpy_scalar", {"dtype": "<f8", "value": "AAAA"}),
    ("numpy_scalar", {"dtype": "O", "value": "AAAAAAAAAAA="}),
    ("numpy_scalar", {"dtype": "os.system", "value": ""}),
    ("numpy_array", {"dtype": "|O", "shape": [1], "value": "AAAAAAAAAAA="}),
    ("numpy_array", {"dtype": [["a", "|O"]], "shape": [1], "value": "AAAAAAAAAAA="}),
    ("numpy_array", {"dtype": [["a", ["__import__('os')"]]], "shape": [1], "value": ""}),
    ("numpy_array", {"dtype": "T", "shape": [1], "value": "AAAAAAAAAAAAAAAAAAAAAA=="}),
    ("numpy_array", {"dtype": "|u1", "shape": [10**12], "value": "AA=="}),
    ("numpy_array", {"dtype": "|u1", "shape": [-1], "value": "AA=="}),
    ("numpy_array", {"dtype": "|u1", "shape": [1.0], "value": "AA=="}),
    ("numpy_array", {"dtype": "|u1", "shape": [1] * 99, "value": "AA=="}),
    ("numpy_array", {"dtype": "|b1", "shape": [1], "value": "Ag=="}),
    ("numpy_array", {"dtype": "<U1", "shape": [1], "value": "/////w=="}),
    ("numpy_array", {"dtype": None, "shape": [1], "value": "AA=="}),
    ("numpy_objects", {"shape": [2], "value": [1]}),
    ("numpy_strings", {"shape": [1], "value": [1]}),
    ("tensor", {"value": 1}),
    ("tensor", {"dtype": "float32", "shape": [1], "value": "AAAA"}),
    ("tensor", {"dtype": "float32", "shape": [2**62], "value": "AAAAAA=="}),
    ("tensor", {"dtype": "load", "shape": [1], "value": "AAAAAA=="}),
    ("tensor", {"dtype": "qint8", "shape": [1], "value": "AA=="}),
    ("tensor", {"dtype": "bool", "shape": [1], "value": "Ag=="}),
    ("tensor", {"dtype": ["bool"], "shape": [1], "value": "AA=="}),
    ("pandas_Timestamp", {"unit": "parsec", "value": 1}),
    ("pandas_Timedelta", {"unit": "ns", "value": "a"}),
    (["tuple"], {"value": []}),
    (None, {}),
]


@pytest.mark.parametrize(("kind", "fields"), HOSTILE)
def test_hostile_text_ends_in_an_error(kind, fields):
    text = json.dumps({"prompt": {"__exgrpo_type__": kind, **fields}})
    with pytest.raises(ValueError, match="An encoded example holds"):
        decode_example(text)


def test_hostile_tensors_end_in_an_error_without_torch():
    texts = [json.dumps({"x": {"__exgrpo_type__": kind, **fields}}) for kind, fields in HOSTILE if kind == "tensor"]
    code = """
import json, sys
from exgrpo_trl.examples import decode_example
for text in json.loads(sys.argv[1]):
    try:
        value = decode_example(text)["x"]
    except ValueError:
        continue
    assert value.dtype.kind == "V" and value.size == 1, value  # a dtype that NumPy does not know
print("torch" in sys.modules)
"""
    assert in_a_new_process(code, json.dumps(texts)) == "False"


def test_text_that_is_nested_too_deeply():
    with pytest.raises(ValueError, match="deep"):
        decode_example('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
