"""What `exgrpo-trl why` says of real runs is what recording strategies have seen; exact resume; same training."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import assert_engaged, run_ranks
from same_rollouts import SameRollouts, same_rollouts_trainer
from test_filled_groups import Filling, filling_trainer
from test_ways_of_replay import ABufferOfAUser, Watched
from tiny import first_letter_reward, make_trainer, parameters_of, tiny_dataset

from exgrpo_trl import CompletionSelector, ExperienceBuffer, GroupSelector, QuestionSampler, replayer
from exgrpo_trl.cli import main
from exgrpo_trl.cli.why import explain
from exgrpo_trl.replay_log import parts_of, read_replay_log
from exgrpo_trl.strategies import COMPLETION_SELECTORS, GROUP_SELECTORS, QUESTION_SAMPLERS

K = 4


class Recorder:
    """What the strategies of a run were shown and did, batch by batch."""

    def __init__(self):
        self.buckets, self.choices, self.batches = {}, [], []

    def strategies(self, selector="lowest_entropy"):
        return {
            "question_sampler": RecordingSampler(self),
            "completion_selector": RecordingSelector(self, selector),
            "group_selector": RecordingGroupSelector(self),
        }


class RecordingSampler(QuestionSampler):
    def __init__(self, recorder):
        self.recorder, self.inner = recorder, QUESTION_SAMPLERS["gaussian"]()

    def __call__(self, pool, num_questions, rng):
        drawn = list(self.inner(pool, num_questions, rng))
        for bucket, ids in pool.buckets().items():
            self.recorder.buckets.update((question_id, bucket) for question_id in ids if question_id in drawn)
        return drawn

    def observe(self, batch):
        """The last one to see a batch: what was recorded since the one before belongs to it."""
        recorder = self.recorder
        recorder.batches.append(
            {
                "version": batch.policy_version,
                "replays": batch.replays,
                "is_correct": batch.is_correct.ravel(),
                "choices": recorder.choices,
                "buckets": recorder.buckets,
            }
        )
        recorder.choices, recorder.buckets = [], {}


class RecordingSelector(CompletionSelector):
    def __init__(self, recorder, name):
        self.recorder, self.inner = recorder, COMPLETION_SELECTORS[name]()
        self.requires_scores = self.inner.requires_scores

    def __call__(self, candidates, rng):
        index = self.inner(candidates, rng)
        shown = [(c.experience, c.entropy, c.negative_log_likelihood) for c in candidates]
        self.recorder.choices.append(([shown[index][0]], shown[index], shown[:index] + shown[index + 1 :]))
        return index


class RecordingGroupSelector(GroupSelector):
    def __init__(self, recorder):
        self.recorder, self.inner = recorder, GROUP_SELECTORS["random"]()

    def __call__(self, groups, rng):
        index = self.inner(groups, rng)
        others = [(group[0], None, None) for number, group in enumerate(groups) if number != index]
        self.recorder.choices.append((list(groups[index]), (None, None, None), others))
        return index


def expected_replays(batch, num_before, first_step):
    """What `why` must say of the replays of a recorded batch, as far as the strategies could see it."""
    version = batch["version"]
    for replay in batch["replays"]:
        chosen, others = (None, None, None), []
        for experiences, of_chosen, of_others in batch["choices"]:
            if any(experience is replay.experience for experience in experiences):
                chosen, others = of_chosen, of_others
        key = replay.question.question_id, replay.experience.token_bytes
        yield {
            "step": first_step,
            "policy_version": version,
            "row": replay.row,
            "group": replay.row // K,
            "group_size": K,
            "question_id": replay.question.question_id,
            "num_tokens": replay.experience.num_tokens,
            "reward": replay.experience.reward,
            "age": version - replay.experience.policy_version,
            "num_replays": num_before.get(key, 0),
            "entropy": approx(chosen[1]),
            "negative_log_likelihood": approx(chosen[2]),
            "competitors": [
                {
                    "age": version - experience.policy_version,
                    "entropy": approx(entropy),
                    "negative_log_likelihood": approx(likelihood),
                }
                for experience, entropy, likelihood in others
            ],
        }
    for replay in batch["replays"]:
        key = replay.question.question_id, replay.experience.token_bytes
        num_before[key] = num_before.get(key, 0) + 1


def approx(value):
    return None if value is None else pytest.approx(value, rel=1e-6)


def why(capsys, *arguments):
    capsys.readouterr()
    assert main(["why", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


WAYS = {
    "current": {},
    "last_known": {"candidate_scores": "last_known"},
    "likelihood": {"completion_selection": "lowest_negative_log_likelihood", "num_rows": 6},
    "without_scores": {"completion_selection": "random"},
    "several_stored": {"stored_per_group": 2},
    "several_last_known": {"stored_per_group": 2, "candidate_scores": "last_known"},
    "groups": {"replay_unit": "group", "max_steps": 10},
    "num_iterations": {"num_iterations": 2, "max_steps": 10},
    "steps_per_generation": {"per_device_train_batch_size": 8, "steps_per_generation": 2, "max_steps": 12},
    "batches_of_a_step": {
        "per_device_train_batch_size": 8,
        "steps_per_generation": 1,
        "gradient_accumulation_steps": 2,
        "max_steps": 6,
    },
    "used_up": {"max_replays": 1},
    "delayed": {"replay_start_pass_rate": 0.3},
}


@pytest.mark.parametrize("way", WAYS)
def test_why_agrees_with_what_the_strategies_saw(tmp_path, capsys, way):
    options = {"max_steps": 8, "learning_rate": 1e-2, "num_rows": 8} | WAYS[way]
    num_steps, recorder = options["max_steps"], Recorder()
    strategies = recorder.strategies(options.pop("completion_selection", "lowest_entropy"))
    trainer = make_trainer(
        tmp_path,
        Watched,
        train_dataset=tiny_dataset(options.pop("num_rows")),
        retire_solved=False,
        **options,
        **strategies,
    )
    trainer.train()
    spans = {"num_iterations": 2, "steps_per_generation": 2}.get(way, 1)
    per_step = 2 if way == "batches_of_a_step" else 1
    of_step, num_before, num_compared, num_competitors = {}, {}, 0, 0
    for number, (batch, watched) in enumerate(zip(recorder.batches, trainer.batches, strict=True)):
        assert watched["replays"] == batch["replays"]
        first = number * spans // per_step + 1
        for step in range(first, first + spans):
            of_step.setdefault(step, []).append((number, batch, watched, first))
    # As the batches came, each once: what was replayed before counts up.
    expected = {
        number: list(expected_replays(batch, num_before, number * spans // per_step + 1))
        for number, batch in enumerate(recorder.batches)
    }
    for step in range(1, num_steps + 1):
        found = why(capsys, tmp_path, "--step", step)
        told = [replay for number, *_ in of_step[step] for replay in expected[number]]
        assert [{name: replay[name] for name in of} for replay, of in zip(found["replays"], told, strict=True)] == told
        index = 0
        for number, batch, watched, first in of_step[step]:
            for replay in batch["replays"]:
                shown = found["replays"][index]
                index += 1
                assert shown["batch"] == number % per_step
                assert shown["last_step"] == first + spans - 1
                assert shown["bucket"] == batch["buckets"][replay.question.question_id]
                assert not shown["is_fill"]
                check_ratio(trainer, watched, replay, shown)
                check_scores(way, batch, shown)
                if way == "used_up":
                    assert shown["num_replays"] == 0
                    assert shown["evicted"] == "used_up"
                else:
                    assert shown["evicted"] is None
                num_compared += 1
                num_competitors += len(shown["competitors"])
        if not found["replays"]:
            assert found["nearest_steps"] == nearest(of_step, step)
    assert num_compared > 10
    assert num_competitors > 5 or way == "used_up"
    last = max(step for step, batches in of_step.items() if any(batch["replays"] for _, batch, *_ in batches))
    assert why(capsys, tmp_path)["step"] == last - spans + 1, "where a batch begins"
    first = expected[len(expected) - 1][0]["question_id"]
    of_one = why(capsys, tmp_path, "--question", first, "--step", num_steps)["replays"]
    assert {replay["question_id"] for replay in of_one} == {first}


def nearest(of_step, step):
    replaying = sorted({first for batches in of_step.values() for _, batch, _, first in batches if batch["replays"]})
    return [s for s in replaying if s < step][-1:] + [s for s in replaying if s >= step][:1]


def check_ratio(trainer, watched, replay, shown):
    """The first forward that trained it was one of the policy that generated the batch: computed by hand."""
    if watched["version"] != shown["policy_version"] or shown["mean_log_ratio"] is None:
        raise AssertionError("every stored completion was trained")
    _, likelihood, drift = trainer.scores_of(watched["policy"], replay.question.question_id, replay.experience)
    log_ratio = -likelihood - float(np.mean(replay.experience.behavior_per_token_logps))
    if shown["last_step"] == shown["step"] or trainer.args.num_iterations > 1:  # else the policy has moved on
        assert shown["mean_log_ratio"] == pytest.approx(log_ratio, abs=1e-4)
        assert shown["drift"] == pytest.approx(drift, abs=1e-4)
    assert shown["importance_ratio"] == pytest.approx(np.exp(shown["mean_log_ratio"]))


def check_scores(way, batch, shown):
    if not shown["competitors"] or way in ("without_scores", "groups"):
        assert shown["scored_at"] is None
    elif "last_known" in way:
        assert batch["version"] - shown["age"] <= shown["scored_at"] < batch["version"]
    else:
        assert shown["scored_at"] == batch["version"]


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_successes_in_the_place_of_failures(tmp_path, capsys, fraction):
    recorder = Recorder()
    trainer = filling_trainer(
        tmp_path, Filling, replay_fraction=fraction, max_steps=8, **recorder.strategies(), stored_per_group=1
    )
    trainer.train()
    num_before, num_fills = {}, 0
    for step, (batch, filling) in enumerate(zip(recorder.batches, trainer.batches, strict=True), start=1):
        replays = why(capsys, tmp_path, "--step", step)["replays"]
        told = list(expected_replays(batch, num_before, step))
        assert [{name: replay[name] for name in of} for replay, of in zip(replays, told, strict=True)] == told
        assert [replay["row"] for replay in replays if replay["is_fill"]] == filling.filled
        assert all(replay["bucket"] in range(K + 1) for replay in replays)
        num_fills += len(filling.filled)
    assert num_fills > 3


def test_a_reward_that_takes_itself_back(tmp_path):
    def reward(prompts, trainer_state, **kwargs):
        return [float(i % 2 and trainer_state.global_step < 4) for i in range(len(prompts))]

    trainer = make_trainer(tmp_path, max_steps=6, reward_funcs=reward, retire_solved=False)
    trainer.train()
    table = read_replay_log(tmp_path)
    reasons = dict(zip(table.column("step").to_pylist(), table.column("evicted").to_pylist(), strict=True))
    assert reasons[4] is None
    assert reasons[5] == "incorrect"
    (line,) = [line for line in trainer.state.log_history if line["step"] == 6 and "loss" in line]
    assert line["replay/evicted_incorrect"] == table.column("step").to_pylist().count(5) > 0


def test_a_buffer_of_a_user(tmp_path, capsys):
    buffer = ABufferOfAUser(ExperienceBuffer(group_size=K, retire_solved=False))
    trainer = make_trainer(tmp_path, max_steps=6, experience_buffer=buffer, retire_solved=False)
    trainer.train()
    replays = why(capsys, tmp_path)["replays"]
    assert replays
    assert all(replay["num_replays"] is None and replay["bucket"] in range(1, K + 1) for replay in replays)
    assert any(replay["competitors"] and replay["entropy"] for replay in replays)


# Files


RESUMED = {
    "plain": {},
    "last_known": {"candidate_scores": "last_known", "stored_per_group": 2},
    "num_iterations": {"num_iterations": 2, "max_steps": 12, "save_steps": 6},
    "groups": {"replay_unit": "group", "max_replays": 2},
    "carried": {"replay_fraction": 0.4, "save_steps": 3},
}


@pytest.mark.parametrize("setting", RESUMED)
def test_the_log_of_a_resumed_run_is_that_of_the_uninterrupted_one(tmp_path, setting, monkeypatch):
    messages = []
    options = {"max_steps": 10, "save_strategy": "steps", "save_steps": 5, "learning_rate": 2e-3} | RESUMED[setting]
    make_trainer(tmp_path / "whole", train_dataset=tiny_dataset(8), retire_solved=False, **options).train()
    # A run that has gone on beyond the checkpoint that it is resumed from.
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    expected = read_replay_log(tmp_path / "whole")
    assert sum(step > options["save_steps"] for step in expected.column("step").to_pylist()) > 2
    assert sum(step <= options["save_steps"] for step in expected.column("step").to_pylist()) > 2
    resumed = make_trainer(tmp_path / "resumed", train_dataset=tiny_dataset(8), retire_solved=False, **options)
    monkeypatch.setattr(resumed.replayer.log, "_warn", messages.append)
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / f"checkpoint-{options['save_steps']}"))
    assert read_replay_log(tmp_path / "resumed").to_pylist() == expected.to_pylist()
    assert messages == []


def test_a_new_run_begins_a_new_log(tmp_path, monkeypatch):
    messages = []
    for seed in (1, 2):
        trainer = make_trainer(tmp_path, max_steps=3 + seed, seed=seed)
        monkeypatch.setattr(trainer.replayer.log, "_warn", messages.append)
        trainer.train()
        if seed == 1:
            before = read_replay_log(tmp_path).to_pylist()
    assert len(messages) == 1
    assert "log of another run" in messages[0]
    assert read_replay_log(tmp_path / "replay_log.previous").to_pylist() == before
    assert max(read_replay_log(tmp_path).column("step").to_pylist()) == 5
    # The same trainer again, for another phase.
    trainer.train()
    assert len(messages) == 2
    versions = read_replay_log(tmp_path).column("policy_version").to_pylist()
    assert min(versions) >= 5, "of the second phase alone"


def test_a_run_that_fails_leaves_its_log(tmp_path):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step == 5:
            raise ZeroDivisionError
        return first_letter_reward(completions)

    with pytest.raises(ZeroDivisionError):
        make_trainer(tmp_path, max_steps=8, reward_funcs=reward, retire_solved=False).train()
    assert max(read_replay_log(tmp_path).column("step").to_pylist()) == 5


@pytest.mark.parametrize("options", [{"replay_log": False}, {"replay_fraction": 0.0}])
def test_it_can_be_off(tmp_path, options):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=4, **options).train()
    assert not (tmp_path / "replay_log").exists()


def test_training_is_the_same_with_and_without(tmp_path, monkeypatch):
    """Also where it cannot be written, which is said once."""
    messages = []
    monkeypatch.setattr(replayer.logger, "warning", messages.append)

    def run(name, **options):
        trainer = make_trainer(tmp_path / name, max_steps=6, save_strategy="steps", save_steps=2, **options)
        trainer.train()
        return parameters_of(trainer)

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "replay_log").write_text("mine")
    expected = run("on")
    assert parts_of(tmp_path / "on" / "replay_log")
    assert messages == []
    for other in (run("off", replay_log=False), run("broken")):
        for name, value in expected.items():
            assert torch.equal(other[name], value), name
    assert [str(tmp_path / "broken" / "replay_log") in message for message in messages] == [True]


# Several processes


class RecordedRollouts(SameRollouts):
    pass


def train_recorded(mode, mode_options, folder, options):
    recorder = Recorder()
    trainer = same_rollouts_trainer(
        Path(folder) / "out", mode, trainer_class=RecordedRollouts, **mode_options | options, **recorder.strategies()
    )
    trainer.train()
    assert_engaged(trainer, mode, 2)
    if not trainer.accelerator.is_main_process:
        return
    num_before, num_compared = {}, 0
    for step, batch in enumerate(recorder.batches, start=1):
        told = list(expected_replays(batch, num_before, step))
        replays = explain(Path(folder) / "out", step)["replays"]
        assert [{name: replay[name] for name in of} for replay, of in zip(replays, told, strict=True)] == told
        assert all(replay["mean_log_ratio"] is not None for replay in replays), "those of the other process, too"
        num_compared += len(told)
    assert num_compared > 15


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
@pytest.mark.parametrize("way", ["current", "groups"])
def test_several_processes(tmp_path, mode, way):
    if mode == "zero3" and way == "groups":
        pytest.skip("DDP shows it")
    options = {"per_device_train_batch_size": 8, **({"replay_unit": "group"} if way == "groups" else {})}
    run_ranks(train_recorded, str(tmp_path), options, folder=tmp_path, mode=mode, timeout=240)
    assert len(parts_of(tmp_path / "out" / "replay_log")) == 1
