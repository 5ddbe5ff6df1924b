"""Promise 2: loss and gradient of mixed batches are the paper's objective, by two oracles (see `watched.py`)."""

import pytest
import trl
from peft import get_peft_model
from tiny import lora_config, make_trainer, tiny_model
from watched import WatchedTrainer

CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "cispo_default_epsilon": {"loss_type": "cispo"},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "balanced": {"loss_type": "grpo", "replay_weighting": "balanced"},
    "clipped": {"loss_type": "grpo", "replay_weighting": "clipped"},
    "truncated": {"loss_type": "grpo", "replay_weighting": "truncated"},
    "none": {"loss_type": "grpo", "replay_weighting": "none"},
    "balanced_cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "replay_weighting": "balanced"},
    "clipped_sapo": {"loss_type": "sapo", "replay_weighting": "clipped"},
    "truncated_vespo": {"loss_type": "vespo", "replay_weighting": "truncated"},
    "sequence_level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "sequence_level_clipped": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "replay_weighting": "clipped",
    },
    "sequence_level_dapo": {"importance_sampling_level": "sequence"},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "accumulation_grpo": {"loss_type": "grpo", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "single_rows": {
        "loss_type": "grpo",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "max_steps": 3,
    },
    "single_rows_bnpo": {
        "loss_type": "bnpo",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "max_steps": 3,
    },
    "num_iterations": {"loss_type": "grpo", "num_iterations": 2},
    "num_iterations_cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "num_iterations_vespo": {"loss_type": "vespo", "num_iterations": 2},
    "num_iterations_sapo": {"loss_type": "sapo", "num_iterations": 2},
    "steps_per_generation": {"per_device_train_batch_size": 8, "steps_per_generation": 2},
    "steps_per_generation_grpo": {"loss_type": "grpo", "per_device_train_batch_size": 8, "steps_per_generation": 2},
    "kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": True},
    "kl_uncorrected": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "kl_num_iterations": {"loss_type": "grpo", "beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": True},
    "kl_dapo_accumulation": {"beta": 0.1, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "lora": {"loss_type": "grpo", "use_lora": True},
    "lora_kl": {"beta": 0.1, "use_lora": True},
    "gradient_checkpointing": {"loss_type": "grpo", "gradient_checkpointing": True},
    "truncated_masked": {"mask_truncated_completions": True, "max_completion_length": 24},
    "several_stored": {"stored_per_group": 3},
    "several_stored_grpo": {"stored_per_group": 2, "loss_type": "grpo", "replay_weighting": "balanced"},
    "several_stored_kl_accumulation": {
        "stored_per_group": 2,
        "beta": 0.1,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    },
    "last_known": {"candidate_scores": "last_known", "stored_per_group": 2, "num_iterations": 2},
    # Whole groups: advantages of both signs.
    "groups": {"replay_unit": "group"},
    "groups_grpo": {"replay_unit": "group", "loss_type": "grpo"},
    "groups_bnpo": {"replay_unit": "group", "loss_type": "bnpo"},
    "groups_dr_grpo": {"replay_unit": "group", "loss_type": "dr_grpo", "scale_rewards": "none"},
    "groups_cispo": {"replay_unit": "group", "loss_type": "cispo", "epsilon_high": 5.0},
    "groups_sapo": {"replay_unit": "group", "loss_type": "sapo"},
    "groups_luspo": {"replay_unit": "group", "loss_type": "luspo", "importance_sampling_level": "sequence"},
    "groups_vespo": {"replay_unit": "group", "loss_type": "vespo"},
    "groups_balanced": {"replay_unit": "group", "loss_type": "grpo", "replay_weighting": "balanced"},
    "groups_clipped": {"replay_unit": "group", "loss_type": "grpo", "replay_weighting": "clipped"},
    "groups_truncated": {"replay_unit": "group", "loss_type": "grpo", "replay_weighting": "truncated"},
    "groups_none": {"replay_unit": "group", "loss_type": "grpo", "replay_weighting": "none"},
    "groups_clipped_sapo": {"replay_unit": "group", "loss_type": "sapo", "replay_weighting": "clipped"},
    "groups_sequence_level_clipped": {
        "replay_unit": "group",
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "replay_weighting": "clipped",
    },
    "groups_kl_num_iterations": {"replay_unit": "group", "loss_type": "grpo", "beta": 0.1, "num_iterations": 2},
    "groups_accumulation": {
        "replay_unit": "group",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(tmp_path, case):
    options = {"max_steps": 6, "learning_rate": 5e-3} | CASES[case]
    if options.pop("use_lora", False):
        options["model"] = get_peft_model(tiny_model(), lora_config())
    trainer = make_trainer(tmp_path, WatchedTrainer, **options)
    trainer.train()
    assert trainer.log_ratios, "nothing was replayed"
    assert max(ratio.abs().max() for ratio in trainer.log_ratios) > 0.05, "the policy never moved"
    if options.get("replay_unit") == "group":
        assert min(trainer.replayed_advantages) < 0 < max(trainer.replayed_advantages)
    if options.get("per_device_train_batch_size") == 1:
        assert trainer.num_only_replayed
        assert trainer.num_fresh
    else:
        assert trainer.num_mixed


def test_entropy_bonus(tmp_path):
    from trl import GRPOConfig

    if "entropy_coef" not in GRPOConfig.__dataclass_fields__:
        pytest.skip(f"trl {trl.__version__} has no entropy bonus")
    trainer = make_trainer(tmp_path, WatchedTrainer, max_steps=5, loss_type="dr_grpo", entropy_coef=0.05)
    trainer.train()
    assert trainer.log_ratios
