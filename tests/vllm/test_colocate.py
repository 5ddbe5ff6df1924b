"""Colocate mode with real engines in the process of the trainer."""

import math

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

import torch
import trl
from engines import counted_engine, use_engines_on_cpu
from packaging.version import Version
from peft import get_peft_model
from recorder import (
    SAME_POLICY,
    Recorder,
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
from watched import WatchedTrainer

pytestmark = pytest.mark.xdist_group("colocate")


@pytest.fixture(autouse=True)
def engines_on_cpu():
    use_engines_on_cpu()


def lag_behind(trainer):
    """Let the engine keep its first weights, so that sampler and policy differ, as they do in bf16 on GPUs."""
    sync, generation = trainer.vllm_generation.sync_weights, trainer.vllm_generation

    def sync_once():
        sync()
        generation.sync_weights = lambda: None

    generation.sync_weights = sync_once


CASES = {
    "plain": {},
    "several_stored": {"stored_per_group": 3, "candidate_scores": "last_known"},
    "groups": {"replay_unit": "group"},
    "lora": {"use_lora": True},
    "uncorrected": {"vllm_importance_sampling_correction": False},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "steps_per_generation": {"per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 10},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_generated_in_vain(model_folder, tmp_path, case):
    options = dict(CASES[case])
    if options.pop("use_lora", False):
        options["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora_config())
    trainer = make_recorder(tmp_path, model_folder, vllm_mode="colocate", **options)
    with counted_engine(trainer.vllm_generation.llm) as asked:
        trainer.train()
    batches, is_corrected = trainer.batches, trainer.vllm_importance_sampling_correction
    assert len(replayed_rows(batches)) >= 2 * (len(batches) - 2)
    assert asked == [row["prompt"] for row in fresh_rows(batches)]
    assert_fresh_rows_belong(batches)
    assert_replayed_rows_are_left_alone(batches, is_corrected)
    assert_stored_by_policy(trainer, batches)
    for line in trainer.state.log_history if is_corrected else []:
        assert line.get("sampling/sampling_logp_difference/max", 0) < SAME_POLICY


def test_filled_groups(model_folder, tmp_path):
    """Nothing is saved, and stored successes in the place of failures are kept from the correction."""
    trainer = make_recorder(
        tmp_path,
        model_folder,
        vllm_mode="colocate",
        fill_failed_groups=True,
        replay_fraction=0.0,
        train_dataset=tiny_dataset(8),
        reward_funcs=DryingUp(),
    )
    lag_behind(trainer)
    with counted_engine(trainer.vllm_generation.llm) as asked:
        trainer.train()
    assert len(replayed_rows(trainer.batches)) > 4
    assert asked == [row["prompt"] for batch in trainer.batches for row in batch["rows"]]
    assert_replayed_rows_are_left_alone(trainer.batches)
    for row in replayed_rows(trainer.batches):
        assert torch.equal(row["sampling_per_token_logps"], row["behavior_per_token_logps"])


MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize("is_corrected", [True, False])
def test_what_is_stored_is_the_policy_and_not_the_sampler(model_folder, tmp_path, is_corrected):
    trainer = make_recorder(
        tmp_path, model_folder, vllm_mode="colocate", vllm_importance_sampling_correction=is_corrected
    )
    lag_behind(trainer)
    trainer.train()
    assert_stored_by_policy(trainer, trainer.batches)
    fresh = [row for row in fresh_rows(trainer.batches) if "old_per_token_logps" in row]
    distances = [(row["old_per_token_logps"] - row["sampling_per_token_logps"]).abs().max().item() for row in fresh]
    if is_corrected:
        assert max(distances) > 0.1, "the sampler did not lag behind"


@pytest.mark.parametrize("mode", MODES)
def test_metrics_of_the_sampler_are_those_of_fresh_rows(model_folder, tmp_path, mode):
    options = {"vllm_importance_sampling_mode": mode}
    trainer = make_recorder(tmp_path, model_folder, vllm_mode="colocate", **options)
    lag_behind(trainer)
    trainer.train()
    assert_replayed_rows_are_left_alone(trainer.batches)
    steps = [line for line in trainer.state.log_history if "loss" in line]
    for line, batch in zip(steps, trainer.batches, strict=True):
        fresh = fresh_rows([batch])
        distances = torch.cat([(row["old_per_token_logps"] - row["sampling_per_token_logps"]).abs() for row in fresh])
        ratios = torch.cat([row["importance_sampling_ratio"].flatten() for row in fresh])
        expected = {
            "sampling_logp_difference/mean": distances.mean(),
            "sampling_logp_difference/max": distances.max(),
            "importance_sampling_ratio/min": ratios.min(),
            "importance_sampling_ratio/mean": ratios.mean(),
            "importance_sampling_ratio/max": ratios.max(),
        }
        for name, value in expected.items():
            assert line[f"sampling/{name}"] == pytest.approx(value.item(), abs=1e-6), name
    # With the stored rows, the numbers would have been others.
    stored = [row["behavior_per_token_logps"] - row["old_per_token_logps"] for row in replayed_rows(trainer.batches)]
    assert torch.cat(stored).abs().max() > 0.1


LOSSES = {
    **{mode: {"vllm_importance_sampling_mode": mode} for mode in MODES},
    "grpo": {"loss_type": "grpo"},
    "cispo": {"loss_type": "cispo", "vllm_importance_sampling_mode": "token_truncate"},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_truncate"},
    "kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "num_iterations": {"num_iterations": 2},
    "uncorrected": {"vllm_importance_sampling_correction": False},
}


@pytest.mark.parametrize("case", LOSSES)
def test_loss_and_gradient_with_a_sampler_that_differs(model_folder, tmp_path, case):
    """Fresh rows have TRL's correction, replayed ones their own weight alone: by two independent computations."""
    options = {"max_steps": 6, "learning_rate": 5e-3} | LOSSES[case]
    trainer = make_recorder(tmp_path, model_folder, vllm_mode="colocate", trainer_class=WatchedTrainer, **options)
    lag_behind(trainer)
    trainer.train()
    assert trainer.log_ratios, "nothing was replayed"
    assert trainer.num_mixed
    if case != "uncorrected":
        assert torch.cat(trainer.sampler_weights).sub(1).abs().max() > 0.05, "the sampler did not lag behind"


def test_the_off_policy_mask_leaves_replay_alone(model_folder, tmp_path):
    """It compares the policy with the sampler; a stored completion has its own weight for that."""
    seen = []

    class Watching(Recorder):
        def get_off_policy_mask(self, *args, **kwargs):
            mask = super().get_off_policy_mask(*args, **kwargs)
            seen.append((self._is_replayed, mask.bool().all(-1)))
            return mask

        def compute_loss(self, model, inputs, *args, **kwargs):
            self._is_replayed = inputs["is_replayed"]
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make_recorder(
        tmp_path,
        model_folder,
        vllm_mode="colocate",
        trainer_class=Watching,
        off_policy_mask_threshold=1e-3,
        # Lower is better: successes have a negative advantage, without which nothing is masked.
        reward_funcs=[lower_half, upside_down],
        success_reward="lower_half",
        reward_weights=[0.0, 1.0],
    )
    lag_behind(trainer)
    trainer.train()
    is_replayed = torch.cat([rows for rows, _ in seen])
    is_kept = torch.cat([mask for _, mask in seen])
    assert is_replayed.sum() >= 4
    assert is_kept[is_replayed].all()
    assert not is_kept[~is_replayed].all(), "nothing was masked at all"


def lower_half(completions, **kwargs):
    return [float(completion[:1].isalpha() and completion[:1] <= "t") for completion in completions]


def upside_down(completions, **kwargs):
    return [1 - reward for reward in lower_half(completions)]


@pytest.mark.skipif(
    Version(trl.__version__) < Version("1.11"), reason=f"trl {trl.__version__} fails without a log-probability"
)
def test_a_completion_without_log_probabilities_is_not_stored(model_folder, tmp_path):
    trainer = make_recorder(tmp_path, model_folder, vllm_mode="colocate", max_steps=8)
    engine, unscored = trainer.vllm_generation.llm, set()
    generate = engine.generate

    def forgetful(*args, **kwargs):
        outputs = generate(*args, **kwargs)
        for output in outputs[::3]:
            (completion,) = output.outputs
            for logprob in completion.logprobs[len(completion.logprobs) // 2].values():
                logprob.logprob = math.nan
            unscored.add((trainer.state.global_step, tuple(output.prompt_token_ids), tuple(completion.token_ids)))
        return outputs

    engine.generate = forgetful
    try:
        trainer.train()
    finally:
        del engine.generate
    assert len(unscored) > 20
    buffer = trainer.experience_buffer
    stored = {
        (
            experience.policy_version,
            tuple(trainer.processing_class(buffer.question(question_id).example["prompt"])["input_ids"]),
            tuple(experience.token_ids.tolist()),
        )
        for question_ids in buffer.buckets().values()
        for question_id in question_ids
        for experience in buffer.completions(question_id)
    }
    assert len(stored) > 10
    assert not stored & unscored
    assert_stored_by_policy(trainer, trainer.batches)


def test_resume(model_folder, tmp_path):
    options = {"vllm_mode": "colocate", "save_strategy": "steps", "save_steps": 3}
    first = make_recorder(tmp_path, model_folder, max_steps=3, **options)
    first.train()
    second = make_recorder(tmp_path, model_folder, max_steps=6, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [batch["step"] for batch in second.batches] == [3, 4, 5]
    assert len(replayed_rows(second.batches[:1])) == 2, "replay goes on at once"
    assert_fresh_rows_belong(second.batches)
    assert_stored_by_policy(second, [*first.batches, *second.batches])


def test_a_failing_engine_ends_the_training(model_folder, tmp_path):
    trainer = make_recorder(tmp_path, model_folder, vllm_mode="colocate")
    engine = trainer.vllm_generation.llm

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    engine.generate = fail
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer.train()
    finally:
        del engine.generate
    assert trainer.vllm_generation.llm is engine
