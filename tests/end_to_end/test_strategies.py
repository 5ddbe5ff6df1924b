"""Strategies of users in a real training: every kind, functions, states that survive a resume; who owns the buffer."""

import inspect
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Ranks, run_ranks
from rules import LeastReplayed, Lowest
from same_rollouts import same_rollouts_trainer
from test_checkpoints import contents
from tiny import make_trainer, parameters_of
from trl import GRPOTrainer

from exgrpo_trl import (
    Admission,
    ExGRPOTrainer,
    Experience,
    ExperienceBuffer,
    ImportanceWeight,
    Question,
    ReplayWeighting,
)
from exgrpo_trl.buffer import RemoteBuffer


class Fading(ReplayWeighting):
    """No correction, fading with every batch that was collected: acts in the loss, on every process."""

    def __init__(self):
        self.num_batches = 0

    def __call__(self, log_ratio, advantages):
        weight = torch.full_like(log_ratio, 0.9**self.num_batches)
        return ImportanceWeight(weight, weight)

    def observe(self, batch):
        assert batch.is_collected
        self.num_batches += 1

    def state_dict(self):
        return {"num_batches": self.num_batches}

    def load_state_dict(self, state):
        self.num_batches = state["num_batches"]


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def test_states_survive_a_resume(tmp_path):
    """With a sampler and a weighting that remember, a resumed run does what the uninterrupted one would have done."""

    def run(name, checkpoint=None):
        trainer = make_trainer(
            tmp_path / name, max_steps=8, save_strategy="steps", save_steps=4, learning_rate=2e-3, retire_solved=False,
            question_sampler=LeastReplayed(), weighting=Fading(),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = run("whole")
    strategies = whole.replayer.strategies
    assert strategies.weighting.num_batches == 8
    assert sum(strategies.question_sampler.counts.values()) == sum(2 * (n > 0) for n in range(8))
    assert lines_of(whole)[-1]["replay/most_replayed"] >= 1
    checkpoint = tmp_path / "whole" / "checkpoint-4"
    saved = ExperienceBuffer.load(checkpoint / "experience_buffer").replay_state["strategies"]
    assert saved["weighting"] == {"class": "Fading", "state": {"num_batches": 4}}
    resumed = run("resumed", str(checkpoint))
    for name, parameter in parameters_of(whole).items():
        assert torch.equal(parameters_of(resumed)[name], parameter), name
    assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)
    assert resumed.replayer.state_dict() == whole.replayer.state_dict()


def resume_on_ranks(mode, mode_options, output_dir, checkpoint):
    weighting = Fading()
    trainer = same_rollouts_trainer(
        output_dir, mode, per_device_train_batch_size=8, max_steps=6, save_strategy="steps", save_steps=3,
        weighting=weighting, question_sampler=LeastReplayed(), **mode_options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.accelerator.num_processes == 2
    assert weighting.num_batches == 6, "every process has the state of the weighting"
    counts = trainer.replayer.strategies.question_sampler.counts
    assert bool(counts) == trainer.accelerator.is_main_process, "the main process alone draws"


def test_the_weighting_has_its_state_on_every_process(tmp_path):
    run_ranks(resume_on_ranks, str(tmp_path / "out"), None, folder=tmp_path / "whole")
    checkpoint = str(tmp_path / "out" / "checkpoint-3")
    run_ranks(resume_on_ranks, str(tmp_path / "resumed"), checkpoint, folder=tmp_path / "resumed_logs")


def test_an_admission_rule_decides_what_is_stored_and_what_retires(tmp_path):
    """Stored while at most two of four are correct, retired from three on, as one paper does it (SU-01)."""
    seen = []

    def rare(rewards, is_correct, is_fresh):
        assert rewards.shape == is_correct.shape == is_fresh.shape == (4, 4)
        num_correct = is_correct.sum(axis=1)
        is_rare = is_correct & (num_correct <= 2)[:, None]
        seen.append((num_correct, is_rare & is_fresh))
        return Admission(is_rare, is_rare.sum(axis=1), num_correct, num_correct >= 3)

    trainer = make_trainer(tmp_path, max_steps=4, admission=rare, learning_rate=0.0)
    trainer.train()
    buffer = trainer.experience_buffer
    assert sum(counts[1].sum() for counts in seen) >= buffer.num_completions > 0
    assert set(buffer.buckets()) <= {1, 2}
    num_solved = sum(int((num_correct >= 3).sum()) for num_correct, _ in seen)
    assert 0 < len(buffer.retired) <= num_solved
    assert any(line["replay/fraction"] > 0 for line in lines_of(trainer))


def test_an_admission_of_another_shape_is_refused(tmp_path):
    def wrong(rewards, is_correct, is_fresh):
        return Admission(is_correct, np.zeros(3), np.zeros(3, dtype=int), np.zeros(3, dtype=bool))

    with pytest.raises(ValueError, match=r"Admission has shapes \(4, 4\)"):
        make_trainer(tmp_path, max_steps=1, admission=wrong).train()


def test_an_eviction_rule_decides_what_leaves_also_after_a_resume(tmp_path):
    options = {
        "max_steps": 6, "buffer_capacity": 5, "retire_solved": False, "save_strategy": "steps", "save_steps": 3,
        "learning_rate": 0.0, "eviction": Lowest(lambda experience: experience.num_tokens),
    }  # fmt: skip
    trainer = make_trainer(tmp_path / "whole", **options)
    trainer.train()
    lengths = [experience.num_tokens for _, _, experience in trainer.experience_buffer.items()]
    assert len(lengths) == 5
    assert min(lengths) == 8, "of completions of up to eight tokens, the longest stay"
    resumed = make_trainer(tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert contents(resumed.experience_buffer) == contents(trainer.experience_buffer)


def test_a_weighting_of_the_user_is_that_of_the_loss(tmp_path):
    """A function that does what a built-in weighting does gives the same parameters, and another one others."""

    def run(name, **options):
        trainer = make_trainer(tmp_path / name, max_steps=4, **options)
        trainer.train()
        return torch.cat([parameter.flatten() for parameter in parameters_of(trainer).values()])

    def no_correction(log_ratio, advantages):
        return torch.ones_like(log_ratio), torch.ones_like(log_ratio)

    built_in = run("built_in", replay_weighting="none")
    assert torch.equal(run("function", weighting=no_correction), built_in)
    assert not torch.equal(run("other", weighting=lambda r, a: (2 + 0 * r, 2 + 0 * r)), built_in)


def filled(num_tokens=2, **kwargs):
    buffer = ExperienceBuffer(group_size=4, **kwargs)
    experience = Experience.create([5] * num_tokens, [-1.0] * num_tokens, policy_version=7, reward=1.0)
    row = {"prompt": "0 + 0 = ", "answer": 0, "uid": "q0"}
    buffer.collect(Question("q0", row), [experience], num_correct=1, group_size=4)
    return buffer


def test_an_assigned_buffer_is_used(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, question_id_column="uid", learning_rate=0.0)
    mine = filled()
    trainer.experience_buffer = mine
    assert trainer.experience_buffer is trainer.replayer.buffer is mine
    trainer.train()
    assert lines_of(trainer)[0]["replay/fraction"] == 0.25
    assert mine.provenance["temperature"] == 1.0
    assert max(experience.policy_version for _, _, experience in mine.items()) >= 8


@pytest.mark.parametrize(
    ("buffer", "message"),
    [
        (filled(num_tokens=9), "assigned to the trainer holds a completion of 9 tokens"),
        (filled(capacity=7), r"capacity=7.*buffer_capacity=9"),
    ],
)
def test_an_assigned_buffer_must_fit(tmp_path, buffer, message):
    trainer = make_trainer(tmp_path, buffer_capacity=9)
    before = trainer.experience_buffer
    with pytest.raises(ValueError, match=message):
        trainer.experience_buffer = buffer
    assert trainer.experience_buffer is before


@pytest.mark.parametrize("way", [str, Path])
@pytest.mark.parametrize("place", ["buffer", "checkpoint", "run"])
def test_a_saved_buffer_is_given_by_its_path(tmp_path, way, place):
    checkpoint = tmp_path / "run" / "checkpoint-3"
    filled().save(checkpoint / "experience_buffer")
    (checkpoint / "trainer_state.json").write_text("{}")
    path = {"buffer": checkpoint / "experience_buffer", "checkpoint": checkpoint, "run": tmp_path / "run"}[place]
    given = make_trainer(tmp_path / "given", question_id_column="uid", experience_buffer=way(path))
    assigned = make_trainer(tmp_path / "assigned", question_id_column="uid")
    assigned.experience_buffer = way(path)
    for trainer in (given, assigned):
        assert list(trainer.experience_buffer.buckets()[1]) == ["q0"]
        assert trainer.experience_buffer.provenance["temperature"] == 1.0


def test_a_saved_buffer_is_replayed(tmp_path):
    filled().save(tmp_path / "saved")
    trainer = make_trainer(
        tmp_path,
        max_steps=1,
        question_id_column="uid",
        experience_buffer=tmp_path / "saved",
        question_sampler="uniform",
    )
    trainer.train()
    assert lines_of(trainer)[0]["replay/fraction"] == 0.25


def read_on_ranks(mode, mode_options, output_dir, path, by):
    if os.environ["RANK"] == "1":  # which has no such folder
        path = str(Path(path) / "elsewhere")
    options = {"question_id_column": "uid", "per_device_train_batch_size": 8} | mode_options
    if by == "argument":
        trainer = make_trainer(output_dir, experience_buffer=path, **options)
    else:
        trainer = make_trainer(output_dir, **options)
        trainer.experience_buffer = path
    if trainer.accelerator.is_main_process:
        assert trainer.experience_buffer.num_questions == 1
    else:
        assert isinstance(trainer.experience_buffer, RemoteBuffer)


@pytest.mark.parametrize("mode", ["ddp", "zero2"])
@pytest.mark.parametrize("by", ["argument", "assignment"])
def test_the_main_process_reads_a_path(tmp_path, mode, by):
    filled().save(tmp_path / "saved")
    run_ranks(read_on_ranks, str(tmp_path / "out"), str(tmp_path / "saved"), by, folder=tmp_path / "logs", mode=mode)


@pytest.mark.parametrize("by", ["argument", "assignment"])
def test_all_processes_fail_where_it_cannot_be_read(tmp_path, by):
    ranks = Ranks(read_on_ranks, (str(tmp_path / "out"), str(tmp_path / "none"), by), tmp_path / "logs")
    assert ranks.wait(60) == [1, 1], ranks.logs()
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank{rank}.log").read_text()
        assert f"{tmp_path / 'none'} does not exist" in log.rsplit("Traceback", 1)[-1], log


def assign_on_ranks(mode, mode_options, output_dir):
    trainer = same_rollouts_trainer(output_dir, mode, per_device_train_batch_size=8, **mode_options)
    mine = ExperienceBuffer(group_size=4, retire_solved=False)
    trainer.experience_buffer = mine
    is_main = trainer.accelerator.is_main_process
    assert trainer.experience_buffer is mine if is_main else isinstance(trainer.experience_buffer, RemoteBuffer)
    trainer.train()
    assert bool(mine.num_completions) == is_main


def test_the_main_process_owns_an_assigned_buffer(tmp_path):
    run_ranks(assign_on_ranks, str(tmp_path / "out"), folder=tmp_path)


def test_the_signature_shows_what_trl_takes_and_what_replay_adds():
    parameters = inspect.signature(ExGRPOTrainer).parameters
    of_trl = list(inspect.signature(GRPOTrainer).parameters)
    assert list(parameters)[: len(of_trl)] == of_trl
    assert list(parameters)[len(of_trl) :] == [
        "experience_buffer", "question_sampler", "completion_selector", "group_selector", "admission", "eviction",
        "weighting",
    ]  # fmt: skip
    assert {"train_dataset", "peft_config", "callbacks"} <= parameters.keys()
    assert not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values())
    assert "ExGRPOConfig" in str(parameters["args"].annotation)


def test_the_trainer_keeps_no_state_of_a_step(tmp_path):
    """All of it is in the batch: no attribute of the trainer changes its value for a batch, but TRL's own."""
    trainer = make_trainer(tmp_path, max_steps=3)
    plain = make_trainer(tmp_path / "plain", GRPOTrainer, max_steps=3)
    trainer.train()
    plain.train()
    ours = vars(trainer).keys() - vars(plain).keys()
    assert ours == {"replayer", "_processes", "_rollouts", "_is_replay_enabled", "_questions_of"}
    assert trainer.replayer.batch.is_collected
    assert trainer.replayer.batch.forwards == []
