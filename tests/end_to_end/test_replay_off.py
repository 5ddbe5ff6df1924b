"""Promise 1: with `replay_fraction=0` the trained parameters are bit-identical to `trl.GRPOTrainer`'s."""

import pytest
import torch
from tiny import lora_config, make_trainer, parameters_of
from trl import GRPOTrainer

CASES = {
    "dapo": {"loss_type": "dapo"},
    "grpo_kl_accumulation": {
        "loss_type": "grpo",
        "beta": 0.1,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 8,
    },
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
}


def train(tmp_path, name, trainer_class, use_lora, **options):
    trainer = make_trainer(
        tmp_path / name,
        trainer_class,
        max_steps=options.pop("max_steps", 5),  # into the second epoch
        peft_config=lora_config() if use_lora else None,
        **options,
    )
    before = parameters_of(trainer)
    trainer.train()
    after = parameters_of(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was trained"
    return trainer, after


@pytest.mark.parametrize("use_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_replay_off_is_grpo(tmp_path, case, use_lora):
    _, theirs = train(tmp_path, "grpo", GRPOTrainer, use_lora, **CASES[case])
    trainer, ours = train(tmp_path, "exgrpo", None, use_lora, replay_fraction=0.0, **CASES[case])
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name
    assert trainer.experience_buffer.num_completions == 0
    assert not any("replay" in key or "fresh" in key for line in trainer.state.log_history for key in line)


def test_before_the_delayed_start_training_is_grpo(tmp_path):
    options = {"loss_type": "grpo", "max_steps": 4}
    _, theirs = train(tmp_path, "grpo", GRPOTrainer, False, **options)
    trainer, ours = train(tmp_path, "exgrpo", None, False, replay_start_pass_rate=0.99, **options)
    assert not trainer.experience_buffer.num_completions
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name


def test_replay_on_is_not_grpo(tmp_path):
    _, theirs = train(tmp_path, "grpo", GRPOTrainer, False)
    _, ours = train(tmp_path, "exgrpo", None, False)
    assert any(not torch.equal(theirs[name], ours[name]) for name in theirs)
