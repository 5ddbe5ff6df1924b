import datetime as dt
import enum
import math

import numpy as np
import pytest

from exgrpo_trl.examples import decode_example, encode_example, question_id_of


def same(left, right):
    """Equal in value and in every type; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


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


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [(1,), {1}, np.float64(1), np.int64(1), np.zeros(1), object(), Colour.RED, 1j, dt.timedelta(1), {1: 2}],
    ids=lambda value: type(value).__name__,
)
def test_encode_names_the_column_of_what_it_cannot_save(value):
    with pytest.raises(TypeError, match=r"'picture'.*[Dd]rop the column"):
        encode_example({"prompt": "a", "picture": [{"deep": value}]})


def test_encode_and_decode_refuse():
    with pytest.raises(TypeError, match="strings"):
        encode_example({1: "a"})
    with pytest.raises(ValueError, match="object"):
        decode_example("[1]")
    with pytest.raises(ValueError, match="tensor"):
        decode_example('{"a": {"__exgrpo_type__": "tensor", "value": 1}}')
