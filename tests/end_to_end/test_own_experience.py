"""Completions from elsewhere: scored by the policy that is about to be trained, stored, and replayed."""

import copy
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
from agents import (
    Rollouts,
    Rooms,
    Watched,
    agent_options,
    last_letter_reward,
    room_dataset,
    skip_unless_able,
    tool_dataset,
)
from datasets import Dataset, IterableDataset, concatenate_datasets
from packaging.version import Version
from ranks import assert_engaged, run_ranks, skip_unless_trainable
from tiny import (
    completion_logps,
    first_letter_reward,
    lora_config,
    make_trainer,
    save_tiny_model,
    tiny_arguments,
    tiny_dataset,
    tiny_model,
    tiny_tokenizer,
)
from transformers import TrainerCallback

import exgrpo_trl
from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer, ExperienceBuffer, ExperienceBufferError, question_id_of
from exgrpo_trl.records import prompt_hash

K = 4
TEXTS = ["a", "bcd", "ef gh", "i", "jk", "lmnopq", "r", "st"]


def traces(dataset=None, texts=TEXTS):
    """A successful completion, text without log-probabilities, of each of the first questions of a dataset."""
    dataset = tiny_dataset() if dataset is None else dataset
    rows = [
        {"prompt": prompt, "completion": text, "reward": 1.0}
        for prompt, text in zip(dataset["prompt"][: len(texts)], texts, strict=True)
    ]
    return Dataset.from_list(rows)


def own_of(buffer):
    return {question.example["prompt"]: experience for question, _, experience in buffer if experience.is_scored}


class Replayed(TrainerCallback):
    """What each step has replayed: completions, and policy versions of the batches."""

    def __init__(self):
        self.steps, self.versions = [], []

    def bind(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([replay.experience for replay in self.trainer.replayer.batch.replays])
        self.versions.append(self.trainer.replayer.batch.policy_version)


# What the policy thinks of them


KINDS = {
    "text": {},
    "chat": {"train_dataset": "chat"},
    "lora": {"peft_config": "lora"},
    "temperature": {"temperature": 0.7},
    "small_batches": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_a_forward(tmp_path, kind):
    options = dict(KINDS[kind])
    if kind == "chat":
        options["train_dataset"] = tiny_dataset(conversational=True)
    if kind == "lora":
        options["peft_config"] = lora_config()
    trainer = make_trainer(tmp_path, max_steps=2, **options)
    policy = copy.deepcopy(trainer.model).double().eval()
    report = trainer.score_experience(traces(trainer.train_dataset))
    assert (report.num_stored, report.num_scored, report.refused) == (8, 8, ())
    tokenizer, questions = tiny_tokenizer(), 0
    for (question, bucket, experience), text in zip(
        sorted(trainer.experience_buffer, key=lambda item: str(item[0].example["answer"]).zfill(9)), TEXTS, strict=True
    ):
        prompt = question.example["prompt"]
        rendered = f"user: {prompt[0]['content']}\nassistant:" if kind == "chat" else prompt
        prompt_ids = tokenizer(rendered)["input_ids"]
        assert experience.token_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert experience.prompt_hash == prompt_hash(prompt_ids)
        with torch.no_grad():
            logps, entropies = logps_at(policy, prompt_ids, experience.token_ids, options.get("temperature", 1.0))
        np.testing.assert_allclose(experience.behavior_per_token_logps, logps, atol=2e-5)
        assert experience.entropy == pytest.approx(entropies.mean().item(), abs=1e-5)
        assert (experience.is_scored, experience.policy_version, experience.reward, bucket) == (True, 0, 1.0, K // 2)
        questions += 1
    assert questions == 8
    replayed = Replayed().bind(trainer)
    trainer.train()
    # The first batch replays them, by the policy that scored them: every ratio is 1.
    assert len(replayed.steps[0]) == 2
    assert all(experience.is_scored for experience in replayed.steps[0])
    first = trainer.state.log_history[0]
    for name in ("mean", "max", "q10", "q50", "q90"):
        assert first[f"replay/importance_ratio_{name}"] == pytest.approx(1, abs=1e-4)
    assert trainer.state.log_history[1]["replay/importance_ratio_max"] > 1.01
    assert replayed.versions == [1, 2], "above that of what was scored"


def logps_at(policy, prompt_ids, token_ids, temperature):
    """Log-probabilities and entropies in the precision of the policy."""
    ids = torch.tensor([*prompt_ids, *token_ids.tolist()])
    logits = policy(input_ids=ids[None]).logits[0, len(prompt_ids) - 1 : -1] / temperature
    log_probs = torch.log_softmax(logits, -1)
    return log_probs.gather(1, ids[len(prompt_ids) :, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


def test_text_has_the_tokens_that_a_model_generates(tmp_path):
    """What another run has generated, given as text: the same tokens, log-probabilities and prompts."""
    for is_chat in (False, True):
        dataset = tiny_dataset(conversational=is_chat)
        options = {"train_dataset": dataset, "max_completion_length": 24, "retire_solved": False}
        first = make_trainer(tmp_path, max_steps=8, learning_rate=0.0, replay_fraction=0.01, **options)
        first.train()
        generated = [
            (question, experience)
            for question, _, experience in first.experience_buffer
            if (experience.token_ids[:-1] > 2).all() and experience.token_ids[-1] not in (0, 2)
        ]
        ended = [bool(experience.token_ids[-1] == 1) for _, experience in generated]
        assert sum(ended) > 2 < len(ended) - sum(ended)
        tokenizer = tiny_tokenizer()
        second = make_trainer(tmp_path, **options)
        for add_eos in (True, False):
            rows = [
                {
                    "prompt": question.example["prompt"],
                    "completion": "".join(
                        token for token in tokenizer.convert_ids_to_tokens(experience.token_ids) if token != "<eos>"
                    ),
                    "reward": 1.0,
                }
                for (question, experience), is_ended in zip(generated, ended, strict=True)
                if is_ended == add_eos
            ]
            assert second.score_experience(Dataset.from_list(rows), add_eos=add_eos).num_stored == len(rows)
        found = {(q.question_id, e.token_bytes): e for q, _, e in second.experience_buffer}
        assert len(found) == len(generated)
        for question, experience in generated:
            again = found[question.question_id, experience.token_bytes]
            assert again.prompt_hash == experience.prompt_hash
            np.testing.assert_allclose(
                again.behavior_per_token_logps, experience.behavior_per_token_logps, atol=2e-5, rtol=1e-4
            )
            assert again.entropy == pytest.approx(experience.entropy, abs=1e-4)


def test_given_log_probabilities_are_kept(tmp_path):
    rows = [row | {"behavior_per_token_logps": 0.0 if i else None} for i, row in enumerate(traces().to_list())]
    trainer = make_trainer(tmp_path, max_steps=2, candidate_scores="last_known")
    report = trainer.score_experience(Dataset.from_list(rows))
    assert (report.num_stored, report.num_scored) == (8, 1)
    buffer = trainer.experience_buffer
    for number, row in enumerate(rows):
        [experience] = buffer.completions(question_id_of(row["prompt"]))
        logps, entropies = completion_logps(
            tiny_model(), tiny_tokenizer()(row["prompt"])["input_ids"], experience.token_ids.copy()
        )
        known = buffer.reuse(experience)
        assert known.entropy == pytest.approx(entropies.mean().item(), abs=1e-4)
        assert known.negative_log_likelihood == pytest.approx(-logps.mean().item(), abs=1e-4)
        assert known.scored_at == 0
        assert experience.is_scored == (number == 0)
        if number:
            assert not experience.behavior_per_token_logps.any(), "LUFFY's behaviour policy is certain"
            assert np.isnan(experience.entropy)
    trainer.train()
    # Eq. 4 at a behaviour policy of probability 1: the ratio is the probability itself.
    assert 0 < trainer.state.log_history[0]["replay/importance_ratio_max"] <= 1 + 1e-4


# What is refused


def refusing_rows():
    dataset = tiny_dataset()
    good = {"prompt": dataset[0]["prompt"], "uid": "q0", "completion": "a", "completion_ids": None, "reward": 1.0}
    good |= {"behavior_per_token_logps": None}
    return {
        None: good,
        "its completion has 9 tokens, more than max_completion_length=8": good | {"completion": "a" * 8},
        "its completion is empty": good | {"completion": ""},
        "its token id 49 is outside of the vocabulary (0..48)": good | {"completion_ids": [49]},
        "an end token is inside its completion, as token 1 of 2": good | {"completion_ids": [1, 1]},
        "its question is not in the training dataset": good | {"prompt": "9 + 9 = ", "uid": "q99"},
        "it has 1 log-probabilities for 2 tokens": good | {"completion": "b", "behavior_per_token_logps": [0.0]},
        "its reward 0 is below success_threshold=1": good | {"completion": "c", "reward": 0.0},
        "its question has a completion of the same tokens already": good,
        "its question has retired from the buffer": good | {"prompt": dataset[1]["prompt"], "uid": "q1"},
        "characters that the tokenizer does not know": good | {"completion": "Z"},
        "it has no completion": good | {"completion": None},
    }


@pytest.mark.parametrize("column", [None, "uid"])
def test_rows_are_refused_with_their_reason(tmp_path, caplog, column):
    trainer = make_trainer(tmp_path, question_id_column=column)
    question_id = "q1" if column else question_id_of(tiny_dataset()[1]["prompt"])
    trainer.experience_buffer.retire(question_id)
    assert trainer.model.config.vocab_size == 49
    rows = refusing_rows()
    report = trainer.score_experience(Dataset.from_list(list(rows.values())))
    assert (report.num_rows, report.num_stored, report.num_scored) == (len(rows), 1, 1)
    assert [row for row, _ in report.refused] == list(range(1, len(rows)))
    for (_, reason), expected in zip(report.refused, list(rows)[1:], strict=True):
        assert expected in reason
    assert str(report) in caplog.text
    assert len(trainer.experience_buffer) == 1
    again = trainer.score_experience(Dataset.from_list([rows[None]]))
    assert again.refused[0].reason == "its question has a completion of the same tokens already"


def test_prompt_and_completion_must_fit_into_the_model(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.model.config.max_position_embeddings = 10
    report = trainer.score_experience(traces(texts=["a", "abcd"]))
    assert [tuple(row) for row in report.refused] == [
        (1, "its prompt and completion have 13 tokens, and the model takes 10")
    ]


def test_a_question_is_found_by_its_id_alone(tmp_path):
    rows = [{"uid": f"q{i}", "completion": "a", "reward": 1.0} for i in (0, 3, 99)]
    rows.append({"uid": None, "completion": "a", "reward": 1.0})
    trainer = make_trainer(tmp_path, question_id_column="uid")
    report = trainer.score_experience(Dataset.from_list(rows))
    assert [row for row, _ in report.refused] == [2, 3]
    assert "question_id_column='uid' has no value" in report.refused[1].reason
    assert trainer.experience_buffer.question("q3").example == tiny_dataset()[3], "the row of the training dataset"
    wrong = Dataset.from_list([rows[0] | {"prompt": "another"}])
    assert "its prompt is not that of question 'q0'" in trainer.score_experience(wrong).refused[0].reason


def test_rows_that_share_a_prompt_need_their_columns(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["a"] * 4 + ["b"] * 4, "answer": [*range(4), *[0] * 4]})
    trainer = make_trainer(tmp_path, train_dataset=dataset)
    rows = [{"prompt": "a", "answer": 1}, {"prompt": "a", "answer": 9}, {"prompt": "b", "answer": 0}]
    report = trainer.score_experience(Dataset.from_list([row | {"completion": "x", "reward": 1.0} for row in rows]))
    assert [row for row, _ in report.refused] == [1]
    assert "where several rows share a prompt, by all columns" in report.refused[0].reason
    assert sorted(str(question.example) for question, _, _ in trainer.experience_buffer) == [
        "{'prompt': 'a', 'answer': 1}",
        "{'prompt': 'b', 'answer': 0}",
    ]


def test_a_dataset_that_was_assigned_since(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train_dataset = Dataset.from_dict({"prompt": [f"other {i}" for i in range(8)]})
    report = trainer.score_experience(concatenate_datasets([traces(trainer.train_dataset), traces()]))
    assert [row for row, _ in report.refused] == list(range(8, 16))
    replayed = Replayed().bind(trainer)
    trainer.train()
    assert all(experience.is_scored for experience in replayed.steps[0])
    assert len(replayed.steps[0]) == 2


def test_what_the_policy_rules_out_is_refused(tmp_path):
    class Forbidding(ExGRPOTrainer):
        def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, **kwargs):
            logps, *rest = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, **kwargs
            )
            forbidden = input_ids[:, -logits_to_keep:] == tiny_tokenizer().convert_tokens_to_ids("b")
            return logps.masked_fill(forbidden, -torch.inf), *rest

    trainer = make_trainer(tmp_path, Forbidding)
    report = trainer.score_experience(traces())
    assert [tuple(row) for row in report.refused] == [
        (1, "the present policy gives one of its tokens, or one of its group, no probability")
    ]
    assert len(trainer.experience_buffer) == report.num_scored == 7


def test_trainers_that_cannot_take_them(tmp_path):
    with pytest.raises(ValueError, match="switched off"):
        make_trainer(tmp_path, replay_fraction=0).score_experience(traces())
    trainer = make_trainer(tmp_path)
    with pytest.raises(TypeError, match=r"Expected a datasets\.Dataset, got list"):
        trainer.score_experience([])
    with pytest.raises(ExperienceBufferError, match="lacks the columns completion"):
        trainer.score_experience(tiny_dataset())
    with pytest.raises(ValueError, match=r"`bucket` must lie in 0\.\.4"):
        trainer.score_experience(traces(), bucket=5)
    assert len(trainer.experience_buffer) == 0
    options = {"replay_rewards": "stored", "reward_funcs": [first_letter_reward, last_letter_reward]}
    with pytest.raises(ValueError, match="replay_rewards='recomputed'"):
        make_trainer(tmp_path, **options).score_experience(traces())
    with pytest.raises(NotImplementedError, match="has a rollout_func"):
        make_trainer(tmp_path, **agent_options(rollout_func=Rollouts())).score_experience(traces(tool_dataset()))
    skip_unless_able("environments")
    with pytest.raises(NotImplementedError, match="has environments"):
        make_trainer(
            tmp_path, **agent_options(environment_factory=Rooms(), train_dataset=room_dataset())
        ).score_experience(traces(tool_dataset()))


# Where they go


def test_stored_rewards(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, replay_rewards="stored")
    trainer.score_experience(traces())
    assert {e.details.rewards["first_letter_reward"] for _, _, e in trainer.experience_buffer} == {1.0}
    trainer.train()
    assert trainer.state.log_history[0]["replay/reward"] == 1


def test_whole_groups(tmp_path):
    rows = [
        {"prompt": row["prompt"], "completion": text, "reward": float(text < "c"), "group": number}
        for number, row in enumerate(tiny_dataset(8).to_list())
        for text in "abyz"
    ]
    trainer = make_trainer(
        tmp_path, max_steps=2, replay_unit="group", max_replays=1, train_dataset=tiny_dataset(8), retire_solved=False
    )
    report = trainer.score_experience(Dataset.from_list(rows[:-1]))
    assert (report.num_stored, report.num_questions) == (28, 7)
    assert {row for row, _ in report.refused} == {28, 29, 30}
    replayed = Replayed().bind(trainer)
    trainer.train()
    assert len(replayed.steps[0]) == 2 * K
    assert all(experience.is_scored for experience in replayed.steps[0])
    assert trainer.state.log_history[0]["replay/importance_ratio_max"] == pytest.approx(1, abs=1e-4)


def test_limits_are_told(tmp_path):
    trainer = make_trainer(tmp_path, buffer_capacity=5)
    report = trainer.score_experience(traces())
    assert (report.num_stored, report.num_evicted, len(trainer.experience_buffer)) == (8, 3, 5)


def test_a_stored_question_keeps_its_bucket(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, retire_solved=False)
    trainer.train()
    before = {q: bucket for bucket, ids in trainer.experience_buffer.buckets().items() for q in ids}
    newest = max(experience.policy_version for _, _, experience in trainer.experience_buffer)
    report = trainer.score_experience(traces(texts=["zzz"] * 16), bucket=1)
    after = {q: bucket for bucket, ids in trainer.experience_buffer.buckets().items() for q in ids}
    assert report.num_stored == 16
    assert len(set(before.values()) - {1}) > 0
    assert after == dict.fromkeys(after, 1) | before
    assert {e.policy_version for _, _, e in trainer.experience_buffer if e.is_scored} == {max(4, newest + 1)}


def test_a_stream(tmp_path):
    if Version(trl.__version__) < Version("1.15"):
        pytest.skip(f"trl {trl.__version__} does not take iterable datasets")
    rows = tiny_dataset().to_list()
    trainer = make_trainer(
        tmp_path,
        max_steps=2,
        train_dataset=IterableDataset.from_generator(lambda: iter(rows)),
        drop_retired_questions=False,
    )
    own = [row | {"completion": "a", "reward": 1.0} for row in rows[:8]]
    report = trainer.score_experience(Dataset.from_list(own))
    assert report.num_stored == 8
    [question] = [q for q, _, _ in trainer.experience_buffer if q.example["uid"] == "q0"]
    assert question.example == rows[0]
    trainer.train()
    assert trainer.state.log_history[0]["replay/questions"] == 8


def test_prompts_with_tools(tmp_path):
    skip_unless_able("tools")
    tools = Watched()
    trainer = make_trainer(tmp_path, **agent_options(tools=tools.tools, max_steps=2))
    report = trainer.score_experience(traces(tool_dataset()))
    assert report.num_stored == 8, report
    tokenizer = trainer.processing_class
    for question, _, experience in trainer.experience_buffer:
        rendered = tokenizer.apply_chat_template(
            question.example["prompt"], tools=tools.tools, add_generation_prompt=True, tokenize=False
        )
        assert rendered.startswith("tools:")
        assert experience.prompt_hash == prompt_hash(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    replayed = Replayed().bind(trainer)
    trainer.train()
    assert any(experience.is_scored for experience in replayed.steps[0])
    assert trainer.state.log_history[0]["replay/importance_ratio_max"] == pytest.approx(1, abs=1e-3)


# Runs


def test_a_checkpoint_has_them(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "retire_solved": False}
    trainer = make_trainer(tmp_path, **options)
    trainer.score_experience(traces())
    trainer.train()
    of_run = [line.get("loss") for line in trainer.state.log_history]
    checkpoint = tmp_path / "checkpoint-2" / "experience_buffer"
    saved = ExperienceBuffer.load(checkpoint)
    assert len(own_of(saved)) == 8
    assert all(experience.policy_version >= 1 for _, _, experience in saved if not experience.is_scored)
    resumed = make_trainer(tmp_path, **options)
    resumed.score_experience(traces(texts=["z"]))  # a script does it each time
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [line.get("loss") for line in resumed.state.log_history] == of_run
    assert own_of(resumed.experience_buffer).keys() == own_of(trainer.experience_buffer).keys()


class Scoring(TrainerCallback):
    """Scores experience once the training has begun."""

    def __init__(self, rows, at=0):
        self.rows, self.at, self.reports = rows, at, []

    def bind(self, trainer):
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at == 0:
            self.reports.append(self.trainer.score_experience(self.rows))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            self.reports.append(self.trainer.score_experience(self.rows))


@pytest.mark.parametrize("at", [0, 2])
def test_while_a_run_goes_on(tmp_path, at):
    trainer = make_trainer(tmp_path, max_steps=4, retire_solved=False)
    scoring = Scoring(traces(texts=["zz"] * 16), at).bind(trainer)
    replayed = Replayed().bind(trainer)
    trainer.train()
    assert [report.num_scored for report in scoring.reports] == [16]
    assert {experience.policy_version for experience in own_of(trainer.experience_buffer).values()} <= {at}
    assert replayed.versions == [0, 1, 2, 3]
    assert any(experience.is_scored for experiences in replayed.steps[at:] for experience in experiences)


def test_a_progress_bar(tmp_path, capsys):
    make_trainer(tmp_path, disable_tqdm=False).score_experience(traces())
    assert re.search(r"Scoring experience: 100%.*8/8", capsys.readouterr().err)
    make_trainer(tmp_path).score_experience(traces())
    assert "Scoring" not in capsys.readouterr().err


def test_a_buffer_of_text_is_replayed(tmp_path):
    """`from_dataset` without a trainer: the trainer knows prompts and tokens again, and says where it does not."""
    rows = [row | {"behavior_per_token_logps": -0.5} for row in traces().to_list()]
    rows.append(rows[0] | {"prompt": "9 + 9 = "})
    buffer = ExperienceBuffer.from_dataset(Dataset.from_list(rows), group_size=K, tokenizer=tiny_tokenizer())
    trainer = make_trainer(tmp_path, max_steps=1, experience_buffer=buffer)
    replayed = Replayed().bind(trainer)
    trainer.train()
    assert len(replayed.steps[0]) == 2
    with pytest.raises(ExperienceBufferError, match="another tokenizer"):
        make_trainer(tmp_path, experience_buffer=buffer, processing_class=tiny_tokenizer(extra="_"))


def test_rows_of_no_question_are_told_by_the_trainer(tmp_path, caplog):
    rows = [row | {"behavior_per_token_logps": -0.5} for row in traces().to_list()]
    rows.append(rows[0] | {"prompt": "9 + 9 = "})
    buffer = ExperienceBuffer.from_dataset(Dataset.from_list(rows), group_size=K, tokenizer=tiny_tokenizer())
    make_trainer(tmp_path, max_steps=1, experience_buffer=buffer).train()
    assert "1 of 9 questions are not in the training dataset" in caplog.text


# The examples of the docs


def test_the_examples_of_the_docs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "own_experience.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    [printed] = re.findall(r"^```text\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    save_tiny_model(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny = tiny_arguments("", max_steps=2, num_generations=8, per_device_train_batch_size=8, log_replay="all")
    del tiny["output_dir"]
    monkeypatch.setattr(exgrpo_trl, "ExGRPOConfig", functools.partial(ExGRPOConfig, **tiny))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        # A tiny model, which is right now and then.
        block = block.replace('"Qwen/Qwen2.5-0.5B"', repr(str(tmp_path / "model")))
        exec(block.replace("completion.startswith(expected)", "'a' <= completion[:1] <= 't'"), names)
    assert printed in capsys.readouterr().out
    assert len(names["first"].experience_buffer) > 4
    assert names["second"].state.log_history[0]["replay/questions"] > 1
    assert len(names["third"].experience_buffer) == len(names["hard"]) > 0
    assert len(names["report"].refused) == 2
    assert names["trainer"].state.log_history[0]["replay/importance_ratio_max"] == pytest.approx(1, abs=1e-4)
    assert not any(e.behavior_per_token_logps.any() for _, _, e in names["luffy"].experience_buffer)


# Several processes


def seeded_trainer(folder, **options):
    model = tiny_model()  # to make it draws random numbers, the first time
    torch.manual_seed(0)  # of the adapters
    return make_trainer(folder, model=model, **options)


def score_and_train(mode, options, folder, lora, during):
    trainer = seeded_trainer(
        folder,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        peft_config=lora_config() if lora else None,
        optim="sgd",
        **options,
    )
    rows = traces(texts=["abc", "de", "f", "ghijk", "", "l", "mn", "opqrst"])
    if during:
        with pytest.raises(NotImplementedError, match=r"has not prepared the model.*on_train_begin"):
            trainer.score_experience(rows)
        scoring = Scoring(rows).bind(trainer)
    else:
        report = trainer.score_experience(rows)
    found = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0 and trainer.accelerator.is_main_process:
                found.extend(
                    (
                        question.question_id,
                        bucket,
                        e.token_ids.tolist(),
                        e.behavior_per_token_logps.tolist(),
                        e.entropy,
                    )
                    for question, bucket, e in trainer.experience_buffer
                    if e.is_scored
                )

    trainer.add_callback(Look())
    trainer.train()
    assert_engaged(trainer, mode, 2)
    report = scoring.reports[0] if during else report
    first = trainer.state.log_history[0]["replay/importance_ratio_max"] if trainer.accelerator.is_main_process else 1
    result = {"report": str(report), "found": found, "ratio": first}
    Path(folder, f"result{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("mode", "lora"), [("ddp", False), ("ddp", True), ("fsdp2", False), ("zero2", False), ("zero3", False)]
)
def test_two_processes_do_what_one_does(tmp_path, mode, lora):
    skip_unless_trainable(mode, lora)
    run_ranks(score_and_train, str(tmp_path), lora, mode != "ddp", folder=tmp_path, mode=mode)
    ranks = [json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in range(2)]
    assert ranks[0]["report"] == ranks[1]["report"]
    assert "7 of 8 rows are stored" in ranks[0]["report"]
    assert ranks[0]["ratio"] == pytest.approx(1, abs=1e-4)
    single = seeded_trainer(tmp_path / "single", peft_config=lora_config() if lora else None)
    rows = traces(texts=["abc", "de", "f", "ghijk", "", "l", "mn", "opqrst"])
    assert str(single.score_experience(rows)) == ranks[0]["report"]
    assert len(ranks[0]["found"]) == 7
    for (question, bucket, experience), found in zip(single.experience_buffer, ranks[0]["found"], strict=True):
        assert found[:3] == [question.question_id, bucket, experience.token_ids.tolist()]
        np.testing.assert_allclose(found[3], experience.behavior_per_token_logps, atol=1e-5)
        assert found[4] == pytest.approx(experience.entropy, abs=1e-5)
