"""A trainer whose fresh completions depend on prompt, slot and step only: runs on any number of ranks agree."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from ranks import assert_engaged, whole_parameters
from tiny import CHARACTERS, first_letter_reward, lora_config, make_trainer, tiny_dataset, tiny_model

from exgrpo_trl import ExGRPOTrainer


def long_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Continuous: the length in characters."""
    return [float(len(completion)) for completion in completions]


def easy_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 for completions that do not begin with a letter from q on: three in four."""
    return [float(not completion[:1].isalpha() or completion[:1] <= "p") for completion in completions]


# By name, because functions of a test do not travel to its ranks.
REWARDS = {"first_letter": first_letter_reward, "easy": easy_reward, "long": long_reward}


class SameRollouts(ExGRPOTrainer):
    """Generates as ever, then puts other tokens in the place of what was generated; records every row."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows: dict[str, Any] = {}
        self.num_generated: list[int] = []
        self.num_scored: list[tuple[int, int]] = []

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled:
            from torch.distributed.tensor import DTensor

            # TRL reads the shards to send weights to vLLM; a forward without backward leaves the outermost ones whole.
            assert all(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        completion_ids, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if not self.model.training:
            return completion_ids, *rest
        first_row = self.accelerator.process_index * len(prompt_ids)
        same = []
        for row, prompt in enumerate(prompt_ids):
            if row in self.replayer.batch.stored:
                same.append(completion_ids[row])
                continue
            slot = (first_row + row) % self.num_generations
            rng = np.random.default_rng([self.state.global_step, slot, *prompt])
            same.append([*rng.integers(3, 3 + len(CHARACTERS), rng.integers(1, 8)).tolist(), 1])
        self.num_generated.append(len(prompt_ids) - len(self.replayer.batch.stored))
        return same, *rest

    def _score(self, pairs: Any) -> Any:
        self.num_scored.append((self.state.global_step, len(pairs)))
        return super()._score(pairs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            first_row = self.accelerator.process_index * len(inputs)
            for row in range(len(inputs)):
                self.rows[f"{self.state.global_step}/{first_row + row}"] = (
                    output["prompt_ids"][row][output["prompt_mask"][row].bool()].tolist(),
                    output["completion_ids"][row][output["completion_mask"][row].bool()].tolist(),
                    bool(output["is_replayed"][row]),
                )
        return output


def same_rollouts_trainer(output_dir: Any, mode: str = "", **options: Any) -> Any:
    """A trainer of the same rollouts; SGD, because Adam makes large steps of small differences."""
    options = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_steps": 12,
        "retire_solved": False,
        "reward_funcs": "first_letter",
        "train_dataset": tiny_dataset(options.pop("num_rows", 8)),
    } | options
    if options.pop("iterable", False):
        options["train_dataset"] = options["train_dataset"].to_iterable_dataset()
    options["reward_funcs"] = REWARDS[options["reward_funcs"]]
    if options.pop("lora", False):
        options["peft_config"] = lora_config()
    model = tiny_model()
    torch.manual_seed(0)  # LoRA's weights
    return make_trainer(output_dir, options.pop("trainer_class", SameRollouts), model=model, **options)


def result_of(trainer: Any) -> dict[str, Any]:
    """What a process has seen, and the parameters of all."""
    is_main = trainer.accelerator.is_main_process
    buffer = trainer.experience_buffer
    return {
        "rows": trainer.rows,
        "num_generated": trainer.num_generated,
        "num_scored": trainer.num_scored,
        "parameters": whole_parameters(trainer),
        "retired": list(buffer.retired) if is_main else None,
        "buffer": buffer_contents(buffer) if is_main else None,
        "state": trainer.replayer.state_dict(),
        "is_started": trainer.replayer.batch.plan.is_started,
        "history": trainer.state.log_history,
        "left_out": left_out(trainer),
    }


def left_out(trainer: Any) -> list[int]:
    """Dataset rows that a new epoch would leave out, as this process is told; all processes ask."""
    return sorted(trainer.replayer.begin_epoch(10**6)[0])


def buffer_contents(buffer: Any) -> dict[str, Any]:
    """Everything in a buffer that does not depend on rounding."""
    return {
        "questions": {s: list(questions) for s, questions in buffer.buckets().items()},
        "completions": {
            question_id: [(e.token_ids.tolist(), e.policy_version, e.reward) for e in buffer.completions(question_id)]
            for questions in buffer.buckets().values()
            for question_id in questions
        },
        "logps": [
            e.behavior_per_token_logps.tolist()
            for questions in buffer.buckets().values()
            for question_id in questions
            for e in buffer.completions(question_id)
        ],
        "rng": buffer.rng.bit_generator.state,
    }


def train_and_save(mode: str, mode_options: dict[str, Any], folder: str, options: dict[str, Any]) -> None:
    """What every rank does: train, prove that the mode is engaged, write down what was seen."""
    resume = options.pop("resume", None)
    trainer = same_rollouts_trainer(Path(folder) / "out", mode, **mode_options | options)
    trainer.train(resume_from_checkpoint=resume)
    assert_engaged(trainer, mode, int(trainer.args.world_size))
    assert trainer.args.world_size > 1
    torch.save(result_of(trainer), Path(folder) / f"result{trainer.accelerator.process_index}.pt")


def results(folder: Any, world: int = 2) -> list[dict[str, Any]]:
    """What each rank has written."""
    return [torch.load(Path(folder) / f"result{rank}.pt", weights_only=False) for rank in range(world)]
