"""What counts as a success: every function that has an opinion, one that is named, or the weighted sum."""

import json

import numpy as np
import pytest

from exgrpo_trl import success
from exgrpo_trl.success import SuccessRule, reaches

NAN = np.nan


@pytest.fixture
def warnings_of(monkeypatch):
    messages = []
    monkeypatch.setattr(success.logger, "warning", messages.append)
    return messages


def rule(success_reward=None, names=("accuracy", "form"), weights=(1.0, 0.5), threshold=1.0):
    return SuccessRule(names, weights, threshold, success_reward)


REWARDS = np.array([[1, 1], [1, 0], [0, 1], [1, NAN], [NAN, 1], [NAN, NAN], [2, 5], [1, 0.9999]])


@pytest.mark.parametrize(
    ("success_reward", "is_correct", "rewards"),
    [
        (None, [1, 0, 0, 1, 1, 0, 1, 0], [1.5, 1, 0.5, 1, 0.5, NAN, 4.5, 1.49995]),
        ("weighted_sum", [1, 1, 0, 1, 0, 0, 1, 1], [1.5, 1, 0.5, 1, 0.5, NAN, 4.5, 1.49995]),
        ("accuracy", [1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 1, NAN, NAN, 2, 1]),
        ("form", [1, 0, 1, 0, 1, 0, 1, 0], [1, 0, 1, NAN, 1, NAN, 5, 0.9999]),
    ],
)
def test_rules(success_reward, is_correct, rewards):
    actual_rewards, actual = rule(success_reward)(REWARDS)
    assert actual.tolist() == [bool(c) for c in is_correct]
    np.testing.assert_allclose(actual_rewards, rewards)


def test_the_only_function_decides_whatever_its_weight():
    rewards, is_correct = rule(names=["right"], weights=[0.2])(np.array([[1.0], [0.5], [NAN]]))
    np.testing.assert_array_equal(rewards, [1.0, 0.5, NAN])
    assert is_correct.tolist() == [True, False, False]


def test_reaching_a_threshold_in_float32():
    rewards = np.array([np.float32(0.9), 0.8999, NAN, 0.9]).astype(float)
    assert reaches(rewards, 0.9).tolist() == [True, False, False, True]


def test_while_a_judge_is_silent_there_is_no_verdict(warnings_of):
    decide = rule()
    decide(np.array([[1.0, 1.0], [0.0, 1.0]]))
    rewards, is_correct = decide(np.array([[NAN, 1.0], [NAN, 0.0]]))
    assert np.isnan(rewards).all()
    assert not is_correct.any()
    (message,) = warnings_of
    assert "accuracy" in message
    assert "success_reward" in message
    decide(np.array([[NAN, 1.0]]))
    assert len(warnings_of) == 1, "once"
    assert decide(np.array([[1.0, 1.0], [NAN, 1.0]]))[1].tolist() == [True, True], "it has an opinion again"


def test_functions_for_different_tasks_may_be_silent(warnings_of):
    """Mathematics and code have a function each, and one for the form of both: batches of one task are judged."""
    decide = rule(names=["math", "code", "form"], weights=[1, 1, 1])
    of_math, of_code = np.array([[1.0, NAN, 1.0]] * 2), np.array([[NAN, 1.0, 1.0]] * 2)
    for batch in (of_math, of_code, of_math, np.concatenate([of_math, of_code])):
        assert decide(batch)[1].all()
    assert not warnings_of
    assert not decide(np.array([[NAN, NAN, 1.0]]))[1].any(), "form alone"


def test_the_state_survives_json(warnings_of):
    decide, resumed = rule(), rule()
    decide(np.array([[1.0, 1.0]]))
    resumed.load_state_dict(json.loads(json.dumps(decide.state_dict())))
    assert not resumed(np.array([[NAN, 1.0]]))[1].any()
    other = rule(names=["accuracy", "length"])
    other.load_state_dict(decide.state_dict())
    assert other(np.array([[NAN, 1.0]]))[1].all(), "what a function that is gone has judged is of no account"


def test_a_function_of_weight_0_is_there_to_be_logged():
    decide = rule(weights=[1.0, 0.0])
    assert decide(REWARDS)[1].tolist() == [True, True, False, True, False, False, True, True]
    assert "each of accuracy that" in decide.description
    assert rule(weights=[0.0, 0.0])(REWARDS)[1].tolist() == rule()(REWARDS)[1].tolist(), "unless all are"


def test_the_rule_follows_the_trainer():
    decide = rule("weighted_sum")
    assert decide(np.array([[0.5, 0.5]]))[1].tolist() == [False]
    decide.follow(["accuracy", "form"], [1.0, 1.0], 1.0)
    assert decide(np.array([[0.5, 0.5]]))[1].tolist() == [True]
    decide.follow(["accuracy", "form", "length"], [1.0, 1.0, 1.0], 1.6)
    assert decide(np.array([[0.5, 0.5, 0.5]]))[1].tolist() == [False]
    named = rule("form")
    with pytest.raises(ValueError, match="'form' is not a reward function"):
        named.follow(["accuracy"], [1.0], 1.0)


def test_names():
    with pytest.raises(ValueError, match=r"'exact' is not a reward function.*\['accuracy', 'form'\].*weighted_sum"):
        rule("exact")
    with pytest.raises(ValueError, match=r"'reward' is the name of 2 reward functions"):
        rule("reward", names=["reward", "reward"])
    rule(names=["reward", "reward"])


@pytest.mark.parametrize(
    ("success_reward", "words"),
    [
        (None, "each of accuracy, form that has an opinion gives at least success_threshold=1.0"),
        ("weighted_sum", "the weighted sum of accuracy, form is at least success_threshold=1.0"),
        ("form", "form gives at least success_threshold=1.0"),
    ],
)
def test_the_rule_in_words(success_reward, words):
    assert words in rule(success_reward).description
    assert "['accuracy', 'form']" in rule(success_reward).way_out
