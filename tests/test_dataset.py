"""Which rows an epoch leaves out, and in which order the others come."""

import copy
import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import Sampler
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


def test_another_dataset_has_rows_of_its_own(monkeypatch):
    from exgrpo_trl import dataset as module

    messages = []
    monkeypatch.setattr(module.logger, "warning_once", messages.append)
    dropped = DroppedQuestions(TrainingQuestions(dataset(8), None), min_rows=2)
    retired = ids(3, 1, 11)
    assert dropped.begin_epoch(0, retired) == {3, 1}
    dropped.questions = TrainingQuestions(dataset(0, repeated=[10, 11, 12, 1, 20]), None)
    assert dropped.begin_epoch(0, retired) == {1, 3}
    dropped.questions = TrainingQuestions(dataset(0, repeated=range(20, 30)), None)
    assert dropped.begin_epoch(0, retired) == set()
    dropped.questions = TrainingQuestions(dataset(0, repeated=[20]), None)
    assert dropped.begin_epoch(0, retired) == set(), "nothing of a dataset that is smaller than a batch"
    assert not messages


def trl_sampler(num_rows, shuffle=True, batch_size=2):
    return RepeatSampler(
        list(range(num_rows)), mini_repeat_count=3, batch_size=batch_size, repeat_count=2, shuffle=shuffle, seed=7
    )


def active_only(sampler, dropped=frozenset(), epoch=0, num_rows=8, rows_per_batch=6):
    return ActiveQuestionSampler(
        sampler, lambda: (epoch, set(dropped), set()), num_rows=num_rows, rows_per_batch=rows_per_batch, seed=7
    )


def test_the_first_epoch_is_trls_own():
    assert list(active_only(trl_sampler(8))) == list(trl_sampler(8))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("dropped", [set(), {0}, {1, 2, 5}, set(range(6))])
def test_an_epoch_keeps_its_length_and_its_groups(dropped, shuffle):
    sampler = active_only(trl_sampler(8, shuffle), dropped, 3)
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
    assert order == list(active_only(trl_sampler(8, shuffle), dropped, 3))
    if shuffle and len(active) > 2:
        assert order != list(active_only(trl_sampler(8, shuffle), dropped, 4))


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_dropped", [6, 7, 8])
def test_too_few_active_questions_do_not_end_an_epoch_early_or_never(num_dropped, shuffle, epoch):
    sampler = active_only(trl_sampler(8, shuffle, batch_size=3), set(range(num_dropped)), epoch)
    order = list(itertools.islice(sampler, 1000))
    assert len(order) == len(sampler) == 2 * 3 * 3 * 2
    batches = [set(order[start : start + 9]) for start in range(0, len(order), 9)]
    assert all(len(batch) == 3 for batch in batches)
    assert all(batch >= set(range(num_dropped, 8)) for batch in batches), "active ones come before retired ones"


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_dataset_smaller_than_a_batch_is_empty_as_in_trl(epoch):
    plain = trl_sampler(2, batch_size=3)
    assert list(plain) == []
    assert list(active_only(plain, epoch=epoch, num_rows=2)) == list(active_only(plain, {0}, epoch, num_rows=2)) == []


# What stands in for a sampler is one.


class Curriculum(Sampler):
    """All rows in an order of its own, every one `repeats` times, every batch of four groups `passes` times."""

    def __init__(self, order, repeats=3, passes=1):
        self.order, self.repeats, self.passes, self.epochs = order, repeats, passes, []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def __iter__(self):
        for start in range(0, len(self.order), 4):
            for _ in range(self.passes):
                for row in self.order[start : start + 4]:
                    yield from [row] * self.repeats


class Backwards(RepeatSampler):
    def __iter__(self):
        return iter([row for row in range(self.num_samples - 1, -1, -1) for _ in range(self.mini_repeat_count)])


def test_attributes_are_those_of_the_sampler():
    wrapped = trl_sampler(8)
    sampler = active_only(wrapped)
    assert (sampler.mini_repeat_count, sampler.repeat_count, sampler.batch_size, sampler.seed) == (3, 2, 2, 7)
    assert sampler.generator is wrapped.generator
    sampler.shuffle, sampler.batch_size, sampler.mine = False, 4, "mine"
    assert (wrapped.shuffle, wrapped.batch_size, wrapped.mine) == (False, 4, "mine")
    assert list(sampler) == list(trl_sampler(8, shuffle=False, batch_size=4))
    del sampler.mine
    assert not hasattr(wrapped, "mine")
    with pytest.raises(AttributeError, match="set_epoch"):
        sampler.set_epoch(1)
    curriculum = Curriculum([1, 0])
    active_only(curriculum).set_epoch(3)
    assert curriculum.epochs == [3]
    with pytest.raises(TypeError, match="len"):
        len(active_only(curriculum))


def test_shuffle_set_to_false_holds_in_every_epoch():
    sampler = active_only(trl_sampler(8), {1, 6}, epoch=2)
    sampler.shuffle = False
    assert list(dict.fromkeys(sampler)) == [0, 2, 3, 4, 5, 7]


def test_it_is_of_the_class_of_the_sampler():
    sampler = active_only(trl_sampler(8))
    assert isinstance(sampler, RepeatSampler)
    assert isinstance(sampler, Sampler)
    assert isinstance(sampler, ActiveQuestionSampler)
    assert not isinstance(active_only(Curriculum([0])), RepeatSampler)
    assert isinstance(active_only(Curriculum([0])), Curriculum)


def first_epoch():
    return 0, {1}, set()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda sampler: pickle.loads(pickle.dumps(sampler))])
def test_a_copy_is_a_sampler_of_its_own(way):
    wrapped = trl_sampler(8, shuffle=False)
    sampler = ActiveQuestionSampler(wrapped, first_epoch, num_rows=8, rows_per_batch=6, seed=7)
    other = way(sampler)
    assert type(other) is ActiveQuestionSampler
    assert list(other) == list(sampler)
    other.batch_size = 4
    assert (sampler.batch_size, wrapped.batch_size) == (2, 2)
    bare = ActiveQuestionSampler.__new__(ActiveQuestionSampler)
    with pytest.raises(AttributeError):
        bare.shuffle  # noqa: B018


def test_a_deep_copy_leaves_the_trainer_alone():
    class Trainer:
        def begin_epoch(self):
            return 0, {1}, set()

        def __deepcopy__(self, memo):
            raise AssertionError("copied with its model")

    sampler = ActiveQuestionSampler(trl_sampler(8), Trainer().begin_epoch, num_rows=8, rows_per_batch=6, seed=7)
    copy.deepcopy(sampler)


# Samplers of others keep their order.


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
@pytest.mark.parametrize("dropped", [{0}, {1, 2, 5}, set(range(12)), {15}])
def test_retired_rows_of_another_sampler_give_way_to_active_ones(dropped, kind):
    order = np.random.default_rng(0).permutation(16).tolist()
    plain = list(Curriculum(order, passes=2))
    sampler = active_only(
        Curriculum([kind(row) for row in order], passes=2), dropped, 1, num_rows=16, rows_per_batch=12
    )
    rows = [int(row) for row in sampler]
    assert len(rows) == len(plain)
    assert not dropped & set(rows)
    assert all(row == was for row, was in zip(rows, plain, strict=True) if was not in dropped)
    batches = [rows[start : start + 12] for start in range(0, len(rows), 12)]
    for batch in batches:
        assert all(len(set(batch[start : start + 3])) == 1 for start in range(0, 12, 3)), "a group has one question"
        assert len(set(batch)) == 4, "no question twice in a batch"
    assert batches[::2] == batches[1::2], "a batch that comes again is the same"
    counts = Counter(batch[start] for batch in batches[::2] for start in range(0, 12, 3))
    assert max(counts.values()) - min(counts.values()) <= 2, "all active questions have their share"
    again = active_only(Curriculum(order, passes=2), dropped, 1, num_rows=16, rows_per_batch=12)
    assert list(again) == rows


def test_another_sampler_is_untouched_where_nothing_is_retired():
    for epoch in (0, 1):
        assert list(active_only(Curriculum([3, 1, 2, 0]), epoch=epoch)) == list(Curriculum([3, 1, 2, 0]))
        assert list(active_only(Backwards(range(8), 3), epoch=epoch)) == list(Backwards(range(8), 3))


def test_a_subclass_of_trls_sampler_keeps_its_own_order():
    rows = list(active_only(Backwards(range(8), 3), {5, 2}, 1))
    assert [row for row in dict.fromkeys(rows) if row not in (5, 2)][:2] == [7, 6]
    assert rows[3:6] == [6, 6, 6]
    assert rows[9:12] == [4, 4, 4]
    assert not {5, 2} & set(rows)


def test_equal_neighbours_stay_equal_across_batches():
    rows = list(active_only(Curriculum([0, 1, 1, 2, 2, 2, 3, 0]), {1, 2}, rows_per_batch=5))
    plain = list(Curriculum([0, 1, 1, 2, 2, 2, 3, 0]))
    for (before, after), (was_before, was_after) in zip(
        itertools.pairwise(rows), itertools.pairwise(plain), strict=True
    ):
        assert before == after or was_before != was_after


def test_retired_rows_stay_where_too_few_are_active():
    rows = list(active_only(Curriculum([0, 1, 2, 3, 4, 5, 6, 7]), {0, 1, 2, 3, 4, 5}, rows_per_batch=12))
    for batch in (rows[:12], rows[12:]):
        assert len(set(batch)) == 4
        assert {6, 7} <= set(batch)
    assert list(active_only(Curriculum(range(8)), set(range(8)))) == list(Curriculum(range(8)))


def test_an_endless_sampler_may_watch_what_was_drawn():
    class Endless(Sampler):
        drawn = 0

        def __iter__(self):
            while True:
                self.drawn += 1
                yield self.drawn % 8

    endless = Endless()
    rows = list(itertools.islice(active_only(endless, {3}, rows_per_batch=4), 40))
    assert 3 not in rows
    assert endless.drawn <= 44
