"""Which rows an epoch leaves out, and in which order the others come."""

from collections import Counter

import pytest
from datasets import Dataset
from trl.trainer.utils import RepeatSampler

from exgrpo_trl import question_id_of
from exgrpo_trl.dataset import ActiveQuestionSampler, DroppedQuestions
from exgrpo_trl.questions import TrainingQuestions


def dataset(num_rows, repeated=()):
    return Dataset.from_dict({"prompt": [f"{row}" for row in range(num_rows)] + [f"{row}" for row in repeated]})


def ids(*rows):
    return [question_id_of(f"{row}") for row in rows]


def test_an_epoch_keeps_the_questions_that_it_began_with():
    dropped = DroppedQuestions(TrainingQuestions(dataset(8), None), min_rows=2)
    retired = dict.fromkeys(ids(3))
    assert dropped.begin_epoch(0, retired) == {3}
    retired |= dict.fromkeys(ids(5, 1))
    assert dropped.begin_epoch(0, retired) == {3}
    assert dropped.begin_epoch(1, retired) == {3, 5, 1}
    resumed = DroppedQuestions(TrainingQuestions(dataset(8), None), min_rows=2)
    resumed.load_state_dict(dropped.state_dict())
    assert resumed.begin_epoch(1, retired | dict.fromkeys(ids(7))) == {3, 5, 1}


def test_all_rows_of_a_question_go_and_foreign_ones_are_none():
    dropped = DroppedQuestions(TrainingQuestions(dataset(6, repeated=[2]), None), min_rows=1)
    assert dropped.begin_epoch(0, ids(2, 100)) == {2, 6}


def test_a_batch_always_stays(monkeypatch):
    from exgrpo_trl import dataset as module

    messages = []
    monkeypatch.setattr(module.logger, "warning_once", messages.append)
    dropped = DroppedQuestions(TrainingQuestions(dataset(5), None), min_rows=3)
    assert dropped.begin_epoch(0, ids(4, 0, 1, 2)) == {4, 0}
    assert len(messages) == 1
    assert "run dry" in messages[0]


def trl_sampler(num_rows, shuffle=True, batch_size=2):
    return RepeatSampler(
        list(range(num_rows)), mini_repeat_count=3, batch_size=batch_size, repeat_count=2, shuffle=shuffle, seed=7
    )


def test_the_first_epoch_is_trls_own():
    assert list(ActiveQuestionSampler(trl_sampler(8), lambda: (0, set()))) == list(trl_sampler(8))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("dropped", [set(), {0}, {1, 2, 5}, set(range(6))])
def test_an_epoch_keeps_its_length_and_its_groups(dropped, shuffle):
    sampler = ActiveQuestionSampler(trl_sampler(8, shuffle), lambda: (3, dropped))
    order = list(sampler)
    assert len(order) == len(sampler) == len(trl_sampler(8))
    groups = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert all(len(set(group)) == 1 for group in groups), "a group has one question"
    # Two questions a batch, and every batch twice.
    batches = [tuple(group[0] for group in groups[i : i + 2]) for i in range(0, len(groups), 2)]
    assert batches[::2] == batches[1::2]
    assert all(len(set(batch)) == 2 for batch in batches)
    counts = Counter(row for batch in batches[::2] for row in batch)
    active = set(range(8)) - dropped
    assert set(counts) <= active
    if len(active) % 2 == 0:
        assert set(counts) == active
        assert max(counts.values()) - min(counts.values()) <= 1
    assert order == list(ActiveQuestionSampler(trl_sampler(8, shuffle), lambda: (3, dropped)))
    if shuffle and len(active) > 2:
        assert order != list(ActiveQuestionSampler(trl_sampler(8, shuffle), lambda: (4, dropped)))
