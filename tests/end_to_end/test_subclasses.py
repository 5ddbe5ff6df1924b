"""What people override in a GRPO trainer: it works where it keeps the contract, else an error names the method."""

import copy

import pytest
import torch
from ranks import Ranks, run_ranks
from same_rollouts import same_rollouts_trainer
from tiny import completion_logps, first_letter_reward, make_trainer, parameters_of, tiny_model
from trl.trainer.utils import selective_log_softmax

from exgrpo_trl import ExGRPOTrainer


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def num_replayed(trainer):
    return sum(line.get("replay/fraction", 0) > 0 for line in lines_of(trainer))


def forward_of(trainer, model, inputs, **kwargs):
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].size(1), **kwargs)[0]


class ExtraForward(ExGRPOTrainer):
    """A term of its own in the loss, from a forward of its own; 0 times that term, so that nothing may change."""

    where, other = "before", None

    def _compute_loss(self, model, inputs):
        if "before" in self.where:
            extra = forward_of(self, self.other or model, inputs).sum()
        shapes = {name: value.shape for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        loss = super()._compute_loss(model, inputs)
        assert {name: value.shape for name, value in inputs.items() if isinstance(value, torch.Tensor)} == shapes
        if "after" in self.where:
            extra = forward_of(self, self.other or model, inputs, compute_entropy=True).sum()
        return loss + 0.0 * extra


class ExtraForwardOutside(ExGRPOTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        extra = forward_of(self, model, inputs).sum()
        return super().compute_loss(model, inputs, *args, **kwargs) + 0.0 * extra


class ChunkedForward(ExGRPOTrainer):
    """Computes log-probabilities in two halves, to save memory."""

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        halves = [
            super(ChunkedForward, self)._get_per_token_logps_and_entropies(
                model, ids, mask, logits_to_keep, *args, **kwargs
            )
            for ids, mask in zip(input_ids.chunk(2), attention_mask.chunk(2), strict=True)
        ]
        return tuple(None if parts[0] is None else torch.cat(parts) for parts in zip(*halves, strict=True))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("plain"), max_steps=5, retire_solved=False)
    trainer.train()
    assert num_replayed(trainer) >= 3
    return trainer


@pytest.mark.parametrize("other_model", [False, True], ids=["own_model", "teacher"])
@pytest.mark.parametrize("where", ["before", "after", "before and after"])
def test_further_forwards_change_nothing(tmp_path, untouched, where, other_model):
    teacher = tiny_model(seed=3)  # before the trainer, which seeds the generators
    trainer = make_trainer(tmp_path, ExtraForward, max_steps=5, retire_solved=False)
    trainer.where = where
    if other_model:
        trainer.other = copy.deepcopy(trainer.model)  # with what TRL does to the forward of a model
        trainer.other.load_state_dict(teacher.state_dict())
    trainer.train()
    for name, parameter in parameters_of(untouched).items():
        assert torch.equal(parameters_of(trainer)[name], parameter), name


@pytest.mark.parametrize("trainer_class", [ExtraForwardOutside, ChunkedForward])
def test_other_ways_to_make_a_forward(tmp_path, untouched, trainer_class):
    trainer = make_trainer(tmp_path, trainer_class, max_steps=5, retire_solved=False)
    trainer.train()
    assert num_replayed(trainer) == num_replayed(untouched)
    for name, parameter in parameters_of(untouched).items():
        torch.testing.assert_close(parameters_of(trainer)[name], parameter, atol=1e-5, rtol=1e-5)


class OwnComputeLoss(ExGRPOTrainer):
    """A loss of its own that never asks the parent."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, -inputs["completion_ids"].size(1) - 1 : -1]
        logps = selective_log_softmax(logits, inputs["completion_ids"])
        is_own = inputs["completion_mask"]
        return -(inputs["advantages"].unsqueeze(1) * logps * is_own).sum() / is_own.sum()


class OwnInnerLoss(ExGRPOTrainer):
    def _compute_loss(self, model, inputs):
        return -(forward_of(self, model, inputs) * inputs["completion_mask"]).mean()


@pytest.fixture
def warnings_of(monkeypatch):
    from exgrpo_trl import replayer

    messages = []
    monkeypatch.setattr(replayer.logger, "warning", lambda message, *args: messages.append(message))
    return messages


class ForgetsColumns(ExGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {name: value for name, value in output.items() if name not in ("rollout_rows", "is_replayed")}


OWN_LOSSES = [
    (OwnComputeLoss, "OwnComputeLoss.compute_loss"),
    (OwnInnerLoss, "OwnInnerLoss._compute_loss"),
    (ForgetsColumns, "ForgetsColumns._generate_and_score_completions"),
]


@pytest.mark.parametrize("options", [{}, {"num_iterations": 2}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize(("trainer_class", "name"), OWN_LOSSES)
def test_a_loss_that_goes_past_replay_switches_it_off(tmp_path, warnings_of, trainer_class, name, options):
    trainer = make_trainer(tmp_path, trainer_class, max_steps=4, **options)
    trainer.train()
    told = [message for message in warnings_of if "switched off" in message]
    assert len(told) == 1
    assert name in told[0]
    assert num_replayed(trainer) == trainer.experience_buffer.num_completions == 0


@pytest.mark.parametrize(("trainer_class", "name"), OWN_LOSSES)
def test_a_loss_that_goes_past_stored_completions_is_an_error(tmp_path, untouched, trainer_class, name):
    trainer = make_trainer(
        tmp_path, trainer_class, max_steps=4, retire_solved=False, experience_buffer=untouched.experience_buffer
    )
    before = parameters_of(trainer)
    with pytest.raises(RuntimeError, match=rf"{name}.*importance weight.*replay_fraction=0"):
        trainer.train()
    for name, parameter in parameters_of(trainer).items():
        assert torch.equal(parameter, before[name]), "no optimizer step was made"


class Dynamic(ExGRPOTrainer):
    """Dynamic sampling: generates three times, and trains one of the three."""

    def __init__(self, *args, model, **kwargs):
        self.pristine, self.policies, self.best = copy.deepcopy(model), {}, []
        super().__init__(model, *args, **kwargs)

    def choose(self, attempts):
        return max(range(3), key=lambda i: (attempts[i]["advantages"] != 0).sum().item())

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        self.policies[self.state.global_step] = policy
        attempts = [super(Dynamic, self)._generate_and_score_completions(inputs) for _ in range(3)]
        best = self.choose(attempts)
        self.best.append(best)
        return attempts[best]


DYNAMIC = {
    "plain": {},
    "several_updates": {"num_iterations": 2},
    "accumulation": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "unaligned": {"per_device_train_batch_size": 8, "steps_per_generation": 2},
}


@pytest.mark.parametrize("setting", DYNAMIC)
def test_dynamic_sampling_stores_what_was_trained(tmp_path, setting):
    trainer = make_trainer(tmp_path, Dynamic, max_steps=8, retire_solved=False, **DYNAMIC[setting])
    trainer.train()
    assert num_replayed(trainer) > 0
    assert len(set(trainer.best)) > 1
    buffer = trainer.experience_buffer
    assert buffer.num_completions > 5
    for question, _, experience in buffer.items():
        prompt = trainer.processing_class(question.example["prompt"])["input_ids"]
        with torch.no_grad():
            logps, _ = completion_logps(
                trainer.policies[experience.policy_version], prompt, experience.token_ids.copy()
            )
        torch.testing.assert_close(
            torch.tensor(experience.behavior_per_token_logps).double(), logps, atol=2e-5, rtol=1e-5
        )


class MixedRows(ExGRPOTrainer):
    """Generates twice, and takes the first half of the rows from one attempt and the rest from the other."""

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        first, second = (super(MixedRows, self)._generate_and_score_completions(inputs) for _ in range(2))
        width = min(first["completion_ids"].size(1), second["completion_ids"].size(1))
        half = len(inputs) // 2
        mixed = {}
        for name, mine in first.items():
            if not isinstance(mine, torch.Tensor) or mine.ndim == 0:
                mixed[name] = mine
                continue
            other = second[name]
            if mine.ndim == 2 and name not in ("prompt_ids", "prompt_mask", "rollout_rows"):
                mine, other = mine[:, :width], other[:, :width]
            mixed[name] = torch.cat([mine[:half], other[half:]])
        return mixed


def test_rows_of_several_attempts_may_be_mixed(tmp_path):
    # Completions of one length, or rows would be cut.
    trainer = make_trainer(
        tmp_path, MixedRows, max_steps=6, learning_rate=0.0, retire_solved=False,
        generation_kwargs={"min_new_tokens": 8},
    )  # fmt: skip
    trainer.train()
    ratios = [
        line["replay/importance_ratio_max"] for line in lines_of(trainer) if "replay/importance_ratio_max" in line
    ]
    assert len(ratios) >= 3
    assert max(ratios) == pytest.approx(1, abs=1e-4), "the policy is frozen: log-probabilities are those of the row"


class Filtered(ExGRPOTrainer):
    """Rows that teach nothing make room for others of the batch, in another order."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        teaching = (output["advantages"] != 0).nonzero()[:, 0].tolist() or [0]
        order = [teaching[i % len(teaching)] for i in range(len(inputs))][::-1]
        return {
            name: value[order] if isinstance(value, torch.Tensor) and value.ndim else value
            for name, value in output.items()
        }


def test_rows_may_be_filtered_and_repeated(tmp_path):
    trainer = make_trainer(tmp_path, Filtered, max_steps=8, learning_rate=0.0, retire_solved=False)
    trainer.train()
    ratios = [
        line["replay/importance_ratio_max"] for line in lines_of(trainer) if "replay/importance_ratio_max" in line
    ]
    assert len(ratios) >= 3
    assert max(ratios) == pytest.approx(1, abs=1e-4)


class Penalized(ExGRPOTrainer):
    """Takes something from the rewards of the parent."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list) - 0.25


class OwnRewards(ExGRPOTrainer):
    """Computes rewards without asking the parent."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        return torch.tensor(first_letter_reward(completions)).unsqueeze(1) - 0.25


@pytest.mark.parametrize("trainer_class", [Penalized, OwnRewards])
def test_rewards_are_those_that_trl_takes(tmp_path, trainer_class):
    trainer = make_trainer(tmp_path, trainer_class, max_steps=5, success_threshold=0.75, retire_solved=False)
    trainer.train()
    assert num_replayed(trainer) > 0
    assert {experience.reward for _, _, experience in trainer.experience_buffer.items()} == {0.75}


class TooFewRewards(ExGRPOTrainer):
    def _calculate_rewards(self, *args):
        return super()._calculate_rewards(*args)[:-1]


class AppendsAToken(ExGRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return [[*ids, 7] for ids in completion_ids], *rest


class GeneratesByItself(ExGRPOTrainer):
    def _generate(self, prompts, *args, **kwargs):
        result = list(super()._generate(prompts, *args, **kwargs))
        result[1] = [[3 + (row + 5 * self.state.global_step) % 20, 1] for row in range(len(prompts))]
        return tuple(result)


class GeneratesInParts(ExGRPOTrainer):
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        parts = [
            super(GeneratesInParts, self)._generate_single_turn(part, images, multimodal_fields, *args, **kwargs)
            for part in (prompt_ids[:5], prompt_ids[5:])
        ]
        return parts[0][0] + parts[1][0], *parts[0][1:]


class ForgetsAColumn(ExGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        return {name: value for name, value in output.items() if name != "is_replayed"}


class ChangesTokens(ExGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        output["completion_ids"] = output["completion_ids"].clone()
        output["completion_ids"][:, 0] = 9
        return output


BROKEN = [
    (TooFewRewards, r"TooFewRewards\._calculate_rewards.*\(15, 1\), of 16 rows"),
    (AppendsAToken, r"AppendsAToken\._generate_single_turn.*row \d+ holds other tokens than the stored completion"),
    (GeneratesByItself, r"GeneratesByItself\._generate has.*row \d+ holds other tokens than the stored completion"),
    (GeneratesInParts, r"GeneratesInParts\._generate_single_turn asks for 5 completions of a batch of 16"),
    (ForgetsAColumn, r"ForgetsAColumn\._generate_and_score_completions.*'is_replayed'\] are missing"),
    (ChangesTokens, r"ChangesTokens\._generate_and_score_completions.*row \d+ holds other tokens in the loss"),
]


@pytest.mark.parametrize(("trainer_class", "message"), BROKEN)
def test_an_override_that_breaks_the_contract_is_named(tmp_path, trainer_class, message):
    trainer = make_trainer(tmp_path, trainer_class, max_steps=6, retire_solved=False)
    with pytest.raises(RuntimeError, match=message) as error:
        trainer.train()
    assert "replay_fraction=0" in str(error.value)


def train_dynamically(mode, mode_options, output_dir):
    """Every process keeps an attempt of its own choice."""
    from same_rollouts import SameRollouts

    class DynamicRanks(SameRollouts):
        def _generate_and_score_completions(self, inputs):
            attempts = [super(DynamicRanks, self)._generate_and_score_completions(inputs) for _ in range(2)]
            return attempts[self.accelerator.process_index]

    trainer = same_rollouts_trainer(
        output_dir, mode, trainer_class=DynamicRanks, per_device_train_batch_size=8, learning_rate=0.0, **mode_options
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        buffer = trainer.experience_buffer
        assert buffer.num_completions > 5
        assert num_replayed(trainer) > 0
        ratios = [line.get("replay/importance_ratio_max", 1.0) for line in lines_of(trainer)]
        assert max(ratios) < 1.001
        assert min(line.get("replay/importance_ratio_q10", 1.0) for line in lines_of(trainer)) > 0.999


def test_processes_may_keep_different_attempts(tmp_path):
    run_ranks(train_dynamically, str(tmp_path / "out"), folder=tmp_path)


def break_on_one_process(mode, mode_options, output_dir):
    from same_rollouts import SameRollouts

    class BreaksOnOne(SameRollouts):
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            completion_ids, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            if self.accelerator.process_index == 1 and self.replayer.batch.stored:
                completion_ids = [[*ids, 7] for ids in completion_ids]
            return completion_ids, *rest

    same_rollouts_trainer(
        output_dir, mode, trainer_class=BreaksOnOne, per_device_train_batch_size=8, **mode_options
    ).train()


def test_an_override_that_breaks_one_process_ends_all(tmp_path):
    ranks = Ranks(break_on_one_process, (str(tmp_path / "out"),), tmp_path)
    assert ranks.wait() == [1, 1]
    logs = [(tmp_path / f"rank{rank}.log").read_text() for rank in range(2)]
    assert "BreaksOnOne._generate_single_turn" in logs[1]
    assert "Process 1 failed while checking what was generated" in logs[0]
