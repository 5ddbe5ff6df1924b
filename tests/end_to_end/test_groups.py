"""Whole groups, failures included, come back as they were generated, and nothing is generated for them."""

import numpy as np
import pytest
from test_ways_of_replay import K, Watched
from tiny import first_letter_reward, make_trainer, tiny_dataset

from exgrpo_trl import ExperienceBuffer


def train(tmp_path, **options):
    defaults = {"max_steps": 8, "retire_solved": False, "replay_unit": "group", "learning_rate": 3e-3}
    trainer = make_trainer(tmp_path, Watched, **defaults | options)
    trainer.train()
    return trainer


def groups_of(batch):
    """Replays of a generation batch by group."""
    found = {}
    for replay in batch["replays"]:
        found.setdefault(replay.row // K, []).append(replay)
    return found


def test_groups_come_back_whole(tmp_path):
    asked = []

    def reward(prompts, completions, **kwargs):
        asked.append(len(prompts))
        return first_letter_reward(completions)

    trainer = train(tmp_path, reward_funcs=reward)
    policies = {batch["version"]: batch["policy"] for batch in trainer.batches}
    num_groups = num_failures = 0
    for batch in trainer.batches:
        groups = groups_of(batch)
        assert len(groups) <= 2
        assert batch["generated"] == 16 - K * len(groups)
        assert batch["is_replayed"].nonzero()[:, 0].tolist() == [r * K + i for r in sorted(groups) for i in range(K)]
        assert batch["scored"] == 0
        for group, replays in groups.items():
            num_groups += 1
            assert [replay.row for replay in replays] == list(range(group * K, group * K + K))
            (question_id,) = {replay.question.question_id for replay in replays}
            experiences = [replay.experience for replay in replays]
            stored = batch["stored"][question_id]
            assert experiences == list(stored[-K:]), "the most recent group"
            rewards = {experience.reward for experience in experiences}
            assert rewards == {0.0, 1.0}, "some of them succeeded, some failed"
            num_failures += sum(experience.reward == 0 for experience in experiences)
            assert len({experience.policy_version for experience in experiences}) == 1
            for replay in replays:
                ids = replay.experience.token_ids.tolist()
                assert batch["completion_ids"][replay.row, : len(ids)].tolist() == ids
                # Log-probabilities of failures, too, are those of the policy that generated them.
                policy = policies[replay.experience.policy_version]
                assert trainer.scores_of(policy, question_id, replay.experience)[2] < 2e-5
    assert num_groups > 5
    assert num_failures > 5
    assert asked == [16] * 8, "rewards are computed anew"
    lines = [line for line in trainer.state.log_history if "loss" in line]
    saved = sum(r.experience.num_tokens for batch in trainer.batches for r in batch["replays"])
    assert lines[-1]["replay/tokens_saved"] == saved
    assert lines[-1]["replay/fraction"] == 0.5


def test_advantages_are_those_of_rewards_computed_anew(tmp_path):
    """Where a completion is judged otherwise now, its advantage is another, and a group of one kind leaves."""
    calls = []

    def reward(completions, trainer_state, **kwargs):
        rewards = first_letter_reward(completions)
        if trainer_state.global_step == 5:
            batch = trainer.replayer.batch
            rewards = [1.0 if row in batch.stored_rows else value for row, value in enumerate(rewards)]
        calls.append(rewards)
        return rewards

    trainer = make_trainer(
        tmp_path, Watched, reward_funcs=reward, replay_unit="group", retire_solved=False, max_steps=7,
        learning_rate=1e-3,
    )  # fmt: skip
    trainer.train()
    replayed = groups_of(trainer.batches[5])
    assert replayed
    for replays in replayed.values():
        question_id, experience = replays[0].question.question_id, replays[0].experience
        assert experience not in trainer.batches[6]["stored"].get(question_id, ()), "there is nothing to learn from it"
        assert question_id not in trainer.experience_buffer.retired
    evicted = [line.get("replay/evicted_incorrect", 0) for line in trainer.state.log_history if "loss" in line]
    assert max(evicted) == K * len(replayed)


@pytest.mark.parametrize("selection", ["most_recent", "largest_spread", "random"])
def test_group_selection(tmp_path, selection):
    def graded(completions, **kwargs):
        return [min(text.count("a") + text.count("e") + text.count("i"), 3) / 3 for text in completions]

    trainer = train(
        tmp_path, group_selection=selection, reward_funcs=graded, success_threshold=0.3, max_steps=20,
        train_dataset=tiny_dataset(6), learning_rate=1e-3,
    )  # fmt: skip
    places, newest = [], []
    for batch in trainer.batches:
        for replays in groups_of(batch).values():
            stored = batch["stored"][replays[0].question.question_id]
            groups = [stored[i : i + K] for i in range(0, len(stored), K)]
            index = groups.index(tuple(replay.experience for replay in replays))
            if len(groups) > 1:
                spreads = [np.std([experience.reward for experience in group]) for group in groups]
                places.append(spreads[index] == max(spreads))
                newest.append(index == len(groups) - 1)
    assert len(places) > 5
    if selection == "most_recent":
        assert all(newest)
    elif selection == "largest_spread":
        assert all(places)
        assert not all(newest)
    else:
        assert not all(newest)
        assert any(newest)


def test_a_selector_of_a_user(tmp_path):
    seen = []

    def first(groups, rng):
        seen.append([len(group) for group in groups])
        return 0

    trainer = train(tmp_path, group_selector=first, train_dataset=tiny_dataset(8), max_steps=10)
    for batch in trainer.batches:
        for replays in groups_of(batch).values():
            stored = batch["stored"][replays[0].question.question_id]
            assert [replay.experience for replay in replays] == list(stored[:K])
    assert len(seen) > 3
    assert all(len(sizes) > 1 and set(sizes) == {K} for sizes in seen)
    with pytest.raises(ValueError, match="group selector returned 7 for"):
        train(tmp_path / "wrong", group_selector=lambda groups, rng: 7, train_dataset=tiny_dataset(8), max_steps=10)


def test_whole_batches_where_they_are_asked_for(tmp_path):
    options = {"per_device_train_batch_size": K, "max_steps": 14, "train_dataset": tiny_dataset(4)}
    trainer = train(tmp_path, replay_whole_batches=True, **options)
    replaying = [len(groups_of(batch)) for batch in trainer.batches]
    first = replaying.index(1)
    assert sum(replaying[first:]) >= 4
    for batch, num_groups in zip(trainer.batches, replaying, strict=True):
        assert batch["generated"] == K * (1 - num_groups), "nothing at all is generated for a replayed batch"
    lines = [line for line in trainer.state.log_history if "loss" in line]
    rates = [line["fresh/pass_rate"] for line in lines]
    assert not np.isnan(rates).any()


def test_limits_act_on_whole_groups(tmp_path):
    trainer = train(tmp_path, buffer_capacity=10, max_completions_per_question=4, max_steps=10)
    for batch in trainer.batches:
        sizes = [len(stored) for stored in batch["stored"].values()]
        assert set(sizes) <= {K}
        assert sum(sizes) <= 8
    assert trainer.experience_buffer.num_evicted
    assert trainer.experience_buffer.num_evicted % K == 0


def test_reuse_is_that_of_a_group(tmp_path):
    trainer = train(tmp_path, max_replays=1, max_steps=10)
    replayed = [tuple(r.experience for r in group) for batch in trainer.batches for group in groups_of(batch).values()]
    assert len(replayed) == len(set(replayed)) > 4
    left = {experience for _, _, experience in trainer.experience_buffer.items()}
    assert left.isdisjoint(experience for group in replayed for experience in group)


def test_drift_of_a_group_is_that_of_all_its_tokens(tmp_path):
    most = 0.2
    trainer = train(tmp_path, max_drift=most, max_steps=10, learning_rate=1e-2)
    num_evicted = 0
    for before, after in zip(trainer.batches, trainer.batches[1:], strict=False):
        for replays in groups_of(before).values():
            question_id = replays[0].question.question_id
            drifts = [trainer.scores_of(before["policy"], question_id, replay.experience)[2] for replay in replays]
            drift = np.average(drifts, weights=[replay.experience.num_tokens for replay in replays])
            if abs(drift - most) > 1e-3:
                assert (replays[0].experience in after["stored"].get(question_id, ())) == (drift < most)
                num_evicted += drift > most
    assert num_evicted > 2


def test_a_truncated_failure_is_part_of_its_group(tmp_path):
    """What mask_truncated_completions keeps from the loss is generated and judged all the same."""
    trainer = train(tmp_path, mask_truncated_completions=True, max_completion_length=12, max_steps=10)
    eos = trainer.processing_class.eos_token_id
    truncated = [e for _, _, e in trainer.experience_buffer.items() if e.token_ids[-1] != eos]
    assert truncated
    assert any(groups_of(batch) for batch in trainer.batches)


def test_a_replayed_group_neither_moves_nor_retires_its_question(tmp_path):
    def reward(completions, trainer_state, **kwargs):
        if trainer_state.global_step < 4:
            return [float(i % 2) for i in range(len(completions))]
        return [1.0] * len(completions)

    trainer = make_trainer(tmp_path, Watched, reward_funcs=reward, replay_unit="group", max_steps=5, learning_rate=0.0)
    trainer.train()
    replayed = {replays[0].question.question_id for replays in groups_of(trainer.batches[-1]).values()}
    assert replayed
    assert replayed.isdisjoint(trainer.experience_buffer.retired)
    assert trainer.experience_buffer.retired, "those that were fresh retire"


def test_a_buffer_of_the_other_kind_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds single completions, but replay_unit='group'.*replay_unit='completion'"
    ):
        make_trainer(tmp_path, replay_unit="group", experience_buffer=ExperienceBuffer(group_size=K))
    with pytest.raises(ValueError, match=r"holds whole groups, but replay_unit='completion'"):
        make_trainer(tmp_path, experience_buffer=ExperienceBuffer(group_size=K, unit="group"))
    trainer = train(tmp_path / "groups", max_steps=4, save_strategy="steps", save_steps=2)
    other = make_trainer(tmp_path / "other", max_steps=4)
    with pytest.raises(ValueError, match=r"checkpoint-2.*holds whole groups"):
        other.train(resume_from_checkpoint=str(tmp_path / "groups" / "checkpoint-2"))
    again = make_trainer(
        tmp_path / "again", replay_unit="group", experience_buffer=tmp_path / "groups", max_steps=2,
        retire_solved=False,
    )  # fmt: skip
    again.train()
    assert trainer.experience_buffer.num_questions
    assert again.state.log_history[0]["replay/fraction"] == 0.5


def test_exported_groups_replay_in_a_new_trainer(tmp_path):
    trainer = train(tmp_path / "old")
    dataset = trainer.experience_buffer.to_dataset()
    buffer = ExperienceBuffer.from_dataset(dataset, group_size=K, unit="group", retire_solved=False)
    new = make_trainer(
        tmp_path / "new", Watched, replay_unit="group", experience_buffer=buffer, retire_solved=False, max_steps=1
    )
    new.train()
    (batch,) = new.batches
    assert len(groups_of(batch)) == 2
    old = {e.token_bytes for _, _, e in trainer.experience_buffer.items()}
    assert {replay.experience.token_bytes for replay in batch["replays"]} <= old
