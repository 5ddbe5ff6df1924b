"""Tools and environments with a real vLLM, server and engine."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

import copy

import torch
import trl
from agents import Room, Rooms, Watched, agent_options, environment_reward, room_dataset
from engines import counted_engine, use_engines_on_cpu
from packaging.version import Version
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
from transformers import AutoModelForCausalLM
from watched import WatchedTrainer

from exgrpo_trl.rollouts.vllm import ENGINES

SERVES_TURNS = Version("1.14.1") <= Version(trl.__version__)
MODES = [
    pytest.param(
        "server",
        marks=[
            pytest.mark.xdist_group("server"),
            pytest.mark.skipif(not SERVES_TURNS, reason=f"trl {trl.__version__} mixes up the turns of a server"),
        ],
    ),
    pytest.param("colocate", marks=pytest.mark.xdist_group("colocate")),
]


class TurnRecorder(Recorder):
    """Records the messages of each row as well, and how often vLLM had been asked when a batch began."""

    asked = ()

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.messages = copy.deepcopy(completions)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _generate_and_score_completions(self, inputs):
        num_asked = len(self.asked)
        output = super()._generate_and_score_completions(inputs)
        self.batches[-1] |= {"num_asked": num_asked, "stored": dict(self.replayer.batch.stored)}
        for row, messages in zip(self.batches[-1]["rows"], self.messages, strict=True):
            row["messages"] = messages
        return output


@pytest.fixture
def make(request, tool_model_folder, tmp_path):
    """Makes trainers of several turns in a mode of vLLM."""

    def make_in(mode, kind, trainer_class=TurnRecorder, **options):
        if mode == "colocate":
            use_engines_on_cpu()
        else:
            options["vllm_server_base_url"] = request.getfixturevalue("tool_server").url
        if kind == "tools":
            options["tools"] = Watched().tools
        else:
            options |= {
                "environment_factory": Rooms(Room, observe="rollout"),
                "train_dataset": room_dataset(),
                "reward_funcs": environment_reward,
            }
        options = {"vllm_mode": mode, "vllm_max_model_length": 1024, "success_threshold": 0.5} | options
        options = agent_options(model=AutoModelForCausalLM.from_pretrained(tool_model_folder), **options)
        return make_recorder(tmp_path, tool_model_folder, trainer_class=trainer_class, **options)

    return make_in


def later_prompts(row):
    """What a row was, with its prompt, each time that the model went on after a tool had spoken."""
    is_model = row["is_model"].tolist()
    starts = [i for i in range(1, len(is_model)) if is_model[i] and not is_model[i - 1]]
    return [row["prompt"] + row["completion"][:start] for start in starts]


@pytest.mark.parametrize("kind", ["tools", "environment"])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_generated_in_vain(make, mode, kind):
    trainer = make(mode, kind)
    with counted_engine(getattr(trainer.vllm_generation, ENGINES[mode])) as asked:
        trainer.asked = asked
        trainer.train()
    batches = trainer.batches
    assert len(replayed_rows(batches)) >= 2 * (len(batches) - 2)

    ends = [batch["num_asked"] for batch in batches[1:]] + [len(asked)]
    num_later = 0
    for batch, end in zip(batches, ends, strict=True):
        fresh = fresh_rows([batch])
        later = batch["num_asked"] + len(fresh)
        assert asked[batch["num_asked"] : later] == [row["prompt"] for row in fresh]
        # Every later turn goes on with what a fresh row was by then; what exceeds the length is cut from the row.
        left = list(asked[later:end])
        for row in fresh:
            for ids in later_prompts(row):
                left.remove(ids)
        whole = [row["prompt"] + row["completion"] for row in fresh]
        assert all(any(ids[: len(of_row)] == of_row for of_row in whole) for ids in left)
        num_later += end - later
    assert num_later > 20

    # Also: each row answers its own prompt, which environments have made different within a group.
    assert_fresh_rows_belong(batches)
    assert_replayed_rows_are_left_alone(batches)
    assert_stored_by_policy(trainer, batches)
    for line in trainer.state.log_history:
        assert line.get("sampling/sampling_logp_difference/max", 0) < SAME_POLICY

    num_foreign = 0
    for number, batch in enumerate(batches):
        for row, experience in batch["stored"].items():
            shown = batch["rows"][row]
            assert shown["completion"] == experience.token_ids.tolist()
            assert shown["is_model"].tolist() == experience.is_model.tolist()
            sources = [source for source in fresh_rows(batches[:number]) if source["prompt"] == shown["prompt"]
                       and source["completion"] == shown["completion"]]  # fmt: skip
            assert any(source["messages"] == shown["messages"] for source in sources)
            num_foreign += int((~experience.is_model).sum())
    assert num_foreign > 20, "hardly a tool spoke in a replayed rollout"
    if kind == "environment":
        groups = [batch["rows"][first : first + 4] for batch in batches for first in range(0, 16, 4)]
        assert all(len({tuple(row["prompt"]) for row in group}) == 4 for group in groups)


@pytest.mark.parametrize("mode", MODES)
def test_loss_and_gradient(make, mode):
    """What tools said is not trained, by two independent computations."""
    trainer = make(mode, "tools", trainer_class=WatchedTrainer, learning_rate=2e-3)
    trainer.train()
    assert trainer.num_mixed
    assert max(ratio.abs().max() for ratio in trainer.log_ratios) > 0.02, "the policy never moved"
    assert trainer.num_foreign > 50, "hardly a tool spoke"
    assert torch.cat(trainer.sampler_weights).sub(1).abs().max() < 1e-3
