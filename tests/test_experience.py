import datetime as dt
import enum
import math
import subprocess
import sys

import numpy as np
import pytest

from exgrpo_trl.experience import Candidate, Experience, Question, decode_example, encode_example, question_id_of


def same(left, right):
    """Equal in value and in every type; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return repr(left) == repr(right)


def test_torch_free():
    code = (
        "import sys; from exgrpo_trl import experience, sampling, buffer, indices, tables, storage, cli; "
        "print(sorted({'torch', 'trl', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint16, ">i4", "list", "tuple", "strided"])
def test_create_keeps_tokens_and_log_probabilities(dtype):
    ids, logps = [0, 5, 65535, 7], [-0.5, 0.0, -1e30, -3.25]
    if dtype == "strided":
        given = np.array([ids, ids]).T.ravel()[::2]
    else:
        given = {"list": list, "tuple": tuple}.get(dtype, lambda values: np.array(values, dtype=dtype))(ids)
    experience = Experience.create(given, logps, policy_version=np.int64(3), reward=np.float32(1.5))
    assert experience.token_ids.tolist() == ids
    assert experience.token_ids.dtype == np.int32
    assert experience.behavior_per_token_logps.tolist() == np.float32(logps).tolist()
    assert experience.behavior_per_token_logps.dtype == np.float32
    assert (len(experience), experience.num_tokens) == (4, 4)
    assert (experience.policy_version, experience.reward) == (3, 1.5)
    assert type(experience.policy_version) is int
    assert type(experience.reward) is float
    assert math.isnan(experience.entropy)


def test_experience_is_a_read_only_copy():
    ids, logps = np.array([1, 2], dtype=np.int32), np.array([-1, -2], dtype=np.float32)
    experience = Experience.create(ids, logps, policy_version=0, reward=1.0, entropy=0.25)
    ids[0], logps[0] = 9, -9
    assert experience.token_ids.tolist() == [1, 2]
    assert experience.behavior_per_token_logps.tolist() == [-1, -2]
    assert experience.entropy == 0.25
    for array in (experience.token_ids, experience.behavior_per_token_logps):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3
    with pytest.raises(AttributeError):
        experience.reward = 2.0
    assert not hasattr(experience, "__dict__")
    twin = Experience.create([1, 2], [-1, -2], policy_version=0, reward=1.0, entropy=0.25)
    assert experience != twin


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"token_ids": []}, ValueError, "equally long"),
        ({"token_ids": [], "behavior_per_token_logps": []}, ValueError, "at least one token"),
        ({"token_ids": [1, 2, 3]}, ValueError, r"\(3,\) and \(2,\)"),
        ({"token_ids": [[1, 2]], "behavior_per_token_logps": [[-1.0, -1.0]]}, ValueError, "one-dimensional"),
        ({"token_ids": 3, "behavior_per_token_logps": -1.0}, ValueError, "one-dimensional"),
        ({"token_ids": [1.0, 2.0]}, TypeError, "float64"),
        ({"token_ids": [True, False]}, TypeError, "bool"),
        ({"token_ids": [1, -1]}, ValueError, "-1"),
        ({"token_ids": np.array([1, -100], dtype=np.int16)}, ValueError, "-100"),
        ({"token_ids": np.array([-1, 1], dtype=np.int8)}, ValueError, "-1"),
        ({"token_ids": np.array([-1, 1], dtype=np.int32)}, ValueError, "-1"),
        ({"token_ids": [1, 2**31]}, ValueError, "2147483648"),
        ({"token_ids": np.array([1, 2**64 - 1], dtype=np.uint64)}, ValueError, str(2**64 - 1)),
        ({"behavior_per_token_logps": [-1.0, math.nan]}, ValueError, "nan"),
        ({"behavior_per_token_logps": [math.nan, -1.0]}, ValueError, "nan"),
        ({"behavior_per_token_logps": [-math.inf, -1.0]}, ValueError, "-inf"),
        ({"behavior_per_token_logps": [-1e300, -1.0]}, ValueError, "1e\\+300"),
        ({"behavior_per_token_logps": [-1.0, 0.01]}, ValueError, "0.01"),
        ({"behavior_per_token_logps": ["a", "b"]}, TypeError, "dtype"),
        ({"policy_version": -1}, ValueError, "-1"),
        ({"policy_version": 2**63}, ValueError, str(2**63)),
        ({"policy_version": 1.0}, TypeError, "1.0"),
        ({"reward": math.nan}, ValueError, "reward"),
        ({"reward": math.inf}, ValueError, "reward"),
        ({"reward": "good"}, TypeError, "good"),
        ({"entropy": math.inf}, ValueError, "entropy"),
        ({"entropy": None}, TypeError, "entropy"),
    ],
)
def test_create_refuses(changes, error, message):
    good = {"token_ids": [1, 2], "behavior_per_token_logps": [-1.0, -0.5], "policy_version": 0, "reward": 1.0}
    arguments = {**good, **changes}
    Experience.create(**good)
    with pytest.raises(error, match=message):
        Experience.create(arguments.pop("token_ids"), arguments.pop("behavior_per_token_logps"), **arguments)


def test_log_probabilities_may_overshoot_zero_by_rounding():
    experience = Experience.create([1], [9e-5], policy_version=0, reward=1.0)
    assert experience.behavior_per_token_logps[0] == np.float32(9e-5)


def test_question_refuses():
    with pytest.raises(TypeError, match="3"):
        Question(3, {"prompt": "a"})
    with pytest.raises(ValueError, match="empty"):
        Question("", {"prompt": "a"})
    with pytest.raises(TypeError, match="list"):
        Question("q", [("prompt", "a")])
    with pytest.raises(ValueError, match="answer"):
        Question("q", {"answer": "a"})


def test_candidate_is_unscored_by_default():
    experience = Experience.create([1], [-1.0], policy_version=0, reward=1.0)
    assert Candidate(experience) == Candidate(experience, None, None)


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
