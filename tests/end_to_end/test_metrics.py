"""Every log line describes replayed and fresh rollouts apart, in numbers that can be recomputed."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
from tiny import (
    first_letter_reward,
    make_trainer,
    parameters_of,
    tiny_arguments,
    tiny_dataset,
    tiny_model,
    tiny_tokenizer,
)
from transformers import TrainerCallback

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer, ExperienceBuffer, metrics
from exgrpo_trl.strategies.samplers import UniformSampler

ALWAYS = {
    "replay/active", "replay/fraction", "replay/questions", "replay/completions", "replay/tokens", "replay/retired",
    "replay/evicted", "replay/duplicates", "replay/bucket_1", "replay/bucket_2", "replay/bucket_3",
    "replay/candidates_scored", "replay/selection_seconds", "replay/scoring_seconds", "replay/tokens_saved",
    "fresh/pass_rate", "fresh/reward", "fresh/reward_std", "fresh/frac_groups_without_signal",
}  # fmt: skip
WHEN_REPLAYED = {
    "replay/reward", "replay/group_pass_rate", "replay/staleness_mean", "replay/staleness_max",
    "replay/importance_ratio_mean", "replay/importance_ratio_max", "replay/importance_ratio_q10",
    "replay/importance_ratio_q50", "replay/importance_ratio_q90", "replay/effective_sample_size",
}  # fmt: skip
SHORT = {
    "fresh/pass_rate", "fresh/frac_groups_without_signal", "replay/fraction", "replay/group_pass_rate",
    "replay/effective_sample_size", "replay/staleness_mean", "replay/questions", "replay/retired",
    "replay/tokens_saved", "replay/scoring_seconds",
}  # fmt: skip


def replay_lines(trainer):
    """Metrics of replay of each line of the training."""
    return [
        {name: value for name, value in line.items() if name.startswith(("replay/", "fresh/"))}
        for line in trainer.state.log_history
        if "loss" in line
    ]


@pytest.mark.parametrize(
    "options", [{}, {"per_device_train_batch_size": 8, "steps_per_generation": 2}], ids=["", "spg2"]
)
def test_every_log_line(tmp_path, options):
    trainer = make_trainer(tmp_path, max_steps=6, retire_solved=False, **options)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 6
    replayed = False
    for line in lines:
        assert line.keys() >= ALWAYS
        replayed |= line["replay/fraction"] > 0
        assert not replayed or line.keys() >= WHEN_REPLAYED
        assert all(math.isfinite(v) for k, v in line.items() if k.startswith(("replay/", "fresh/")))
    assert replayed


def test_values(tmp_path):
    """Rewards, pass rate and ratios of a batch, recomputed from what the trainer saw."""
    seen = []

    class Watched(ExGRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            output = super()._generate_and_score_completions(inputs)
            seen.append((output["is_replayed"].numpy().copy(), rewards[-1]))
            return output

    rewards = []

    def reward(completions, **kwargs):
        rewards.append(np.array([float(c[:1].isalpha()) for c in completions]))
        return rewards[-1].tolist()

    trainer = make_trainer(tmp_path, Watched, max_steps=6, reward_funcs=reward, retire_solved=False)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    for line, (is_replayed, batch) in zip(lines, seen, strict=True):
        assert line["fresh/pass_rate"] == pytest.approx(batch[~is_replayed].mean())
        assert line["fresh/reward"] == pytest.approx(batch[~is_replayed].mean())
        assert line["replay/fraction"] == is_replayed.sum() / 4
        fresh = [
            group[~replayed] for group, replayed in zip(batch.reshape(4, 4), is_replayed.reshape(4, 4), strict=True)
        ]
        assert line["fresh/frac_groups_without_signal"] == np.mean([len(set(group)) == 1 for group in fresh])
    assert seen[-1][0].any()


def test_completions_table_marks_replayed_rows(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, retire_solved=False, log_completions=True)
    trainer.train()
    marked = 0
    for step in range(1, 5):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
        assert table["replayed"].dtype == bool
        line = next(line for line in trainer.state.log_history if line.get("step") == step and "loss" in line)
        assert table["replayed"].sum() == line["replay/fraction"] * 4
        marked += table["replayed"].sum()
    assert marked > 0


def test_tokens_saved_is_a_total_also_over_long_log_intervals(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, logging_steps=3, retire_solved=False)
    trainer.train()
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert last["replay/tokens_saved"] == trainer.replayer.metrics.tokens_saved > 0


@pytest.mark.parametrize("logging", [{"logging_strategy": "no"}, {"logging_steps": 10**6}], ids=str)
def test_a_run_that_does_not_log_keeps_its_size(tmp_path, monkeypatch, logging):
    monkeypatch.setattr(metrics, "MAX_VALUES", 2)
    monkeypatch.setattr(metrics, "MAX_LOG_RATIOS", 8)
    sizes = []

    class Sizes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            sizes.append([len(pickle.dumps(kept)) for kept in (replayer.metrics, replayer.log_ratios)])

    trainer = make_trainer(tmp_path, max_steps=24, retire_solved=False, callbacks=[Sizes()], **logging)
    replayer = trainer.replayer
    trainer.train()
    assert replayer.log_ratios.count > 100
    assert sizes[-1][0] < sizes[8][0] + 100
    assert sizes[-1][1] < sizes[8][1] + 100


def test_by_default_a_line_has_ten_metrics_and_those_of_the_user(tmp_path):
    class Sampler(UniformSampler):
        def metrics(self):
            return {"temperature": 0.5}

    class Buffer(ExperienceBuffer):
        def metrics(self):
            return super().metrics() | {"own": 7}

    args = ExGRPOConfig(**tiny_arguments(tmp_path, max_steps=4, retire_solved=False, replay_start_pass_rate=None))
    trainer = ExGRPOTrainer(
        tiny_model(),
        first_letter_reward,
        args,
        train_dataset=tiny_dataset(),
        processing_class=tiny_tokenizer(),
        experience_buffer=Buffer(group_size=4, retire_solved=False),
        question_sampler=Sampler(),
    )
    trainer.train()
    first, *_, last = replay_lines(trainer)
    own = {"replay/temperature", "replay/own"}
    assert first.keys() == SHORT - WHEN_REPLAYED | own
    assert last.keys() == SHORT | own
    assert last["replay/temperature"] == 0.5
    assert last["replay/own"] == 7


def test_training_does_not_depend_on_what_is_logged(tmp_path):
    """Weights, state and numbers are the same to the last bit, also where a resume logs something else."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    runs = {}
    for log_replay in ("short", "all"):
        runs[log_replay] = make_trainer(tmp_path / log_replay, log_replay=log_replay, **options)
        runs[log_replay].train()
    runs["resumed"] = make_trainer(tmp_path / "resumed", log_replay="all", **options)
    runs["resumed"].train(resume_from_checkpoint=str(tmp_path / "short" / "checkpoint-3"))
    expected = parameters_of(runs["all"])
    for trainer in runs.values():
        assert all((value == expected[name]).all() for name, value in parameters_of(trainer).items())
        assert trainer.replayer.state_dict() == runs["all"].replayer.state_dict()
    lines = [replay_lines(runs[name]) for name in ("short", "all")]
    assert any(line["replay/fraction"] for line in lines[0])
    for short, whole in zip(*lines, strict=True):
        assert short.keys() == whole.keys() & SHORT
        assert all(whole[name] == value for name, value in short.items() if name != "replay/scoring_seconds")
