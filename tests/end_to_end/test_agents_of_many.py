"""Rollouts of several turns and images on real processes: DDP, FSDP2 and ZeRO-3."""

from pathlib import Path

import pytest
import torch
from agents import Room, Rooms, skip_unless_able
from ranks import MODES, assert_engaged, run_ranks, whole_parameters
from same_rollouts import buffer_contents
from test_agents import KINDS, AgentTrainer, calls_in, options_of, own
from test_vision import VisionTrainer, same_image
from test_vision import options_of as vision_options
from tiny import make_trainer


class Recorded(AgentTrainer):
    """Without copies of the policy, which sharded parameters do not allow."""

    def _generate_and_score_completions(self, inputs):
        output = super(AgentTrainer, self)._generate_and_score_completions(inputs)
        kept = {name: value.clone() for name, value in output.items() if isinstance(value, torch.Tensor)}
        self.batches.append({"stored": dict(self.replayer.batch.stored), "output": kept} | self.rewarded)
        return output


def train_agent(mode, mode_options, folder, kind, options):
    options, watched = options_of(kind, per_device_train_batch_size=8, **mode_options | options)
    trainer = make_trainer(Path(folder) / "out", Recorded, **options)
    trainer.train()
    assert_engaged(trainer, mode, 2)
    turns = []
    for batch in trainer.batches:
        for row, experience in batch["stored"].items():
            assert own(batch, row) == experience.token_ids.tolist()
            mask = batch["output"]["tool_mask"][row][: experience.num_tokens]
            assert mask.tolist() == experience.is_model.astype(int).tolist()
        turns.append(
            max(
                sum(message["role"] == "assistant" for message in completion)
                for row, completion in enumerate(batch["completions"])
                if row not in batch["stored"]
            )
        )
    fresh = [(batch, row) for batch in trainer.batches for row in range(8) if row not in batch["stored"]]
    if kind == "tools":
        asked = [name for batch, row in fresh for name in calls_in(batch["completions"][row], {})]
        expected = sum(name in ("look", "find", "fail") for name in asked)
        assert len(watched.calls) == expected > 3
    if kind.startswith("environment"):
        assert len(watched.events("reset")) == len(fresh)
    result = {
        "num_stored": [len(batch["stored"]) for batch in trainer.batches],
        "turns": turns,
        "parameters": whole_parameters(trainer),
        "buffer": buffer_contents(trainer.experience_buffer) if trainer.accelerator.is_main_process else None,
    }
    torch.save(result, Path(folder) / f"result{trainer.accelerator.process_index}.pt")


@pytest.mark.parametrize("kind", [kind for kind in ("tools", "environment_observes", "function") if kind in KINDS])
@pytest.mark.parametrize("mode", MODES)
def test_rollouts_of_several_turns(tmp_path, mode, kind):
    skip_unless_able(kind)
    run_ranks(train_agent, str(tmp_path), kind, {}, folder=tmp_path, mode=mode)
    ranks = [torch.load(tmp_path / f"result{rank}.pt", weights_only=False) for rank in range(2)]
    assert sum(map(sum, (rank["num_stored"] for rank in ranks))) > 4
    for name, parameter in ranks[0]["parameters"].items():
        assert torch.equal(parameter, ranks[1]["parameters"][name]), name
    if kind != "function":
        assert ranks[0]["turns"] != ranks[1]["turns"], "the processes never took different numbers of turns"


class BrokenRoom(Room):
    """Fails in one row, of the second process."""

    def reset(self, **row):
        if row["seed"] == 3:
            raise OSError("no room")
        return super().reset(**row)


def fail_to_reset(mode, mode_options, folder):
    options, _ = options_of(
        "environment_observes", per_device_train_batch_size=8, shuffle_dataset=False, **mode_options
    )
    trainer = make_trainer(Path(folder) / "out", **options | {"environment_factory": Rooms(BrokenRoom, observe="row")})
    with pytest.raises(RuntimeError, match=r"reset failed in row 12 of the generation batch.*OSError: no room"):
        trainer.train()
    assert not trainer.replayer.batch.experiences
    if trainer.accelerator.is_main_process:
        assert not trainer.experience_buffer.num_completions


def test_an_environment_that_fails_stops_all(tmp_path):
    skip_unless_able("environment")
    run_ranks(fail_to_reset, str(tmp_path), folder=tmp_path)


def train_vision(mode, mode_options, folder):
    changes = {"per_device_train_batch_size": 8, "max_steps": 5, "optim": "sgd"}
    trainer = make_trainer(
        Path(folder) / "out", VisionTrainer, **vision_options("same_text", **mode_options | changes)
    )
    sent = []
    scatter = trainer.replayer.processes.scatter

    def watched(parts):
        mine = scatter(parts)
        sent.append(sorted(mine))
        return mine

    trainer.replayer.processes.scatter = watched
    trainer.train()
    assert_engaged(trainer, mode, 2)
    by_answer = {row["answer"]: row for row in trainer.train_dataset}
    rank = trainer.accelerator.process_index
    num_stored = 0
    for batch in trainer.batches:
        for row in range(8):
            replay = batch["replays"].get(8 * rank + row)
            if replay is None:
                continue
            assert own(batch, row) == replay.experience.token_ids.tolist()
            assert same_image(batch["rows"][row]["image"], by_answer[batch["rows"][row]["answer"]]["image"])
            num_stored += 1
    torch.save(
        {"num_stored": num_stored, "sent": sent, "parameters": whole_parameters(trainer)}, f"{folder}/{rank}.pt"
    )


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero3"])
def test_images(tmp_path, mode):
    run_ranks(train_vision, str(tmp_path), folder=tmp_path, mode=mode)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    assert all(rank["num_stored"] > 1 for rank in ranks)
    for name, parameter in ranks[0]["parameters"].items():
        assert torch.equal(parameter, ranks[1]["parameters"][name]), name
    # Each process is sent its own images alone.
    assert any(ranks[0]["sent"])
    for mine, others in zip(ranks[0]["sent"], ranks[1]["sent"], strict=True):
        assert mine != others or len(mine) <= 1
