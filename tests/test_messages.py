"""What processes tell each other arrives as it was sent, without a message per tensor."""

from datetime import date

import numpy as np
import pytest

from exgrpo_trl.experience import Candidate, Experience, Question
from exgrpo_trl.messages import (
    decode_forwards,
    decode_records,
    decode_scores,
    encode_forwards,
    encode_records,
    encode_scores,
)
from exgrpo_trl.rollouts import Records


def experience(rng, num_tokens, entropy=0.5):
    return Experience.create(
        rng.integers(0, 2**31, num_tokens),
        -rng.exponential(size=num_tokens),
        policy_version=int(rng.integers(10**6)),
        reward=float(rng.normal()),
        entropy=entropy,
    )


def fields(stored):
    return stored.token_bytes, stored.logp_bytes, stored.policy_version, stored.reward, repr(stored.entropy)


def test_records():
    rng = np.random.default_rng(0)
    example = {"prompt": [{"role": "user", "content": "é\n"}], "answer": 3, "day": date(2026, 1, 2), "x": float("inf")}
    records = Records(
        {7: Question("seven", example), 2: Question("2", {"prompt": "two"})},
        {3: experience(rng, 5, float("nan")), 2**40: experience(rng, 1), 0: experience(rng, 1000)},
    )
    decoded = decode_records(encode_records(records))
    assert decoded.questions == records.questions
    assert list(decoded.experiences) == list(records.experiences)
    for row, stored in records.experiences.items():
        assert fields(decoded.experiences[row]) == fields(stored)


@pytest.mark.parametrize("part", ["questions", "experiences"])
def test_records_of_one_kind(part):
    only = {
        "questions": {1: Question("q", {"prompt": "p"})},
        "experiences": {4: experience(np.random.default_rng(1), 3)},
    }
    decoded = decode_records(encode_records(Records(**{part: only[part]})))
    assert list(getattr(decoded, part)) == list(only[part])
    assert not getattr(decoded, "questions" if part == "experiences" else "experiences")


def test_nothing_is_nothing():
    assert encode_records(Records()) == b""
    assert decode_records(b"") == Records()
    assert encode_forwards([]) == b""
    assert decode_forwards(b"") == []
    assert decode_scores(encode_scores([])) == []


def test_records_take_what_they_hold():
    """8 bytes a token, and a constant that does not grow with the number of completions' tokens."""
    rng = np.random.default_rng(2)
    sizes = {
        (count, length): len(encode_records(Records({}, {i: experience(rng, length) for i in range(count)})))
        for count in (1, 100)
        for length in (10, 1000)
    }
    for count in (1, 100):
        assert sizes[count, 1000] - sizes[count, 10] == pytest.approx(8 * 990 * count, abs=128)
    assert sizes[100, 10] < 100 * (8 * 10 + 64) + 2048


def test_forwards():
    rng = np.random.default_rng(3)
    forwards = [
        [([1, 2, 3], experience(rng, 2)), ([4], experience(rng, 9))],
        [([5, 6], experience(rng, 1))],
    ]
    decoded = decode_forwards(encode_forwards(forwards))
    assert [[(prompt, fields(stored)) for prompt, stored in pairs] for pairs in decoded] == [
        [(prompt, fields(stored)) for prompt, stored in pairs] for pairs in forwards
    ]


def test_scores():
    stored = experience(np.random.default_rng(4), 2)
    scored = [Candidate(stored, 0.1, 1e-9), Candidate(stored, float("nan"), 3.0)]
    decoded = decode_scores(encode_scores(scored))
    assert decoded[0] == (0.1, 1e-9)
    assert np.isnan(decoded[1][0])
    assert decoded[1][1] == 3.0
