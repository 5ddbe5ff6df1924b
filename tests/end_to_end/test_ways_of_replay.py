"""More than one stored completion in a group, last known scores, bounded reuse, drift: by what really happens."""

import copy

import numpy as np
import pytest
import torch
from tiny import completion_logps, make_trainer, tiny_dataset

from exgrpo_trl import CompletionSelector, ExGRPOTrainer, question_id_of

K = 4


class Watched(ExGRPOTrainer):
    """Keeps of every generation batch: the plan, rows given to `model.generate`, what was scored, the policy."""

    def __init__(self, *args, model, **kwargs):
        self.pristine = copy.deepcopy(model)  # accelerate binds the forward of the other to it
        super().__init__(model, *args, **kwargs)
        self.batches, self.num_scored, self.num_generated = [], 0, 0
        generate = self.model.generate

        def counted(*args, **kwargs):
            self.num_generated += len(kwargs["input_ids"])
            return generate(*args, **kwargs)

        self.model.generate = counted

    def _score(self, prompted):
        self.num_scored += len(prompted)
        return super()._score(prompted)

    def _generate_and_score_completions(self, inputs):
        self.num_scored = self.num_generated = 0
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        buffer = self.experience_buffer
        output = super()._generate_and_score_completions(inputs)
        batch = self.replayer.batch
        self.batches.append(
            {
                "version": batch.policy_version,
                "replays": batch.replays,
                "policy": policy,
                "scored": self.num_scored,
                "generated": self.num_generated,
                "completion_ids": output["completion_ids"],
                "is_replayed": output["is_replayed"],
                "stored": {q: buffer.completions(q) for ids in buffer.buckets().values() for q in ids},
                "reuse": {e: buffer.reuse(e) for _, _, e in buffer.items()},
            }
        )
        return output

    def scores_of(self, policy, question_id, experience):
        """Mean entropy, negative log-likelihood and drift under a policy, in float64."""
        (text,) = (prompt for prompt in self.train_dataset["prompt"] if question_id_of(prompt) == question_id)
        prompt = self.processing_class(text)["input_ids"]
        with torch.no_grad():
            logps, entropies = completion_logps(policy, prompt, experience.token_ids.copy())
        drift = np.abs(logps.numpy() - experience.behavior_per_token_logps).mean()
        return entropies.mean().item(), -logps.mean().item(), drift


def train(tmp_path, **options):
    trainer = make_trainer(tmp_path, Watched, **{"max_steps": 8, "retire_solved": False} | options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("stored_per_group", [1, 2, 3, 100])
def test_several_stored_completions_in_a_group(tmp_path, stored_per_group):
    trainer = train(tmp_path, stored_per_group=stored_per_group, learning_rate=1e-3)
    sizes = set()
    for batch in trainer.batches:
        groups = {}
        for replay in batch["replays"]:
            groups.setdefault(replay.row // K, []).append(replay)
        assert batch["is_replayed"].nonzero()[:, 0].tolist() == [replay.row for replay in batch["replays"]]
        assert batch["generated"] == 16 - len(batch["replays"]), "nothing is generated for any of them"
        for replays in groups.values():
            question_id = replays[0].question.question_id
            assert {replay.question.question_id for replay in replays} == {question_id}
            stored = batch["stored"][question_id]
            assert len(replays) == min(stored_per_group, len(stored), K - 1), "fewer where fewer are stored"
            assert len({replay.experience for replay in replays}) == len(replays), "distinct"
            assert {replay.experience for replay in replays} <= set(stored)
            for replay in replays:
                ids = replay.experience.token_ids.tolist()
                assert batch["completion_ids"][replay.row, : len(ids)].tolist() == ids
            if len(stored) > stored_per_group:  # those of lowest entropy
                entropies = {e: trainer.scores_of(batch["policy"], question_id, e)[0] for e in stored}
                lowest = sorted(stored, key=entropies.get)[: len(replays)]
                assert {replay.experience for replay in replays} == set(lowest)
            sizes.add(len(replays))
    assert max(sizes) == min(stored_per_group, K - 1)


def test_a_question_retires_by_fresh_completions_alone(tmp_path):
    """Where two of four are stored, two fresh successes do not show that the question is solved."""

    def reward(prompts, completion_ids, trainer_state, **kwargs):
        # One success of four in the first steps, which fills the buffer; then every completion is right.
        if trainer_state.global_step < 4:
            return [float(i % 2) for i in range(len(prompts))]
        return [1.0] * len(prompts)

    options = {"reward_funcs": reward, "max_steps": 5, "retire_solved": True, "learning_rate": 0.0}
    trainer = make_trainer(tmp_path / "two", Watched, stored_per_group=2, **options)
    trainer.train()
    replayed = {replay.question.question_id for replay in trainer.batches[-1]["replays"]}
    counts = {q: sum(r.question.question_id == q for r in trainer.batches[-1]["replays"]) for q in replayed}
    assert set(counts.values()) == {2}
    buffer = trainer.experience_buffer
    assert buffer.retired, "those that were all fresh retire"
    assert replayed.isdisjoint(buffer.retired)
    assert replayed <= set(buffer.buckets()[K]), "they are where a question goes of which all fresh ones are right"
    alone = make_trainer(tmp_path / "one", Watched, stored_per_group=1, **options)
    alone.train()
    assert {r.question.question_id for r in alone.batches[-1]["replays"]} <= set(alone.experience_buffer.retired)


@pytest.mark.parametrize("fresh", [0, 1, 2])
def test_the_bucket_is_what_a_group_with_one_stored_completion_would_show(tmp_path, fresh):
    def reward(prompts, trainer_state, **kwargs):
        if trainer_state.global_step < 4:
            return [float(i % 2) for i in range(len(prompts))]
        batch = trainer.replayer.batch
        rewards = np.ones(len(prompts))
        for group in batch.replayed_questions:
            rows = [row for row in range(group * K, group * K + K) if row not in batch.stored_rows]
            rewards[rows[fresh:]] = 0
        return rewards.tolist()

    trainer = make_trainer(tmp_path, Watched, reward_funcs=reward, stored_per_group=2, max_steps=5, learning_rate=0.0)
    trainer.train()
    replayed = {replay.question.question_id for replay in trainer.batches[-1]["replays"]}
    # Both stored ones count as the one of the paper, the share of fresh ones for the K - 1 others.
    expected = 1 + round(3 * fresh / 2)
    assert replayed <= set(trainer.experience_buffer.buckets()[expected])


SELECTORS = {
    "lowest_entropy": lambda entropy, likelihood: entropy,
    "highest_entropy": lambda entropy, likelihood: -entropy,
    "lowest_negative_log_likelihood": lambda entropy, likelihood: likelihood,
}


@pytest.mark.parametrize("selection", SELECTORS)
def test_last_known_scores_cost_no_forward(tmp_path, selection):
    options = {"completion_selection": selection, "candidate_scores": "last_known"}
    trainer = train(tmp_path, max_steps=12, **options)
    policies = {batch["version"]: batch["policy"] for batch in trainer.batches}
    num_choices = num_renewed = 0
    for batch in trainer.batches:
        assert batch["scored"] == 0
        for replay in batch["replays"]:
            stored = batch["stored"][replay.question.question_id]
            keys = []
            for experience in stored:
                reuse = batch["reuse"][experience]
                # Known is what the policy thought that trained it last, or the one that generated it.
                expected = trainer.scores_of(policies[reuse.scored_at], replay.question.question_id, experience)
                assert (reuse.entropy, reuse.negative_log_likelihood) == pytest.approx(expected[:2], abs=2e-5)
                assert reuse.scored_at <= batch["version"]
                num_renewed += reuse.scored_at > experience.policy_version
                keys.append(SELECTORS[selection](reuse.entropy, reuse.negative_log_likelihood))
            assert replay.experience is stored[int(np.argmin(keys))]
            if len(stored) > 1:
                assert replay.entropy == batch["reuse"][replay.experience].entropy
                num_choices += 1
    assert num_choices > 5
    assert num_renewed > 5
    assert trainer.state.log_history[-2]["replay/candidates_scored"] == 0


def test_the_first_forward_that_trains_a_completion_tells(tmp_path):
    """Later ones of the same batch see a policy that has moved on."""
    trainer = train(tmp_path, candidate_scores="last_known", num_iterations=2, max_steps=16)
    versions = {batch["version"] for batch in trainer.batches}
    assert versions == set(range(0, 16, 2))
    reuses = [reuse for reuse in trainer.batches[-1]["reuse"].values() if reuse.num_replays]
    assert len(reuses) > 5
    assert {reuse.scored_at for reuse in reuses} <= versions


def test_how_often_last_known_scores_agree_is_logged(tmp_path):
    """Beside the paper's choice, compared with one by what is known."""
    trainer = train(tmp_path, max_steps=12)
    agreed = []
    for batch in trainer.batches:
        of_batch = []
        for replay in batch["replays"]:
            stored = batch["stored"][replay.question.question_id]
            if len(stored) > 1:
                known = [batch["reuse"][experience].entropy for experience in stored]
                of_batch.append(stored[int(np.argmin(known))] is replay.experience)
        agreed.append(np.mean(of_batch) if of_batch else None)
    logged = [line.get("replay/last_known_agreement") for line in trainer.state.log_history if "loss" in line]
    last = None
    for mine, line in zip(agreed, logged, strict=True):
        last = mine if mine is not None else last  # a line without news repeats the last value
        assert line == (None if last is None else pytest.approx(last))
    assert {value for value in agreed if value is not None} - {1.0}, "they always agreed"


class OwnSelector(CompletionSelector):
    """Draws by chance, which a look at the other scores must not disturb."""

    def __init__(self):
        self.seen = []

    def __call__(self, candidates, rng):
        self.seen.append([candidate.entropy for candidate in candidates])
        return int(rng.integers(len(candidates)))


def test_a_selector_of_a_user_is_asked_once(tmp_path):
    selector = OwnSelector()
    trainer = train(tmp_path, completion_selector=selector)
    choices = [
        replay
        for batch in trainer.batches
        for replay in batch["replays"]
        if len(batch["stored"][replay.question.question_id]) > 1
    ]
    assert len(selector.seen) == len(choices) > 3
    assert not any(key == "replay/last_known_agreement" for line in trainer.state.log_history for key in line)


def test_replays_are_counted_and_bounded(tmp_path):
    trainer = train(tmp_path, max_replays=2, max_steps=10)
    counts = {}
    for batch in trainer.batches:
        for experience, reuse in batch["reuse"].items():
            assert reuse.num_replays == counts.get(experience, 0) < 2, "what was used up has left"
        for replay in batch["replays"]:
            counts[replay.experience] = counts.get(replay.experience, 0) + 1
    assert max(counts.values()) == 2
    used_up = [
        line["replay/evicted_used_up"] for line in trainer.state.log_history if "replay/evicted_used_up" in line
    ]
    gone = [e for e, count in counts.items() if count == 2]
    assert sum(used_up) == len(gone) - sum(e in {r.experience for r in trainer.batches[-1]["replays"]} for e in gone)
    left = {experience for _, _, experience in trainer.experience_buffer.items()}
    assert left.isdisjoint(gone)


@pytest.mark.parametrize("cooldown", [0, 1, 3])
def test_questions_rest_between_replays(tmp_path, cooldown):
    trainer = train(tmp_path, replay_cooldown=cooldown, max_steps=16, train_dataset=tiny_dataset(8))
    drawn, gaps = {}, []
    for batch in trainer.batches:
        for question_id in {replay.question.question_id for replay in batch["replays"]}:
            if question_id in drawn:
                gaps.append(batch["version"] - drawn[question_id])
            drawn[question_id] = batch["version"]
    assert min(gaps) == cooldown + 1


@pytest.mark.parametrize("scores", ["current", "last_known"])
def test_what_has_drifted_away_is_not_replayed(tmp_path, scores):
    most = 0.25
    trainer = train(tmp_path, max_drift=most, candidate_scores=scores, max_steps=12, logging_steps=1)
    evicted = 0.0
    for before, after in zip(trainer.batches, trainer.batches[1:], strict=False):
        for replay in before["replays"]:
            question_id = replay.question.question_id
            is_scored = scores == "current" and len(before["stored"][question_id]) > 1
            drift = trainer.scores_of(before["policy"], question_id, replay.experience)[2]
            still_there = replay.experience in after["stored"].get(question_id, ())
            if is_scored:
                assert drift < most + 1e-4, "measured before it is replayed"
            elif abs(drift - most) > 1e-3:
                assert still_there == (drift <= most), "measured by the forward that trained it"
    for line in trainer.state.log_history:
        evicted += line.get("replay/evicted_drifted", 0.0)
    assert evicted > 5


def test_replay_steps_back_where_few_tokens_count(tmp_path):
    """The policy runs away from what is stored, so that the effective sample size falls."""
    options = {
        "learning_rate": 5e-2,
        "max_steps": 10,
        "train_dataset": tiny_dataset(32),
        "lr_scheduler_type": "constant",
    }
    options |= {"per_device_train_batch_size": 32, "min_effective_sample_size": 0.5, "replay_fraction": 0.5}
    trainer = train(tmp_path, **options)
    lines = [line for line in trainer.state.log_history if "loss" in line]
    allowed = 4
    halved = recovered = 0
    for number, line in enumerate(lines):
        num_questions = len({replay.question.question_id for replay in trainer.batches[number]["replays"]})
        assert num_questions <= allowed
        if num_questions:
            assert num_questions == min(allowed, len(trainer.batches[number]["stored"]))
        assert line["replay/fraction_allowed"] == allowed / 8
        size = line.get("replay/effective_sample_size")
        if num_questions:
            halved += size < 0.5 and allowed > 1
            recovered += size >= 0.5 and allowed < 4
            allowed = min(4, allowed * 2) if size >= 0.5 else max(1, allowed // 2)
    assert halved
    assert recovered or allowed < 4


def test_one_question_in_a_batch_is_replayed_every_second_time(tmp_path):
    options = {"per_device_train_batch_size": 4, "max_steps": 12, "replay_fraction": 0.5, "learning_rate": 1e-3}
    trainer = train(tmp_path, **options)
    replaying = [bool(batch["replays"]) for batch in trainer.batches]
    first = replaying.index(True)
    assert first < 4
    assert replaying[first:] == [i % 2 == 0 for i in range(len(replaying) - first)]
    assert not any("less than one question" in str(line) for line in trainer.state.log_history)


class ABufferOfAUser:
    """What the protocol asked for before there was anything to know of reuse."""

    def __init__(self, buffer):
        object.__setattr__(self, "buffer", buffer)

    def __getattr__(self, name):
        if name in ("reuse", "note_reuse", "groups", "unit"):
            raise AttributeError(name)
        return getattr(self.buffer, name)

    def __setattr__(self, name, value):
        setattr(self.buffer, name, value)


@pytest.mark.parametrize(
    ("options", "missing"),
    [({}, None), ({"max_replays": 3}, "reuse"), ({"candidate_scores": "last_known"}, "reuse")],
)
def test_a_buffer_that_knows_nothing_of_reuse(tmp_path, options, missing):
    from exgrpo_trl import ExperienceBuffer

    options |= {"experience_buffer": ABufferOfAUser(ExperienceBuffer(group_size=K)), "max_steps": 4}
    if missing is None:
        trainer = make_trainer(tmp_path, **options)
        trainer.train()
        assert any(line.get("replay/fraction") for line in trainer.state.log_history)
        return
    with pytest.raises(TypeError, match=rf"it lacks {missing}"):
        make_trainer(tmp_path, **options)
