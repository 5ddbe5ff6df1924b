import math

import numpy as np
import pytest

from exgrpo_trl.records import Candidate, Experience, Question, Reuse


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


def test_an_experience_reads_well():
    short = Experience.create([5, 6], [-1.0, -2.0], policy_version=3, reward=1.0)
    assert repr(short) == "Experience(num_tokens=2, policy_version=3, reward=1, entropy=nan, token_ids=[5, 6])"
    long = Experience.create(range(9000), [-1.0] * 9000, policy_version=3, reward=1 / 3, entropy=0.123456)
    assert repr(long) == (
        "Experience(num_tokens=9000, policy_version=3, reward=0.333333, entropy=0.1235, "
        "token_ids=[0, 1, 2, 3, 4, 5, ...])"
    )


def test_a_record_of_reuse_holds_plain_numbers():
    assert str(Reuse()) == "Reuse(num_replays=0, entropy=nan, negative_log_likelihood=nan, scored_at=0)"
    record = Reuse(np.int64(2), np.float32(0.5), 1, np.int32(7))
    assert record == Reuse(2, 0.5, 1.0, 7)
    assert [type(value) for value in (record.num_replays, record.entropy, record.negative_log_likelihood)] == [
        int,
        float,
        float,
    ]
    with pytest.raises(AttributeError):
        record.num_replays = 3
    assert not hasattr(record, "__dict__")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_replays": -1}, ValueError, "`num_replays`.*-1"),
        ({"num_replays": 2**63}, ValueError, "`num_replays`"),
        ({"num_replays": 1.0}, TypeError, "`num_replays` must be an integer, got 1.0"),
        ({"entropy": math.inf}, ValueError, "`entropy` must be finite or NaN"),
        ({"entropy": None}, TypeError, "`entropy`"),
        ({"negative_log_likelihood": -math.inf}, ValueError, "`negative_log_likelihood` must be finite or NaN"),
        ({"scored_at": -1}, ValueError, "`scored_at`.*-1"),
        ({"scored_at": 2**63}, ValueError, "`scored_at`"),
    ],
)
def test_a_record_of_reuse_is_checked(changes, error, message):
    with pytest.raises(error, match=message):
        Reuse(**changes)
