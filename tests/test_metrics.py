"""Metrics of replay: averages between log lines, importance ratios, what a batch says; by hand."""

import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from exgrpo_trl import Experience, Question, metrics
from exgrpo_trl.batch import Batch
from exgrpo_trl.metrics import SHORT_LINE, LogRatios, ReplayMetrics, importance_ratio_metrics
from exgrpo_trl.plan import Plan
from exgrpo_trl.records import Replay
from exgrpo_trl.reuse import REASONS

ROOT = Path(__file__).parents[1]


def test_importance_ratio_metrics():
    log_ratios = np.log([1.0, 2.0, 4.0])
    metrics = importance_ratio_metrics(log_ratios)
    assert metrics["replay/importance_ratio_mean"] == pytest.approx(7 / 3)
    assert metrics["replay/importance_ratio_max"] == pytest.approx(4)
    assert metrics["replay/importance_ratio_q50"] == pytest.approx(2)
    assert metrics["replay/effective_sample_size"] == pytest.approx(49 / (3 * 21))
    assert importance_ratio_metrics(np.array([])) == {}
    huge = importance_ratio_metrics(np.array([-2000.0, 2000.0]))
    assert all(math.isfinite(value) for value in huge.values())
    assert huge["replay/effective_sample_size"] == pytest.approx(0.5)


def test_a_line_without_news_repeats_the_last_values():
    metrics = ReplayMetrics()
    metrics.add({"fresh/reward": 1.0})
    metrics.add({"fresh/reward": 3.0, "replay/reward": float("nan")})
    assert metrics.flush() == {"fresh/reward": 2.0}
    assert metrics.flush() == {"fresh/reward": 2.0}
    metrics.add({"fresh/reward": 5.0, "replay/staleness_max": 2})
    metrics.add({"replay/staleness_max": 4})
    assert metrics.flush() == {"fresh/reward": 5.0, "replay/staleness_max": 4}
    metrics.add({"fresh/reward": 5.0})
    assert metrics.flush() == {"fresh/reward": 5.0, "replay/staleness_max": 4}


def size_of(thing):
    return len(pickle.dumps(thing))


def test_a_million_numbers_take_the_space_of_a_few():
    metrics, expected = ReplayMetrics(), []
    rng = np.random.default_rng(0)
    sizes = []
    for _ in range(2):
        for value in rng.normal(3, 1, 10**5).tolist():
            metrics.add({"fresh/reward": value, "replay/staleness_max": value})
            expected.append(value)
        sizes.append(size_of(metrics))
    assert sizes[1] <= sizes[0] < 10**5
    flushed = metrics.flush()
    assert flushed["fresh/reward"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert flushed["replay/staleness_max"] == max(expected)
    metrics.add({"fresh/reward": 1.0})
    assert metrics.flush()["fresh/reward"] == 1


@pytest.mark.parametrize("num_values", [1, 7, 9, 130, 1024])
def test_averages_of_an_ordinary_interval_are_numpys_to_the_digit(num_values):
    values = np.random.default_rng(num_values).normal(0, 100, num_values).tolist()
    metrics = ReplayMetrics()
    for value in values:
        metrics.add({"fresh/reward": value})
    assert metrics.flush() == {"fresh/reward": float(np.mean(values))}


def log_ratios(num_values, seed=0, scale=1.0):
    return np.random.default_rng(seed).normal(0, scale, num_values).astype(np.float32)


def accumulated(values, chunk):
    ratios = LogRatios()
    for start in range(0, len(values), chunk):
        ratios.add(values[start : start + chunk])
    return ratios


@pytest.mark.parametrize("num_values", [0, 1, 1000, 65_536])
@pytest.mark.parametrize("num_processes", [1, 3])
def test_ratios_of_an_ordinary_interval_are_exact_to_the_digit(num_values, num_processes):
    values = log_ratios(num_values)
    ratios = LogRatios()
    for share in np.array_split(values, num_processes):
        ratios.merge(accumulated(share, 100))
    assert ratios.metrics() == importance_ratio_metrics(values.astype(np.float64))


@pytest.mark.parametrize("num_processes", [1, 4])
def test_a_million_ratios_take_bounded_space_and_all_but_quantiles_are_exact(num_processes):
    values = log_ratios(10**6)
    shares = [accumulated(share, 997) for share in np.array_split(values, num_processes)]
    ratios = LogRatios()
    for share in shares:
        assert size_of(share) < 10**6
        ratios.merge(share)
    assert ratios.count == 10**6
    assert size_of(ratios) < 10**6
    exact, streamed = importance_ratio_metrics(values.astype(np.float64)), ratios.metrics()
    assert streamed.keys() == exact.keys()
    for name, value in exact.items():
        is_quantile = "_q" in name
        assert streamed[name] == pytest.approx(value, rel=0.03 if is_quantile else 1e-10), name
    again = LogRatios()
    for share in np.array_split(values, num_processes):
        again.merge(accumulated(share, 997))
    assert again.metrics() == streamed


@pytest.mark.parametrize("period", [2, 64, 1000, 1024])
def test_the_sample_for_quantiles_has_no_period_of_its_own(period):
    """Completions of one length: a sample of every so-manieth token would always meet the same place in them."""
    values = np.tile(np.linspace(-3, 3, period, dtype=np.float32), 2**20 // period)
    exact = importance_ratio_metrics(values.astype(np.float64))
    streamed = accumulated(values, 64 * period).metrics()
    for name, value in exact.items():
        if "_q" in name:
            assert math.log(streamed[name]) == pytest.approx(math.log(value), abs=0.1), name


@pytest.mark.parametrize("extreme", [-2000.0, 600.0, 2000.0, float("-inf")])
def test_extreme_ratios_neither_overflow_nor_vanish(extreme):
    values = np.concatenate([log_ratios(70_000, scale=5.0), np.float32([extreme]), log_ratios(70_000, 1)])
    exact, streamed = importance_ratio_metrics(values.astype(np.float64)), accumulated(values, 1000).metrics()
    for name in ("mean", "max"):
        assert streamed[f"replay/importance_ratio_{name}"] == pytest.approx(
            exact[f"replay/importance_ratio_{name}"], rel=1e-10
        )
    name = "replay/effective_sample_size"
    assert streamed[name] == pytest.approx(exact[name], rel=1e-10)


def test_a_ratio_that_is_not_a_number_shows():
    ratios = accumulated(np.full(70_000, np.nan, dtype=np.float32), 1000)
    ratios.add(log_ratios(10))
    assert math.isnan(ratios.metrics()["replay/importance_ratio_mean"])
    assert math.isnan(ratios.metrics()["replay/effective_sample_size"])


def batch_of(rewards, replayed=(), entropies=(), is_started=True):
    """A batch with these rewards; stored completions of three tokens, of policy 4, take the replayed rows."""
    rewards = np.array(rewards, dtype=float)
    experience = Experience.create([1, 2, 3], [-1.0] * 3, policy_version=4, reward=1.0)
    replays = tuple(
        Replay(Question("q", {"prompt": "p"}), experience, row, entropy)
        for row, entropy in zip(replayed, entropies, strict=True)
    )
    batch = Batch(Plan(9, is_started, replays), 0, rewards.size, *rewards.shape)
    batch.rewards, batch.is_correct = rewards, rewards >= 1.0
    return batch


def test_a_batch_by_hand():
    nan = float("nan")
    metrics = ReplayMetrics()
    metrics.add_batch(batch_of([[1, 0, 0, 1], [1, 1, 1, 0], [nan, nan, nan, nan]], [3, 4], [0.5, None]))
    assert metrics.flush() == pytest.approx(
        {
            "fresh/pass_rate": 3 / 10,
            "fresh/reward": 3 / 6,
            # Of 1, 0, 0 and of 1, 1, 0; the group without rewards has none.
            "fresh/reward_std": math.sqrt(2) / 3,
            "fresh/frac_groups_without_signal": 1 / 3,
            "replay/active": 1,
            "replay/fraction": 2 / 3,
            "replay/reward": 1,
            "replay/group_pass_rate": 3 / 6,
            "replay/staleness_mean": 5,
            "replay/staleness_max": 5,
            "replay/entropy": 0.5,
        }
    )
    assert metrics.tokens_saved == 6


def test_a_line_names_the_sizes_of_the_buffer():
    metrics = ReplayMetrics()
    metrics.add_collection({"incorrect": 2, "drifted": 1, "used_up": 0})
    line = metrics.line({"questions": 3.0, "bucket_2": 1.0, "own": 7.0}, {"temperature": 0.5})
    assert line == {
        "replay/evicted_incorrect": 2,
        "replay/evicted_drifted": 1,
        "replay/evicted_used_up": 0,
        "replay/questions": 3,
        "replay/bucket_2": 1,
        "replay/own": 7,
        "replay/temperature": 0.5,
        "replay/tokens_saved": 0,
    }


def test_seconds_of_messages_are_those_since_the_last_batch():
    metrics = ReplayMetrics()
    metrics.add_process_seconds({"gathering": 1.0, "broadcasting": 0.5})
    assert metrics.flush()["replay/gathering_seconds"] == 1.0
    metrics.add_process_seconds({"gathering": 1.25, "broadcasting": 0.5})
    assert metrics.flush() == {"replay/gathering_seconds": 0.25, "replay/broadcasting_seconds": 0.0}


def test_a_short_line_has_what_tells_whether_replay_works_and_what_is_the_users():
    metrics = ReplayMetrics()
    metrics.add({"fresh/pass_rate": 0.5, "fresh/reward": 1.0, "replay/entropy": 2.0})
    of_buffer, of_strategies = {"questions": 3.0, "tokens": 9.0, "bucket_2": 1.0, "own": 7.0}, {"entropy": 0.5}
    whole = {"fresh/pass_rate", "fresh/reward", "replay/tokens", "replay/bucket_2"}
    short = {"fresh/pass_rate", "replay/questions", "replay/own", "replay/entropy", "replay/tokens_saved"}
    line = metrics.line(of_buffer, of_strategies, is_short=True)
    assert line.keys() == short
    assert line["replay/entropy"] == 0.5
    assert metrics.line(of_buffer, of_strategies).keys() == whole | short  # nothing was forgotten


def test_the_docs_describe_every_metric_and_mark_the_short_line():
    page = (ROOT / "docs" / "metrics.md").read_text()
    tables = [line for line in page.splitlines() if re.match(r"\| \**`(replay|fresh)/", line)]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in tables]
    assert all(len(row) == 4 and all(row) for row in rows), "name, meaning, healthy, otherwise"
    names = [re.fullmatch(r"(\*\*)?`(.*)`(?:\*\*)?( \.\.\.)?", row[0]) for row in rows]
    assert {found[2] for found in names if found[1]} == SHORT_LINE
    assert len(names) == len({found[2] for found in names})
    assert {found[2] for found in names} == existing_names() | {"replay/bucket_1"}


def names_in(module):
    return set(re.findall(r"[\"']((?:replay|fresh)/\w+)[\"']", module.read_text()))


def existing_names():
    return names_in(Path(metrics.__file__)) | {f"replay/evicted_{reason}" for reason in REASONS}


def test_modules_that_log_have_no_names_of_metrics_and_those_that_read_know_them():
    """So that the docs, which are compared with this one, know them all."""
    package = Path(metrics.__file__).parent
    for module in package.rglob("*.py"):
        reads_logs = module.parent.name == "report" or module.name == "notebook.py"
        if module.name != "metrics.py":
            assert names_in(module) <= (existing_names() | {"replay/bucket_"} if reads_logs else set()), module
