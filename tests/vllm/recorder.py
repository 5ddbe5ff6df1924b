"""A trainer that writes down every row of every batch, and what has to hold for them whatever generates."""

import copy
from typing import Any

import torch
from tiny import completion_logps, make_trainer

from exgrpo_trl import ExGRPOTrainer

# Log-probabilities of one policy, computed twice in float32: 1e-5 apart on some CPUs. Training moves
# them by 0.05 and more.
SAME_POLICY = 1e-4


class Recorder(ExGRPOTrainer):
    """Records each row of a batch, and the policy that generated it."""

    keeps_policies = True

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.pristine = copy.deepcopy(model) if self.keeps_policies else None  # TRL patches the forward of its model
        super().__init__(model, *args, **kwargs)
        self.batches: list[dict[str, Any]] = []

    def policy(self) -> Any:
        """Copy of the model in float64."""
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        return policy

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        policy = None if self.pristine is None else self.policy()
        output = super()._generate_and_score_completions(inputs)
        rows = []
        for row, prompt in enumerate(output["prompt_ids"]):
            own = output["completion_mask"][row].bool()
            kept: dict[str, Any] = {
                "prompt": prompt[output["prompt_mask"][row].bool()].tolist(),
                "completion": output["completion_ids"][row][own].tolist(),
                "is_replayed": bool(output["is_replayed"][row]),
                "is_model": output["tool_mask"][row][own].bool() if "tool_mask" in output else own[own],
            }
            for name in ("old_per_token_logps", "sampling_per_token_logps", "behavior_per_token_logps"):
                if name in output:
                    kept[name] = output[name][row][own].clone()
            if "importance_sampling_ratio" in output:
                ratio = output["importance_sampling_ratio"][row]
                kept["importance_sampling_ratio"] = (ratio[own] if len(ratio) == len(own) else ratio).clone()
            rows.append(kept)
        self.batches.append({"step": self.state.global_step, "rows": rows, "policy": policy})
        return output


class RowRecorder(Recorder):
    """Records rows alone, for processes that share the parameters."""

    keeps_policies = False


def make_recorder(folder: Any, model_folder: Any, **options: Any) -> Recorder:
    """A recording trainer with vLLM; 4 questions of 4 completions a step, everything stays in the dataset."""
    from transformers import AutoModelForCausalLM

    options = {
        "use_vllm": True,
        "vllm_max_model_length": 128,
        "max_steps": 6,
        "learning_rate": 5e-3,
        "retire_solved": False,
    } | options
    if "model" not in options:
        options["model"] = AutoModelForCausalLM.from_pretrained(model_folder)
    return make_trainer(folder, options.pop("trainer_class", Recorder), **options)


def fresh_rows(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The generated rows of all batches."""
    return [row for batch in batches for row in batch["rows"] if not row["is_replayed"]]


def replayed_rows(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The replayed rows of all batches."""
    return [row for batch in batches for row in batch["rows"] if row["is_replayed"]]


def assert_fresh_rows_belong(batches: list[dict[str, Any]]) -> None:
    """
    The sampler's log-probabilities of each generated row are those of the policy, given the prompt of that row.

    And not those given another prompt of the batch, which shows that the comparison can tell.
    """
    num_others = num_told_apart = 0
    for batch in batches:
        prompts = {tuple(row["prompt"]) for row in batch["rows"]}
        for row in batch["rows"]:
            if row["is_replayed"]:
                continue
            sampled = row["sampling_per_token_logps"].double()
            for prompt in prompts:
                with torch.no_grad():
                    logps, _ = completion_logps(batch["policy"], prompt, row["completion"])
                distance = (logps - sampled)[row["is_model"]].abs().max().item()
                if prompt == tuple(row["prompt"]):
                    assert distance < SAME_POLICY, f"step {batch['step']}: another prompt or policy ({distance})"
                else:
                    num_others += 1
                    num_told_apart += distance > 1e-3
    assert num_told_apart > 0.95 * num_others > 20, f"{num_told_apart} of {num_others} prompts told apart"


def assert_replayed_rows_are_left_alone(batches: list[dict[str, Any]], is_corrected: bool = True) -> None:
    """A replayed row has ratio 1, its group holds one question, and what is kept of it is what was stored."""
    assert replayed_rows(batches), "nothing was replayed"
    for batch in batches:
        for row in batch["rows"]:
            assert ("importance_sampling_ratio" in row) == is_corrected
            if row["is_replayed"] and is_corrected:
                assert (row["importance_sampling_ratio"] == 1).all()


def prompt_ids_of(trainer: Any, example: Any, stored: Any) -> list[int]:
    """Prompt token ids of a stored completion, as the dataset or its environment showed it."""
    shown = stored.details.prompt if stored.details is not None else None
    prompt = example["prompt"] if shown is None else shown
    if isinstance(prompt, str):
        return trainer.processing_class(prompt)["input_ids"]
    return trainer.processing_class.apply_chat_template(
        prompt, tools=trainer.tools or None, add_generation_prompt=True, return_dict=False
    )


def assert_stored_by_policy(trainer: Any, batches: list[dict[str, Any]]) -> None:
    """Whatever is stored was generated in these batches, and its log-probabilities are the policy's of that time."""
    generated = {(batch["step"], tuple(row["prompt"]), tuple(row["completion"])) for batch in batches
                 for row in batch["rows"] if not row["is_replayed"]}  # fmt: skip
    policies = {batch["step"]: batch["policy"] for batch in batches}
    buffer, num_checked = trainer.experience_buffer, 0
    for question_ids in buffer.buckets().values():
        for question_id in question_ids:
            example = buffer.question(question_id).example
            for stored in buffer.completions(question_id):
                prompt, tokens = prompt_ids_of(trainer, example, stored), stored.token_ids.tolist()
                assert (stored.policy_version, tuple(prompt), tuple(tokens)) in generated
                with torch.no_grad():
                    logps, entropies = completion_logps(policies[stored.policy_version], prompt, tokens)
                behavior, is_model = torch.tensor(stored.behavior_per_token_logps).double(), stored.is_model
                torch.testing.assert_close(behavior[is_model], logps[is_model], atol=2e-5, rtol=0)
                assert not behavior[~is_model].any()
                assert abs(stored.entropy - entropies[is_model].mean().item()) < 2e-5
                num_checked += 1
    assert num_checked == buffer.num_completions > 10
