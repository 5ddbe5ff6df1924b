"""Measurements on one of several processes."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

PARTS = ("selection", "scoring", "gathering", "broadcasting")
WARM_UP = 4  # steps: nothing is replayed in the first, and caches fill


def even_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for completions that begin with an even token: about half of a random model's."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def train(name: str, mode_options: dict[str, Any], chosen: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Log lines of one run, without those of the warm-up."""
    import torch
    from ranks import assert_engaged
    from tiny import make_trainer, tiny_dataset, tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOTrainer

    torch.manual_seed(seed)
    hidden = chosen["hidden"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer()), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            initializer_range=0.02,
        )
    )  # fmt: skip
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": tiny_dataset(64),
        "reward_funcs": even_reward,
        "per_device_train_batch_size": chosen["rows"],
        "num_generations": 8,
        "max_completion_length": chosen["length"],
        "max_steps": WARM_UP + chosen["steps"],
        "learning_rate": 1e-5,
        "seed": seed,
    }
    if name == "exgrpo":
        options |= {"retire_solved": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, GRPOTrainer if name == "grpo" else None, **mode_options | options)
        trainer.train()
        if chosen["world"] > 1:
            assert_engaged(trainer, "ddp", chosen["world"])
    return [line for line in trainer.state.log_history if "step_time" in line][WARM_UP:]


def measure(mode: str, mode_options: dict[str, Any], chosen: dict[str, Any], folder: str) -> None:
    """Seconds per step of each trainer and part, on the main process."""
    rank = int(os.environ["RANK"])
    results = []
    for seed in range(chosen["seeds"]):
        order = ("grpo", "exgrpo") if seed % 2 == 0 else ("exgrpo", "grpo")
        with contextlib.redirect_stdout(None):
            lines = {name: train(name, mode_options, chosen, seed) for name in order}
        if rank > 0:
            continue  # the main process describes replay
        assert all(line["replay/fraction"] > 0 for line in lines["exgrpo"])
        result = {name: mean(line["step_time"] for line in lines[name]) for name in lines}
        result |= {part: mean(line[f"replay/{part}_seconds"] for line in lines["exgrpo"]) for part in PARTS}
        result["candidates_scored"] = mean(line["replay/candidates_scored"] for line in lines["exgrpo"])
        results.append(result)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
