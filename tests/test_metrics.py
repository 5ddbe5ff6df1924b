"""Metrics of replay: averages between log lines, importance ratios, what a batch says; by hand."""

import math

import numpy as np
import pytest

from exgrpo_trl import Experience, Question
from exgrpo_trl.batch import Batch, Plan
from exgrpo_trl.metrics import ReplayMetrics, importance_ratio_metrics
from exgrpo_trl.records import Replay


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
    metrics.add_collection(evicted_incorrect=2)
    line = metrics.line({"questions": 3.0, "bucket_2": 1.0, "own": 7.0}, {"temperature": 0.5})
    assert line == {
        "replay/evicted_incorrect": 2,
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
