"""What leaves a full buffer is what the rule says."""

import pytest
from rules import Lowest

from exgrpo_trl import Experience, ExperienceBuffer, Question

K = 4


def collect(buffer, name, *rewards, version=0):
    stored = [
        Experience.create([len(name), index, version], [-1.0] * 3, policy_version=version, reward=reward)
        for index, reward in enumerate(rewards)
    ]
    buffer.collect(Question(name, {"prompt": name}), stored, num_correct=1, group_size=K)
    return stored


def rewards_of(buffer):
    return {question.question_id: sorted(e.reward for e in buffer.completions(question.question_id))
            for question, _, _ in buffer.items()}  # fmt: skip


def test_a_rule_decides_for_both_limits():
    buffer = ExperienceBuffer(capacity=4, max_completions_per_question=2)
    buffer.eviction = Lowest(lambda experience: experience.reward)
    collect(buffer, "a", 0.5, 0.9, 0.7)
    assert rewards_of(buffer) == {"a": [0.7, 0.9]}
    collect(buffer, "bb", 0.8, 0.6, version=1)
    collect(buffer, "ccc", 1.0, version=2)
    assert rewards_of(buffer) == {"a": [0.7, 0.9], "bb": [0.8], "ccc": [1.0]}
    assert buffer.num_evicted == 2
    assert buffer.check_valid() == (True, "")


def test_a_plain_function_is_enough():
    buffer = ExperienceBuffer(capacity=1)
    buffer.eviction = lambda pool, question_id: pool.oldest(question_id)
    collect(buffer, "a", 0.5)
    collect(buffer, "bb", 0.6, version=1)
    assert rewards_of(buffer) == {"bb": [0.6]}


def test_the_oldest():
    buffer = ExperienceBuffer()
    with pytest.raises(KeyError, match="empty"):
        buffer.oldest()
    first, second = collect(buffer, "a", 0.1, 0.2, version=5)
    (old,) = collect(buffer, "bb", 0.3, version=1)
    assert buffer.oldest() == ("bb", old)
    assert buffer.oldest("a") == ("a", first)
    buffer.evict("bb", old)
    assert buffer.oldest() == ("a", second), "of a policy version, the one that was stored last"
    with pytest.raises(KeyError, match="bb"):
        buffer.oldest("bb")


@pytest.mark.parametrize("name", ["nobody", "a"])
def test_a_rule_that_names_what_is_not_stored(name):
    buffer = ExperienceBuffer(capacity=1)
    other = Experience.create([9], [-1.0], policy_version=0, reward=1.0)
    buffer.eviction = lambda pool, question_id: (name, other)
    collect(buffer, "a", 0.5)
    with pytest.raises(ValueError, match=rf"eviction rule returned a completion of question '{name}'"):
        collect(buffer, "bb", 0.6)
