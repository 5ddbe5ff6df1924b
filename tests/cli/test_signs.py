"""Warning signs of a report: each at its threshold, and what the sentences make of them."""

import numpy as np
import pyarrow as pa
import pytest

from exgrpo_trl.replay_log import LOG_SCHEMA
from exgrpo_trl.report.charts import bands_of
from exgrpo_trl.report.history import History, read_history
from exgrpo_trl.report.run import Run
from exgrpo_trl.report.savings import savings_of
from exgrpo_trl.report.signs import signs_of
from exgrpo_trl.report.words import did_replay_happen, seconds, warning, what_it_saved

HEALTHY = {
    "replay/effective_sample_size": 0.5, "replay/group_pass_rate": 0.5, "replay/fraction": 0.5,
    "replay/fraction_allowed": 0.5, "replay/entropy": 1.0, "entropy": 1.0, "fresh/frac_groups_without_signal": 0.2,
    "replay/staleness_mean": 10.0,
}  # fmt: skip


def run_of(*lines, num_each=30, log=None):
    """A run that logged each of these lines so many times, the last ones being the newest."""
    repeated = [line for line in lines for _ in range(num_each)]
    history = History([{"step": step, **line} for step, line in enumerate(repeated, start=1)], len(repeated))
    return Run(path=None, history=history, log=log)


def levels(run):
    return {sign.name: sign.level for sign in signs_of(run)}


def test_a_healthy_run():
    signs = signs_of(run_of(HEALTHY))
    assert {sign.level for sign in signs} == {"fine"}
    assert len(signs) == 6
    assert warning(signs).startswith(
        "No warning sign among 6 checked values: effective sample size is 0.5, for example"
    )


@pytest.mark.parametrize(
    ("metric", "fine", "bad", "name", "level"),
    [
        ("replay/effective_sample_size", 0.1, 0.099, "Effective sample size", "warning"),
        ("replay/group_pass_rate", 0.05, 0.049, "Pass rate of replayed questions", "warning"),
        ("replay/group_pass_rate", 0.95, 0.951, "Pass rate of replayed questions", "warning"),
        ("replay/fraction", 0.25, 0.249, "Share of questions replayed", "warning"),
        ("replay/entropy", 0.5, 0.499, "Entropy of replayed completions", "warning"),
        ("fresh/frac_groups_without_signal", 0.8, 0.801, "Groups without signal", "warning"),
        ("replay/staleness_mean", 200, 201, "Age of replayed completions", "hint"),
    ],
)
def test_every_threshold(metric, fine, bad, name, level):
    assert levels(run_of(HEALTHY | {metric: bad}, HEALTHY | {metric: fine}))[name] == "fine", "only what is new counts"
    found = signs_of(run_of(HEALTHY, HEALTHY | {metric: bad}))
    assert found[0].name == name, "the worst comes first"
    assert {sign.name: sign.level for sign in found} == dict.fromkeys(levels(run_of(HEALTHY)), "fine") | {name: level}
    text = warning(found)
    assert text.startswith("1 warning sign: " if level == "warning" else "No warning sign")
    if level == "warning":
        assert f" is {found[0].value} (warns {found[0].threshold}). {found[0].meaning}" in text


def test_a_share_is_compared_with_what_was_allowed_once_replay_began():
    late = HEALTHY | {"replay/fraction": 0.0}
    assert levels(run_of(late, HEALTHY))["Share of questions replayed"] == "fine"
    assert levels(run_of(late))["Share of questions replayed"] == "hint"
    without = {name: value for name, value in HEALTHY.items() if name != "replay/fraction_allowed"}
    assert levels(run_of(without))["Share of questions replayed"] == "unknown"


def test_without_log_lines_the_replay_log_tells():
    row = dict.fromkeys(LOG_SCHEMA.names)
    rows = [row | {"step": step, "last_step": step, "age": age, "entropy": 0.1} for step, age in ((1, 1), (2, 500))]
    log = pa.Table.from_pylist(rows, schema=LOG_SCHEMA)
    found = {sign.name: sign for sign in signs_of(run_of({"entropy": 1.0}, log=log))}
    assert found["Age of replayed completions"].value == "250 steps"
    assert found["Entropy of replayed completions"].level == "warning"
    assert found["Groups without signal"].level == "unknown"


def test_sentences_of_runs_without_replay():
    assert "Whether replay happened is unknown" in did_replay_happen(Run(path=None))
    assert "unknown" in what_it_saved(Run(path=None), savings_of(Run(path=None)))
    off = {"replay/fraction": 0.0, "replay/active": 0.0, "fresh/pass_rate": 0.2, "replay/tokens_saved": 0.0}
    assert did_replay_happen(run_of(off)) == (
        "Replay did not happen: nothing was replayed up to step 30. The delayed start has not come: the pass rate "
        "reached 0.2. Lower replay_start_pass_rate."
    )
    assert what_it_saved(run_of(off), savings_of(run_of(off))) == "It saved no tokens."
    empty = {"replay/fraction": 0.0, "replay/active": 1.0, "replay/questions": 0.0}
    assert did_replay_happen(run_of(empty)).endswith("none was solved at times, but not always.")


def test_batches_that_begin_with_the_same_step():
    rows = [{"step": step, "last_step": step, "batch": batch} for step, batch in ((4, 0), (4, 0), (4, 1), (6, 0))]
    log = pa.Table.from_pylist([dict.fromkeys(LOG_SCHEMA.names) | row for row in rows], schema=LOG_SCHEMA)
    run = Run(path=None, log=log)
    assert did_replay_happen(run) == (
        "Replay happened: 4 stored completions came back in 3 batches, from step 4 to step 6."
    )
    run.is_log_whole = False
    assert "at least 4 stored completions came back in at least 3 batches" in did_replay_happen(run)


def test_savings_of_a_batch_that_trains_several_steps():
    lines = {"replay/scoring_seconds": 2.0, "replay/tokens_saved": 10.0, "num_tokens": 110.0, "step_time": 5.0}
    row = dict.fromkeys(LOG_SCHEMA.names) | {"step": 1, "last_step": 2}
    run = run_of(lines, num_each=1, log=pa.Table.from_pylist([row], schema=LOG_SCHEMA))
    savings = savings_of(run)
    assert savings.scoring_seconds == 1.0, "a batch is two steps, of which one was logged"
    assert savings.seconds == 10 * (5 - 1) / 100
    assert [seconds(value) for value in (0.0123, 5.0, 600.0, 36000.0)] == [
        "12 ms", "5 seconds", "10 minutes", "10.0 hours",
    ]  # fmt: skip


def test_a_state_that_nobody_should_have_written(tmp_path):
    file = tmp_path / "trainer_state.json"
    for text in ("", "[]", '{"log_history": 3, "global_step": 1}', '{"log_history": []}', '{"global_step": 1.5}'):
        file.write_text(text)
        assert read_history(file) is None
    file.write_text(
        '{"global_step": 9, "max_steps": -1, "log_history": [3, {"step": "x"}, {"step": 1, "a": NaN, "b": true, '
        f'"c": "0.5", "d": [1], "e": 1e400, "f": 1{"0" * 400}, "g": 2}}, {{"step": -1, "g": 3}}]}}'
    )
    history = read_history(file)
    assert history.names == {"step", "g"}
    assert history.series("g").values.tolist() == [2.0]
    assert history.max_steps is None


def test_bands_hold_every_bucket_once():
    for number in (1, 3, 8, 9, 63, 1000):
        bands = bands_of(list(range(1, number + 1)))
        assert np.concatenate(bands).tolist() == list(range(1, number + 1))
        assert len(bands) == min(number, 8)
