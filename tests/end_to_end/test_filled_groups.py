"""Groups that failed as a whole get a stored success in the place of a failure: `fill_failed_groups`."""

import copy
import functools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import trl
from agents import Watched, agent_options, call_text, skip_unless_able, tool_tokenizer
from datasets import Dataset
from packaging.version import Version
from peft import get_peft_model
from test_checkpoints import contents
from test_vision import options_of as vision_options
from tiny import (
    completion_logps,
    first_letter_reward,
    lora_config,
    make_trainer,
    parameters_of,
    tiny_dataset,
    tiny_model,
    tiny_tokenizer,
)
from trl import GRPOTrainer
from vision import random_images
from watched import WatchedTrainer

from exgrpo_trl import ExGRPOTrainer, Experience, ExperienceBuffer, Question, RolloutDetails, question_id_of
from exgrpo_trl.images import pixel_digest
from exgrpo_trl.records import prompt_hash

K = 4
TRL = Version(trl.__version__)


def text_of(completion):
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return text.replace(" ", "")  # the tokenizer puts one between characters


def question_in(prompt):
    parts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    texts = [part if isinstance(part, str) else [piece.get("text", "") for piece in part] for part in parts]
    return str(texts)


class DryingUp:
    """The first letter decides for some steps; then only what was a success of its question before is one."""

    __name__ = "drying_up"

    def __init__(self, after=2):
        self.after, self.seen, self.calls = after, set(), []

    def __call__(self, prompts, completions, trainer_state, **columns):
        step = trainer_state.global_step
        texts = [(question_in(prompt), text_of(c)) for prompt, c in zip(prompts, completions, strict=True)]
        self.calls.append((step, texts))
        is_success = [worth == 1.0 for worth in first_letter_reward([text for _, text in texts])]
        if step >= self.after:
            return [float(text in self.seen) for text in texts]
        self.seen.update(text for text, succeeds in zip(texts, is_success, strict=True) if succeeds)
        return [float(succeeds) for succeeds in is_success]

    def rows_asked(self):
        """Number of rows of each call, by step."""
        by_step = {}
        for step, texts in self.calls:
            by_step.setdefault(step, []).append(len(texts))
        return by_step


class Filling(ExGRPOTrainer):
    """Keeps of every generation batch: policy, output, rewards, which rows were planned and which were filled."""

    def __init__(self, *args, model, **kwargs):
        self.pristine = copy.deepcopy(model)
        super().__init__(model, *args, **kwargs)
        self.batches = []

    def _generate_and_score_completions(self, inputs):
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        batch = self.replayer.batch
        self.batches.append(
            SimpleNamespace(
                policy=policy,
                output={name: v.clone() for name, v in output.items() if isinstance(v, torch.Tensor)},
                rewards=batch.rewards_per_func.copy(),
                is_correct=batch.is_correct.copy(),
                filled=sorted(batch.replaced),
                replaced=dict(batch.replaced),
                planned=[replay.row for replay in batch.planned],
                replays={replay.row: replay for replay in batch.replays},
                stored=dict(batch.stored),
                inputs=inputs,
                questions={group: q.question_id for group, q in batch.questions.items()},
            )
        )
        return output


def filling_trainer(tmp_path, trainer_class=Filling, **options):
    options = {
        "fill_failed_groups": True,
        "replay_fraction": 0.0,
        "train_dataset": tiny_dataset(8),
        "reward_funcs": DryingUp(),
        "max_steps": 6,
        "retire_solved": False,
    } | options
    return make_trainer(tmp_path, trainer_class, **options)


def steps_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def num_filled(trainer):
    return sum(len(batch.filled) for batch in trainer.batches)


def completion_in(output, row):
    return output["completion_ids"][row][output["completion_mask"][row].bool()]


def prompt_in(output, row):
    return output["prompt_ids"][row][output["prompt_mask"][row].bool()]


# What is filled


def stored(text, question_id=None, policy_version=0, logp=-1.0, **kwargs):
    """A stored success of these tokens, the end token last."""
    ids = [*tiny_tokenizer()(text)["input_ids"], 1]
    return Experience.create(ids, [logp] * len(ids), policy_version=policy_version, reward=1.0, **kwargs)


def buffer_of(dataset, successes):
    """A buffer with these successes by row of the dataset."""
    buffer = ExperienceBuffer(retire_solved=False)
    for row, experiences in successes.items():
        question = Question(question_id_of(dataset[row]["prompt"]), dict(dataset[row]))
        buffer.collect(question, experiences, num_correct=1, group_size=K)
    return buffer


class Judge:
    """A stored text is a success, any other a failure; questions may be exceptions. Keeps what it is asked."""

    __name__ = "judge"

    def __init__(self, texts, exceptions=None):
        self.texts, self.exceptions, self.calls = texts, exceptions or {}, []

    def __call__(self, completions, uid, **columns):
        self.calls.append({"completions": completions, "uid": uid} | columns)
        seen, rewards = {}, []
        for completion, name in zip(completions, uid, strict=True):
            number = seen[name] = seen.get(name, -1) + 1
            otherwise = self.exceptions.get(name, [0.0] * K)[number % K]
            rewards.append(1.0 if text_of(completion) in self.texts else otherwise)
        return rewards


def group_of(trainer, batch, row):
    ids = {question_id_of(prompt): row for row, prompt in enumerate(trainer.train_dataset["prompt"])}
    (group,) = [group for group, question_id in batch.questions.items() if ids[question_id] == row]
    return group


def test_what_is_filled_and_what_is_not(tmp_path):
    dataset = tiny_dataset(4)
    successes = {row: [stored(f"ok{row}")] for row in (0, 2, 3)}
    judge = Judge(["ok0", "ok2", "ok3"], {"q2": [0.0, 1.0, 0.0, 0.0], "q3": [0.0, None, 0.0, 0.0]})
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, successes),
        reward_funcs=judge,
        learning_rate=0.0,
        max_steps=3,
    )
    trainer.train()
    for batch in trainer.batches:
        # q0 alone: nothing is stored of q1, q2 has a success, and of a completion of q3 nobody knows.
        (row,) = batch.filled
        assert row // K == group_of(trainer, batch, 0)
        assert batch.replaced == {row: 0.0}
        assert completion_in(batch.output, row).tolist() == successes[0][0].token_ids.tolist()
        assert batch.output["is_replayed"].nonzero()[:, 0].tolist() == [row]
        group = batch.output["advantages"].reshape(K, K)[row // K]
        std = np.std([1, 0, 0, 0], ddof=1) + 1e-4
        assert group.tolist() == pytest.approx([(0.75 if i == row % K else -0.25) / std for i in range(K)], rel=1e-4)
        assert not batch.output["advantages"].reshape(K, K)[group_of(trainer, batch, 1)].any()
    first = steps_of(trainer)[0]
    assert first["replay/groups_filled"] == 1
    assert first["replay/fraction"] == first["replay/tokens_saved"] == 0
    assert first["fresh/pass_rate"] == pytest.approx(1 / 16)
    assert first["fresh/reward"] == pytest.approx(1 / 15)  # nobody knows the reward of one
    assert first["fresh/frac_groups_without_signal"] == 0.75
    assert first["frac_reward_zero_std"] == 0.5
    assert first["replay/reward"] == 1


def test_which_failure_is_replaced_is_drawn_by_the_seed(tmp_path):
    dataset = tiny_dataset(4)

    def rows(name, seed):
        trainer = filling_trainer(
            tmp_path / name,
            train_dataset=dataset,
            experience_buffer=buffer_of(dataset, {row: [stored("ok")] for row in range(4)}),
            reward_funcs=Judge(["ok"]),
            learning_rate=0.0,
            seed=seed,
        )
        trainer.train()
        assert all(len(batch.filled) == 4 for batch in trainer.batches)
        return [[row % K for row in batch.filled] for batch in trainer.batches]

    first, again, other = rows("first", 7), rows("again", 7), rows("other", 8)
    assert first == again != other
    assert {slot for slots in first for slot in slots} == set(range(K))


def test_nothing_is_filled_before_the_start_in_evaluation_or_without_the_option(tmp_path):
    dataset = tiny_dataset(4)
    for name, options in {
        "before": {"replay_start_pass_rate": 0.99},
        "without": {"fill_failed_groups": False, "replay_fraction": 0.25},
    }.items():
        judge = Judge(["ok"])
        trainer = filling_trainer(
            tmp_path / name,
            train_dataset=dataset,
            eval_dataset=dataset,
            per_device_eval_batch_size=16,
            experience_buffer=buffer_of(dataset, {row: [stored("ok")] for row in range(4)}),
            reward_funcs=judge,
            max_steps=2,
            **options,
        )
        trainer.train()
        assert len(judge.calls) == 2
        assert num_filled(trainer) == 0
        assert ("replay/groups_filled" in steps_of(trainer)[0]) == (name == "before")
        trainer.evaluate()
        assert len(judge.calls) == 3


def test_a_failure_in_the_place_of_a_failure_leaves_the_buffer(tmp_path):
    dataset = tiny_dataset(4)
    buffer = buffer_of(dataset, {0: [stored("no")], 1: [stored("ok")]})
    trainer = filling_trainer(
        tmp_path, train_dataset=dataset, experience_buffer=buffer, reward_funcs=Judge(["ok"]), max_steps=2
    )
    trainer.train()
    assert [len(batch.filled) for batch in trainer.batches] == [2, 1]
    assert buffer.num_completions == 1
    assert steps_of(trainer)[1]["replay/evicted_incorrect"] == 1
    assert buffer.reuse(next(iter(buffer.items()))[2]).num_replays == 2


def test_limits_of_replay_hold(tmp_path, monkeypatch):
    dataset = tiny_dataset(4)
    runs = {
        "max_replays": ({"max_replays": 2}, [4, 4, 0]),
        "max_staleness": ({"max_staleness": 2}, [4, 4, 0]),
        "cooldown": ({"replay_cooldown": 5}, [4, 4, 4]),  # of planned replays
        "stopped": ({}, [0, 0, 0]),
    }
    for name, (options, expected) in runs.items():
        trainer = filling_trainer(
            tmp_path / name,
            train_dataset=dataset,
            experience_buffer=buffer_of(dataset, {row: [stored("ok")] for row in range(4)}),
            reward_funcs=Judge(["ok"]),
            max_steps=3,
            **options,
        )
        if name == "stopped":
            stop = functools.partial(trainer.replayer.stop, "a test says so")
            monkeypatch.setattr(trainer.replayer, "begin_training", stop)
        trainer.train()
        assert [len(batch.filled) for batch in trainer.batches] == expected, name


def test_completions_of_other_prompts_do_not_fill(tmp_path):
    dataset = tiny_dataset(4)
    hashes = [prompt_hash(tiny_tokenizer()(dataset[row]["prompt"])["input_ids"]) for row in range(4)]
    shown = [{"role": "tool", "content": [{"type": "image", "image": random_images(1)[0]}]}]
    successes = {
        0: [stored("ok", prompt_hash=hashes[0])],
        1: [
            stored("ok", prompt_hash=hashes[0]),  # another question's
            stored("okay", details=RolloutDetails.create(messages=shown)),  # a tool returned an image
        ],
        2: [stored("ok", details=RolloutDetails.create(prompt="what an environment said"))],
        3: [stored("ok", details=RolloutDetails.create(prompt_ids=[3, 4, 5]))],
    }
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, successes),
        reward_funcs=Judge(["ok", "okay"]),
        max_steps=2,
    )
    trainer.train()
    for batch in trainer.batches:
        assert [row // K for row in batch.filled] == [group_of(trainer, batch, 0)]


def test_a_question_in_two_groups_is_filled_in_both(tmp_path):
    dataset = tiny_dataset(4)
    columns = dataset.to_dict()
    twice = Dataset.from_dict({name: values[:2] * 2 for name, values in columns.items()})
    success = stored("ok")
    trainer = filling_trainer(
        tmp_path,
        train_dataset=twice,
        experience_buffer=buffer_of(dataset, {0: [success]}),
        reward_funcs=Judge(["ok"]),
        max_steps=2,
    )
    trainer.train()
    assert [len(batch.filled) for batch in trainer.batches] == [2, 2]
    assert trainer.experience_buffer.reuse(success).num_replays == 4


class Several(Filling):
    """Generates twice, and trains one of the two."""

    def _generate_and_score_completions(self, inputs):
        attempts = [super(Several, self)._generate_and_score_completions(inputs) for _ in range(2)]
        return attempts[self.state.global_step % 2]


def test_fills_of_a_batch_that_is_not_trained_are_forgotten(tmp_path):
    dataset = tiny_dataset(4)
    success = stored("ok")
    trainer = filling_trainer(
        tmp_path,
        Several,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, {0: [success]}),
        reward_funcs=Judge(["ok"]),
        max_steps=3,
    )
    trainer.train()
    assert num_filled(trainer) == 6
    assert trainer.experience_buffer.reuse(success).num_replays == 3
    assert [line["replay/groups_filled"] for line in steps_of(trainer)] == [1, 1, 1]


@pytest.mark.parametrize("scores", ["current", "last_known"])
def test_the_selector_chooses_the_success(tmp_path, scores):
    trainer = filling_trainer(tmp_path, candidate_scores=scores, max_drift=50.0)
    scored = []
    score = trainer.replayer.score
    trainer.replayer.score = lambda prompted: scored.extend(prompted) or score(prompted)
    trainer.train()
    assert num_filled(trainer) >= 8
    assert bool(scored) == (scores == "current")
    assert sum(line["replay/candidates_scored"] for line in steps_of(trainer)) == len(scored)
    if scores == "last_known":
        return
    tokenizer, num_choices = trainer.processing_class, 0
    kept = {
        question_id: trainer.experience_buffer.completions(question_id)
        for ids in trainer.experience_buffer.buckets().values()
        for question_id in ids
    }
    for batch in trainer.batches:
        for row in batch.filled:
            replay = batch.replays[row]
            candidates = kept[replay.question.question_id]
            prompt = tokenizer(replay.question.example["prompt"])["input_ids"]
            with torch.no_grad():
                entropies = [
                    completion_logps(batch.policy, prompt, e.token_ids.copy())[1].mean().item() for e in candidates
                ]
            assert candidates[int(np.argmin(entropies))] is replay.experience
            if len(candidates) > 1:
                num_choices += 1
                assert replay.entropy == pytest.approx(min(entropies), abs=1e-4)
    assert num_choices > 3


def test_a_success_that_the_policy_left_behind_is_evicted_instead(tmp_path):
    dataset = tiny_dataset(4)
    far = [stored("ok", logp=-60.0), stored("okay", logp=-60.0)]
    buffer = buffer_of(dataset, {0: far, 1: [stored("ok")]})
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer,
        reward_funcs=Judge(["ok", "okay"]),
        max_drift=20.0,
        max_steps=2,
    )
    trainer.train()
    assert [len(batch.filled) for batch in trainer.batches] == [1, 1]
    assert buffer.num_completions == 1
    assert steps_of(trainer)[1]["replay/evicted_drifted"] == 2


def test_continuous_rewards_are_filled_where_they_are_all_the_same(tmp_path):
    dataset = tiny_dataset(4)
    spread = {"q1": [0.1, 0.2, 0.3, 0.2]}
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, {row: [stored("ok")] for row in (0, 1)}),
        reward_funcs=Judge(["ok"], spread),
        difficulty="reward_std",
        max_steps=2,
    )
    trainer.train()
    for batch in trainer.batches:
        assert [row // K for row in batch.filled] == [group_of(trainer, batch, 0)]


def test_together_with_planned_replays(tmp_path):
    trainer = filling_trainer(tmp_path, replay_fraction=0.25, max_steps=10)
    trainer.train()
    both = [batch for batch in trainer.batches if batch.planned and batch.filled]
    assert len(both) > 3
    saved = 0
    for line, batch in zip(steps_of(trainer), trainer.batches, strict=True):
        assert not {row // K for row in batch.filled} & {row // K for row in batch.planned}
        assert line["replay/groups_filled"] == len(batch.filled)
        assert line["replay/fraction"] == len(batch.planned) / 4
        is_fresh = np.ones(16, dtype=bool)
        is_fresh[batch.planned] = False
        generated = batch.rewards[:, 0].copy()
        generated[batch.filled] = 0
        assert line["fresh/pass_rate"] == pytest.approx(generated[is_fresh].mean())
        assert line["fresh/reward"] == pytest.approx(generated[is_fresh].mean())
        groups = [g[f] for g, f in zip(generated.reshape(4, 4), is_fresh.reshape(4, 4), strict=True)]
        assert line["fresh/frac_groups_without_signal"] == np.mean([len(set(group)) == 1 for group in groups])
        if batch.planned:
            of_planned = [generated.reshape(4, 4)[row // K][np.arange(4) != row % K] for row in batch.planned]
            assert line["replay/group_pass_rate"] == pytest.approx(np.concatenate(of_planned).mean())
        saved += sum(batch.replays[row].experience.num_tokens for row in batch.planned)
        assert line["replay/tokens_saved"] == saved


# What is asked of reward functions


def test_functions_are_asked_about_filled_rows_alone(tmp_path):
    asked = {"sync": [], "later": []}
    judge = Judge(["ok"])

    def sync(prompts, completions, completion_ids, uid, answer, log_extra, log_metric, trainer_state, **kwargs):
        assert len(prompts) == len(completions) == len(completion_ids) == len(uid) == len(answer)
        asked["sync"].append([text_of(completion) for completion in completions])
        log_extra("text", [text_of(completion) for completion in completions])
        log_extra("uid", list(uid))
        if len(completions) < 16:
            log_extra("late", list(uid))
        log_metric("rows", float(len(completions)))
        return judge(completions, uid)

    async def later(completions, uid, **kwargs):
        asked["later"].append([text_of(completion) for completion in completions])
        return [1.0] * len(completions)

    dataset = tiny_dataset(4)
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, {row: [stored("ok")] for row in range(2)}),
        reward_funcs=[sync, later],
        max_steps=2,
        log_completions=True,
    )
    trainer.train()
    for name in asked:
        assert [len(texts) for texts in asked[name]] == [16, 2] * 2
        assert asked[name][1] == asked[name][3] == ["ok", "ok"]
    for number, batch in enumerate(trainer.batches):
        table = pd.read_parquet(tmp_path / "completions" / f"completions_{number + 1:05d}.parquet")
        generated = asked["sync"][2 * number]
        expected = ["ok" if row in batch.filled else generated[row] for row in range(16)]
        assert table["text"].tolist() == [text_of(c) for c in table["completion"]] == expected
        assert table["replayed"].tolist() == [row in batch.filled for row in range(16)]
        assert table["sync"].tolist() == [float(row in batch.filled) for row in range(16)]
        assert table["later"].tolist() == [1.0] * 16
        assert "late" not in table
        prompts = [dataset[int(uid[1:])]["prompt"] for uid in table["uid"]]
        assert [text_of(prompt) for prompt in prompts] == [text_of(prompt) for prompt in table["prompt"]]
    assert [line["rows"] for line in steps_of(trainer)] == [16, 16]


def test_where_nothing_is_filled_nothing_is_asked_again(tmp_path):
    judge = Judge([])
    trainer = filling_trainer(tmp_path, reward_funcs=judge, max_steps=3)
    trainer.train()
    assert len(judge.calls) == 3


class TinyRewardModel(torch.nn.Module):
    """Counts the letter r; keeps how many rows it was asked about."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(_name_or_path="org/tiny-model", pad_token_id=0)
        self.sizes = []

    def forward(self, input_ids, attention_mask, **kwargs):
        self.sizes.append(len(input_ids))
        return SimpleNamespace(logits=((input_ids == 20) * attention_mask).sum(1, keepdim=True).float())


def test_a_reward_model_is_asked_about_filled_rows_alone(tmp_path):
    dataset = tiny_dataset(4)
    model = TinyRewardModel()
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, {row: [stored("ok" + "r" * (2 + row))] for row in range(2)}),
        reward_funcs=[Judge(["okrr", "okrrr"]), model],
        success_reward="judge",
        max_steps=2,
    )
    trainer.reward_processing_classes[1] = tiny_tokenizer()
    trainer.train()
    assert model.sizes == [16, 2, 16, 2]
    for batch in trainer.batches:
        assert len(batch.filled) == 2
        for row in range(16):
            assert batch.rewards[row, 1] == (completion_in(batch.output, row) == 20).sum()
        assert (batch.rewards[batch.filled, 1] >= 2).all()


def test_stored_rewards_are_kept(tmp_path):
    judge = DryingUp()
    trainer = filling_trainer(tmp_path, reward_funcs=judge, replay_rewards="stored")
    trainer.train()
    assert num_filled(trainer) > 4
    assert all(rows == [16] for rows in judge.rows_asked().values())
    for batch in trainer.batches:
        assert (batch.rewards[batch.filled] == 1).all()


class Penalized(Filling):
    """What functions gave, less a tenth a token."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        lengths = torch.tensor([len(ids) for ids in completion_ids_list])
        return rewards - 0.01 * lengths[:, None]


def test_an_override_of_the_rewards_is_seen_once_for_each_completion(tmp_path):
    judge = DryingUp()
    trainer = filling_trainer(tmp_path, Penalized, reward_funcs=judge, success_threshold=0.5)
    trainer.train()
    assert num_filled(trainer) > 4
    for step, batch in enumerate(trainer.batches):
        texts = [text for number, asked in judge.calls if number == step for text in asked]
        assert len(texts) == 16 + len(batch.filled)
        for row in range(16):
            raw = float((batch.rewards[row, 0] + 0.01 * len(completion_in(batch.output, row))).round(6))
            assert raw == (1.0 if batch.is_correct.flat[row] else 0.0)


# What is trained


CASES = {
    "dapo": {},
    "grpo": {"loss_type": "grpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "vespo": {"loss_type": "vespo"},
    "clipped": {"loss_type": "grpo", "replay_weighting": "clipped"},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "num_iterations": {"loss_type": "grpo", "num_iterations": 2, "max_steps": 12},
    "kl": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "kl_num_iterations": {"beta": 0.1, "num_iterations": 2, "max_steps": 12, "use_bias_correction_kl": True},
    "lora": {"beta": 0.1, "use_lora": True},
    "planned": {"replay_fraction": 0.25, "max_steps": 10},
    "truncated_masked": {"mask_truncated_completions": True, "max_completion_length": 24},
}


class WatchedFilling(WatchedTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_filled = 0

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.num_filled += len(self.replayer.batch.replaced)
        return output


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient(tmp_path, case):
    options = {"learning_rate": 5e-3} | CASES[case]
    if options.pop("use_lora", False):
        options["model"] = get_peft_model(tiny_model(), lora_config())
    trainer = filling_trainer(tmp_path, WatchedFilling, **options)
    trainer.train()
    assert trainer.num_filled > 4
    assert trainer.log_ratios
    assert max(ratio.abs().max() for ratio in trainer.log_ratios) > 0.05, "the policy never moved"


@pytest.mark.parametrize("conversational", [False, True])
def test_tensors_of_filled_rows(tmp_path, conversational):
    """What TRL makes of a filled row is what it makes of any other."""
    dataset = tiny_dataset(8, conversational=conversational)
    trainer = filling_trainer(tmp_path, train_dataset=dataset, beta=0.1, num_iterations=2, max_steps=12)
    trainer.train()
    assert num_filled(trainer) > 6
    reference = tiny_model().double()
    for batch in trainer.batches:
        output = batch.output
        is_own = output["completion_mask"].bool()
        assert int(output["num_items_in_batch"]) == is_own.sum()
        for row in batch.filled:
            experience = batch.stored[row]
            prompt, completion = prompt_in(output, row), completion_in(output, row)
            assert completion.tolist() == experience.token_ids.tolist()
            question = batch.replays[row].question
            rendered = trainer.replayer.prompts.token_ids([question.example])[0]
            assert prompt.tolist() == rendered
            with torch.no_grad():
                old, ref = (completion_logps(m, prompt, completion)[0] for m in (batch.policy, reference))
            for name, expected in (("old_per_token_logps", old), ("ref_per_token_logps", ref)):
                torch.testing.assert_close(output[name][row][is_own[row]].double(), expected, atol=1e-4, rtol=1e-4)
            behavior = output["behavior_per_token_logps"][row][is_own[row]]
            assert behavior.tolist() == experience.behavior_per_token_logps.tolist()
            others = [batch.rewards[r, 0] for r in range(row - row % K, row - row % K + K) if r != row]
            assert others == [0.0] * (K - 1)
            assert batch.rewards[row, 0] == 1


class Short(Filling):
    """Completions of three tokens."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids, *rest = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        return [ids[:3] for ids in completion_ids], *rest


@pytest.mark.parametrize("text", ["longer", "o"])
def test_stored_successes_of_another_length(tmp_path, text):
    dataset = tiny_dataset(4)
    success = stored(text)
    trainer = filling_trainer(
        tmp_path,
        Short,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, {0: [success]}),
        reward_funcs=Judge([text]),
        max_steps=2,
    )
    trainer.train()
    for batch in trainer.batches:
        (row,) = batch.filled
        assert completion_in(batch.output, row).tolist() == success.token_ids.tolist()
        lengths = batch.output["completion_mask"].sum(1).tolist()
        assert max(lengths[:row] + lengths[row + 1 :]) == 3
        assert int(batch.output["num_items_in_batch"]) == sum(lengths)


def test_conversational_completions_look_like_the_others(tmp_path):
    dataset = tiny_dataset(4, conversational=True)
    judge = Judge(["ok"])
    trainer = filling_trainer(
        tmp_path,
        train_dataset=dataset,
        experience_buffer=buffer_of(dataset, {0: [stored("ok")]}),
        reward_funcs=judge,
        max_steps=1,
    )
    trainer.train()
    assert [len(call["completions"]) for call in judge.calls] == [16, 1]
    assert judge.calls[1]["completions"] == [[{"role": "assistant", "content": "o k"}]]
    assert judge.calls[1]["uid"] == ["q0"]


class Parsing(Filling):
    """Keeps what reward functions saw."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self.rewarded = copy.deepcopy(completions)
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)


def test_completions_are_parsed_as_trl_parses_them(tmp_path):
    """Where the tokenizer says how, TRL takes tool calls out of the text, without tools, too."""
    skip_unless_able("tools")
    options = agent_options(max_completion_length=12)
    tokenizer, dataset = tool_tokenizer(), options["train_dataset"].select(range(4))
    if getattr(tokenizer, "response_schema", None) is None and Version("1.7.1") > TRL:
        pytest.skip(f"trl {trl.__version__} does not parse completions by a template")
    ids = [*tokenizer("ab" + call_text("look", {"place": "a"}))["input_ids"], 1]
    success = Experience.create(ids, [-1.0] * len(ids), policy_version=0, reward=1.0)

    def judge(completions, **kwargs):
        return [float(bool(c[0].get("tool_calls")) and c[0]["content"] == "ab") for c in completions]

    trainer = filling_trainer(
        tmp_path,
        Parsing,
        **options
        | {
            "train_dataset": dataset,
            "experience_buffer": buffer_of(dataset, {0: [success]}),
            "reward_funcs": judge,
            "max_steps": 2,
        },
    )
    trainer.train()
    for batch in trainer.batches:
        (row,) = batch.filled
        assert batch.rewards[row, 0] == 1
    (message,) = trainer.rewarded[row]
    assert message["tool_calls"][0]["function"] == {"name": "look", "arguments": {"place": "a"}}


@pytest.mark.parametrize("watched", [False, True])
def test_rollouts_of_tools_fill_groups(tmp_path, watched):
    skip_unless_able("tools")
    tools = Watched()
    judge = DryingUp()
    options = agent_options(tools=tools.tools, reward_funcs=judge, learning_rate=2e-3)
    options["train_dataset"] = options["train_dataset"].select(range(8))
    trainer = filling_trainer(tmp_path, WatchedFilling if watched else Filling, max_steps=8, **options)
    trainer.train()
    if watched:
        assert trainer.num_filled > 4
        assert trainer.num_foreign > 100, "hardly a tool spoke"
        return
    of_turns = 0
    for batch in trainer.batches:
        is_own = batch.output["completion_mask"].bool()
        assert int(batch.output["num_items_in_batch"]) == (batch.output["tool_mask"] * is_own).sum()
        for row in batch.filled:
            experience = batch.stored[row]
            of_turns += experience.num_model_tokens < experience.num_tokens
            assert completion_in(batch.output, row).tolist() == experience.token_ids.tolist()
            assert batch.output["tool_mask"][row][is_own[row]].bool().tolist() == experience.is_model.tolist()
            assert batch.rewards[row, 0] == 1
    assert of_turns > 2


@pytest.mark.parametrize("differs", [False, True])
def test_images_of_a_filled_row_are_its_own(tmp_path, differs):
    """A success fills a group that shows the images that it was generated for, and no other."""
    options = vision_options("grid_of_sizes", reward_funcs=DryingUp(), max_steps=8)
    dataset = options["train_dataset"] = options["train_dataset"].select(range(8))
    if differs:
        turned = []

        def turn(rows):
            turned.append(1)
            images = [image.rotate(90 * (len(turned) % 4)) for image in rows["image"]]
            return rows | {"image": images}

        options["train_dataset"] = dataset.with_transform(turn)
        options["question_id_column"] = "answer"
        trainer = filling_trainer(tmp_path, **options)
        trainer.train()
        assert num_filled(trainer) > 1
        for batch in trainer.batches:
            for row in batch.filled:
                shown = [pixel_digest(batch.inputs[row]["image"])]
                assert batch.stored[row].prompt_hash == prompt_hash(prompt_in(batch.output, row), shown)
                assert batch.rewards[row, 0] == 1
        return
    trainer = filling_trainer(tmp_path, WatchedFilling, **options)
    trainer.train()
    assert trainer.num_filled > 4


def test_resume_is_exact(tmp_path):
    judge = DryingUp()  # of both: it knows no more after the first steps

    def make(name):
        return filling_trainer(
            tmp_path / name,
            reward_funcs=judge,
            replay_fraction=0.25,
            save_strategy="steps",
            save_steps=4,
            max_steps=10,
            learning_rate=2e-3,
        )

    whole = make("whole")
    whole.train()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert num_filled(resumed) > 4
    assert [batch.filled for batch in resumed.batches] == [batch.filled for batch in whole.batches[4:]]
    expected, actual = parameters_of(whole), parameters_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)
    assert resumed.replayer.state_dict() == whole.replayer.state_dict()


def test_without_a_group_to_fill_training_is_grpo(tmp_path):
    parameters = {}
    for name, trainer_class in {"grpo": GRPOTrainer, "exgrpo": None}.items():
        options = {"fill_failed_groups": True, "replay_fraction": 0.0} if trainer_class is None else {}
        trainer = make_trainer(
            tmp_path / name, trainer_class, max_steps=4, reward_funcs=first_letter_reward, seed=7, **options
        )
        trainer.train()
        parameters[name] = parameters_of(trainer)
        if trainer_class is None:
            assert all(line["replay/groups_filled"] == 0 for line in steps_of(trainer))
            assert trainer.experience_buffer.num_completions > 0, "what succeeds is collected"
    for name in parameters["grpo"]:
        assert torch.equal(parameters["grpo"][name], parameters["exgrpo"][name]), name


@pytest.mark.parametrize("argument", ["environment_factory", "rollout_func"])
def test_prompts_that_others_make_are_refused(tmp_path, argument):
    with pytest.raises(NotImplementedError, match=rf"fill_failed_groups=True does not work with {argument}.*False"):
        make_trainer(tmp_path, fill_failed_groups=True, **{argument: lambda *args, **kwargs: {}})
