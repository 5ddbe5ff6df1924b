"""What every strategy can rely on: plain functions are enough, state is kept, names and parameters are checked."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from exgrpo_trl import (
    Admission,
    AdmissionRule,
    CompletionSelector,
    EvictionRule,
    ExGRPOConfig,
    GroupSelector,
    QuestionSampler,
    ReplayWeighting,
    Strategy,
)
from exgrpo_trl.strategies import Strategies
from exgrpo_trl.strategies.base import as_strategy

KINDS = (QuestionSampler, CompletionSelector, GroupSelector, AdmissionRule, EvictionRule, ReplayWeighting)


def config(**fields):
    return ExGRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none", **fields)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_function_is_enough(kind):
    strategy = as_strategy(kind, lambda *arguments: ("called with", *arguments))
    assert isinstance(strategy, kind)
    assert isinstance(strategy, Strategy)
    assert strategy(1, 2) == ("called with", 1, 2)
    assert strategy.observe(None) is None
    assert strategy.state_dict() == {}
    assert strategy.load_state_dict({}) is None
    assert strategy.metrics() == {}
    assert as_strategy(kind, strategy) is strategy


class Counter:
    """Derives from nothing, and keeps a state all the same."""

    def __init__(self):
        self.num_observed = 0

    def __call__(self, pool, num_questions, rng):
        return []

    def observe(self, batch):
        self.num_observed += 1

    def state_dict(self):
        return {"num_observed": self.num_observed}

    def load_state_dict(self, state):
        self.num_observed = state["num_observed"]


def test_the_state_of_an_object_that_derives_from_nothing_is_kept():
    rule = Counter()
    strategies = Strategies.choose(config(), question_sampler=rule)
    strategies.observe(SimpleNamespace())
    state = json.loads(json.dumps(strategies.state_dict()))
    assert state == {"question_sampler": {"class": "Counter", "state": {"num_observed": 1}}}
    other = Counter()
    Strategies.choose(config(), question_sampler=other).load_state_dict(state)
    assert other.num_observed == 1


def test_the_state_of_another_class_is_not_taken(monkeypatch):
    from exgrpo_trl.strategies import chosen

    messages = []
    monkeypatch.setattr(chosen.logger, "warning", messages.append)
    rule = Counter()
    state = {"question_sampler": {"class": "Recency", "state": {"num_observed": 3}}}
    Strategies.choose(config(), question_sampler=rule).load_state_dict(state)
    assert rule.num_observed == 0
    (message,) = messages
    assert "question_sampler=Recency" in message
    assert "question_sampler=Counter" in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [3, "gaussian", Counter])
def test_what_cannot_be_called_is_refused(kind, rule):
    with pytest.raises(TypeError, match=rf"{kind.__name__} must be callable"):
        as_strategy(kind, rule)


ARGUMENTS = {
    "question_sampler": "uniform",
    "completion_selector": "most_recent",
    "group_selector": "largest_spread",
    "admission": "reward_std",
    "eviction": "oldest",
    "weighting": "balanced",
}


def test_a_name_is_that_of_a_built_in_strategy():
    args = config(shaping_beta=0.5)
    chosen = Strategies.choose(args, **ARGUMENTS)
    assert {name: type(strategy).__name__ for name, strategy in chosen.items()} == {
        "question_sampler": "UniformSampler",
        "completion_selector": "MostRecent",
        "group_selector": "LargestSpread",
        "admission": "RewardSpread",
        "eviction": "Oldest",
        "weighting": "Balanced",
    }
    assert chosen.weighting.beta == 0.5
    with pytest.raises(ValueError, match=r"weighting='shaped' does not take replay_weighting_kwargs=.*'epsilon_low'"):
        Strategies.choose(
            config(replay_weighting="clipped", replay_weighting_kwargs={"epsilon_low": 0.1}), weighting="shaped"
        )


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_what_is_no_strategy_is_refused(argument):
    with pytest.raises(ValueError, match=rf"{argument}='best' is unknown\. Choose one of '"):
        Strategies.choose(config(), **{argument: "best"})
    for wrong in (0, [], "", {}, False, Counter):
        with pytest.raises((TypeError, ValueError), match=r"Pass a function|Choose one of") as error:
            Strategies.choose(config(), **{argument: wrong})
        assert repr(wrong) in str(error.value)


def test_parameters_come_from_fields_and_from_kwargs():
    chosen = Strategies.choose(config(bucket_mean=0.25, replay_weighting="clipped", epsilon=0.1))
    assert (chosen.question_sampler.bucket_mean, chosen.question_sampler.bucket_std) == (0.25, 1.0)
    assert (chosen.weighting.epsilon_low, chosen.weighting.epsilon_high) == (0.1, 0.1)
    chosen = Strategies.choose(
        config(
            question_sampling_kwargs={"bucket_std": 2.0},
            replay_weighting="clipped",
            replay_weighting_kwargs={"epsilon_low": 0.3, "epsilon_high": 0.4},
        )
    )
    assert (chosen.question_sampler.bucket_mean, chosen.question_sampler.bucket_std) == (0.5, 2.0)
    assert (chosen.weighting.epsilon_low, chosen.weighting.epsilon_high) == (0.3, 0.4)
    assert Strategies.choose(config(shaping_beta=0.5)).weighting.beta == 0.5
    assert Strategies.choose(config(replay_weighting="balanced", shaping_beta=0.5)).weighting.beta == 0.5


def test_kwargs_may_be_json_as_on_the_command_line():
    args = config(question_sampling_kwargs='{"bucket_mean": 0.75}')
    assert Strategies.choose(args).question_sampler.bucket_mean == 0.75


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"question_sampling_kwargs": {"width": 1}}, r"question_sampling='gaussian'.*\{.*'width': 1\}.*width"),
        ({"question_sampling_kwargs": {"bucket_std": -1.0}}, r"question_sampling='gaussian'.*positive.*-1\.0"),
        ({"completion_selection_kwargs": {"k": 3}}, r"completion_selection='lowest_entropy'.*'k'"),
        ({"difficulty_kwargs": {"k": 3}}, r"difficulty='success_rate'.*'k'"),
        ({"eviction_kwargs": {"k": 3}}, r"eviction='oldest'.*'k'"),
        ({"replay_weighting_kwargs": {"beta": 0.0}}, r"replay_weighting='shaped'.*beta.*0\.0"),
        ({"replay_weighting_kwargs": [1]}, r"replay_weighting_kwargs=\[1\] must be a dict"),
        ({"eviction": "newest"}, r"eviction='newest' is unknown. Choose one of 'oldest'"),
        (
            {"bucket_mean": 0.25, "question_sampling_kwargs": {"bucket_mean": 0.75}},
            r"bucket_mean=0\.25 and question_sampling_kwargs=.*different values",
        ),
    ],
)
def test_bad_parameters_are_refused_when_the_configuration_is_made(fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_an_admission_has_the_shapes_of_its_batch():
    mask = np.ones((3, 4), dtype=bool)
    Admission(mask, np.ones(3), np.array([0, 2, 4]), np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(2,\)"):
        Admission(mask, np.ones(2), np.zeros(3, dtype=int), np.zeros(3, dtype=bool))
    with pytest.raises(ValueError, match=r"0\.\.4.*5"):
        Admission(mask, np.ones(3), np.array([0, 5, 1]), np.zeros(3, dtype=bool))
