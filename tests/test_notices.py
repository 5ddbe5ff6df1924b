"""What a run says in words."""

import numpy as np
import pytest

from exgrpo_trl import ExGRPOConfig, Experience, ExperienceBuffer, Question, notices
from exgrpo_trl.batch import Batch
from exgrpo_trl.notices import Notices
from exgrpo_trl.plan import Plan
from exgrpo_trl.records import Replay
from exgrpo_trl.success import SuccessRule


@pytest.fixture
def messages(monkeypatch):
    collected = []
    monkeypatch.setattr(notices.logger, "warning", collected.append)
    return collected


def make_notices(requires_success=True, **options):
    args = ExGRPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, report_to="none", num_generations=4,
        per_device_train_batch_size=16, **{"replay_start_pass_rate": None} | options,
    )  # fmt: skip
    return Notices(args, SuccessRule(["right"], [1.0], 1.0, None), requires_success=requires_success)


def experience():
    return Experience.create([1, 2], [-1.0, -1.0], policy_version=0, reward=1.0)


def filled():
    buffer = ExperienceBuffer(group_size=4)
    buffer.collect(Question("q", {"prompt": "p"}), [experience()], num_correct=1, group_size=4)
    return buffer


def batch_of(rewards, replayed=(), is_started=True):
    rewards = np.array(rewards, dtype=float)
    replays = tuple(Replay(Question("q", {"prompt": "p"}), experience(), row) for row in replayed)
    batch = Batch(Plan(9, is_started, replays), 0, rewards.size, *rewards.shape)
    batch.rewards, batch.is_correct = rewards, rewards >= 1.0
    return batch


def test_ten_batches_without_a_success(messages):
    told = make_notices()
    for number in range(10):
        assert not messages
        told.observe(batch_of([[0.25, 0.5 + number / 100, float("nan")]]))
    for _ in range(20):
        told.observe(batch_of([[0.25, 0.75, 0.0]]))
    (message,) = messages
    assert "10 generation batches" in message
    assert "0.59" in message
    assert "success_threshold=1.0" in message


def test_rewards_that_are_none_are_not_called_the_best(messages):
    told = make_notices()
    for _ in range(10):
        told.observe(batch_of([[float("nan"), float("nan")]]))
    assert "No completion has got a reward" in messages[0]
    assert "inf" not in messages[0]


def test_infinite_rewards_are_said_once(messages):
    told = make_notices()
    for _ in range(3):
        told.observe(batch_of([[float("inf"), 0.0], [-float("inf"), 1.0]]))
    (message,) = messages
    assert "rewards of 2 completions of a generation batch are infinite" in message


@pytest.mark.parametrize("masks", [True, False])
def test_the_end_says_how_many_successes_there_were(messages, masks):
    told = make_notices(mask_truncated_completions=masks)
    told.observe(batch_of([[1.0, 0.0], [1.0, 1.0]]))
    told.end(ExperienceBuffer(), 0)
    assert "in 1 generation batches, in which 3 completions were successes" in messages[0]
    assert ("mask_truncated_completions=True" in messages[0]) == masks


@pytest.mark.parametrize("requires_success", [True, False])
def test_no_doubt_after_a_success_or_where_none_is_needed(messages, requires_success):
    told = make_notices(requires_success)
    told.observe(batch_of([[1.0 if requires_success else 0.0, 0.0]]))
    for _ in range(20):
        told.observe(batch_of([[0.0, 0.0]]))
    assert not messages


def test_the_state_goes_on(messages):
    told, resumed = make_notices(), make_notices()
    assert told.state_dict()["best_reward"] is None
    told.observe(batch_of([[0.5, 0.0]]))
    resumed.load_state_dict(told.state_dict())
    resumed.end(ExperienceBuffer(), 0)
    assert "1 generation batches" in messages[0]
    assert "0.5" in messages[0]


def test_the_start_names_numbers_and_the_rule(messages):
    make_notices(replay_fraction=0.5).start(ExperienceBuffer(), is_started=True)
    assert "up to 2 of the 4 questions" in messages[0]
    assert "success when right gives at least success_threshold=1.0" in messages[0]
    assert "success_reward" in messages[0]
    assert "wait" not in messages[0]


def test_the_start_tells_what_a_fraction_of_a_question_means(messages):
    make_notices(replay_fraction=0.2).start(ExperienceBuffer(), is_started=True)
    assert "up to 1 of the 4 questions of a generation batch (0.8 on average)" in messages[0]


def test_the_start_tells_of_fills(messages):
    make_notices(replay_fraction=0.5, fill_failed_groups=True).start(ExperienceBuffer(), is_started=True)
    assert "up to 2 of the 4 questions" in messages[0]
    assert "; a stored success takes the place of a failure" in messages[0]
    make_notices(replay_fraction=0.0, fill_failed_groups=True).start(ExperienceBuffer(), is_started=True)
    assert messages[1].startswith("A stored success takes the place of a failure")


def test_groups_that_come_back_without_a_bound(messages):
    for bound in ({}, {"max_replays": 1}, {"max_staleness": 5}, {"max_drift": 0.5}):
        make_notices(replay_unit="group", **bound).start(ExperienceBuffer(unit="group"), is_started=True)
    assert ["Set max_replays=1, max_staleness or max_drift" in message for message in messages] == [True] + [False] * 3


def test_a_filled_buffer_that_waits(messages):
    make_notices(replay_start_pass_rate=0.35).start(filled(), is_started=False)
    assert "exceeded replay_start_pass_rate=0.35" in messages[0]
    assert "completions of 1 questions, which wait" in messages[0]
    assert "replay_start_pass_rate=None" in messages[0]


def test_limits_that_evict_everything(messages):
    make_notices(max_staleness=0).start(ExperienceBuffer(), is_started=True)
    assert "max_staleness=0 evicts every completion" in messages[0]


def test_a_delayed_start_that_is_not_reached_is_said_after_ten_batches(messages):
    told = make_notices(replay_start_pass_rate=0.35)
    for number in range(25):
        assert len(messages) == (number >= 10)
        told.observe(batch_of([[1.0, 0.0, 0.0, 0.0], [0.0] * 4], is_started=False))
    assert "pass rate of the last 10 generation batches is 0.12" in messages[0]
    assert "starts above replay_start_pass_rate=0.35" in messages[0]
    told.end(ExperienceBuffer(), 0)
    assert "Nothing was replayed in 25 generation batches" in messages[1]


def test_a_short_run_says_at_the_end_that_replay_has_not_started(messages):
    told = make_notices(replay_start_pass_rate=0.35)
    told.observe(batch_of([[1.0, 0.0, 0.0, 0.0]], is_started=False))
    told.end(ExperienceBuffer(), 0)
    assert "Replay has not started: the pass rate of the last 1 generation batches is 0.25" in messages[0]
    assert "Nothing was replayed" in messages[1]


def test_the_end_counts_what_was_replayed(messages):
    told = make_notices()
    told.observe(batch_of([[1.0, 0.0], [1.0, 0.0]]))
    told.observe(batch_of([[1.0, 0.0], [1.0, 0.0]], replayed=(0, 2)))
    told.end(filled(), 4)
    (message,) = messages
    assert "1 of 2 generation batches replayed 2 stored completions; 4 tokens were not generated" in message
    assert "holds 1 completions of 1 questions; 0 questions have retired" in message
