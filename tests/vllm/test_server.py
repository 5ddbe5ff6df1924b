"""Server mode against a real vLLM server that counts what it is asked for."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

import torch
from peft import get_peft_model
from recorder import (
    SAME_POLICY,
    assert_fresh_rows_belong,
    assert_replayed_rows_are_left_alone,
    assert_stored_by_policy,
    fresh_rows,
    make_recorder,
    replayed_rows,
)
from test_filled_groups import DryingUp
from tiny import lora_config, tiny_dataset
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.xdist_group("server")

CASES = {
    "plain": {},
    "several_stored": {"stored_per_group": 3, "candidate_scores": "last_known"},
    "groups": {"replay_unit": "group"},
    "lora": {"use_lora": True},
    "uncorrected": {"vllm_importance_sampling_correction": False},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "num_iterations": {"num_iterations": 2, "max_steps": 10},
    "steps_per_generation_uncorrected": {
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "max_steps": 10,
        "vllm_importance_sampling_correction": False,
    },
    "evaluation": {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": tiny_dataset(4)},
}


def train(server, folder, model_folder, **options):
    """A trained recorder, and what the server counted meanwhile."""
    if options.pop("use_lora", False):
        options["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora_config())
    trainer = make_recorder(folder, model_folder, vllm_mode="server", vllm_server_base_url=server.url, **options)
    before = server.counts()
    trainer.train()
    after = server.counts()
    return trainer, {name: after[name] - before[name] for name in after}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_generated_in_vain(server, model_folder, tmp_path, case):
    trainer, counted = train(server, tmp_path, model_folder, **CASES[case])
    batches, is_corrected = trainer.batches, trainer.vllm_importance_sampling_correction
    assert len(batches) >= 5
    assert len(replayed_rows(batches)) >= 2 * (len(batches) - 2), "replay works at its full share"

    assert_fresh_rows_belong(batches)
    assert_replayed_rows_are_left_alone(batches, is_corrected)
    assert_stored_by_policy(trainer, batches)

    # What the server itself has counted: one request a batch, and in it the fresh rows alone.
    fresh = fresh_rows(batches)
    if case != "evaluation":
        assert counted["http"] == len(batches)
        assert counted["sequences"] == len(fresh) == 16 * len(batches) - len(replayed_rows(batches))
        assert counted["prompt_tokens"] == sum(len(row["prompt"]) for row in fresh)
        assert counted["generated_tokens"] == sum(len(row["completion"]) for row in fresh)
    else:
        assert counted["sequences"] == len(fresh) + 3 * 16, "three evaluations of 4 questions with 4 completions"
        assert sum("eval_reward" in line for line in trainer.state.log_history) == 3

    # TRL's metrics speak of fresh rows: weights have really arrived, and no stored completion is among them.
    steps = [line for line in trainer.state.log_history if "sampling/sampling_logp_difference/max" in line]
    assert len(steps) == len(batches) * is_corrected
    for line in steps:
        assert line["sampling/sampling_logp_difference/max"] < SAME_POLICY
        for name in ("min", "mean", "max"):
            assert line[f"sampling/importance_sampling_ratio/{name}"] == pytest.approx(1, abs=1e-3)
    moved = max(
        (row["behavior_per_token_logps"] - row["old_per_token_logps"]).abs().max().item()
        for row in replayed_rows(batches)
        if "old_per_token_logps" in row
    ) if is_corrected else 1.0  # fmt: skip
    assert moved > 0.05, "the policy never moved, so that stale weights would not have been noticed"


def test_filled_groups(server, model_folder, tmp_path):
    """All completions are asked for, and then stored successes stand in the place of failures."""
    options = {"fill_failed_groups": True, "replay_fraction": 0.0, "train_dataset": tiny_dataset(8)}
    trainer, counted = train(server, tmp_path, model_folder, reward_funcs=DryingUp(), **options)
    replayed = replayed_rows(trainer.batches)
    assert len(replayed) > 4
    assert counted["http"] == len(trainer.batches)
    assert counted["sequences"] == 16 * len(trainer.batches)
    assert_replayed_rows_are_left_alone(trainer.batches)
    for row in replayed:
        assert torch.equal(row["sampling_per_token_logps"], row["behavior_per_token_logps"])


def test_a_replayed_batch_asks_for_nothing(server, model_folder, tmp_path):
    options = {"replay_unit": "group", "replay_whole_batches": True, "per_device_train_batch_size": 4, "max_steps": 14}
    trainer, counted = train(server, tmp_path, model_folder, train_dataset=tiny_dataset(4), **options)
    replayed = [batch for batch in trainer.batches if all(row["is_replayed"] for row in batch["rows"])]
    assert len(replayed) > 3
    assert counted["http"] == len(trainer.batches) - len(replayed)
    assert counted["sequences"] == 4 * counted["http"] == len(fresh_rows(trainer.batches))


def test_prompts_stay_together_where_one_number_fits_all(server, model_folder, tmp_path):
    asked = server.client_class.asked
    asked.clear()
    trainer, _ = train(server, tmp_path, model_folder, max_steps=4)
    num_replayed = [sum(row["is_replayed"] for row in batch["rows"]) for batch in trainer.batches]
    assert num_replayed[0] == 0
    # A request has one `n`: 4 prompts of 4 completions, or every fresh row by itself.
    assert asked == [(4, 4) if count == 0 else (16 - count, 1) for count in num_replayed]


def test_a_failing_server_ends_the_training(server, model_folder, tmp_path):
    """One prompt is longer than the server allows."""
    from datasets import Dataset

    dataset = Dataset.from_dict({"prompt": ["a" * 200] * 8})
    with pytest.raises(Exception, match="400"):
        train(server, tmp_path, model_folder, train_dataset=dataset)
    trainer, _ = train(server, tmp_path, model_folder, max_steps=2)
    assert trainer.state.global_step == 2, "and leaves the server as it was"
