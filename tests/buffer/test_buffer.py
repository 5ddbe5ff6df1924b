import math
import random
import sys
import tracemalloc

import numpy as np
import pytest

from exgrpo_trl.buffer import ExperienceBuffer
from exgrpo_trl.records import Experience, Question, Reuse

K = 4


def make(*token_ids, version=0, reward=1.0, entropy=math.nan):
    return Experience.create(
        token_ids, [-0.5] * len(token_ids), policy_version=version, reward=reward, entropy=entropy
    )


def ask(name):
    return Question(name, {"prompt": f"prompt of {name}", "answer": 1})


def collect(buffer, name, *experiences, correct=1, **kwargs):
    return buffer.collect(ask(name), experiences, num_correct=correct, group_size=K, **kwargs)


def tokens_of(buffer, name):
    return [experience.token_ids.tolist() for experience in buffer.completions(name)]


def tokens_in(experiences):
    return [experience.token_ids.tolist() for experience in experiences]


class Twin:
    """The buffer as one list of what came in together, oldest first, that every operation walks."""

    def __init__(self, capacity, per_question, retire_solved, unit):
        self.capacity, self.per_question, self.retire_solved, self.unit = capacity, per_question, retire_solved, unit
        self.parts, self.bucket, self.retired, self.reuse = [], {}, [], {}
        self.evicted = self.duplicates = 0

    @property
    def rows(self):
        return [(name, experience) for name, part in self.parts for experience in part]

    def of(self, name):
        return [experience for owner, experience in self.rows if owner == name]

    def groups(self, name):
        return [part for owner, part in self.parts if owner == name]

    def find(self, name, experience):
        same = [own for own in self.of(name) if own.token_bytes == experience.token_bytes]
        return experience if any(own is experience for own in same) else same[0]

    def drop(self, keep):
        num_before = len(self.rows)
        self.parts = [(name, part) for name, part in self.parts if all(keep(name, experience) for experience in part)]
        self.bucket = {name: bucket for name, bucket in self.bucket.items() if self.of(name)}
        self.reuse = {experience: self.reuse[experience] for _, experience in self.rows if experience in self.reuse}
        return num_before - len(self.rows)

    def evict(self, victim):
        self.evicted += self.drop(lambda name, experience: experience is not victim)

    def limit(self, *names):
        for name in names:
            while self.per_question and len(self.of(name)) > self.per_question:
                self.evict(self.of(name)[0])
        while self.capacity and len(self.rows) > self.capacity:
            oldest = min(experience.policy_version for _, experience in self.rows)
            self.evict([experience for _, experience in self.rows if experience.policy_version == oldest][-1])

    def collect(self, name, experiences, correct, bucket):
        if name in self.retired or correct == 0:
            return 0
        if correct == K and self.retire_solved:
            self.retire(name)
            return 0
        num_inserted = 0
        parts = [(experience,) for experience in experiences]
        if self.unit == "group":
            parts = [tuple(experiences)] if experiences and correct < K else []
        for part in parts:
            if tokens_in(part) in [tokens_in(stored) for stored in self.groups(name)]:
                self.duplicates += len(part)
            else:
                self.parts.append((name, part))
                num_inserted += len(part)
        if self.of(name):
            self.bucket[name] = correct if bucket is None else bucket
        self.limit(name)
        return num_inserted

    def retire(self, name):
        self.drop(lambda owner, experience: owner != name)
        if name not in self.retired:
            self.retired.append(name)


def assert_same(buffer, twin):
    assert buffer.check_valid() == (True, "")
    assert buffer.num_questions == len(twin.bucket)
    assert buffer.num_completions == len(twin.rows)
    assert buffer.num_tokens == sum(len(experience) for _, experience in twin.rows)
    assert (buffer.num_evicted, buffer.num_duplicates) == (twin.evicted, twin.duplicates)
    assert list(buffer.retired) == twin.retired
    buckets = {bucket: set(names) for bucket, names in buffer.buckets().items()}
    expected = {}
    for name, bucket in twin.bucket.items():
        expected.setdefault(bucket, set()).add(name)
    assert list(buckets.items()) == sorted(expected.items())
    for name in twin.bucket:
        assert list(buffer.completions(name)) == twin.of(name)
        if twin.unit == "group":
            assert list(buffer.groups(name)) == twin.groups(name)
    assert buffer._store.reuse == twin.reuse


@pytest.mark.parametrize("unit", ["completion", "group"])
@pytest.mark.parametrize(
    ("capacity", "per_question", "retire_solved"),
    [(None, None, True), (25, None, False), (None, 2, True), (20, 3, True)],
)
def test_random_operations_match_the_slow_twin(capacity, per_question, retire_solved, unit):
    chance = random.Random(f"{capacity} {per_question}")
    whole = K if unit == "group" else 1
    per_question = per_question and per_question * whole + whole // 2
    buffer = ExperienceBuffer(
        group_size=K,
        capacity=capacity,
        max_completions_per_question=per_question,
        retire_solved=retire_solved,
        unit=unit,
    )
    twin = Twin(capacity, per_question, retire_solved, unit)
    names = [f"q{number}" for number in range(200)]
    used = set()
    most_replays = 0
    for step in range(4000):
        operation = chance.choices(
            ["collect", "evict", "foreign", "retire", "age", "limits", "sample", "note"], [70, 8, 3, 1, 2, 1, 10, 10]
        )[0]
        # A window of names that moves on, as questions retire for good.
        name = names[min(step // 25 + chance.randrange(15), 199)]
        used.add(operation)
        if operation == "collect":
            group = [
                make(
                    # Few groups, too, so that some are the same.
                    *(chance.choices(range(3), k=chance.randint(1, 3)) if whole == 1 else [chance.randrange(2)]),
                    version=max(0, step // 10 - chance.randrange(4)),
                )
                for _ in range(chance.randint(0, 3) if unit == "completion" else chance.choice([0, K, K, K]))
            ]
            correct = chance.choices(range(K + 1), [2, 6, 6, 6, 1])[0]
            bucket = chance.choice([None, None, chance.randint(0, K)])
            given = collect(buffer, name, *group, correct=correct, bucket=bucket)
            assert given == twin.collect(name, group, correct, bucket)
        elif operation == "evict" and twin.rows:
            name, victim = chance.choice(twin.rows)
            victim = chance.choice([victim, make(*victim.token_ids)])
            assert buffer.evict(name, victim) is True
            twin.evict(twin.find(name, victim))
        elif operation == "note" and twin.rows:
            name, used_again = chance.choice(twin.rows)
            used_again = chance.choice([used_again, make(*used_again.token_ids)])
            found = twin.find(name, used_again)
            record = Reuse(buffer.reuse(found).num_replays + 1, chance.random(), chance.random(), step)
            assert buffer.note_reuse(name, used_again, record) is True
            twin.reuse[found] = record
            most_replays = max(most_replays, record.num_replays)
        elif operation == "foreign":
            assert buffer.note_reuse(name, make(9, 9), Reuse(1)) is False
            assert buffer.evict(name, make(9, 9)) is False
        elif operation == "retire":
            buffer.retire(name)
            twin.retire(name)
        elif operation == "age":
            oldest = max(0, step // 10 - chance.randrange(2, 9))
            num_dropped = twin.drop(lambda _, experience, oldest=oldest: experience.policy_version >= oldest)
            twin.evicted += num_dropped
            assert buffer.evict_older_than(oldest) == num_dropped
        elif operation == "limits" and capacity:
            twin.capacity, twin.per_question = chance.randint(5, 40), chance.choice([None, whole, 3 * whole])
            # What goes first when both limits shrink: each question's own limit.
            twin.limit(*twin.bucket)
            buffer.set_limits(capacity=twin.capacity, max_completions_per_question=twin.per_question)
        elif operation == "sample":
            drawn = buffer.sample_questions(5)
            assert len(drawn) == min(5, len(twin.bucket))
            assert set(drawn) <= set(twin.bucket)
        assert_same(buffer, twin)
    assert len(used) == 8
    assert most_replays > 1
    assert twin.retired
    assert twin.evicted > 50
    assert twin.duplicates > 50


def test_latest_group_decides_the_bucket():
    buffer = ExperienceBuffer()
    assert collect(buffer, "a", make(1), correct=1) == 1
    assert {bucket: list(names) for bucket, names in buffer.buckets().items()} == {1: ["a"]}
    assert collect(buffer, "a", make(1), correct=3) == 0
    assert {bucket: list(names) for bucket, names in buffer.buckets().items()} == {3: ["a"]}
    assert collect(buffer, "a", correct=2) == 0
    assert collect(buffer, "a", make(2), correct=0) == 0
    assert {bucket: list(names) for bucket, names in buffer.buckets().items()} == {2: ["a"]}
    assert tokens_of(buffer, "a") == [[1]]
    assert (buffer.num_duplicates, buffer.num_evicted) == (1, 0)


def test_nothing_correct_and_nothing_fresh_store_nothing():
    buffer = ExperienceBuffer()
    assert collect(buffer, "a", make(1), correct=0) == 0
    assert collect(buffer, "b", correct=2) == 0
    assert (buffer.num_questions, dict(buffer.buckets())) == (0, {})
    assert buffer.group_size == K


def test_solved_questions_retire_for_good():
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1), make(2), correct=2)
    collect(buffer, "b", make(1))
    assert collect(buffer, "a", make(3), correct=K) == 0
    assert collect(buffer, "a", make(4), correct=1) == 0
    assert "a" not in buffer
    assert list(buffer.retired) == ["a"]
    buffer.retire("never seen")
    buffer.retire("a")
    assert list(buffer.retired) == ["a", "never seen"]
    assert "never seen" in buffer.retired
    assert buffer.num_evicted == 0
    assert not hasattr(buffer.retired, "add")
    with pytest.raises(AttributeError):
        buffer.retired = set()


def test_solved_questions_may_stay():
    buffer = ExperienceBuffer(retire_solved=False)
    assert collect(buffer, "a", make(1), correct=K) == 1
    assert list(buffer.buckets()) == [K]
    assert buffer.metrics()[f"bucket_{K}"] == 1
    assert not buffer.retired


def test_first_example_is_kept_and_the_prompt_must_stay():
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1))
    later = Question("a", {"prompt": "prompt of a", "answer": 2})
    buffer.collect(later, [make(2)], num_correct=1, group_size=K)
    assert buffer.question("a").example["answer"] == 1
    for correct in range(K + 1):
        with pytest.raises(ValueError, match=r"'a' belongs to two prompts: 'prompt of a' and 'else'"):
            buffer.collect(Question("a", {"prompt": "else"}), [make(3)], num_correct=correct, group_size=K)
    assert tokens_of(buffer, "a") == [[1], [2]]


def test_a_prompt_with_nan_is_itself():
    buffer = ExperienceBuffer()
    for token in (1, 2):  # as datasets and saved buffers give it, another object each time
        prompt = [{"role": "user", "content": "?", "tool_calls": [{"arguments": {"x": float("nan")}}]}]
        buffer.collect(Question("a", {"prompt": prompt}), [make(token)], num_correct=1, group_size=K)
    prompt = [{"role": "user", "content": "?", "tool_calls": [{"arguments": {"x": 1.0}}]}]
    with pytest.raises(ValueError, match="belongs to two prompts"):
        buffer.collect(Question("a", {"prompt": prompt}), [make(3)], num_correct=1, group_size=K)
    assert tokens_of(buffer, "a") == [[1], [2]]


def test_same_tokens_of_two_questions_are_two_completions():
    buffer = ExperienceBuffer()
    experience = make(1)
    collect(buffer, "a", experience)
    collect(buffer, "b", experience)
    assert (buffer.num_completions, buffer.num_duplicates) == (2, 0)
    assert buffer.check_valid() == (True, "")
    assert buffer.evict("a", experience)
    assert tokens_of(buffer, "b") == [[1]]
    assert buffer.check_valid() == (True, "")


def test_capacity_evicts_the_oldest_policy_first():
    buffer = ExperienceBuffer(capacity=3)
    collect(buffer, "a", make(1, version=5))
    collect(buffer, "b", make(2, version=1), make(3, version=7))
    assert collect(buffer, "c", make(4, version=6)) == 1
    assert tokens_of(buffer, "b") == [[3]]
    collect(buffer, "c", make(5, version=8))
    assert "a" not in buffer
    assert list(buffer.buckets()[1]) == ["c", "b"]
    assert (buffer.num_completions, buffer.num_evicted) == (3, 2)
    # Older than everything stored: it goes at once.
    assert collect(buffer, "d", make(6, version=0)) == 1
    assert "d" not in buffer


def test_limit_per_question_evicts_its_oldest():
    buffer = ExperienceBuffer(max_completions_per_question=2)
    collect(buffer, "a", make(1, version=9), make(2, version=3))
    collect(buffer, "a", make(3, version=4))
    assert tokens_of(buffer, "a") == [[2], [3]]
    collect(buffer, "a", make(4), make(5), make(6))
    assert tokens_of(buffer, "a") == [[5], [6]]
    assert (buffer.num_evicted, buffer.num_tokens) == (4, 2)


def test_staleness_limit():
    buffer = ExperienceBuffer()
    for version in (4, 2, 9, 2, 0):
        collect(buffer, f"q{version}", make(version, buffer.num_completions, version=version))
    assert buffer.evict_older_than(0) == 0
    assert buffer.evict_older_than(4) == 3
    assert sorted(buffer.buckets()[1]) == ["q4", "q9"]
    assert buffer.evict_older_than(4) == 0
    assert buffer.evict_older_than(100) == 2
    assert (buffer.num_questions, buffer.num_tokens, buffer.num_evicted) == (0, 0, 5)
    assert buffer.check_valid() == (True, "")


def test_bucket_views_are_live_and_read_only():
    buffer = ExperienceBuffer()
    for name in "abc":
        collect(buffer, name, make(1))
    buckets = buffer.buckets()
    view = buckets[1]
    assert (len(view), view[0], list(view), view[-2:], "b" in view) == (3, "a", ["a", "b", "c"], ["b", "c"], True)
    collect(buffer, "d", make(1))
    assert len(view) == 4
    assert [view.index(name) for name in view] == [0, 1, 2, 3]
    assert (view.index("c", 1), view.index("c", -2), view.index("a", 0, 1)) == (2, 2, 0)
    for absent in (("x",), ("a", 1), ("c", 0, 2), ("b", -2)):
        with pytest.raises(ValueError, match=f"'{absent[0]}' is not in this bucket"):
            view.index(*absent)
    assert not [name for name in dir(view) if name in ("add", "append", "remove", "pop", "clear", "__setitem__")]
    with pytest.raises(TypeError):
        buckets[1] = []


def test_metrics_have_stable_names():
    buffer = ExperienceBuffer()
    sizes = ["questions", "completions", "tokens", "retired", "evicted", "duplicates"]
    assert buffer.metrics() == dict.fromkeys(sizes, 0.0)
    collect(buffer, "a", make(1, 2), make(1, 2), correct=2)
    collect(buffer, "b", make(1), correct=2, bucket=0)
    collect(buffer, "c", correct=K)
    buffer.evict("a", make(1, 2))
    assert buffer.metrics() == {
        "questions": 1,
        "completions": 1,
        "tokens": 1,
        "retired": 1,
        "evicted": 1,
        "duplicates": 1,
        "bucket_0": 1,
        "bucket_1": 0,
        "bucket_2": 0,
        "bucket_3": 0,
    }
    assert {type(value) for value in buffer.metrics().values()} == {float}


def test_sampling_is_capped_seeded_and_pluggable():
    buffer, twin = ExperienceBuffer(seed=7), ExperienceBuffer(seed=7)
    for target in (buffer, twin):
        for number in range(30):
            collect(target, f"q{number}", make(1), correct=1 + number % 3)
    assert buffer.sample_questions(0) == []
    assert sorted(buffer.sample_questions(99)) == sorted(twin.sample_questions(30))
    draws = [buffer.sample_questions(5) for _ in range(10)]
    assert draws == [twin.sample_questions(5) for _ in range(10)]
    assert len(set(map(tuple, draws))) > 1
    seen = []

    def sampler(pool, n, rng):
        seen.append((pool, n, rng))
        return ("q3",)

    assert buffer.sample_questions(2, sampler) == ["q3"]
    assert seen == [(buffer, 2, buffer.rng)]
    assert ExperienceBuffer().sample_questions(3, sampler) == []


@pytest.mark.parametrize(
    ("drawn", "message"),
    [(["a", "b", "c"], "3 questions, at most 2"), (["a", "a"], "twice"), (["a", "z"], "'z'")],
)
def test_what_a_sampler_returns_is_checked(drawn, message):
    buffer = ExperienceBuffer()
    for name in "abc":
        collect(buffer, name, make(1))
    with pytest.raises(ValueError, match=message):
        buffer.sample_questions(2, lambda pool, n, rng: drawn)
    with pytest.raises(ValueError, match="-1"):
        buffer.sample_questions(-1)


def test_strategies_of_other_papers_are_plain_callables():
    buffer = ExperienceBuffer()
    for number in range(12):
        collect(buffer, f"q{number}", make(number, version=number), correct=1 + number % 3)

    def by_pass_rate(pool, n, rng, tau=0.1):  # DOTS + RR
        ids = [(name, bucket / pool.group_size) for bucket, names in pool.buckets().items() for name in names]
        weights = np.exp([-abs(rate - 0.5) / tau for _, rate in ids])
        return [ids[i][0] for i in rng.choice(len(ids), n, replace=False, p=weights / weights.sum())]

    last_use = {}

    def with_cooldown(pool, n, rng, step=[0]):  # noqa: B006 - Prompt Replay: no question twice within three draws
        step[0] += 1
        names = [name for names in pool.buckets().values() for name in names if step[0] - last_use.get(name, -9) > 3]
        last_use.update(dict.fromkeys(names[:n], step[0]))
        return names[:n]

    def by_freshness(pool, n, rng):  # FreshPER: recent completions first
        newest = {
            name: max(experience.policy_version for experience in pool.completions(name))
            for names in pool.buckets().values()
            for name in names
        }
        return sorted(newest, key=newest.get)[-n:]

    assert len(buffer.sample_questions(4, by_pass_rate)) == 4
    assert buffer.sample_questions(3, by_freshness) == ["q9", "q10", "q11"]
    draws = [buffer.sample_questions(3, with_cooldown) for _ in range(5)]
    assert len({name for drawn in draws[:4] for name in drawn}) == 12
    assert draws[4] == draws[0]


@pytest.mark.parametrize("name", ["group_size", "capacity", "max_completions_per_question"])
def test_sizes_are_checked(name):
    for value in (0, -3):
        with pytest.raises(ValueError, match=rf"`{name}`.*{value}"):
            ExperienceBuffer(**{name: value})
    with pytest.raises(TypeError, match=rf"`{name}`.*1.5"):
        ExperienceBuffer(**{name: 1.5})
    assert getattr(ExperienceBuffer(**{name: np.int64(2)}), name) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group_size": 8}, ValueError, "groups of 4, got `group_size`=8"),
        ({"group_size": 0}, ValueError, "0"),
        ({"num_correct": 5}, ValueError, r"`num_correct` must lie in 0..4, got 5"),
        ({"num_correct": -1}, ValueError, "-1"),
        ({"num_correct": 1.0}, TypeError, "1.0"),
        ({"bucket": 5}, ValueError, r"`bucket` must lie in 0..4, got 5"),
        ({"bucket": -1}, ValueError, "-1"),
        ({"question": "a"}, TypeError, "Question"),
        ({"experiences": [[1, 2]]}, TypeError, "Experience.create"),
    ],
)
def test_collect_refuses_and_changes_nothing(arguments, error, message):
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1))
    good = {"question": ask("a"), "experiences": [make(2)], "num_correct": 2, "group_size": K}
    arguments = {**good, **arguments}
    with pytest.raises(error, match=message):
        buffer.collect(arguments.pop("question"), arguments.pop("experiences"), **arguments)
    assert tokens_of(buffer, "a") == [[1]]
    assert list(buffer.buckets()) == [1]
    assert buffer.collect(**good) == 1


def test_unknown_questions():
    buffer = ExperienceBuffer()
    for method in (buffer.question, buffer.completions):
        with pytest.raises(KeyError, match="no completion of question 'x'"):
            method("x")
    assert buffer.evict("x", make(1)) is False
    assert "x" not in buffer


def test_limits_can_be_replaced():
    buffer = ExperienceBuffer()
    for version in range(6):
        collect(buffer, f"q{version % 2}", make(version, version=version))
    buffer.set_limits(capacity=3, max_completions_per_question=2)
    assert (tokens_of(buffer, "q0"), tokens_of(buffer, "q1")) == ([[4]], [[3], [5]])
    assert (buffer.capacity, buffer.max_completions_per_question) == (3, 2)
    with pytest.raises(ValueError, match="capacity"):
        buffer.set_limits(capacity=0, max_completions_per_question=1)
    with pytest.raises(ValueError, match="max_completions_per_question"):
        buffer.set_limits(capacity=1, max_completions_per_question=0)
    assert (buffer.num_completions, buffer.capacity, buffer.max_completions_per_question) == (3, 3, 2)


BREAKS = {
    "count of completions": lambda buffer: setattr(buffer._store, "num_completions", 9),
    "count of tokens": lambda buffer: setattr(buffer._store, "num_tokens", 9),
    "retired": lambda buffer: buffer._retired.update(a=None),
    "bucket position": lambda buffer: buffer._store.buckets[1]._positions.update(a=1),
    "bucket member": lambda buffer: buffer._store.buckets[1].add("z"),
    "lost bucket": lambda buffer: buffer._store.buckets.pop(1),
    "wrong bucket": lambda buffer: setattr(buffer._store.questions["a"], "bucket", 2),
    "bucket out of range": lambda buffer: setattr(buffer, "_group_size", None),
    "no completions": lambda buffer: buffer._store.questions["a"].completions.clear(),
    "key": lambda buffer: buffer._store.questions["a"].completions.update(x=make(3)),
    "id": lambda buffer: setattr(buffer._store.questions["a"], "question", ask("b")),
    "version": lambda buffer: buffer._store.versions.remove(buffer.completions("a")[0]),
    "foreign version": lambda buffer: buffer._store.versions.add(make(1), "a"),
    "heap": lambda buffer: buffer._store.versions._heap.append(77),
    "foreign record": lambda buffer: buffer._store.reuse.update({make(1): Reuse(1)}),
    "capacity": lambda buffer: setattr(buffer, "_capacity", 1),
    "limit per question": lambda buffer: setattr(buffer, "_max_per_question", 1),
}


@pytest.mark.parametrize("name", BREAKS)
def test_check_valid_sees(name):
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1), make(2))
    collect(buffer, "b", make(1))
    assert buffer.check_valid() == (True, "")
    BREAKS[name](buffer)
    is_valid, reason = buffer.check_valid()
    assert not is_valid
    assert reason


class NoWalkDict(dict):
    def _refuse(self, *args):
        raise AssertionError("walked")

    __iter__ = keys = values = items = copy = __reversed__ = __eq__ = _refuse
    __hash__ = None


class NoWalkList(list):
    def _refuse(self, *args):
        raise AssertionError("walked")

    __iter__ = copy = index = count = remove = insert = __contains__ = __reversed__ = sort = reverse = __eq__ = _refuse
    __hash__ = None


def big_buffer(num_questions, unit):
    buffer = ExperienceBuffer(group_size=K, unit=unit)
    for number in range(num_questions):
        version = number * 16 // num_questions
        parts = [make(number % 1000, version=version) for _ in range(K if unit == "group" else 1)]
        collect(buffer, f"q{number}", *parts, correct=1 + number % 3)
    # From here on, to walk anything that grows with the buffer is an error.
    buffer._store.questions = NoWalkDict(buffer._store.questions)
    buffer._retired = NoWalkDict(buffer._retired)
    for bucket in buffer._store.buckets.values():
        bucket._ids, bucket._positions = NoWalkList(bucket._ids), NoWalkDict(bucket._positions)
    buffer._store.versions._owners = {
        version: NoWalkDict(owners) for version, owners in buffer._store.versions._owners.items()
    }
    return buffer


def lines_executed(function):
    """Lines of Python that a call executes, in our package only."""
    num_lines = 0

    def trace(frame, event, argument):
        nonlocal num_lines
        if "exgrpo_trl" not in frame.f_code.co_filename:
            return None
        num_lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return num_lines


@pytest.mark.parametrize("unit", ["completion", "group"])
def test_no_operation_on_the_training_path_walks_the_buffer(unit):
    def new(version):
        return [make(1, version=version) for _ in range(K if unit == "group" else 1)]

    def operations(buffer):
        size = buffer.num_questions
        return {
            "insert": lambda: collect(buffer, "new", *new(20)),
            "insert and move": lambda: collect(buffer, "q7", *new(20), correct=3),
            "evict": lambda: buffer.evict("q8", make(8)),
            "retire": lambda: buffer.retire("q9"),
            "draw": lambda: (
                buffer.rng.bit_generator.__setstate__(np.random.PCG64(1).__getstate__()) or buffer.sample_questions(8)
            ),
            "read": lambda: (buffer.completions("q7"), buffer.question("q7"), buffer.metrics(), "q7" in buffer),
            "note": lambda: buffer.note_reuse("q7", make(7), Reuse(1)) and buffer.reuse(buffer.completions("q7")[0]),
            "position": lambda: buffer.buckets()[1].index("q12"),
            "evict stale": lambda: buffer.evict_older_than(0),
            "replace at capacity": lambda: (
                setattr(buffer, "_capacity", buffer.num_completions),
                collect(buffer, "newer", *new(21)),
            ),
            "still all there": lambda: pytest.fail("lost") if buffer.num_questions < size - 3 else None,
        }

    small, large = operations(big_buffer(300, unit)), operations(big_buffer(6000, unit))
    for name in small:
        assert lines_executed(small[name]) == lines_executed(large[name]), name


def test_memory_per_completion():
    num_questions, per_question, num_tokens = 500, 4, 512
    questions = [ask(f"q{number}") for number in range(num_questions)]
    rng = np.random.default_rng(0)
    logps = -rng.random(num_tokens)
    tracemalloc.start()
    try:
        buffer = ExperienceBuffer(group_size=K)
        before = tracemalloc.get_traced_memory()[0]
        for step in range(per_question):
            for number, question in enumerate(questions):
                ids = rng.integers(0, 150_000, num_tokens)
                experience = Experience.create(
                    ids, logps, policy_version=step * 4 + number // 128, reward=step + 0.5, entropy=number / 7
                )
                buffer.collect(question, [experience], num_correct=1, group_size=K)
        del ids, experience
        num_bytes = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert buffer.num_tokens == num_questions * per_question * num_tokens
    assert num_bytes <= 8.5 * buffer.num_tokens + 250 * buffer.num_completions


def test_it_has_a_length_and_can_be_walked():
    buffer = ExperienceBuffer()
    assert len(buffer) == 0
    assert list(buffer) == []
    collect(buffer, "a", make(1, 2), make(3), correct=2)
    collect(buffer, "b", make(1), correct=3)
    assert len(buffer) == buffer.num_completions == 3
    assert list(buffer) == list(buffer.items())
    assert [(question.question_id, bucket, len(experience)) for question, bucket, experience in buffer] == [
        ("a", 2, 2),
        ("a", 2, 1),
        ("b", 3, 1),
    ]


def test_an_empty_buffer_is_not_taken_for_none():
    buffer = ExperienceBuffer()
    assert (buffer or "another") is buffer


def test_dataset_round_trip():
    datasets = pytest.importorskip("datasets")
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1, 2, version=3, entropy=0.5), make(3, reward=-2.5), correct=2)
    collect(buffer, "b", make(1), correct=3)
    collect(buffer, "c", make(5), correct=1)
    collect(buffer, "d", correct=K)
    dataset = buffer.to_dataset()
    assert dataset.column_names == [
        *("question_id", "example", "bucket", "token_ids", "behavior_per_token_logps"),
        *("policy_version", "reward", "entropy", "prompt_hash", "is_scored"),
        *("num_replays", "known_entropy", "known_negative_log_likelihood", "known_at", "provenance"),
    ]
    assert dataset["question_id"][:] == ["c", "a", "a", "b"]
    assert dataset[1]["token_ids"] == [1, 2]
    assert dataset[1]["behavior_per_token_logps"] == [-0.5, -0.5]
    # As it comes back from other tools: plain Python values, so int64, float64 and ordinary lists.
    plain = datasets.Dataset.from_list(dataset.select_columns(dataset.column_names[::-1]).to_list())
    for source in (dataset, plain, plain.with_format("numpy")):
        again = ExperienceBuffer.from_dataset(source, group_size=K, seed=3)
        assert again.check_valid() == (True, "")
        # As text, since NaN is not equal to itself.
        assert str(again.to_dataset().to_list()) == str(dataset.to_list())
        assert again.question("a") == buffer.question("a")
        assert not again.retired
    assert ExperienceBuffer.from_dataset(plain, group_size=K, capacity=2).num_completions == 2
    limited = ExperienceBuffer.from_dataset(plain, group_size=K, max_completions_per_question=1)
    assert tokens_of(limited, "a") == [[3]]
    assert len(ExperienceBuffer().to_dataset()) == 0
    assert ExperienceBuffer.from_dataset(ExperienceBuffer().to_dataset(), group_size=K).num_questions == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": None}, "`reward` is never null"),
        ({"token_ids": [-1]}, "not negative"),
        ({"token_ids": [2**31]}, "expected types"),
        ({"token_ids": [1, 2]}, "as many log-probabilities"),
        ({"token_ids": [], "behavior_per_token_logps": []}, "has a token"),
        ({"token_ids": ["a"]}, "expected types"),
        ({"behavior_per_token_logps": [0.5]}, "at most 0"),
        ({"behavior_per_token_logps": [math.nan]}, "finite"),
        ({"policy_version": -1}, "versions are not negative"),
        ({"reward": math.nan}, "rewards are finite"),
        ({"entropy": math.inf}, "entropies"),
        ({"bucket": 9}, "`bucket`.*9"),
        ({"bucket": None}, "`bucket` is never null"),
        ({"example": "{}"}, "no 'prompt'"),
        ({"example": "x"}, "."),
    ],
)
def test_from_dataset_refuses(changes, message):
    datasets = pytest.importorskip("datasets")
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1))
    row = buffer.to_dataset()[0]
    with pytest.raises(ValueError, match=message):
        ExperienceBuffer.from_dataset(datasets.Dataset.from_list([row | changes]), group_size=K)


PROVENANCE = {"tokenizer": "abc", "chat_template": "ü", "temperature": 0.7, "question_id_column": None}


def of_provenance(provenance, name="a"):
    buffer = ExperienceBuffer()
    collect(buffer, name, make(1), make(2, 3), make(4))
    buffer.provenance = provenance
    return buffer.to_dataset()


@pytest.mark.parametrize("way", ["filter", "select", "disk", "parquet", "json", "numpy", "concatenated"])
def test_a_dataset_keeps_the_provenance(tmp_path, way):
    datasets = pytest.importorskip("datasets")
    dataset = of_provenance(PROVENANCE).filter(lambda row: row["token_ids"] != [1])
    if way == "select":
        dataset = dataset.select([1]).shuffle(seed=0)
    elif way == "disk":
        dataset.save_to_disk(tmp_path / "saved")
        dataset = datasets.load_from_disk(tmp_path / "saved")
    elif way == "parquet":
        dataset.to_parquet(tmp_path / "saved.parquet")
        dataset = datasets.Dataset.from_parquet(str(tmp_path / "saved.parquet"), cache_dir=str(tmp_path))
    elif way == "json":
        dataset.to_json(tmp_path / "saved.json")
        dataset = datasets.Dataset.from_json(str(tmp_path / "saved.json"), cache_dir=str(tmp_path))
    elif way == "numpy":
        dataset = dataset.with_format("numpy")
    elif way == "concatenated":  # with one that does not say all, and one that says nothing
        others = of_provenance({"temperature": 0.7}, "b"), of_provenance({}, "c").remove_columns("provenance")
        dataset = datasets.concatenate_datasets([dataset, *others])
    buffer = ExperienceBuffer.from_dataset(dataset, group_size=K)
    assert len(buffer) == len(dataset)
    assert buffer.provenance == PROVENANCE


def test_a_dataset_may_lack_the_provenance():
    assert of_provenance({})["provenance"][:] == [None] * 3
    for dataset in (of_provenance({}), of_provenance(PROVENANCE).remove_columns("provenance")):
        assert ExperienceBuffer.from_dataset(dataset, group_size=K).provenance == {}


def test_completions_of_different_provenance_do_not_mix():
    datasets = pytest.importorskip("datasets")
    mixed = datasets.concatenate_datasets(
        [of_provenance(PROVENANCE), of_provenance(PROVENANCE | {"tokenizer": "xyz"}, "b")]
    )
    with pytest.raises(
        ValueError, match=r"different provenance: tokenizer='abc' and tokenizer='xyz'.*filter"
    ) as error:
        ExperienceBuffer.from_dataset(mixed, group_size=K)
    one = mixed.filter(lambda row: row["provenance"] == mixed[0]["provenance"])
    assert "row['provenance'] == dataset[0]['provenance']" in str(error.value), "the way out, which works"
    assert ExperienceBuffer.from_dataset(one, group_size=K).provenance == PROVENANCE


@pytest.mark.parametrize("text", ["x", "[]", "1"])
def test_a_provenance_that_is_none(text):
    dataset = of_provenance({}).remove_columns("provenance").add_column("provenance", [text] * 3)
    with pytest.raises(ValueError, match="'provenance' must hold a JSON object"):
        ExperienceBuffer.from_dataset(dataset, group_size=K)


def test_from_dataset_refuses_other_things():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"lacks the columns \['question_id'.*\['prompt'\]"):
        ExperienceBuffer.from_dataset(datasets.Dataset.from_list([{"prompt": "a"}]), group_size=K)
    with pytest.raises(TypeError, match="list"):
        ExperienceBuffer.from_dataset([], group_size=K)
    rows = []
    for prompt in ("one", "two"):
        buffer = ExperienceBuffer()
        buffer.collect(Question("a", {"prompt": prompt}), [make(len(rows))], num_correct=1, group_size=K)
        rows += buffer.to_dataset().to_list()
    with pytest.raises(ValueError, match="two prompts"):
        ExperienceBuffer.from_dataset(datasets.Dataset.from_list(rows), group_size=K)
