import contextlib
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from exgrpo_trl.buffer import ExperienceBuffer, files, tables
from exgrpo_trl.buffer.metadata import _sha256 as checksum_of
from exgrpo_trl.records import Experience, ExperienceBufferError, Question, Reuse

K = 8
FILES = ["completions.parquet", "images.parquet", "metadata.json", "questions.parquet", "retired.parquet"]


def operate(buffer, chance, num_operations):
    """Seeded random use of a buffer; returns everything that it answered."""
    answers = []
    for step in range(num_operations):
        name = f"q{chance.randrange(60)}"
        roll = chance.random()
        if roll < 0.75:
            group = []
            for _ in range(chance.choice([0, K, K]) if buffer.unit == "group" else chance.randint(0, 3)):
                length = chance.randint(1, 9)
                group.append(
                    Experience.create(
                        [chance.randrange(2**31) for _ in range(length)],
                        [-chance.random() for _ in range(length)],
                        policy_version=step // 20 + chance.randrange(3),
                        reward=chance.gauss(0, 1),
                        entropy=chance.choice([math.nan, chance.random()]),
                    )
                )
            correct = chance.choices(range(K + 1), [1] + [4] * (K - 1) + [0.2])[0]
            question = Question(name, {"prompt": [{"role": "user", "content": f"ü {name}"}], "answer": math.inf})
            answers.append(buffer.collect(question, group, num_correct=correct, group_size=K))
        elif roll < 0.8:
            answers.append(buffer.evict_older_than(step // 20 - 5))
        elif roll < 0.85 and name in buffer:
            answers.append(buffer.evict(name, chance.choice(buffer.completions(name))))
        elif roll < 0.9 and name in buffer:
            used = chance.choice(buffer.completions(name))
            known = [chance.choice([math.nan, chance.random()]) for _ in range(2)]
            answers.append(buffer.note_reuse(name, used, Reuse(buffer.reuse(used).num_replays + 1, *known, step)))
        else:
            answers.append(buffer.sample_questions(5))
    return answers


def state(buffer):
    """Everything that decides what a buffer does next, in order."""
    return {
        "buckets": [(bucket, list(ids)) for bucket, ids in buffer.buckets().items()],
        "questions": {
            name: (
                repr(buffer.question(name)),
                [
                    (
                        e.token_bytes,
                        e.logp_bytes,
                        e.policy_version,
                        repr(e.reward),
                        repr(e.entropy),
                        repr(buffer.reuse(e)),
                        e.is_scored,
                    )
                    for e in buffer.completions(name)
                ],
            )
            for ids in buffer.buckets().values()
            for name in ids
        },
        "groups": [
            [[experience.token_bytes for experience in group] for group in buffer.groups(name)]
            for ids in buffer.buckets().values()
            for name in ids
            if buffer.unit == "group"
        ],
        "by age": [(experience.token_bytes, name) for experience, name in buffer._store.versions],
        "num_records": len(buffer._store.reuse),
        "retired": list(buffer.retired),
        "counters": (buffer.num_completions, buffer.num_tokens, buffer.num_evicted, buffer.num_duplicates),
        "settings": (
            *(buffer.group_size, buffer.capacity, buffer.max_completions_per_question, buffer.retire_solved),
            buffer.unit,
        ),
        "rng": buffer.rng.bit_generator.state,
        "extra": (buffer.provenance, buffer.replay_state),
    }


def filled(seed=0, num_operations=150, **kwargs):
    buffer = ExperienceBuffer(seed=seed, **kwargs)
    operate(buffer, random.Random(seed), num_operations)
    buffer.provenance = {"tokenizer": "ü", "temperature": 0.7, "tiny": 1e-05}
    buffer.replay_state = {"started": True, "epoch_start": [2, None], "checksum": ""}
    return buffer


@pytest.fixture
def saved(tmp_path):
    buffer = filled()
    buffer.save(tmp_path / "buffer")
    return buffer, tmp_path / "buffer"


def hidden(directory):
    return [name for name in os.listdir(directory) if name.startswith(".")]


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"capacity": 90, "max_completions_per_question": 3, "retire_solved": False},
        {"unit": "group"},
        {"unit": "group", "capacity": 400, "max_completions_per_question": 20},
    ],
)
@pytest.mark.parametrize("small_batches", [False, True])
def test_round_trip_is_exact_and_goes_on_alike(tmp_path, monkeypatch, limits, small_batches):
    if small_batches:
        monkeypatch.setattr(tables, "ROWS_PER_BATCH", 7)
        monkeypatch.setattr(tables, "BYTES_PER_BATCH", 160)
    buffer = filled(seed=1, num_operations=400, **limits)
    # PCG64 keeps half of a 64-bit number for the next 32-bit draw: that belongs to the state too.
    buffer.rng.integers(5, dtype=np.int32)
    path = tmp_path / "a" / "buffer"
    buffer.save(path)
    assert sorted(os.listdir(path)) == FILES
    assert hidden(path.parent) == []
    if small_batches:
        num_groups = pq.ParquetFile(path / "completions.parquet").num_row_groups
        assert buffer.num_tokens / 30 < num_groups < buffer.num_completions / 2
    loaded = ExperienceBuffer.load(str(path))
    assert loaded.check_valid() == (True, "")
    assert state(loaded) == state(buffer)
    assert buffer.num_questions > 20
    assert 0 < len(buffer._store.reuse) < buffer.num_completions
    assert "capacity" in limits or buffer.retired
    assert [loaded.sample_questions(9) for _ in range(10)] == [buffer.sample_questions(9) for _ in range(10)]
    answers = [operate(each, random.Random(5), 300) for each in (buffer, loaded)]
    assert answers[0] == answers[1]
    assert state(loaded) == state(buffer)


def test_saving_does_not_disturb_and_is_reproducible(tmp_path):
    buffer = filled()
    before = state(buffer)
    buffer.save(tmp_path / "one")
    assert state(buffer) == before
    ExperienceBuffer.load(tmp_path / "one").save(tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_empty_buffer(tmp_path):
    ExperienceBuffer(capacity=3).save(tmp_path / "buffer")
    loaded = ExperienceBuffer.load(tmp_path / "buffer")
    assert state(loaded) == state(ExperienceBuffer(capacity=3))


def test_saving_replaces(saved):
    _, path = saved
    other = filled(seed=2)
    other.save(path)
    assert state(ExperienceBuffer.load(path)) == state(other)
    assert hidden(path.parent) == []


def test_saving_never_replaces_something_else(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ExperienceBufferError, match="not part of one"):
            ExperienceBuffer().save(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "model.safetensors").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    ExperienceBuffer().save(tmp_path / "empty")
    assert ExperienceBuffer.load(tmp_path / "empty").num_questions == 0


def test_symbolic_link_stays_one(saved, tmp_path):
    _, path = saved
    link = tmp_path / "link"
    link.symlink_to(path)
    other = filled(seed=2)
    other.save(link)
    assert link.is_symlink()
    assert state(ExperienceBuffer.load(link)) == state(ExperienceBuffer.load(path)) == state(other)


@pytest.mark.parametrize("broken", ["example", "provenance", "rng"])
def test_what_cannot_be_saved_leaves_the_old_buffer(saved, broken):
    buffer, path = saved
    before = state(buffer)
    other = ExperienceBuffer()
    experience = Experience.create([1], [-1.0], policy_version=0, reward=1.0)
    example = {"prompt": "a", "picture": object()} if broken == "example" else {"prompt": "a"}
    other.collect(Question("a", example), [experience], num_correct=1, group_size=K)
    if broken == "provenance":
        other.provenance = {"tokenizer": object()}
    if broken == "rng":
        other.rng = np.random.Generator(np.random.MT19937(0))
    with pytest.raises(TypeError, match={"example": "'picture'", "provenance": "object", "rng": "MT19937"}[broken]):
        other.save(path)
    assert state(ExperienceBuffer.load(path)) == before
    assert hidden(path.parent) == []


def assert_refused(path, message="."):
    with pytest.raises(ExperienceBufferError, match=message) as caught:
        ExperienceBuffer.load(path)
    text = str(caught.value)
    assert "experience buffer" in text
    assert str(path) in text
    assert any(way_out in text for way_out in ("earlier checkpoint", "pgrade"))


@pytest.mark.parametrize("name", FILES)
def test_missing_empty_and_truncated_files(saved, name):
    _, path = saved
    file = path / name
    content = file.read_bytes()
    for size in (0, 1, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:size])
        assert_refused(path, name)
    file.write_bytes(content + b" ")
    assert_refused(path, name)
    file.unlink()
    assert_refused(path, f"has no {name}")
    file.write_bytes(content)
    assert ExperienceBuffer.load(path).num_questions


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_seen(saved, name):
    _, path = saved
    file = path / name
    content = file.read_bytes()
    chance = random.Random(name)
    # The metadata is text that no other checksum covers: every byte of it.
    positions = range(len(content)) if name == "metadata.json" else chance.sample(range(len(content)), 40)
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        assert_refused(path)


def rewrite(path, **changes):
    """Metadata changed on purpose, with a checksum that matches."""
    metadata = json.loads((path / "metadata.json").read_text())
    metadata |= changes
    metadata = {key: value for key, value in metadata.items() if value is not ...}
    text = json.dumps(metadata | {"checksum": ""}, indent=2)
    text = text.replace('"checksum": ""', f'"checksum": "{checksum_of(text)}"', 1)
    (path / "metadata.json").write_text(text)


def test_newer_schema(saved):
    _, path = saved
    rewrite(path, schema_version=6)
    assert_refused(path, "schema version 6.*up to 5.*Upgrade exgrpo-trl")


@pytest.mark.parametrize(
    "changes",
    [
        {"schema_version": None},
        {"schema_version": "1"},
        {"files": {}},
        {"files": None},
        {"counts": ...},
        {"counts": {"questions": 1, "completions": 1, "tokens": 1, "retired": 0, "evicted": 0, "duplicates": 0}},
        {"settings": {"group_size": 2}},
        {"settings": {"capacity": 1}},
        {"settings": {"seed": "x"}},
        {"settings": {"unknown": 1}},
        {"rng": {}},
        {"rng": {"bit_generator": "MT19937"}},
        {"provenance": ...},
    ],
    ids=str,
)
def test_metadata_that_contradicts_the_files(saved, changes):
    _, path = saved
    rewrite(path)
    assert ExperienceBuffer.load(path).num_questions
    rewrite(path, **changes)
    assert_refused(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "1", '{"schema_version": 1}', "ü", "[" * 10**5])
def test_malformed_metadata(saved, text):
    _, path = saved
    (path / "metadata.json").write_text(text, encoding="utf8")
    assert_refused(path, "metadata.json")


def test_files_of_two_saves_do_not_mix(saved, tmp_path):
    _, path = saved
    filled(seed=2).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "completions.parquet", path)
    assert_refused(path, "completions.parquet")


class Interruption(BaseException):
    """Stands for whatever stops a process."""


class Interrupter:
    """Raises at the k-th file operation; a killed process does none afterwards, an interrupted one cleans up."""

    OPERATIONS = (
        *((os, name) for name in ("rename", "replace", "fsync", "mkdir", "open", "rmdir", "unlink")),
        (Path, "write_text"),
        (shutil, "rmtree"),
        (pq.ParquetWriter, "write_batch"),
        (pq.ParquetWriter, "close"),
    )

    def __init__(self, monkeypatch, stop_at, after, killed):
        self.count, self.stop_at, self.after, self.killed = 0, stop_at, after, killed
        self.called = set()
        for owner, name in self.OPERATIONS:
            monkeypatch.setattr(owner, name, self._wrapped(getattr(owner, name), name))
        # It would close the file of a process that is dead.
        monkeypatch.setattr(pq.ParquetWriter, "__del__", lambda writer: None)

    def _wrapped(self, function, name):
        def call(*args, **kwargs):
            self.called.add(name)
            self.count += 1
            if self.killed and self.count > self.stop_at:
                raise Interruption
            stop = self.count == self.stop_at
            if stop and not self.after:
                raise Interruption
            result = function(*args, **kwargs)
            if stop:
                raise Interruption
            return result

        return call


@pytest.mark.parametrize("killed", [False, True], ids=["exception", "kill"])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replaces"])
def test_interrupted_save_leaves_the_old_or_the_new_buffer(tmp_path, killed, after, replaces):
    old, new, next_one = (filled(seed=seed, num_operations=30) for seed in (1, 2, 3))
    outcomes = set()
    for stop_at in range(1, 1000):
        path = tmp_path / str(stop_at) / "buffer"
        path.parent.mkdir()
        if replaces:
            old.save(path)
        with pytest.MonkeyPatch.context() as patch:
            interrupter = Interrupter(patch, stop_at, after, killed)
            try:
                new.save(path)
                finished = True
            except Interruption:
                finished = False
        try:
            loaded = state(ExperienceBuffer.load(path))
            outcome = "new" if loaded == state(new) else "old" if loaded == state(old) else "wrong"
        except ExperienceBufferError:
            outcome = "none"
        assert outcome in (("old", "new") if replaces else ("none", "new")), stop_at
        assert outcome == "new" or not finished
        outcomes.add(outcome)
        # What the interrupted save left behind does not disturb the next one, and is gone after it.
        if stop_at % 2:
            next_one.save(path)
            assert state(ExperienceBuffer.load(path)) == state(next_one)
            assert hidden(path.parent) == []
        if interrupter.count < stop_at:
            break
    assert finished
    assert stop_at > 15
    assert outcomes == ({"old", "new"} if replaces else {"none", "new"})
    assert {"rename", "fsync", "write_text", "write_batch", "close"} <= interrupter.called


def interrupted_save(buffer, path, stop_at):
    """Number of file operations of a save that is killed before the k-th."""
    with pytest.MonkeyPatch.context() as patch:
        interrupter = Interrupter(patch, stop_at, after=False, killed=True)
        with contextlib.suppress(Interruption):
            buffer.save(path)
    return interrupter.count


def test_second_interruption_keeps_the_only_buffer_of_the_first(tmp_path):
    old, new = filled(seed=1, num_operations=30), filled(seed=2, num_operations=30)
    path = tmp_path / "buffer"
    old.save(path)
    num_operations = interrupted_save(new, path, 1000)
    num_cases = 0
    for first in range(1, num_operations + 1):
        for second in range(1, 100):
            shutil.rmtree(tmp_path)
            tmp_path.mkdir()
            old.save(path)
            interrupted_save(new, path, first)
            if path.exists():
                break
            # Killed between the two renames.
            num_cases += 1
            num_done = interrupted_save(new, path, second)
            assert state(ExperienceBuffer.load(path)) in (state(old), state(new)), second
            if num_done < second:
                break
    assert num_cases > 15


def test_everything_is_synced_before_it_counts(tmp_path, monkeypatch):
    events = []
    sync, rename = files.sync, os.rename
    monkeypatch.setattr(files, "sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(os, "rename", lambda source, target: (events.append("rename"), rename(source, target)))
    filled().save(tmp_path / "buffer")
    assert sorted(events[:6]) == sorted([*FILES, ".buffer.saving"])
    assert events[6:] == ["rename", tmp_path.name]


def fail_to_sync(monkeypatch, number, *, of_directories, at="fsync"):
    """Let a file system refuse to sync, or to open for it, with an errno; returns how often it did."""
    refused = []
    original = getattr(os, at)

    def call(target, *args, **kwargs):
        mode = (os.fstat if at == "fsync" else os.stat)(target).st_mode
        if stat.S_ISDIR(mode) == of_directories and not kwargs:  # `shutil.rmtree` opens directories with `dir_fd`
            refused.append(target)
            raise OSError(number, os.strerror(number))
        return original(target, *args, **kwargs)

    monkeypatch.setattr(os, at, call)
    return refused


CANNOT_SYNC = ["EINVAL", "ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EBADF"]
NO_DIRECTORIES = ["EACCES", "EPERM", "EISDIR"]


@pytest.mark.parametrize(
    ("name", "at", "of_directories"),
    [
        *((name, at, True) for name in CANNOT_SYNC + NO_DIRECTORIES for at in ("fsync", "open")),
        *((name, "fsync", False) for name in CANNOT_SYNC),
    ],
)
def test_a_file_system_that_cannot_sync_still_takes_buffers(saved, monkeypatch, name, at, of_directories):
    _, path = saved
    refused = fail_to_sync(monkeypatch, getattr(errno, name), of_directories=of_directories, at=at)
    for seed in (2, 3):
        other = filled(seed=seed)
        other.save(path)
        assert state(ExperienceBuffer.load(path)) == state(other)
        assert hidden(path.parent) == []
    assert len(refused) == 2 * (2 if of_directories else len(FILES))


@pytest.mark.parametrize("name", ["ENOTSUP", "EOPNOTSUPP", "ENOSYS", "EXDEV"])
def test_a_file_system_that_cannot_rename_directories_still_takes_buffers(saved, monkeypatch, name):
    _, path = saved
    refused = []

    def rename(source, target):
        refused.append(source)
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(os, "rename", rename)
    for seed in (2, 3):
        other = filled(seed=seed)
        other.save(path)
        assert state(ExperienceBuffer.load(path)) == state(other)
        assert hidden(path.parent) == []
    assert len(refused) == 4
    monkeypatch.setattr(os, "rename", lambda source, target: (_ for _ in ()).throw(OSError(errno.EACCES, "denied")))
    with pytest.raises(OSError, match="denied"):
        filled(seed=4).save(path)
    assert state(ExperienceBuffer.load(path)) == state(other)


@pytest.mark.parametrize(
    ("name", "at", "of_directories"),
    [
        *((name, "fsync", of_directories) for name in ("ENOSPC", "EIO", "EDQUOT") for of_directories in (True, False)),
        ("EIO", "open", True),
        *((name, "open", False) for name in ("EACCES", "EINVAL", "EIO")),
        *((name, "fsync", False) for name in NO_DIRECTORIES),
    ],
)
def test_what_is_lost_is_still_an_error(saved, monkeypatch, name, at, of_directories):
    buffer, path = saved
    before = state(buffer)
    number = getattr(errno, name)
    with monkeypatch.context() as patch:
        refused = fail_to_sync(patch, number, of_directories=of_directories, at=at)
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            filled(seed=2).save(path)
    assert len(refused) == 1
    assert state(ExperienceBuffer.load(path)) == before


SAVE_FOREVER = """
import sys
from exgrpo_trl.buffer import ExperienceBuffer
from exgrpo_trl.records import Experience, Question

buffers = []
for number in range(1, 4):
    buffer = ExperienceBuffer()
    for index in range(40 * number):
        experience = Experience.create([index] * 50, [-0.5] * 50, policy_version=index, reward=1.0)
        buffer.collect(Question(str(index), {"prompt": "a"}), [experience], num_correct=1, group_size=8)
    buffer.replay_state = {"completions": buffer.num_completions}
    buffers.append(buffer)
while True:
    for buffer in buffers:
        buffer.save(sys.argv[1])
        print("saved", flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_process_leaves_a_whole_buffer(tmp_path):
    chance = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVE_FOREVER, str(tmp_path / "buffer")], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "saved\n"
        time.sleep(chance.uniform(0, 0.1))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        loaded = ExperienceBuffer.load(tmp_path / "buffer")
        assert loaded.num_completions == loaded.replay_state["completions"] > 0
    filled().save(tmp_path / "buffer")
    assert hidden(tmp_path) == []
