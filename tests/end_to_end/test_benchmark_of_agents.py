"""The benchmark of agents: its files, and the numbers that come from them."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

pytest.importorskip("matplotlib", reason="the benchmarks draw: `make test` installs matplotlib, for the newest TRL")

from benchmarks.agents import records, run, summary, timing
from benchmarks.agents.run import Curve, Run
from benchmarks.recorded import content_in
from examples.train_agent import make_model, make_tokenizer


def point(step, success):
    return {"step": step, "seconds": 2.0 * step, "environment_steps": 100 * step, "success": success}


def result(method, seed, success, steps=200):
    made = Run(method, 5e-4, seed, steps)
    curve = [point(0, 0.0), point(100, success / 2), point(200, success)]
    return made, {
        "run": asdict(made),
        "machine": {"processor": "some", "cores": 2},
        "curve": curve,
        "logs": [{"step": 5.0, "reward": 0.25}],
    }


def test_where_a_curve_reaches_a_success():
    curve = [point(0, 0.1), point(20, 0.3), point(40, 0.7), point(60, 0.4)]
    assert summary.until(curve, 0.5, "step") == pytest.approx(30)
    assert summary.until(curve, 0.5, "environment_steps") == pytest.approx(3000)
    assert summary.until(curve, 0.8, "step") is None
    assert summary.until([point(0, 0.6), point(20, 0.7)], 0.5, "step") == 0


def test_runs_of_files_and_their_summary(tmp_path):
    folder, file = tmp_path / "agents", tmp_path / "agents.parquet"
    folder.mkdir()
    made = dict(
        [result("grpo", 0, 0.4), result("grpo", 1, 0.6), result("balanced", 0, 0.8), result("balanced", 1, 1.0)]
    )
    short, of_short = result("grpo", 0, 0.1, run.SHORT_STEPS)
    for one, content in [*made.items(), (short, of_short)]:
        one.file(folder).write_text(json.dumps(content))
    assert records.single_runs(folder) == made | {short: of_short}
    assert records.merge(folder, file) == 4
    assert records.read(file) == made
    assert records.made(folder, file) == made | {short: of_short}
    assert records.merge(folder, file) == 4
    assert records.read(file) == made
    content = content_in(file)
    assert content["results"]["grpo"]["success"] == [0.4, 0.6]
    of_none, of_some = content["results"]["grpo"]["seconds_until_0.5"]
    assert of_none is None
    assert of_some == pytest.approx(200 + 200 * (0.5 - 0.3) / 0.3, abs=0.1)
    (target,) = content["targets"]
    assert target["is_met"]
    assert target["measured"].startswith("0.900 ± 0.141 against 0.500")
    assert target["cause"] == "ahead with the same mazes in 2 of 2 seeds"
    rows = summary.table_rows(content["results"])
    assert [row[:2] for row in rows] == [["grpo", "2"], ["balanced", "2"]]
    assert {len(row) for row in rows} == {len(summary.COLUMNS)}


def test_evaluations_count_neither_as_seconds_nor_as_steps_of_the_environment(monkeypatch):
    clock = [(10.0, 7), (13.0, 27), (18.0, 127), (20.0, 147)]  # begin, evaluated, step, evaluated
    monkeypatch.setattr(Curve, "now", staticmethod(lambda: clock.pop(0)))
    curve, state = Curve(), SimpleNamespace(global_step=0)
    curve.on_train_begin(None, state, None)
    curve.on_evaluate(None, state, None, metrics={"eval_reward": 0.0})
    state.global_step = 1
    curve.on_step_end(None, state, None)
    curve.on_evaluate(None, state, None, metrics={"eval_reward": 0.5})
    assert curve.points == [
        {"step": 0, "seconds": 0.0, "environment_steps": 0, "success": 0.0},
        {"step": 1, "seconds": 5.0, "environment_steps": 100, "success": 0.5},
    ]


def test_one_step_of_each_method_in_turn_is_timed(tmp_path, monkeypatch):
    make_model(make_tokenizer(), 0).save_pretrained(tmp_path)
    for module in (run, timing):
        monkeypatch.setattr(module, "imitation_folder", lambda seed: tmp_path)
    seconds = timing.seconds_in_turn(seed=0, steps=2)
    assert list(seconds) == ["grpo", "shaped", "balanced"]
    assert all(len(of_one) == 2 and min(of_one) > 0 for of_one in seconds.values())
