"""Replay of rollouts of several turns: tools, environments and rollout functions, through `trainer.train()`."""

import copy
from collections import Counter

import agents
import numpy as np
import pytest
import torch
import trl
from agents import (
    Rollouts,
    Room,
    Rooms,
    Shop,
    Watched,
    agent_options,
    environment_reward,
    last_letter_reward,
    room_dataset,
    score_reward,
    skip_unless_able,
    slow_environment_reward,
)
from packaging.version import Version
from test_checkpoints import contents
from tiny import completion_logps, make_trainer, parameters_of
from trl import GRPOTrainer
from watched import WatchedTrainer

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer

TRL = Version(trl.__version__)
HAS_POOL = Version("1.8") <= TRL


def calls_tools():
    watched = Watched()
    return {"tools": watched.tools}, watched


def acts(observe, kind=Room, prompt="own", reward=environment_reward):
    def options():
        rooms = Rooms(kind, observe=observe)
        rewards = {"reward_funcs": reward, "success_threshold": 1.0}
        return rewards | {"environment_factory": rooms, "train_dataset": room_dataset(prompt=prompt)}, rooms

    return options


def acts_in_several():
    rooms, shops = Rooms(Room, observe="row"), Rooms(Shop)
    options = {
        "environment_factory": {"room": rooms, "shop": shops},
        "train_dataset": room_dataset(environments=("room", "shop")),
        "reward_funcs": environment_reward,
        "success_threshold": 1.0,
    }
    return options, (rooms, shops)


def calls_function(whole_groups):
    def options():
        function = Rollouts(whole_groups=whole_groups)
        rewards = {"reward_funcs": score_reward, "success_threshold": 0.5}
        return rewards | {"rollout_func": function, "rollout_fresh_only": not whole_groups}, function

    return options


KINDS = {
    "tools": calls_tools,
    "environment": acts(None),
    "environment_observes": acts("row"),
    "environment_observes_anew": acts("rollout"),
    "environment_placeholder": acts("row", prompt="same"),
    "function": calls_function(whole_groups=True),
    "function_fresh_only": calls_function(whole_groups=False),
}
if HAS_POOL:
    KINDS |= {
        "environments": acts_in_several,
        # Below, asynchronous functions get no environments.
        "environment_async_reward": acts("row", reward=slow_environment_reward),
        "environment_rewards": acts("row", kind=agents.RewardingRoom, reward=None),
        "environment_rewards_async": acts("row", kind=agents.RewardingShop, reward=None),
    }
if Version("1.9") <= TRL:
    KINDS["environment_without_prompts"] = acts("row", prompt="none")


class AgentTrainer(ExGRPOTrainer):
    """Keeps what every batch was: rows, stored positions, completions as rewarded, output, policy."""

    def __init__(self, *args, model, **kwargs):
        self.pristine = copy.deepcopy(model)
        super().__init__(model, *args, **kwargs)
        self.batches = []
        self.rewarded = None

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.rewarded = {
            "inputs": [dict(row) for row in inputs],
            "prompts": copy.deepcopy(prompts),
            "completions": copy.deepcopy(completions),
            "rewards": rewards.clone(),
        }
        return rewards

    def _generate_and_score_completions(self, inputs):
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            kept = {name: value.clone() for name, value in output.items() if isinstance(value, torch.Tensor)}
            stored = dict(self.replayer.batch.stored)
            self.batches.append({"policy": policy, "stored": stored, "output": kept} | self.rewarded)
        return output


def options_of(kind, **changes):
    skip_unless_able(kind)
    options, watched = KINDS[kind]()
    return agent_options(success_threshold=0.5, max_steps=6) | options | changes, watched


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def train(folder, kind, trainer_class=AgentTrainer, **changes):
    options, watched = options_of(kind, **changes)
    trainer = make_trainer(folder, trainer_class, **options)
    trainer.train()
    assert sum(len(batch["stored"]) for batch in trainer.batches) > 4, "hardly anything was replayed"
    return trainer, watched


def own(batch, row, part="completion"):
    output = batch["output"]
    return output[f"{part}_ids"][row][output[f"{part}_mask"][row].bool()].tolist()


def mask_of(batch, row):
    return batch["output"]["tool_mask"][row][batch["output"]["completion_mask"][row].bool()].tolist()


def calls_in(completion, row):
    """Calls that a rollout made of tools that are there, with the arguments that they take."""
    missing = {"gone", "buy"} if row.get("environment") == "room" else {"gone"}
    calls = [call["function"] for message in completion for call in message.get("tool_calls") or ()]
    return [call["name"] for call in calls if call["name"] not in missing and "wrong" not in call["arguments"]]


def test_nothing_is_done_for_a_stored_row(tmp_path, kind):
    trainer, watched = train(tmp_path, kind)
    fresh = [
        (batch, row)
        for batch in trainer.batches
        for row in range(len(batch["output"]["completion_ids"]))
        if row not in batch["stored"]
    ]
    if kind.startswith("function"):
        num_asked = sum(map(len, watched.asked))
        assert num_asked == (len(fresh) if kind == "function_fresh_only" else 16 * len(trainer.batches))
        # Where all rows were asked for, nothing was saved.
        assert bool(trainer.replayer.metrics.tokens_saved) == (kind == "function_fresh_only")
        return
    stored = [experience for batch in trainer.batches for experience in batch["stored"].values()]
    assert trainer.replayer.metrics.tokens_saved == sum(int(experience.is_model.sum()) for experience in stored)
    if kind == "tools":
        done = Counter(name for name, _ in watched.calls)
    else:
        logs = [entry for rooms in (watched if isinstance(watched, tuple) else (watched,)) for entry in rooms.log]
        done = Counter(event for _, event, _ in logs)
        assert done.pop("reset") == len(fresh)
        assert done.pop("get_reward", len(fresh)) == len(fresh)
    expected = Counter(
        name for batch, row in fresh for name in calls_in(batch["completions"][row], batch["inputs"][row])
    )
    assert done == {name: expected[name] for name in expected if name in done}
    assert done["look"] > 3


def test_a_rollout_comes_back_whole(tmp_path, kind):
    trainer, _ = train(tmp_path, kind, max_steps=8)
    assert_whole(trainer, kind)


@pytest.mark.parametrize("way", [{"stored_per_group": 2}, {"replay_unit": "group"}], ids=["several", "groups"])
@pytest.mark.parametrize(
    "kind", sorted({"tools", "environment_observes_anew", "environments", "function"} & KINDS.keys())
)
def test_so_do_several_and_whole_groups(tmp_path, kind, way):
    trainer, _ = train(tmp_path, kind, max_steps=10, retire_solved=False, **way)
    assert_whole(trainer, kind)
    sizes = [sum(row // 4 == group for row in batch["stored"]) for batch in trainer.batches for group in range(4)]
    assert set(sizes) <= ({0, 4} if "replay_unit" in way else {0, 1, 2})
    assert max(sizes) >= 2


def assert_whole(trainer, kind):
    """Replayed rollouts are what they were where they were fresh: tokens, mask, messages, prompt, rewards, columns."""
    num_foreign = num_moved = 0
    for number, batch in enumerate(trainer.batches):
        for row, experience in batch["stored"].items():
            tokens = experience.token_ids.tolist()
            assert own(batch, row) == tokens
            assert mask_of(batch, row) == experience.is_model.astype(int).tolist()
            # Where it was fresh.
            source, its_row = next(
                (earlier, other)
                for earlier in trainer.batches[:number]
                for other in range(16)
                if other not in earlier["stored"] and own(earlier, other) == tokens
                if own(earlier, other, "prompt") == own(batch, row, "prompt")
                and mask_of(earlier, other) == mask_of(batch, row)
            )
            assert batch["completions"][row] == source["completions"][its_row]
            assert batch["prompts"][row] == source["prompts"][its_row]
            own_columns = {"prompt", "score"} if kind.startswith("function") else {"prompt"}
            for column in set(batch["inputs"][row]) - own_columns:
                assert batch["inputs"][row][column] == source["inputs"][its_row][column]
            if kind.startswith("function"):
                assert batch["inputs"][row]["score"] == source["inputs"][its_row]["score"]
                assert batch["inputs"][row]["style"] == "plain"
            if kind.startswith("environment"):
                torch.testing.assert_close(batch["rewards"][row], source["rewards"][its_row], equal_nan=True)
            num_foreign += len(tokens) - int(experience.is_model.sum())
            num_moved += row != its_row
    assert num_foreign > 20, "hardly a tool spoke in a replayed rollout"
    assert num_moved


def test_stored_log_probabilities_are_those_of_the_generating_policy(tmp_path, kind):
    trainer, _ = train(tmp_path, kind, retire_solved=False)
    num_checked = num_foreign = 0
    for _, _, experience in trainer.experience_buffer.items():
        batch = trainer.batches[experience.policy_version]
        row = next(
            row for row in range(16) if own(batch, row) == experience.token_ids.tolist() and row not in batch["stored"]
        )
        with torch.no_grad():
            logps, entropies = completion_logps(
                batch["policy"], own(batch, row, "prompt"), experience.token_ids.copy()
            )
        is_model = experience.is_model
        np.testing.assert_allclose(experience.behavior_per_token_logps[is_model], logps.numpy()[is_model], atol=2e-5)
        assert not experience.behavior_per_token_logps[~is_model].any()
        assert experience.entropy == pytest.approx(entropies.numpy()[is_model].mean(), abs=2e-5)
        num_checked += 1
        num_foreign += int((~is_model).sum())
    assert num_checked > 8
    assert num_foreign > 20


def test_the_observation_is_part_of_the_prompt(tmp_path):
    """A control: without what the environment had shown, stored log-probabilities are off."""
    trainer, _ = train(tmp_path, "environment_observes", retire_solved=False)
    errors = []
    for question, _, experience in trainer.experience_buffer.items():
        assert experience.details.prompt[-1]["content"].endswith(f" door {question.example['seed']}")
        batch = trainer.batches[experience.policy_version]
        blind = trainer.processing_class.apply_chat_template(
            question.example["prompt"], tools=trainer.tools, add_generation_prompt=True, return_dict=False
        )
        with torch.no_grad():
            logps, _ = completion_logps(batch["policy"], blind, experience.token_ids.copy())
        is_model = experience.is_model
        errors.append(np.abs(experience.behavior_per_token_logps - logps.numpy())[is_model].max())
    assert len(errors) > 8
    assert min(errors) > 1e-3


def test_a_dropped_mask_is_noticed(tmp_path):
    """A control: TRL's own replay lost the mask, and trained on what tools had said (TRL #6439)."""

    class Forgetful(ExGRPOTrainer):
        def _tool_call_loop(self, *args, **kwargs):
            masks, *rest = super()._tool_call_loop(*args, **kwargs)
            return [[1] * len(mask) for mask in masks], *rest

    options, _ = options_of("tools")
    trainer = make_trainer(tmp_path, Forgetful, **options)
    with pytest.raises(RuntimeError, match=r"Forgetful\._tool_call_loop.*trains on other tokens than those"):
        trainer.train()


class ScoredTrainer(AgentTrainer):
    """Keeps what was scored, with the policy of that moment."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scored = []

    def _score(self, prompted):
        scores = super()._score(prompted)
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        self.scored.extend((policy, *pair) for pair in zip(prompted, scores, strict=True))
        return scores


@pytest.mark.parametrize("kind", ["tools", "environment_observes_anew", "function"])
def test_candidates_are_scored_by_what_the_model_wrote(tmp_path, kind):
    trainer, _ = train(tmp_path, kind, ScoredTrainer, completion_selection="lowest_entropy", max_drift=100.0)
    stored = {e.token_bytes: e for b in trainer.batches for e in b["stored"].values()}
    stored |= {experience.token_bytes: experience for _, _, experience in trainer.experience_buffer.items()}
    num_checked = num_foreign = 0
    for policy, of_one, (entropy, negative_log_likelihood, drift) in trainer.scored:
        experience = stored.get(of_one.completion.tobytes())
        if experience is None:  # retired since
            continue
        batch = trainer.batches[experience.policy_version]
        prompts = [own(batch, row, "prompt") for row in range(16) if own(batch, row) == of_one.completion.tolist()]
        assert list(of_one.prompt) in prompts
        with torch.no_grad():
            logps, entropies = completion_logps(policy, of_one.prompt, of_one.completion.copy())
        is_model = torch.from_numpy(experience.is_model.copy())
        assert entropy == pytest.approx(entropies[is_model].mean().item(), abs=2e-5)
        assert negative_log_likelihood == pytest.approx(-logps[is_model].mean().item(), abs=2e-5)
        ratios = (logps.numpy() - experience.behavior_per_token_logps)[experience.is_model]
        assert drift == pytest.approx(abs(ratios).mean(), abs=2e-5)
        num_checked += 1
        num_foreign += int((~is_model).sum())
    assert num_checked > 5
    assert num_foreign > 20


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "num_iterations": {"num_iterations": 2, "loss_type": "grpo"},
    "kl": {"beta": 0.1, "loss_type": "grpo"},
    "kl_num_iterations": {"beta": 0.1, "num_iterations": 2},
    "sequence_level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "sapo": {"loss_type": "sapo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "balanced": {"replay_weighting": "balanced"},
    "clipped": {"replay_weighting": "clipped", "loss_type": "grpo"},
    "truncated": {"replay_weighting": "truncated"},
    "none": {"replay_weighting": "none"},
}
CASES = [("tools", setting) for setting in SETTINGS] + [
    (kind, setting)
    for kind in ("environment_observes_anew", "function", "function_fresh_only")
    for setting in ("plain", "num_iterations", "sequence_level")
]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_loss_and_gradient(tmp_path, kind, setting):
    options, _ = options_of(kind, learning_rate=2e-3, **SETTINGS[setting])
    trainer = make_trainer(tmp_path, WatchedTrainer, **options)
    trainer.train()
    assert len(trainer.log_ratios) > 4, "hardly anything was replayed"
    assert max(ratio.abs().max() for ratio in trainer.log_ratios) > 0.02, "the policy never moved"
    assert trainer.num_foreign > 100, "hardly a tool spoke"


def test_resume_is_exact(tmp_path, kind):
    def make(name):
        options, _ = options_of(kind, save_strategy="steps", save_steps=3, completion_selection="lowest_entropy")
        return make_trainer(tmp_path / name, **options)

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    if kind != "environment_observes_anew":  # what these show depends on how often they were reset
        expected, actual = parameters_of(whole), parameters_of(resumed)
        for name in expected:
            assert torch.equal(expected[name], actual[name]), name
        assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)
    details = [e.details for _, _, e in resumed.experience_buffer.items()]
    others = [e.details for _, _, e in whole.experience_buffer.items()]
    if kind != "environment_observes_anew":
        for mine, its in zip(details, others, strict=True):
            names = ("run_bytes", "messages_text", "prompt_text", "prompt_bytes", "fields_text", "rewards_text")
            assert [getattr(mine, name) for name in names] == [getattr(its, name) for name in names]
    assert any(details)


def test_replay_off_is_grpo(tmp_path, kind):
    def parameters(name, trainer_class, **changes):
        options, watched = options_of(kind, max_steps=3, **changes)
        if trainer_class is GRPOTrainer:
            for field in ("success_threshold", "rollout_fresh_only"):
                options.pop(field, None)
        trainer = make_trainer(tmp_path / name, trainer_class, **options)
        trainer.train()
        return parameters_of(trainer), watched

    theirs, _ = parameters("grpo", GRPOTrainer)
    ours, _ = parameters("exgrpo", None, replay_fraction=0.0)
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name


@pytest.mark.parametrize("mode", ["stored", "recomputed"])
def test_rewards_of_stored_rows(tmp_path, mode):
    asked = []

    def reward(completions, uid, log_extra, **kwargs):
        asked.append(len(completions))
        assert len(uid) == len(completions)
        log_extra("number", list(range(len(completions))))
        return last_letter_reward(completions)

    async def later(prompts, **kwargs):
        asked.append(len(prompts))
        return [0.5] * len(prompts)

    options, _ = options_of("tools", reward_funcs=[reward, later], replay_rewards=mode)
    trainer = make_trainer(tmp_path, AgentTrainer, **options)
    trainer.train()
    num_fresh = [16 - len(batch["stored"]) for batch in trainer.batches]
    assert min(num_fresh) < 16
    expected = num_fresh if mode == "stored" else [16] * len(num_fresh)
    assert asked == [number for number in expected for _ in range(2)]
    for batch in trainer.batches:
        for row, experience in batch["stored"].items():
            if mode == "stored":
                assert batch["rewards"][row].tolist() == pytest.approx(list(experience.details.rewards.values()))


def test_evaluation_reads_and_writes_nothing(tmp_path):
    options, rooms = options_of("environment_observes")
    trainer = make_trainer(
        tmp_path, AgentTrainer, eval_dataset=room_dataset(4), per_device_eval_batch_size=16, **options
    )
    trainer.train()
    before, num_resets = contents(trainer.experience_buffer), len(rooms.events("reset"))
    trainer.evaluate()
    assert contents(trainer.experience_buffer) == before
    assert len(rooms.events("reset")) == num_resets + 16
    assert all(type(environment) is Room for environment in trainer.environments)


@pytest.mark.parametrize("agent", [{"tools": Watched().tools}, {"environment_factory": Rooms()}])
@pytest.mark.parametrize(
    ("num_processes", "options", "way_out"),
    [
        pytest.param(
            1,
            {"vllm_mode": "server"},
            r"1\.14\.1 or later, or set vllm_mode='colocate'",
            marks=pytest.mark.skipif(Version("1.14.1") <= TRL, reason="this TRL can do it"),
        ),
        (2, {"vllm_mode": "server"}, "vllm_mode='colocate'"),
        (
            2,
            {"vllm_mode": "colocate", "vllm_tensor_parallel_size": 2},
            "Use one process, or vllm_mode='colocate' with vllm_tensor_parallel_size=1",
        ),
    ],
)
def test_what_vllm_cannot_do_is_refused(tmp_path, monkeypatch, agent, num_processes, options, way_out):
    monkeypatch.setattr(ExGRPOConfig, "world_size", num_processes)
    with pytest.raises(NotImplementedError, match=f"{next(iter(agent))}.*{way_out}"):
        make_trainer(tmp_path, use_vllm=True, **options, **agent)
