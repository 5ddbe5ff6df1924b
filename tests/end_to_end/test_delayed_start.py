"""Delayed start (method, section 1): strictly above the threshold, from the next batch on, and it stays on."""

import pytest
from tiny import make_trainer


def run(tmp_path, num_correct_per_step, **options):
    """In generation batch `i`, `num_correct_per_step[i]` rollouts of every group are correct, fresh ones first."""
    num_calls = 0

    def reward(completions, **kwargs):
        nonlocal num_calls
        num_correct = num_correct_per_step[num_calls]
        num_calls += 1
        rewards = []
        for group in range(0, len(completions), 4):
            fresh_first = sorted(range(group, group + 4), key=lambda row: row in trainer.replayer.batch.stored)
            rewards += [float(row in fresh_first[:num_correct]) for row in range(group, group + 4)]
        return rewards

    trainer = make_trainer(
        tmp_path,
        reward_funcs=reward,
        max_steps=len(num_correct_per_step),
        learning_rate=0.0,
        **options,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return trainer, [(line["replay/active"], line["replay/questions"], line["replay/fraction"]) for line in lines]


def test_starts_with_the_batch_after_the_one_that_exceeds(tmp_path):
    # Pass rates 0.25, 0.5 (exactly the threshold: not enough), 0.75 (exceeds), then 0.25 (stays on).
    trainer, lines = run(tmp_path, [1, 2, 3, 1, 1, 1], replay_start_pass_rate=0.5)
    active, questions, fraction = zip(*lines, strict=True)
    assert active == (0, 0, 0, 1, 1, 1)
    assert fraction == (0, 0, 0, 0, 0.5, 0.5)
    # A log line describes the buffer as its batch began; the batch that crossed was not collected.
    assert questions[:5] == (0, 0, 0, 0, 4)
    versions = {e.policy_version for q in trainer.experience_buffer.buckets().values() for i in q
                for e in trainer.experience_buffer.completions(i)}  # fmt: skip
    assert versions == {3, 4, 5}


def test_none_starts_at_once(tmp_path):
    _, lines = run(tmp_path, [1, 1], replay_start_pass_rate=None)
    assert lines[0][0] == 1
    assert lines[1] == (1, 4, 0.5)


def test_a_threshold_of_zero_waits_for_the_first_success(tmp_path):
    _, lines = run(tmp_path, [0, 1, 1, 1], replay_start_pass_rate=0.0)
    assert [line[0] for line in lines] == [0, 0, 1, 1]


@pytest.mark.parametrize("retire_solved", [True, False])
def test_solved_questions_retire_before_the_start(tmp_path, retire_solved):
    trainer, lines = run(tmp_path, [4, 1], replay_start_pass_rate=0.99, retire_solved=retire_solved)
    # All four questions of the first batch were solved; its pass rate of 1 exceeds the threshold as well.
    assert len(trainer.experience_buffer.retired) == (4 if retire_solved else 0)
    assert [line[0] for line in lines] == [0, 1]


def test_the_pass_rate_is_that_of_fresh_completions(tmp_path):
    trainer, _ = run(tmp_path, [1, 1, 1, 1, 1], replay_start_pass_rate=None)
    for line in [line for line in trainer.state.log_history if "loss" in line][1:]:
        # Two groups of 4 fresh and two of 3 fresh completions, one correct in each.
        assert line["fresh/pass_rate"] == pytest.approx(4 / 14)
        assert line["replay/group_pass_rate"] == pytest.approx(1 / 3)
