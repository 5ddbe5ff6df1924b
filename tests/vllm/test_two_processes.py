"""Server and colocate mode on two real processes, tensor parallelism included."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

from pathlib import Path

import torch
import trl
from engines import counted_engine, use_engines_on_cpu, use_file_transport
from packaging.version import Version
from peft import get_peft_model
from ranks import Ranks, assert_engaged, run_ranks
from recorder import (
    SAME_POLICY,
    Recorder,
    RowRecorder,
    assert_fresh_rows_belong,
    assert_replayed_rows_are_left_alone,
    fresh_rows,
    make_recorder,
    replayed_rows,
)
from tiny import lora_config
from transformers import AutoModelForCausalLM


def train_and_save(mode, mode_options, folder, model_folder, options):
    """What each process does."""
    is_server = options["vllm_mode"] == "server"
    use_file_transport() if is_server else use_engines_on_cpu()
    if options.pop("too_long", False):
        from datasets import Dataset

        options["train_dataset"] = Dataset.from_dict({"prompt": ["a" * 200] * 8})
    if options.pop("lora", False):
        torch.manual_seed(0)  # the weights of LoRA
        options["model"] = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora_config())
    options |= mode_options
    options["trainer_class"] = Recorder if mode == "ddp" else RowRecorder
    trainer = make_recorder(Path(folder) / "out", model_folder, **options)
    asked = None
    if is_server:
        trainer.train()
    else:
        with counted_engine(trainer.vllm_generation.llm) as asked:
            trainer.train()
    assert_engaged(trainer, mode, 2)
    result = {"batches": trainer.batches, "asked": asked, "history": trainer.state.log_history}
    rank = trainer.accelerator.process_index
    if rank == 0:
        buffer = trainer.experience_buffer
        prompts = {
            question_id: tuple(trainer.processing_class(buffer.question(question_id).example["prompt"])["input_ids"])
            for question_ids in buffer.buckets().values()
            for question_id in question_ids
        }
        result["stored"] = {
            (stored.policy_version, prompts[question_id], tuple(stored.token_ids.tolist())): (
                stored.behavior_per_token_logps
            )
            for question_id in prompts
            for stored in buffer.completions(question_id)
        }
    torch.save(result, Path(folder) / f"result{rank}.pt")


def results(folder):
    return [torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(2)]


def check(told):
    """What has to hold however the batches were generated; returns the rows of both processes by batch."""
    num_batches = len(told[0]["batches"])
    assert len(told[1]["batches"]) == num_batches >= 5
    for rank in told:
        for batch in rank["batches"]:
            for row in batch["rows"]:
                if not row["is_replayed"]:
                    # Computed by the trainer for the prompt of the row, and by the sampler for the prompt it was sent.
                    distance = (row["old_per_token_logps"] - row["sampling_per_token_logps"]).abs().max()
                    assert distance < SAME_POLICY, f"step {batch['step']}: {distance}"
        if rank["batches"][0]["policy"] is not None:
            assert_fresh_rows_belong(rank["batches"])
    both = [
        {"step": first["step"], "rows": first["rows"] + second["rows"]}
        for first, second in zip(told[0]["batches"], told[1]["batches"], strict=True)
    ]
    assert_replayed_rows_are_left_alone(both)
    # Every row is in its place: groups of 4 rows over both processes, each with one question and one replay at most.
    for batch in both:
        for first in range(0, len(batch["rows"]), 4):
            group = batch["rows"][first : first + 4]
            assert len({tuple(row["prompt"]) for row in group}) == 1
            assert sum(row["is_replayed"] for row in group) <= 1
    by_rank = [len(replayed_rows(rank["batches"])) for rank in told]
    assert min(by_rank) > 0, "both processes have replayed"
    num_replayed = {sum(row["is_replayed"] for row in rank["rows"]) for told_of in told for rank in told_of["batches"]}
    assert len(num_replayed) > 1
    # What is stored are the log-probabilities of the policy.
    generated = {
        (batch["step"], tuple(row["prompt"]), tuple(row["completion"])): row["old_per_token_logps"]
        for batch in both
        for row in batch["rows"]
        if not row["is_replayed"]
    }
    assert len(told[0]["stored"]) > 10
    for key, logps in told[0]["stored"].items():
        torch.testing.assert_close(torch.tensor(logps), generated[key], atol=SAME_POLICY, rtol=0)
    for line in told[0]["history"]:
        assert line.get("sampling/sampling_logp_difference/max", 0) < SAME_POLICY
    return both


SERVED = {
    "ddp": ("ddp", {"per_device_train_batch_size": 8}),
    "a_group_on_both_processes": ("ddp", {"per_device_train_batch_size": 6, "replay_fraction": 0.7}),
    "groups_larger_than_a_process": ("ddp", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
    "lora": ("ddp", {"per_device_train_batch_size": 8, "lora": True}),
    "fsdp2": ("fsdp2", {"per_device_train_batch_size": 8}),
    "zero3": ("zero3", {"per_device_train_batch_size": 8}),
}


@pytest.mark.xdist_group("server")
@pytest.mark.parametrize("case", SERVED)
def test_server(server, model_folder, tmp_path, case):
    mode, options = SERVED[case]
    if mode == "fsdp2" and Version(trl.__version__) < Version("1.11"):
        pytest.skip(f"trl {trl.__version__} sends weights of FSDP2 from GPUs only")
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url, **options}
    before = server.counts()
    run_ranks(train_and_save, str(tmp_path), model_folder, options, folder=tmp_path, mode=mode, timeout=240)
    after = server.counts()
    fresh = fresh_rows(check(results(tmp_path)))
    assert after["http"] - before["http"] == 6, "one request a batch, from the main process"
    assert after["sequences"] - before["sequences"] == len(fresh)
    assert after["prompt_tokens"] - before["prompt_tokens"] == sum(len(row["prompt"]) for row in fresh)
    assert after["generated_tokens"] - before["generated_tokens"] == sum(len(row["completion"]) for row in fresh)


@pytest.mark.xdist_group("server")
def test_a_failing_server_ends_both_processes(server, model_folder, tmp_path):
    options = {"vllm_mode": "server", "vllm_server_base_url": server.url, "per_device_train_batch_size": 8}
    ranks = Ranks(train_and_save, (str(tmp_path), model_folder, {**options, "too_long": True}), tmp_path)
    assert ranks.wait(timeout=120) == [1, 1]
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert "400" in logs[0].splitlines()[-1]
    assert "Process 0 failed while generating completions" in logs[1]
    assert "400" in logs[1].splitlines()[-1]


COLOCATED = {
    "an_engine_each": {"per_device_train_batch_size": 8},
    "tensor_parallel": {"per_device_train_batch_size": 8, "vllm_tensor_parallel_size": 2},
    "tensor_parallel_lora": {"per_device_train_batch_size": 8, "vllm_tensor_parallel_size": 2, "lora": True},
    "tensor_parallel_a_group_on_both": {
        "per_device_train_batch_size": 6,
        "vllm_tensor_parallel_size": 2,
        "replay_fraction": 0.7,
    },
}


@pytest.mark.xdist_group("colocate")
@pytest.mark.parametrize("case", COLOCATED)
def test_colocate(model_folder, tmp_path, case):
    options = {"vllm_mode": "colocate", **COLOCATED[case]}
    run_ranks(train_and_save, str(tmp_path), model_folder, options, folder=tmp_path, timeout=240)
    told = results(tmp_path)
    both = check(told)
    if "vllm_tensor_parallel_size" in options:
        expected = [[row["prompt"] for row in fresh_rows(both)]] * 2  # both run every prompt, with half of each layer
    else:
        expected = [[row["prompt"] for row in fresh_rows(rank["batches"])] for rank in told]
    assert [rank["asked"] for rank in told] == expected
