"""The right rows are replayed: which question, which completion, at what cost, with whose log-probabilities."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from tiny import completion_logps, make_trainer
from trl import GRPOTrainer

from exgrpo_trl import Candidate, CompletionSelector, ExGRPOTrainer, QuestionSampler, question_id_of


class RecordingSampler(QuestionSampler):
    """Draws as another sampler does, and keeps what was drawn."""

    def __init__(self, sampler):
        self.sampler, self.drawn = sampler, []

    def __call__(self, pool, num_questions, rng):
        self.drawn = self.sampler(pool, num_questions, rng)
        return self.drawn


class RecordingSelector(CompletionSelector):
    """Chooses as another selector does, and keeps the candidates."""

    def __init__(self, selector):
        self.selector, self.requires_scores, self.chosen_from = selector, selector.requires_scores, []

    def __call__(self, candidates, rng):
        self.chosen_from.append(candidates)
        return self.selector(candidates, rng)

    def choices_of(self, stored):
        """The candidates that these stored completions were, when they were offered; all of them, in their order."""
        for candidates in self.chosen_from:
            if candidates[0].experience is stored[0]:
                assert [candidate.experience for candidate in candidates] == list(stored)
                return candidates
        (only,) = stored
        return [Candidate(only)]


class Recorder(ExGRPOTrainer):
    """Records, per generation batch: the policy, the rows given to `model.generate`, the output."""

    def __init__(self, *args, model, **kwargs):
        self.pristine = copy.deepcopy(model)
        super().__init__(model, *args, **kwargs)
        self.batches = []
        strategies = self.replayer.strategies
        self.sampler = RecordingSampler(strategies.question_sampler)
        self.selector = RecordingSelector(strategies.completion_selector)
        self.replayer.strategies = dataclasses.replace(
            strategies, question_sampler=self.sampler, completion_selector=self.selector
        )
        generate = self.model.generate

        def counted(*args, **kwargs):
            self.generated_rows += len(kwargs["input_ids"])
            self.generated_prompts += kwargs["input_ids"].tolist()
            return generate(*args, **kwargs)

        self.model.generate = counted

    def policy(self):
        policy = copy.deepcopy(self.pristine).double()
        policy.load_state_dict(self.model.state_dict())
        return policy

    def _generate_and_score_completions(self, inputs):
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self.generated_rows, self.generated_prompts = 0, []
        policy, step = self.policy(), self.state.global_step
        rows = [dict(row) for row in inputs]
        self.sampler.drawn, self.selector.chosen_from = [], []
        output = super()._generate_and_score_completions(inputs)
        # A selector is asked where there is a choice; the other questions have one completion.
        candidates = {
            question_id: self.selector.choices_of(self.experience_buffer.completions(question_id))
            for question_id in self.sampler.drawn
        }
        self.batches.append(
            {
                "policy": policy,
                "step": step,
                "rows": rows,
                "candidates": candidates,
                "generated_rows": self.generated_rows,
                "generated_prompts": self.generated_prompts,
                "output": {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in output.items()},
            }
        )
        return output

    def prompt_ids(self, question_id):
        prompt = self.experience_buffer.question(question_id).example["prompt"]
        return self.processing_class(prompt)["input_ids"]


def replayed_rows(batch):
    return batch["output"]["is_replayed"].nonzero()[:, 0].tolist()


def row_tokens(batch, row, part="completion"):
    output = batch["output"]
    return output[f"{part}_ids"][row][output[f"{part}_mask"][row].bool()].tolist()


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "steps_per_generation": {"per_device_train_batch_size": 8, "steps_per_generation": 2},
    "num_iterations": {"num_iterations": 2},
    "several_generations_a_step": {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_stored_log_probabilities_are_those_of_the_generating_policy(tmp_path, setting):
    trainer = make_trainer(tmp_path, Recorder, max_steps=8, retire_solved=False, **SETTINGS[setting])
    trainer.train()
    policies = {batch["step"]: batch["policy"] for batch in trainer.batches}
    buffer, num_checked = trainer.experience_buffer, 0
    for question_ids in buffer.buckets().values():
        for question_id in question_ids:
            for experience in buffer.completions(question_id):
                with torch.no_grad():
                    logps, entropies = completion_logps(
                        policies[experience.policy_version],
                        trainer.prompt_ids(question_id),
                        experience.token_ids.copy(),
                    )
                np.testing.assert_allclose(experience.behavior_per_token_logps, logps.numpy(), atol=2e-5)
                assert experience.entropy == pytest.approx(entropies.mean().item(), abs=2e-5)
                assert experience.reward == 1.0
                num_checked += 1
    assert num_checked == buffer.num_completions > 10
    assert len({e.policy_version for q in buffer.buckets().values() for i in q for e in buffer.completions(i)}) > 2


def test_question_completion_and_cost_of_every_replay(tmp_path):
    trainer = make_trainer(tmp_path, Recorder, max_steps=8, retire_solved=False)
    trainer.train()
    num_replayed = 0
    for number, batch in enumerate(trainer.batches):
        rows, output = replayed_rows(batch), batch["output"]
        assert len(rows) == min(2, len(batch["candidates"]))
        assert len({row // 4 for row in rows}) == len(rows), "one stored completion in a group"
        # Nothing was generated for the stored completions, and everything for the others.
        assert batch["generated_rows"] == 16 - len(rows)
        fresh_prompts = [row_tokens(batch, row, "prompt") for row in range(16) if row not in rows]
        pad = trainer.processing_class.pad_token_id
        given = [[token for token in ids if token != pad] for ids in batch["generated_prompts"]]
        assert given == fresh_prompts
        by_prompt = {tuple(trainer.prompt_ids(q)): (q, c) for q, c in batch["candidates"].items()}
        assert len(by_prompt) == len(batch["candidates"])
        for row in rows:
            num_replayed += 1
            # All rows of the group hold the prompt of one drawn question.
            group = range(row // 4 * 4, row // 4 * 4 + 4)
            prompts = {tuple(row_tokens(batch, other, "prompt")) for other in group}
            (prompt,) = prompts
            _, candidates = by_prompt[prompt]
            tokens, chosen = row_tokens(batch, row), None
            entropies = []
            for candidate in candidates:
                with torch.no_grad():
                    _, entropy = completion_logps(batch["policy"], prompt, candidate.experience.token_ids.copy())
                entropies.append(entropy.mean().item())
                if candidate.entropy is not None:
                    assert candidate.entropy == pytest.approx(entropies[-1], abs=2e-5)
                if candidate.experience.token_ids.tolist() == tokens:
                    chosen = candidate
            assert chosen is not None, "the replayed tokens are those of a stored completion"
            lowest = candidates[int(np.argmin(entropies))]
            assert chosen is lowest, "the completion of lowest entropy under the present policy"
            assert chosen.experience.policy_version < batch["step"]
            stored = chosen.experience.behavior_per_token_logps
            behavior = output["behavior_per_token_logps"][row]
            assert behavior[: len(stored)].numpy().tolist() == stored.tolist()
            assert not behavior[len(stored) :].any()
        # Rows that are not replayed keep the questions of the dataset.
        for group in range(4):
            if group not in [row // 4 for row in rows]:
                prompt = trainer.processing_class(batch["rows"][group * 4]["prompt"])["input_ids"]
                assert all(row_tokens(batch, row, "prompt") == prompt for row in range(group * 4, group * 4 + 4))
        assert number > 0 or not rows
    assert num_replayed >= 10
    saved = sum(len(row_tokens(b, row)) for b in trainer.batches for row in replayed_rows(b))
    assert trainer.state.log_history[-2]["replay/tokens_saved"] == saved


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("most_recent", lambda candidates, scores: max(c.experience.policy_version for c in candidates)),
        ("highest_entropy", lambda candidates, scores: max(scores)[0]),
        ("lowest_negative_log_likelihood", None),
    ],
)
def test_other_selections(tmp_path, selection, expected):
    trainer = make_trainer(tmp_path, Recorder, max_steps=8, retire_solved=False, completion_selection=selection)
    trainer.train()
    num_choices = 0
    for batch in trainer.batches:
        for question_id, candidates in batch["candidates"].items():
            if len(candidates) < 2:
                continue
            prompt = trainer.prompt_ids(question_id)
            (row,) = [r for r in replayed_rows(batch) if row_tokens(batch, r, "prompt") == prompt]
            tokens = row_tokens(batch, row)
            num_choices += 1
            (chosen,) = [c for c in candidates if c.experience.token_ids.tolist() == tokens]
            with torch.no_grad():
                scores = [completion_logps(batch["policy"], prompt, c.experience.token_ids.copy()) for c in candidates]
            index = candidates.index(chosen)
            if selection == "most_recent":
                assert chosen.experience.policy_version == expected(candidates, scores)
                assert chosen.entropy is None, "nothing is scored for a selection that needs no scores"
            elif selection == "highest_entropy":
                assert index == int(np.argmax([entropy.mean() for _, entropy in scores]))
            else:
                assert index == int(np.argmin([-logps.mean() for logps, _ in scores]))
    assert num_choices >= 3


@pytest.mark.parametrize(
    "options", [{}, {"per_device_train_batch_size": 8, "steps_per_generation": 2}], ids=["aligned", "unaligned"]
)
def test_collection_costs_no_forward(tmp_path, options, monkeypatch):
    """As many forwards as GRPO makes; scoring candidates adds one per batch of candidates, and nothing else does."""
    forwards = []
    original = GRPOTrainer._get_per_token_logps_and_entropies

    @functools.wraps(original)
    def counted(trainer, *args, **kwargs):
        forwards.append(len(args[1] if len(args) > 1 else kwargs["input_ids"]))
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", counted)
    options = {"max_steps": 8} | options
    make_trainer(tmp_path / "grpo", GRPOTrainer, **options).train()
    without_replay = forwards.copy()
    forwards.clear()
    make_trainer(tmp_path / "random", completion_selection="random", retire_solved=False, **options).train()
    assert forwards == without_replay
    forwards.clear()
    scoring = make_trainer(tmp_path / "scored", retire_solved=False, **options)
    scoring.train()
    lines = [line for line in scoring.state.log_history if "loss" in line]
    batch_size = scoring.args.per_device_train_batch_size
    generations = lines[:: scoring.args.steps_per_generation]
    num_scored = [int(line["replay/candidates_scored"]) for line in generations]
    assert sum(num_scored) > 0
    assert len(forwards) == len(without_replay) + sum(-(-n // batch_size) for n in num_scored)
    assert sum(forwards) == sum(without_replay) + sum(num_scored)


def test_ratio_is_one_while_the_policy_has_not_moved(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=6, learning_rate=0.0, retire_solved=False)
    trainer.train()
    lines = [line for line in trainer.state.log_history if line.get("replay/fraction", 0) > 0]
    assert lines
    for line in lines:
        assert line["replay/importance_ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert line["replay/importance_ratio_max"] == pytest.approx(1, abs=1e-4)
        assert line["replay/effective_sample_size"] == pytest.approx(1, abs=1e-5)


def test_a_replayed_question_is_scored_with_its_own_row(tmp_path):
    seen = []

    def reward(prompts, completions, uid, answer, **kwargs):
        seen.extend(zip(prompts, uid, answer, strict=True))
        return [float(c[:1].isalpha()) for c in completions]

    trainer = make_trainer(tmp_path, Recorder, max_steps=6, reward_funcs=reward, retire_solved=False)
    trainer.train()
    assert any(replayed_rows(batch) for batch in trainer.batches)
    for prompt, uid, answer in seen:
        i = int(uid[1:])
        assert prompt == f"{i} + {i * i} = "
        assert answer == i + i * i


def test_a_stored_completion_that_no_longer_counts_is_evicted(tmp_path):
    steps_seen = []

    def fickle_reward(completions, trainer_state, **kwargs):
        steps_seen.append(trainer_state.global_step)
        letters = "abcdefghijklmnopqrst" if trainer_state.global_step < 3 else "uvwxyz"
        return [float(c[:1] in letters and c != "") for c in completions]

    trainer = make_trainer(tmp_path, max_steps=4, reward_funcs=fickle_reward, retire_solved=False, learning_rate=0.0)
    trainer.train()
    before, after = trainer.state.log_history[2], trainer.state.log_history[3]
    assert before["replay/evicted"] == 0
    assert before["replay/completions"] > 2
    assert after["replay/reward"] == 0.0
    assert trainer.experience_buffer.metrics()["evicted"] == 2, "both replayed completions of step 4, and no other"


def test_collection_buckets_and_retirement(tmp_path):
    """The buffer after a run equals a plain replay of the rules over what was generated."""
    trainer = make_trainer(tmp_path, Recorder, max_steps=8, learning_rate=2e-3)
    trainer.train()
    stored, buckets, retired = {}, {}, []
    prompts = trainer.train_dataset["prompt"]
    question_of = {tuple(trainer.processing_class(prompt)["input_ids"]): question_id_of(prompt) for prompt in prompts}
    for batch in trainer.batches:
        rows = replayed_rows(batch)
        for group in range(4):
            question_id = question_of[tuple(row_tokens(batch, group * 4, "prompt"))]
            texts = [
                trainer.processing_class.decode(row_tokens(batch, row), skip_special_tokens=True)
                for row in range(group * 4, group * 4 + 4)
            ]
            correct = [text[:1].isalpha() and text[:1] <= "t" for text in texts]
            if question_id in retired or not any(correct):
                continue
            if all(correct):
                retired.append(question_id)
                stored.pop(question_id, None)
                buckets.pop(question_id, None)
                continue
            kept = stored.setdefault(question_id, [])
            for i in range(4):
                tokens = row_tokens(batch, group * 4 + i)
                if correct[i] and group * 4 + i not in rows and tokens not in kept:
                    kept.append(tokens)
            buckets[question_id] = sum(correct)
    buffer = trainer.experience_buffer
    assert list(buffer.retired) == retired
    assert {q: s for s, questions in buffer.buckets().items() for q in questions} == buckets
    for question_id, tokens in stored.items():
        assert [e.token_ids.tolist() for e in buffer.completions(question_id)] == tokens
    assert len(buckets) >= 4
    assert retired
    assert buffer.check_valid()[0]


def test_the_last_batch_is_collected_when_training_returns(tmp_path):
    trainer = make_trainer(tmp_path, Recorder, max_steps=1, retire_solved=False)
    trainer.train()
    (batch,) = trainer.batches
    texts = trainer.processing_class.batch_decode(batch["output"]["completion_ids"], skip_special_tokens=True)
    correct = np.array([t[:1].isalpha() and t[:1] <= "t" for t in texts]).reshape(4, 4)
    assert correct.any()
    assert trainer.experience_buffer.num_questions == correct.any(axis=1).sum()
    assert trainer.experience_buffer.num_completions == correct.sum()
