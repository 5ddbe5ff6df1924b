"""The log of replays on disk: bounded, atomic, small, read while it is written, cut and moved away on a resume."""

import errno
import os
import shutil
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exgrpo_trl import ExperienceBufferError, replay_log_writer
from exgrpo_trl.replay_log import LOG_SCHEMA, find_replay_log, parts_of, read_replay_log
from exgrpo_trl.replay_log_writer import ReplayLog, write_part

RNG = np.random.default_rng(0)


def row(step, number=0, num_competitors=3, **changes):
    """A row as a real run has it: floats and lists that differ, ids of 32 digits."""
    scores = RNG.random((num_competitors, 2))
    return {
        "last_step": step,
        "policy_version": step - 1,
        "row": number,
        "group_size": 8,
        "question_id": f"{RNG.integers(2**63):016x}" * 2,
        "bucket": int(RNG.integers(1, 8)),
        "num_tokens": int(RNG.integers(1, 2000)),
        "reward": 1.0,
        "age": int(RNG.integers(1, 200)),
        "num_replays": int(RNG.integers(3)),
        "is_fill": False,
        "entropy": float(RNG.random()),
        "negative_log_likelihood": float(RNG.random()),
        "scored_at": step - 1,
        "competitor_ages": RNG.integers(1, 200, num_competitors).tolist(),
        "competitor_entropies": scores[:, 0].tolist(),
        "competitor_negative_log_likelihoods": scores[:, 1].tolist(),
        "mean_log_ratio": float(RNG.normal()),
        "drift": float(RNG.random()),
        "evicted": None,
    } | changes


def rows_of_step(step, num_rows=4, **changes):
    return [row(step, number, **changes) for number in range(num_rows)]


@pytest.fixture
def messages():
    return []


@pytest.fixture
def make(tmp_path, messages):
    """Logs of runs in one directory."""
    return lambda **options: ReplayLog(str(tmp_path / "run"), **{"is_on": True, "warn": messages.append} | options)


def steps(tmp_path):
    return sorted(set(read_replay_log(tmp_path / "run").column("step").to_pylist()))


def test_what_is_written_is_read(tmp_path, make, messages):
    log = make()
    log.begin(0)
    written = []
    for step in range(1, 6):
        rows = rows_of_step(step)
        log.add(step, rows)
        written += [{"step": step, "batch": 0, **row} for row in rows]
    assert not (tmp_path / "run").exists(), "it waits"
    log.flush()
    table = read_replay_log(tmp_path / "run")
    assert table.schema.equals(LOG_SCHEMA)
    for expected, actual in zip(written, table.to_pylist(), strict=True):
        assert actual == {
            name: pytest.approx(value, rel=1e-6) if isinstance(value, float | list) else value
            for name, value in expected.items()
        }
    assert messages == []


def test_batches_that_begin_with_the_same_step_are_numbered(tmp_path, make):
    log = make()
    log.begin(0)
    for step in (1, 1, 1, 2, 2, 4):
        log.add(step, rows_of_step(step, 2))
        log.flush()
    log.add(5, [])  # one without replays is one
    log.add(5, rows_of_step(5, 1))
    log.flush()
    table = read_replay_log(tmp_path / "run")
    assert table.column("batch").to_pylist() == [0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 0, 0, 1]


def test_nothing_is_written_where_it_is_off_or_nothing_was_replayed(tmp_path, make):
    for log in (make(is_on=False), make()):
        log.begin(0)
        log.add(1, rows_of_step(1) if not log.is_on else [])
        log.flush()
    assert not (tmp_path / "run").exists()


def test_time_decides_when_it_is_written(tmp_path, make, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(replay_log_writer.time, "monotonic", lambda: now[0])
    log = make()
    log.begin(0)
    num_written = []
    for step in range(1, 30):
        now[0] += 1
        log.add(step, rows_of_step(step))
        num_written.append(len(parts_of(tmp_path / "run" / "replay_log")) and len(read_replay_log(tmp_path / "run")))
    assert num_written == [0] * 9 + [40] * 10 + [80] * 10


def test_it_is_bounded(tmp_path, make, monkeypatch):
    monkeypatch.setattr(replay_log_writer, "PART_SIZE", 40)
    monkeypatch.setattr(replay_log_writer, "MAX_PARTS", 3)
    log = make()
    log.begin(0)
    for step in range(1, 101):
        log.add(step, rows_of_step(step))  # 4 completions and 12 competitors
        log.flush()
        assert len(os.listdir(log.folder)) <= 3
    assert steps(tmp_path) == list(range(94, 101))
    assert max(len(pq.read_table(part)) for part in parts_of(log.folder)) == 12, "a part ends soon after it is full"


def test_bytes_of_a_replay(tmp_path, make):
    """With three competitors, of 200 questions; and without any, of a question that never came up before."""
    log = make()
    log.begin(0)
    num_rows = 0
    ids = [f"{RNG.integers(2**63):016x}" * 2 for _ in range(200)]
    for step in range(1, 500):
        rows = [row(step, number, question_id=ids[RNG.integers(200)]) for number in range(4)]
        log.add(step, rows)
        num_rows += len(rows)
    log.flush()
    size = sum(part.stat().st_size for part in parts_of(log.folder))
    assert 20 < size / num_rows < 56, f"{size / num_rows:.1f} bytes"
    # All that a log may ever hold, were every part as large as the first.
    per_unit = parts_of(log.folder)[0].stat().st_size / replay_log_writer.PART_SIZE
    assert replay_log_writer.MAX_PARTS * replay_log_writer.PART_SIZE * per_unit < 40e6
    without = ReplayLog(str(tmp_path / "alone"), is_on=True, warn=print)
    without.begin(0)
    for step in range(1, 1000):
        without.add(step, rows_of_step(step, num_competitors=0))
    without.flush()
    size = sum(part.stat().st_size for part in parts_of(without.folder))
    assert size / 3996 < 36, f"{size / 3996:.1f} bytes"
    assert replay_log_writer.MAX_PARTS * size < 40e6


def test_a_reader_never_sees_a_torn_file(tmp_path, make, monkeypatch):
    monkeypatch.setattr(replay_log_writer, "PART_SIZE", 60)
    monkeypatch.setattr(replay_log_writer, "MAX_PARTS", 4)
    log = make()
    log.begin(0)
    log.add(1, rows_of_step(1))
    log.flush()
    is_done, failures, num_reads = threading.Event(), [], [0]

    def read():
        while not is_done.is_set():
            try:
                seen = read_replay_log(tmp_path / "run").column("step").to_pylist()
                assert seen == sorted(seen)
                assert all(seen.count(step) == 4 for step in set(seen))
                num_reads[0] += 1
            except Exception as error:
                failures.append(error)
                return

    reader = threading.Thread(target=read)
    reader.start()
    for step in range(2, 300):
        log.add(step, rows_of_step(step))
        log.flush()
    is_done.set()
    reader.join()
    # Parts that come and go all the time may defeat it; it says so then.
    assert all("changes faster" in str(failure) for failure in failures), failures
    assert num_reads[0] > 0


def test_a_writer_that_dies_leaves_what_was_there(tmp_path, make, monkeypatch):
    log = make()
    log.begin(0)
    log.add(1, rows_of_step(1))
    log.flush()
    write = pq.write_table

    def die(table, path, **options):
        write(table, path, **options)
        with open(path, "r+b") as file:
            file.truncate(100)
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", die)
    log.add(2, rows_of_step(2))
    with pytest.raises(KeyboardInterrupt):
        log.flush()
    assert steps(tmp_path) == [1]
    monkeypatch.undo()
    log = make()
    log.load_state_dict({"last": None})
    log.begin(0)
    log.add(7, rows_of_step(7))
    log.flush()
    assert steps(tmp_path) == [7]


# Resume


def run_steps(log, first, last):
    for step in range(first, last + 1):
        log.add(step, rows_of_step(step))
        if step % 3 == 0:
            log.flush()
    log.flush()


@pytest.mark.parametrize("part_size", [30, 4096])
@pytest.mark.parametrize("at", [1, 5, 9, 10])
def test_a_resume_drops_what_came_after_the_checkpoint(tmp_path, make, messages, monkeypatch, part_size, at):
    monkeypatch.setattr(replay_log_writer, "PART_SIZE", part_size)
    log = make()
    log.begin(0)
    run_steps(log, 1, at)
    state, before = log.state_dict(), read_replay_log(tmp_path / "run").to_pylist()
    run_steps(log, at + 1, 10)
    resumed = make()
    resumed.load_state_dict(state)
    resumed.begin(at)
    assert read_replay_log(tmp_path / "run").to_pylist() == before
    run_steps(resumed, at + 1, 12)
    assert steps(tmp_path) == list(range(1, 13))
    assert read_replay_log(tmp_path / "run").to_pylist()[: len(before)] == before
    assert messages == []


def test_a_batch_that_a_checkpoint_cuts_off_ends_there(tmp_path, make):
    log = make()
    log.begin(0)
    log.add(1, rows_of_step(1, last_step=2))
    log.add(3, rows_of_step(3, last_step=4))
    log.flush()
    state = log.state_dict()
    resumed = make()
    resumed.load_state_dict(state)
    resumed.begin(3)
    resumed.add(4, rows_of_step(4, last_step=5))
    resumed.flush()
    table = read_replay_log(tmp_path / "run")
    assert list(dict.fromkeys(zip(*(table.column(n).to_pylist() for n in ("step", "last_step")), strict=True))) == [
        (1, 2), (3, 3), (4, 5)
    ]  # fmt: skip


def test_a_new_run_moves_the_log_of_the_last_one_away(tmp_path, make, messages):
    for first in (1, 11, 21):
        log = make()
        log.begin(0)
        run_steps(log, first, first + 5)
    assert steps(tmp_path) == list(range(21, 27))
    previous = read_replay_log(tmp_path / "run" / "replay_log.previous")
    assert min(previous.column("step").to_pylist()) == 11, "the one before, and no older one"
    assert len(messages) == 2
    for message in messages:
        assert str(tmp_path / "run" / "replay_log") in message
        assert "replay_log.previous" in message
    make().begin(0)
    assert parts_of(tmp_path / "run" / "replay_log") == []
    make().begin(0)  # that one wrote nothing
    assert min(read_replay_log(tmp_path / "run" / "replay_log.previous").column("step").to_pylist()) == 21


@pytest.mark.parametrize("other", ["run", "off", "damaged"])
def test_a_resume_of_another_run_does_not_mix(tmp_path, make, messages, other):
    log = make()
    log.begin(0)
    run_steps(log, 1, 4)
    state = log.state_dict()
    if other == "damaged":
        parts_of(log.folder)[0].write_bytes(b"PAR1")
    else:
        second = make()
        second.begin(0)
        run_steps(second, 1, 8)
    messages.clear()
    resumed = make()
    resumed.load_state_dict({} if other == "off" else state)
    resumed.begin(4)
    run_steps(resumed, 5, 6)
    assert steps(tmp_path) == [5, 6]
    assert len(parts_of(tmp_path / "run" / "replay_log.previous")) == 1
    assert "begins after step 4" in messages[-1]
    assert ("damaged" in messages[0]) == (other == "damaged")


def test_a_resume_in_another_directory_begins_there(tmp_path, make, messages):
    log = make()
    log.begin(0)
    run_steps(log, 1, 4)
    elsewhere = ReplayLog(str(tmp_path / "run2"), is_on=True, warn=messages.append)
    elsewhere.load_state_dict(log.state_dict())
    elsewhere.begin(4)
    run_steps(elsewhere, 5, 6)
    assert set(read_replay_log(tmp_path / "run2").column("step").to_pylist()) == {5, 6}
    assert messages == []


# What goes wrong


def test_training_goes_on_where_it_cannot_be_written(tmp_path, make, messages, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "replay_log").write_text("mine")
    log = make()
    log.begin(0)
    for step in range(1, 5):
        log.add(step, rows_of_step(step))
        log.flush()
    assert (tmp_path / "run" / "replay_log").read_text() == "mine"
    (tmp_path / "run" / "replay_log").unlink()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    log = make()
    log.begin(0)
    run_steps(log, 1, 9)
    assert len(messages) == 2, "each says it once"
    for message, reason in zip(messages, ("FileExistsError", "No space left"), strict=True):
        assert str(tmp_path / "run" / "replay_log") in message
        assert reason in message
        assert "replay_log=False" in message


def test_an_id_that_cannot_be_written_is_no_end_of_training(make, messages):
    log = make()
    log.begin(0)
    log.add(1, rows_of_step(1, question_id="\ud800"))
    log.flush()
    assert len(messages) == 1


def test_files_of_others_stay(tmp_path, make):
    folder = tmp_path / "run" / "replay_log"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "replay_log.previous").mkdir()
    others = (folder / "notes.txt", folder / "part-1.parquet", tmp_path / "run" / "replay_log.previous" / "notes.txt")
    for file in others:
        file.write_text("mine")
    for _ in range(3):
        log = make()
        log.begin(0)
        run_steps(log, 1, 2)
    assert all(file.read_text() == "mine" for file in others)


# Reading


def test_where_a_log_is_looked_for(tmp_path, make):
    log = make()
    log.begin(0)
    run_steps(log, 1, 2)
    run = tmp_path / "run"
    (run / "checkpoint-2").mkdir()
    (run / "other").mkdir()
    for path in (run, run / "replay_log", run / "checkpoint-2", str(run)):
        assert find_replay_log(path).samefile(run / "replay_log")
    for path, told in (
        (run / "other", "no parts"),
        (run / "none", "does not exist"),
        (parts_of(log.folder)[0], "is a file"),
    ):
        with pytest.raises(ExperienceBufferError, match=told) as error:
            read_replay_log(path)
        assert str(path) in str(error.value)
        assert "output_dir" in str(error.value)
    shutil.rmtree(run / "replay_log")
    with pytest.raises(ExperienceBufferError, match="replay_log=False") as error:
        read_replay_log(run / "checkpoint-2")
    assert str(run / "replay_log") in str(error.value)


def other_columns(file):
    pq.write_table(pa.table({"step": [1]}), file, use_dictionary=False, compression="zstd")


def other_types(file):
    fields = [pa.field(f.name, pa.string() if f.name == "step" else f.type) for f in LOG_SCHEMA]
    write_part(pa.schema(fields).empty_table(), file)


def nulls(file):
    write_part(pa.Table.from_pylist([{}], schema=LOG_SCHEMA), file)


def no_utf8(file):
    rows = pa.Table.from_pylist([{"step": 1, "batch": 0, **row(1)}], schema=LOG_SCHEMA)
    raw = pa.array([b"\xff\xfe"] * len(rows)).view(pa.string())
    write_part(rows.set_column(rows.schema.get_field_index("question_id"), LOG_SCHEMA.field("question_id"), raw), file)


def bomb(file):
    """Two million rows in a few kilobytes."""
    rows = pa.Table.from_pylist([{"step": 1, "batch": 0, **row(1)}], schema=LOG_SCHEMA)
    many = pa.table([pa.repeat(column[0], 2 * 10**6) for column in rows.columns], schema=LOG_SCHEMA)
    write_part(many, file)


DAMAGES = {
    "bomb": bomb,
    "empty": lambda file: file.write_bytes(b""),
    "torn": lambda file: file.write_bytes(file.read_bytes()[:-20]),
    "flipped": lambda file: file.write_bytes(file.read_bytes()[:40] + b"\xff" * 400 + file.read_bytes()[440:]),
    "text": lambda file: file.write_text("hello"),
    "directory": lambda file: (file.unlink(), file.mkdir()),
    "other_columns": other_columns,
    "other_types": other_types,
    "nulls": nulls,
    "no_utf8": no_utf8,
}


REASONS = {
    "other_columns": "columns",
    "other_types": "columns",
    "nulls": "null in",
    "no_utf8": "UTF8",
    "bomb": "declares",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named(tmp_path, make, damage):
    log = make()
    log.begin(0)
    run_steps(log, 1, 9)
    part = parts_of(log.folder)[0]
    DAMAGES[damage](part)
    with pytest.raises(ExperienceBufferError, match="Move this file away") as error:
        read_replay_log(tmp_path / "run")
    assert str(part) in str(error.value)
    assert REASONS.get(damage, "") in str(error.value)
