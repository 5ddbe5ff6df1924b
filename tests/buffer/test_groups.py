"""Buffers of whole groups: in memory, in files, in datasets."""

import copy
import math
import pickle

import pyarrow as pa
import pytest
from rewriting import rewritten, with_column

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question
from exgrpo_trl.records import Reuse

K = 4


def make(*token_ids, version=0, reward=1.0):
    return Experience.create(token_ids, [-0.5] * len(token_ids), policy_version=version, reward=reward)


def whole(*first_tokens, version=0):
    """A group; its completions have one token each."""
    return [make(token, version=version, reward=float(token % 2)) for token in first_tokens]


def collect(buffer, name, experiences, correct=2, **kwargs):
    question = Question(name, {"prompt": name})
    return buffer.collect(question, experiences, num_correct=correct, group_size=K, **kwargs)


def tokens_of(buffer, name):
    return [[experience.token_ids.tolist() for experience in group] for group in buffer.groups(name)]


def flat(*first_tokens):
    return [[token] for token in first_tokens]


def filled():
    """Three groups of two questions; two of one completion's tokens come several times."""
    buffer = ExperienceBuffer(unit="group", capacity=100)
    collect(buffer, "a", whole(1, 1, 2, 3, version=1))
    collect(buffer, "b", whole(1, 2, 3, 4, version=2), correct=3)
    collect(buffer, "a", whole(5, 1, 2, 2, version=3), correct=1)
    group = buffer.groups("a")[0]
    buffer.note_reuse("a", group[1], Reuse(2, 0.5, 1.5, 7))
    buffer.note_reuse("a", group[0], Reuse(1, math.nan, 0.25, 8))
    return buffer


def state(buffer):
    return [
        (
            question_id,
            bucket,
            [
                [
                    (
                        experience.token_bytes,
                        experience.policy_version,
                        experience.reward,
                        repr(buffer.reuse(experience)),
                    )
                    for experience in group
                ]
                for group in buffer.groups(question_id)
            ],
        )
        for bucket, ids in buffer.buckets().items()
        for question_id in ids
    ]


# In memory


def test_a_group_is_kept_whole_and_in_order():
    buffer = filled()
    assert buffer.check_valid() == (True, "")
    assert buffer.unit == "group"
    assert tokens_of(buffer, "a") == [flat(1, 1, 2, 3), flat(5, 1, 2, 2)]
    assert buffer.completions("a") == tuple(e for group in buffer.groups("a") for e in group)
    assert [experience for question, _, experience in buffer if question.question_id == "a"] == list(
        buffer.completions("a")
    )
    assert [experience.reward for experience in buffer.groups("a")[0]] == [1.0, 1.0, 0.0, 1.0], "failures, too"
    assert {bucket: list(ids) for bucket, ids in buffer.buckets().items()} == {1: ["a"], 3: ["b"]}
    assert (len(buffer), buffer.num_tokens, buffer.num_questions) == (12, 12, 2)
    assert buffer.metrics()["completions"] == 12
    assert type(buffer.groups("a")) is type(buffer.groups("a")[0]) is tuple
    with pytest.raises(KeyError, match="no completion of question 'x'"):
        buffer.groups("x")
    with pytest.raises(AttributeError):
        buffer.unit = "completion"


def test_single_completions_have_no_groups():
    buffer = ExperienceBuffer()
    collect(buffer, "a", whole(1))
    assert buffer.unit == "completion"
    with pytest.raises(ValueError, match=r"one by one, not groups\. Make it with unit='group'"):
        buffer.groups("a")
    for unit in ("groups", None, 1):
        with pytest.raises(ValueError, match=f"`unit` must be 'completion' or 'group', got {unit!r}"):
            ExperienceBuffer(unit=unit)


def test_only_mixed_groups_are_stored():
    buffer = ExperienceBuffer(unit="group")
    assert collect(buffer, "a", whole(1, 2, 3, 4), correct=0) == 0
    assert collect(buffer, "a", whole(1, 2, 3, 4), correct=2) == 4
    assert collect(buffer, "a", whole(2, 2, 3, 4), correct=0, bucket=3) == 0
    assert {bucket: list(ids) for bucket, ids in buffer.buckets().items()} == {2: ["a"]}
    assert collect(buffer, "a", whole(1, 1, 1, 1), correct=K) == 0
    assert ("a" in buffer, list(buffer.retired), len(buffer)) == (False, ["a"], 0)
    assert collect(buffer, "a", whole(1, 2, 3, 4), correct=2) == 0
    assert buffer.check_valid() == (True, "")


def test_a_solved_question_that_stays_only_moves():
    buffer = ExperienceBuffer(unit="group", retire_solved=False)
    assert collect(buffer, "a", whole(1, 2, 3, 4), correct=K) == 0
    assert len(buffer) == 0
    collect(buffer, "a", whole(1, 2, 3, 4))
    assert collect(buffer, "a", whole(5, 5, 5, 5), correct=K) == 0
    assert {bucket: list(ids) for bucket, ids in buffer.buckets().items()} == {K: ["a"]}
    assert tokens_of(buffer, "a") == [flat(1, 2, 3, 4)]


def test_nothing_moves_a_question_that_is_stored():
    buffer = ExperienceBuffer(unit="group")
    assert collect(buffer, "a", []) == 0
    assert "a" not in buffer
    collect(buffer, "a", whole(1, 2, 3, 4))
    assert collect(buffer, "a", [], correct=3) == 0
    assert collect(buffer, "a", (), correct=1, bucket=0) == 0
    assert {bucket: list(ids) for bucket, ids in buffer.buckets().items()} == {0: ["a"]}
    assert (len(buffer), buffer.num_duplicates) == (4, 0)


def test_the_same_group_is_a_duplicate():
    buffer = ExperienceBuffer(unit="group")
    collect(buffer, "a", whole(1, 2, 3, 4))
    assert collect(buffer, "a", whole(1, 2, 3, 4), correct=3) == 0
    assert (buffer.num_duplicates, len(buffer)) == (4, 4)
    assert list(buffer.buckets()) == [3]
    assert collect(buffer, "a", whole(2, 1, 3, 4)) == 4, "in another order it is another one"
    assert collect(buffer, "b", whole(1, 2, 3, 4)) == 4
    assert buffer.num_duplicates == 4


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_part_of_a_group_is_refused(count):
    buffer = ExperienceBuffer(unit="group")
    with pytest.raises(ValueError, match=rf"all 4 completions of a group, failures included, got {count}"):
        collect(buffer, "a", whole(*range(count)))
    assert (len(buffer), buffer.group_size) == (0, None)
    # Where nothing is stored, nothing needs to be whole.
    assert collect(buffer, "a", whole(*range(count)), correct=0) == 0
    assert collect(buffer, "a", whole(*range(count)), correct=K) == 0
    assert collect(buffer, "a", whole(*range(count))) == 0


def test_one_object_may_come_several_times():
    buffer = ExperienceBuffer(unit="group")
    one = make(1)
    collect(buffer, "a", [one, one, make(2), one])
    assert collect(buffer, "b", [make(2), one, one, one]) == 4
    assert tokens_of(buffer, "a") == [flat(1, 1, 2, 1)]
    assert len(set(buffer.completions("a")) | set(buffer.completions("b"))) == 8
    assert buffer.check_valid() == (True, "")


def test_a_group_leaves_whole():
    buffer = filled()
    first, second = buffer.groups("a")
    assert buffer.evict("a", make(9)) is False
    assert buffer.evict("b", make(5)) is False
    assert buffer.evict("a", second[1]) is True, "this very object, though the older group has its tokens"
    assert buffer.groups("a") == (first,)
    assert (buffer.num_evicted, len(buffer), buffer.num_tokens) == (4, 8, 8)
    assert buffer.evict("a", make(2)) is True
    assert "a" not in buffer
    assert buffer._store.reuse == {}
    assert buffer.check_valid() == (True, "")


def test_of_several_groups_with_the_tokens_the_oldest_leaves():
    buffer = filled()
    second = buffer.groups("a")[1]
    assert buffer.evict("a", make(1)) is True
    assert buffer.groups("a") == (second,)
    assert buffer.note_reuse("a", make(1), Reuse(1)) is True
    assert buffer.reuse(second[1]).num_replays == 1


def test_records_are_of_one_completion_of_a_group():
    buffer = filled()
    group = buffer.groups("a")[0]
    assert [buffer.reuse(experience).num_replays for experience in group] == [1, 2, 0, 0], "the same tokens twice"
    assert buffer.note_reuse("a", make(1), Reuse(9)) is True, "from elsewhere: the oldest of those tokens"
    assert [buffer.reuse(experience).num_replays for experience in group] == [9, 2, 0, 0]


def test_limits_take_whole_groups():
    buffer = ExperienceBuffer(unit="group", capacity=9, max_completions_per_question=7)
    collect(buffer, "a", whole(1, 2, 3, 4, version=5))
    collect(buffer, "b", whole(1, 2, 3, 4, version=2))
    assert collect(buffer, "c", whole(1, 2, 3, 4, version=6)) == 4
    assert ("b" in buffer, len(buffer), buffer.num_evicted) == (False, 8, 4)
    collect(buffer, "a", whole(5, 6, 7, 8, version=1))
    assert tokens_of(buffer, "a") == [flat(5, 6, 7, 8)], "of the question, what came first"
    buffer.set_limits(capacity=4, max_completions_per_question=None)
    assert ("a" in buffer, tokens_of(buffer, "c")) == (False, [flat(1, 2, 3, 4)])
    assert buffer.check_valid() == (True, "")


def test_the_eviction_rule_names_one_completion_of_the_group():
    buffer = ExperienceBuffer(unit="group", capacity=8)
    asked = []

    def newest(pool, question_id):
        asked.append(question_id)
        name = list(pool.buckets()[2])[-1]
        return name, pool.completions(name)[-2]

    buffer.eviction = newest
    for name in "abcd":
        collect(buffer, name, whole(1, 2, 3, 4))
    assert (sorted(buffer.buckets()[2]), asked, buffer.num_evicted) == (["a", "b"], [None, None], 8)
    buffer.eviction = lambda pool, question_id: ("a", make(9))
    with pytest.raises(ValueError, match="the buffer does not hold"):
        collect(buffer, "e", whole(1, 2, 3, 4))


def test_age():
    buffer = filled()
    assert buffer.oldest() == ("a", buffer.groups("a")[0][-1])
    assert buffer.oldest("a") == ("a", buffer.groups("a")[0][0])
    assert buffer.evict_older_than(1) == 0
    assert buffer.evict_older_than(3) == 8
    assert tokens_of(buffer, "a") == [flat(5, 1, 2, 2)]
    assert ("b" in buffer, buffer.num_evicted) == (False, 8)


@pytest.mark.parametrize("name", ["capacity", "max_completions_per_question"])
def test_a_limit_that_can_hold_no_group_is_refused(name):
    message = rf"`{name}`=3 can never hold a group of 4 completions.*at least 4"
    with pytest.raises(ValueError, match=message):
        ExperienceBuffer(unit="group", group_size=K, **{name: 3})
    buffer = ExperienceBuffer(unit="group", **{name: 3})
    for correct in (0, 2, K):
        with pytest.raises(ValueError, match=message):
            collect(buffer, "a", whole(1, 2, 3, 4), correct=correct)
    assert (buffer.group_size, len(buffer), list(buffer.retired)) == (None, 0, [])
    buffer = filled()
    limits = {"capacity": 50, "max_completions_per_question": 60}
    buffer.set_limits(**limits)
    with pytest.raises(ValueError, match=message):
        buffer.set_limits(**(limits | {name: 3}))
    assert (buffer.capacity, buffer.max_completions_per_question) == (50, 60)
    ExperienceBuffer(group_size=K, **{name: 3})
    ExperienceBuffer(unit="group", group_size=K, **{name: 4})


@pytest.mark.parametrize("way", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_of_a_buffer_is_valid(way):
    again = way(filled())
    assert again.check_valid() == (True, "")
    assert state(again) == state(filled())


def group_of(buffer):
    return next(iter(buffer._store.questions["a"].groups))


BREAKS = {
    "cut": lambda buffer, groups, key: groups.update({key[:2]: groups.pop(key)[:2]}),
    "key": lambda buffer, groups, key: groups.update({(b"x",) * K: groups.pop(key)}),
    "twice": lambda buffer, groups, key: groups.update({key[:1] * 2 + key[2:]: (groups[key][0], *groups[key][:1])}),
    "gone": lambda buffer, groups, key: groups.pop(key),
    "all gone": lambda buffer, groups, key: groups.clear(),
    "another question": lambda buffer, groups, key: groups.update({key: buffer.groups("b")[0]}),
    "size": lambda buffer, groups, key: setattr(buffer, "_group_size", K + 1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_check_valid_sees(name):
    buffer = filled()
    BREAKS[name](buffer, buffer._store.questions["a"].groups, group_of(buffer))
    is_valid, reason = buffer.check_valid()
    assert not is_valid
    assert reason


# In files


def test_files_round_trip(tmp_path):
    buffer = filled()
    buffer.save(tmp_path / "buffer")
    loaded = ExperienceBuffer.load(tmp_path / "buffer")
    assert (loaded.unit, loaded.capacity) == ("group", 100)
    assert state(loaded) == state(buffer)
    assert loaded.check_valid() == (True, "")
    collect(loaded, "a", whole(7, 7, 7, 7))
    assert len(loaded.groups("a")) == 3
    ExperienceBuffer(unit="group").save(tmp_path / "empty")
    assert ExperienceBuffer.load(tmp_path / "empty").unit == "group"


class OldBuffer(ExperienceBuffer):
    """As a user made it before there were units."""

    def __init__(self, *, group_size=None, capacity=None, max_completions_per_question=None, retire_solved=True):
        super().__init__(
            group_size=group_size,
            capacity=capacity,
            max_completions_per_question=max_completions_per_question,
            retire_solved=retire_solved,
        )


def test_an_older_subclass_still_loads(tmp_path):
    buffer = OldBuffer()
    collect(buffer, "a", whole(1, 3))
    buffer.save(tmp_path / "buffer")
    assert type(OldBuffer.load(tmp_path / "buffer")) is OldBuffer
    assert len(OldBuffer.from_dataset(buffer.to_dataset(), group_size=K)) == 2
    filled().save(tmp_path / "groups")
    with pytest.raises(ExperienceBufferError, match="unit"):
        OldBuffer.load(tmp_path / "groups")


# Of the rows of "a", of which each group has 4, and of "b".
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 2],
            "Group 0 of question 'a' has 3 rows that follow each other, expected 4",
        ),
        ([0, 0, 1, 1, 1, 1, 0, 0, 2, 2, 2, 2], "Group 0 of question 'a' has 2 rows"),
        ([0] * 12, "Group 0 of question 'a' has 8 rows"),
        ([None] * 4 + [1] * 4 + [2] * 4, "A completion of question 'a' has no `group`"),
        ([0] * 4 + [1] * 4 + [2, 2, 2, None], "Group 2 of question 'b' has 3 rows"),
        ([None] * 12, "no `group`"),
    ],
)
def test_groups_that_are_not_whole_are_refused(tmp_path, values, message):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "buffer"
    filled().save(path)
    rewritten(path, "completions.parquet", with_column("group", lambda before: before))
    assert state(ExperienceBuffer.load(path)) == state(filled())
    rewritten(path, "completions.parquet", with_column("group", lambda _: values))
    with pytest.raises(ExperienceBufferError, match=message):
        ExperienceBuffer.load(path)
    rows = [row | {"group": value} for row, value in zip(filled().to_dataset().to_list(), values, strict=True)]
    with pytest.raises(ValueError, match=message):
        ExperienceBuffer.from_dataset(datasets.Dataset.from_list(rows), group_size=K, unit="group")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: pa.concat_tables([table, table.slice(0, 4)]), "."),
        (lambda table: table.slice(4), "."),
        (with_column("question", lambda _: [0] * 6 + [1] * 6), "has 2 rows"),
        (with_column("token_ids", lambda values: values[:4] + values[:4] + values[8:]), "contradicts itself"),
        (with_column("age_rank", lambda values: [values[1], *values[1:]]), "`age_rank` is there once"),
        (lambda table: table.drop_columns(["group"]), "has the columns"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, change, message):
    path = tmp_path / "buffer"
    filled().save(path)
    rewritten(path, "completions.parquet", change)
    with pytest.raises(ExperienceBufferError, match=message):
        ExperienceBuffer.load(path)


def test_single_completions_in_groups_are_refused(tmp_path):
    buffer = ExperienceBuffer()
    collect(buffer, "a", whole(1, 3))
    buffer.save(tmp_path / "buffer")
    rewritten(tmp_path / "buffer", "completions.parquet", with_column("group", lambda values: [0] * len(values)))
    with pytest.raises(ExperienceBufferError, match="single completions are in no group"):
        ExperienceBuffer.load(tmp_path / "buffer")


# In datasets


def test_dataset_round_trip():
    datasets = pytest.importorskip("datasets")
    buffer = filled()
    dataset = buffer.to_dataset()
    assert dataset["group"][:] == [0] * 4 + [1] * 4 + [2] * 4
    for source in (dataset, datasets.Dataset.from_list(dataset.to_list()), dataset.with_format("numpy")):
        again = ExperienceBuffer.from_dataset(source, group_size=K, unit="group")
        assert state(again) == state(buffer)
        assert again.check_valid() == (True, "")
    assert str(again.to_dataset().to_list()) == str(dataset.to_list())
    some = ExperienceBuffer.from_dataset(dataset.filter(lambda row: row["group"] != 0), group_size=K, unit="group")
    assert (len(some), tokens_of(some, "a")) == (8, [flat(5, 1, 2, 2)])
    limited = ExperienceBuffer.from_dataset(dataset, group_size=K, unit="group", max_completions_per_question=6)
    assert tokens_of(limited, "a") == [flat(5, 1, 2, 2)]
    empty = ExperienceBuffer(unit="group").to_dataset()
    assert "group" in empty.column_names
    assert len(ExperienceBuffer.from_dataset(empty, group_size=K, unit="group")) == 0
    assert "group" not in ExperienceBuffer(group_size=K).to_dataset().column_names


def test_datasets_of_two_buffers_go_together():
    datasets = pytest.importorskip("datasets")
    other = ExperienceBuffer(unit="group")
    collect(other, "b", whole(9, 8, 7, 6))
    collect(other, "a", whole(1, 1, 2, 3))
    both = datasets.concatenate_datasets([filled().to_dataset(), other.to_dataset()])
    again = ExperienceBuffer.from_dataset(both, group_size=K, unit="group")
    assert (len(again), again.num_duplicates) == (16, 4)
    assert tokens_of(again, "b") == [flat(1, 2, 3, 4), flat(9, 8, 7, 6)]


def test_datasets_of_another_unit_are_refused():
    single = ExperienceBuffer()
    collect(single, "a", whole(1, 3, 5, 7))
    with pytest.raises(ValueError, match=r"'a' has no `group`.*unit='completion'"):
        ExperienceBuffer.from_dataset(single.to_dataset(), group_size=K, unit="group")
    with pytest.raises(ValueError, match=r"holds whole groups, failures included. Pass unit='group'"):
        ExperienceBuffer.from_dataset(filled().to_dataset(), group_size=K)
    with pytest.raises(ValueError, match="has 4 rows that follow each other, expected 2"):
        ExperienceBuffer.from_dataset(filled().to_dataset(), group_size=2, unit="group")
    shuffled = filled().to_dataset().shuffle(seed=1)
    with pytest.raises(ValueError, match="must stay whole and in one piece"):
        ExperienceBuffer.from_dataset(shuffled, group_size=K, unit="group")
