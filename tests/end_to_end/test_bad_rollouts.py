"""Tools, environments and rollout functions that fail or give what cannot be: nothing is half stored."""

import copy
from pathlib import Path

import numpy as np
import pytest
import transformers
from agents import (
    Rollouts,
    Rooms,
    Watched,
    agent_options,
    environment_reward,
    room_dataset,
    score_reward,
    tool_dataset,
)
from packaging.version import Version
from ranks import Ranks
from test_agents import AgentTrainer, own
from test_agents_of_many import BrokenRoom
from test_checkpoints import contents
from test_failures_of_many import assert_all_end
from tiny import make_trainer
from vision import vision_dataset, vision_model

from exgrpo_trl import ExperienceBuffer, ExperienceBufferError

needs_tools = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.2"), reason="TRL takes tools and environments from 5.2 on"
)


def options_of_tools(**changes):
    return agent_options(tools=Watched().tools, success_threshold=0.5, max_steps=4) | changes


@needs_tools
def test_a_tool_that_raises_is_part_of_a_rollout(tmp_path):
    trainer = make_trainer(tmp_path, AgentTrainer, **options_of_tools(retire_solved=False, max_steps=8))
    trainer.train()
    failed = [
        message["content"]
        for _, _, experience in trainer.experience_buffer.items()
        for message in experience.details.messages
        if message["role"] == "tool" and message["name"] == "fail"
    ]
    assert failed
    assert set(failed) == {"{'error': 'no a'}"}
    for batch in trainer.batches:
        for row, experience in batch["stored"].items():
            assert batch["completions"][row] == experience.details.messages


class Wrong(Rollouts):
    """
    A rollout function that is right at first, and wrong in its third batch.

    Args:
        spoil: Changes what is returned.
    """

    def __init__(self, spoil):
        super().__init__()
        self.spoil = spoil

    def __call__(self, prompts, trainer):
        output = super().__call__(prompts, trainer)
        if len(self.asked) == 3:
            self.spoil(output)
        return output


def lose_a_row(output):
    for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask"):
        output[name].pop()


def shorten_a_mask(output):
    output["env_mask"][2].pop()


def lengthen_a_mask(output):
    output["env_mask"][2].append(1)


def spoil_a_mask(output):
    output["env_mask"][2][0] = 2


def leave_a_hole(output):
    output["env_mask"][2][0] = None


def lose_completions(output):
    del output["completion_ids"]


def lose_logprobs(output):
    output["logprobs"][2].pop()


def fail(output):
    raise OSError("the sandbox is gone")


WRONG = {
    "few_rows": (lose_a_row, ValueError, r"returned \d+ prompt_ids for \d+ prompts.*rollout_fresh_only=False"),
    "short_mask": (shorten_a_mask, ValueError, r"returned \d+ numbers of env_mask for the \d+ tokens of row"),
    "long_mask": (lengthen_a_mask, ValueError, r"returned \d+ numbers of env_mask for the \d+ tokens of row"),
    "other_numbers": (spoil_a_mask, ValueError, r"an env_mask in row \d+ that is not 0 or 1"),
    "none_in_mask": (leave_a_hole, ValueError, r"an env_mask in row \d+ that is not 0 or 1"),
    "short_logprobs": (lose_logprobs, ValueError, r"returned \d+ numbers of logprobs for the \d+ tokens of row"),
    "no_completions": (lose_completions, ValueError, r"returned no completion_ids, only \['env_mask', 'logprobs'"),
    "raises": (fail, OSError, "the sandbox is gone"),
}


class BeforeEachBatch(AgentTrainer):
    """Keeps what was in the buffer when each batch had been planned."""

    def _generate_and_score_completions(self, inputs):
        plan = self.replayer.next_batch

        def next_batch(*args):
            batch = plan(*args)
            self.before = copy.deepcopy(contents(self.experience_buffer))
            return batch

        self.replayer.next_batch = next_batch
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            self.replayer.next_batch = plan


def assert_nothing_is_half_stored(trainer):
    assert trainer.before["completions"], "nothing was stored before"
    assert contents(trainer.experience_buffer) == trainer.before
    assert not trainer.replayer.batch.experiences
    trainer.replayer.collect()
    assert contents(trainer.experience_buffer) == trainer.before


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_rollout_function_stores_nothing(tmp_path, case):
    spoil, kind, message = WRONG[case]
    function = Wrong(spoil)
    options = {"rollout_func": function, "reward_funcs": score_reward, "success_threshold": 0.5, "max_steps": 6}
    trainer = make_trainer(tmp_path, BeforeEachBatch, **agent_options(**options))
    with pytest.raises(kind, match=message):
        trainer.train()
    assert len(function.asked) == 3
    assert_nothing_is_half_stored(trainer)
    # The run can go on with the same buffer.
    function.spoil = lambda output: None
    trainer.train()
    assert trainer.experience_buffer.num_completions


@needs_tools
def test_a_reset_that_fails_stores_nothing(tmp_path):
    options = {
        "environment_factory": Rooms(BrokenRoom, observe="row"),
        "train_dataset": room_dataset(),
        "reward_funcs": environment_reward,
        "success_threshold": 1.0,
        "shuffle_dataset": False,
    }
    rows = room_dataset().select([*range(4, 16), *range(4)])  # the broken room is in the last batch of the epoch
    trainer = make_trainer(tmp_path, BeforeEachBatch, **agent_options(**options | {"train_dataset": rows}))
    message = r"BrokenRoom.reset failed in row \d+ of the generation batch.*OSError: no room\. Let reset take the col"
    with pytest.raises(RuntimeError, match=message):
        trainer.train()
    assert_nothing_is_half_stored(trainer)


class BrokenOnOne(Rollouts):
    """Fails on the second process, in its third batch."""

    def __call__(self, prompts, trainer):
        output = super().__call__(prompts, trainer)
        if len(self.asked) == 3 and trainer.accelerator.process_index == 1:
            raise OSError("the sandbox is gone")
        return output


def train_broken(mode, mode_options, folder):
    options = {"rollout_func": BrokenOnOne(), "reward_funcs": score_reward, "success_threshold": 0.5, "max_steps": 6}
    options |= {"per_device_train_batch_size": 8} | mode_options
    trainer = make_trainer(Path(folder) / "out", **agent_options(**options))
    try:
        trainer.train()
    finally:
        assert not trainer.replayer.batch.experiences
        if trainer.accelerator.is_main_process:
            versions = {experience.policy_version for _, _, experience in trainer.experience_buffer.items()}
            assert versions == {0, 1}, versions


def test_a_rollout_function_that_fails_on_one_process_stops_all(tmp_path):
    assert_all_end(Ranks(train_broken, (str(tmp_path),), tmp_path), "the sandbox is gone")


@pytest.fixture
def collected(tmp_path):
    """A buffer with rollouts of several turns, and its trainer."""
    trainer = make_trainer(tmp_path / "collected", AgentTrainer, **options_of_tools(max_steps=6))
    trainer.train()
    assert any(experience.details.run_bytes for _, _, experience in trainer.experience_buffer.items())
    return trainer


@needs_tools
def test_rollouts_of_several_turns_need_a_trainer_that_knows_turns(tmp_path, collected):
    buffer = collected.experience_buffer
    with pytest.raises(ExperienceBufferError, match=r"neither tools, nor environments, nor a rollout_func"):
        make_trainer(tmp_path, **agent_options(success_threshold=0.5, experience_buffer=buffer))
    trainer = make_trainer(tmp_path, **agent_options(success_threshold=0.5))
    with pytest.raises(ExperienceBufferError, match=r"assigned to the trainer.*neither tools"):
        trainer.experience_buffer = buffer
    assert trainer.experience_buffer is not buffer


@needs_tools
def test_stored_rewards_have_to_be_there(tmp_path, collected):
    buffer = collected.experience_buffer
    assert all(experience.details.rewards is None for _, _, experience in buffer.items())
    changes = {"experience_buffer": buffer, "replay_rewards": "stored"}
    with pytest.raises(ExperienceBufferError, match=r"without a reward of last_letter_reward.*'recomputed'"):
        make_trainer(tmp_path, **options_of_tools(**changes))
    make_trainer(tmp_path, **options_of_tools(**changes | {"replay_rewards": "recomputed"}))


@pytest.mark.parametrize("has_started", [False, True])
def test_another_image_processor_is_refused(tmp_path, has_started):
    model, processor = vision_model("grid")
    options = {"train_dataset": vision_dataset(16), "processing_class": processor, "max_steps": 3, "model": model}
    trainer = make_trainer(tmp_path / "first", **options)
    trainer.train()
    assert trainer.experience_buffer.num_completions
    trainer.experience_buffer.save(tmp_path / "saved")
    _, other = vision_model("grid")
    other.image_processor.image_mean = [0.4] * 3
    options["processing_class"] = other
    if not has_started:
        with pytest.raises(ExperienceBufferError, match="other settings of the image processor"):
            make_trainer(tmp_path / "second", experience_buffer=tmp_path / "saved", **options)
        return
    second = make_trainer(tmp_path / "second", **options)
    with pytest.raises(ExperienceBufferError, match="other settings of the image processor"):
        second.experience_buffer = tmp_path / "saved"
    assert not second.experience_buffer.num_completions


@needs_tools
def test_exported_rollouts_replay_in_a_new_trainer(tmp_path, collected):
    imported = ExperienceBuffer.from_dataset(collected.experience_buffer.to_dataset(), group_size=4)
    known = {e.token_ids.tobytes(): e for _, _, e in collected.experience_buffer.items()}
    watched = Watched()
    options = options_of_tools(tools=watched.tools, experience_buffer=imported, train_dataset=tool_dataset())
    trainer = make_trainer(tmp_path, AgentTrainer, **options)
    trainer.train()
    first = trainer.batches[0]
    assert len(first["stored"]) == 2
    for row, experience in first["stored"].items():
        original = known[experience.token_ids.tobytes()]
        assert own(first, row) == original.token_ids.tolist()
        assert first["completions"][row] == original.details.messages
        np.testing.assert_array_equal(experience.is_model, original.is_model)
        np.testing.assert_array_equal(experience.behavior_per_token_logps, original.behavior_per_token_logps)
    assert any(not experience.is_model.all() for batch in trainer.batches for experience in batch["stored"].values())
