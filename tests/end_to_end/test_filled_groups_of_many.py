"""Groups that failed as a whole are filled by several processes as by one."""

from pathlib import Path

import pytest
import torch
from ranks import assert_engaged, run_ranks, whole_parameters
from same_rollouts import SameRollouts, results, same_rollouts_trainer, train_and_save
from test_filled_groups import Filling, completion_in, prompt_in
from test_many_processes import assert_agree, assert_same_metrics, run_single
from test_vision import options_of as vision_options
from tiny import first_letter_reward, make_trainer, tiny_tokenizer

from exgrpo_trl.images import pixel_digest
from exgrpo_trl.records import prompt_hash

NINE = tiny_tokenizer().convert_tokens_to_ids("9")


class Drying(SameRollouts):
    """From the fourth step on, every other question fails as a whole: its completions begin with a digit."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_filled = []

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.model.training and self.state.global_step >= 4:
            for row, prompt in enumerate(prompt_ids):
                if row not in self.replayer.batch.stored and sum(prompt) % 2:
                    completion_ids[row] = [NINE, *completion_ids[row][1:]]
        return completion_ids, *rest

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        batch = self.replayer.batch
        own = range(batch.first_row, batch.first_row + batch.num_rows)
        self.num_filled.append(sum(row in own for row in batch.replaced))
        return output


def train(mode, mode_options, folder, options):
    """Train, and write down how many rows of this process were filled in each batch."""
    seen = []

    class Seen(Drying):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(self)

    train_and_save(mode, mode_options, folder, options | {"trainer_class": Seen})
    rank = seen[0].accelerator.process_index
    torch.save(seen[0].num_filled, Path(folder) / f"filled{rank}.pt")


FILLS = {"fill_failed_groups": True, "trainer_class": Drying, "max_steps": 24}
SHAPES = {
    "alone": ({"replay_fraction": 0.0}, {"per_device_train_batch_size": 8}, "ddp", 2),
    "planned": ({"replay_fraction": 0.25}, {"per_device_train_batch_size": 8}, "ddp", 2),
    "group_split_in_the_middle": (
        {"per_device_train_batch_size": 12, "replay_fraction": 0.0},
        {"per_device_train_batch_size": 6},
        "ddp",
        2,
    ),
    "ranks_within_a_group": (
        {"per_device_train_batch_size": 8, "replay_fraction": 0.0},
        {"per_device_train_batch_size": 2},
        "ddp",
        4,
    ),
    "fsdp2": ({"replay_fraction": 0.25}, {"per_device_train_batch_size": 8}, "fsdp2", 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_a_single_process(tmp_path, shape):
    options, parallel, mode, world = SHAPES[shape]
    single, start = run_single(tmp_path / "single", FILLS | options)
    alike = {name: value for name, value in (FILLS | options | parallel).items() if name != "trainer_class"}
    run_ranks(train, str(tmp_path), alike, folder=tmp_path, mode=mode, world=world)
    ranks = results(tmp_path, world)
    assert_agree(single, ranks, start)
    assert_same_metrics(single, ranks[0])
    filled = [torch.load(tmp_path / f"filled{rank}.pt") for rank in range(world)]
    lines = [line["replay/groups_filled"] for line in single["history"] if "loss" in line]
    assert [sum(of_ranks) for of_ranks in zip(*filled, strict=True)] == lines
    assert sum(lines) > 6
    assert any(0 in of_ranks and any(of_ranks) for of_ranks in zip(*filled, strict=True)), "fills on some of them only"


class CountingModel(torch.nn.Module):
    """A reward model that all processes have to run together, as a sharded one."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, input_ids, attention_mask, **kwargs):
        self.sizes.append(len(input_ids))
        torch.distributed.barrier()
        return type("Output", (), {"logits": attention_mask.sum(1, keepdim=True).float()})


def train_with_a_model(mode, mode_options, folder, options):
    trainer = same_rollouts_trainer(Path(folder) / "out", mode, **mode_options | options | FILLS)
    model = CountingModel()
    trainer.reward_funcs.append(model)
    trainer.reward_func_names.append("model")
    trainer.reward_processing_classes.append(tiny_tokenizer())
    trainer.reward_weights = torch.ones(2)
    trainer.args.success_reward = trainer.replayer.success_rule.success_reward = "first_letter_reward"
    trainer.train()
    torch.save((model.sizes, trainer.num_filled), Path(folder) / f"sizes{trainer.accelerator.process_index}.pt")


def test_a_sharded_reward_model_runs_on_all(tmp_path):
    options = {"per_device_train_batch_size": 8, "replay_fraction": 0.0}
    run_ranks(train_with_a_model, str(tmp_path), options, folder=tmp_path)
    (mine, filled), (others, of_other) = (torch.load(tmp_path / f"sizes{rank}.pt") for rank in range(2))
    for sizes, own in ((mine, filled), (others, of_other)):
        both = zip(filled, of_other, strict=True)
        again = [max(number, 1) for number, of_all in zip(own, both, strict=True) if any(of_all)]
        assert [size for size in sizes if size < 8] == again
    assert len(mine) == len(others) > len(filled)


def train_with_a_failure(mode, mode_options, folder, options):
    trainer = same_rollouts_trainer(Path(folder) / "out", mode, **mode_options | options | FILLS)

    def fails(completions, **kwargs):
        if len(completions) < 8:
            raise ValueError("asked twice")
        return first_letter_reward(completions)

    trainer.reward_funcs[0] = fails
    try:
        trainer.train()
    except Exception as error:
        torch.save(f"{type(error).__name__}: {error}", Path(folder) / f"error{trainer.accelerator.process_index}.pt")


def test_where_one_process_fails_all_stop(tmp_path):
    options = {"per_device_train_batch_size": 8, "replay_fraction": 0.0}
    run_ranks(train_with_a_failure, str(tmp_path), options, folder=tmp_path)
    errors = [torch.load(tmp_path / f"error{rank}.pt") for rank in range(2)]
    assert all("asked twice" in error for error in errors)
    assert any("failed while computing rewards" in error for error in errors)


class DryingVision(Filling):
    """From the fourth step on, every question fails as a whole."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        if self.state.global_step >= 4:
            nine = self._text_tokenizer.convert_tokens_to_ids("9")
            completion_ids = [[nine, *ids[1:]] for ids in completion_ids]
        return completion_ids, *rest


def train_vision(mode, mode_options, folder):
    options = vision_options("grid_of_sizes", per_device_train_batch_size=8, max_steps=8)
    options["train_dataset"] = options["train_dataset"].select(range(8))
    options |= {"fill_failed_groups": True, "replay_fraction": 0.0, "retire_solved": False}
    trainer = make_trainer(Path(folder) / "out", DryingVision, **mode_options | options)
    trainer.train()
    assert_engaged(trainer, mode, 2)
    first_row, num_filled = trainer.replayer.batch.first_row, 0
    for batch in trainer.batches:
        for row in set(batch.filled) & set(range(first_row, first_row + 8)):
            num_filled += 1
            position = row - first_row
            assert batch.rewards[row, 0] == 1
            assert batch.output["is_replayed"][position]
            own = completion_in(batch.output, position)
            assert own.tolist() == batch.stored[position].token_ids.tolist()
            shown = [pixel_digest(batch.inputs[position]["image"])]
            prompt = prompt_in(batch.output, position)
            assert batch.stored[position].prompt_hash == prompt_hash(prompt, shown)
    num_scored = sum(line.get("replay/candidates_scored", 0) for line in trainer.state.log_history)
    result = num_filled, num_scored, whole_parameters(trainer)
    torch.save(result, Path(folder) / f"vision{trainer.accelerator.process_index}.pt")


def test_images_of_candidates_are_sent_to_those_that_score_them(tmp_path):
    run_ranks(train_vision, str(tmp_path), folder=tmp_path)
    (filled, num_scored, mine), (others_filled, _, others) = (
        torch.load(tmp_path / f"vision{rank}.pt") for rank in range(2)
    )
    assert filled > 2
    assert others_filled > 2
    assert num_scored > 4
    for name, parameter in mine.items():
        assert torch.equal(parameter, others[name]), name
