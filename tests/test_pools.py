"""A pool without some questions is as if they had never been there, and the others are not walked."""

import numpy as np
import pytest

from exgrpo_trl import Experience, ExperienceBuffer, Question
from exgrpo_trl.pools import PoolWithout
from exgrpo_trl.strategies import QUESTION_SAMPLERS


def filled(question_ids):
    buffer = ExperienceBuffer(group_size=4)
    for number in question_ids:
        experience = Experience.create([number], [-1.0], policy_version=0, reward=1.0)
        question = Question(f"q{number}", {"prompt": f"q{number}"})
        buffer.collect(question, [experience], num_correct=1 + number % 3, group_size=4)
    return buffer


@pytest.mark.parametrize("left_out", [[], [0], [0, 3, 6], [2, 5, 8, 11], range(12), [1, 4, 40]])
def test_it_is_that_of_the_others(left_out):
    pool = PoolWithout(filled(range(12)), [f"q{number}" for number in left_out])
    expected = {
        bucket: [question_id for question_id in ids if int(question_id[1:]) not in left_out]
        for bucket, ids in filled(range(12)).buckets().items()
    }
    found = pool.buckets()
    assert {bucket: list(ids) for bucket, ids in found.items()} == {b: ids for b, ids in expected.items() if ids}
    assert pool.num_questions == sum(map(len, expected.values()))
    for bucket, ids in found.items():
        assert [ids[i] for i in range(-len(ids), len(ids))] == expected[bucket] * 2
        assert ids[1:] == expected[bucket][1:]
        with pytest.raises(IndexError):
            ids[len(ids)]


@pytest.mark.parametrize("name", QUESTION_SAMPLERS)
def test_samplers_draw_as_if_they_had_never_been_there(name):
    sampler = QUESTION_SAMPLERS[name]()
    pool = PoolWithout(filled(range(30)), {f"q{number}" for number in range(9)})
    drawn = [sampler(pool, 5, np.random.default_rng(seed)) for seed in range(200)]
    assert {question_id for of_one in drawn for question_id in of_one} == {f"q{number}" for number in range(9, 30)}
    # The ids have the same order in the buckets of a buffer that never held the others.
    alone = filled(range(9, 30))
    assert drawn == [sampler(alone, 5, np.random.default_rng(seed)) for seed in range(200)]


def test_the_others_are_not_walked():
    class Unwalkable(list):
        def __iter__(self):
            raise AssertionError("walked")

    class Pool:
        group_size = 4

        def buckets(self):
            return {2: Unwalkable(f"q{number}" for number in range(1000))}

    ids = PoolWithout(Pool(), ["q3", "q700"]).buckets()[2]
    assert (len(ids), ids[3], ids[699], ids[997]) == (998, "q4", "q701", "q999")
