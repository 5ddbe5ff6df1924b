"""Stored rows are compared with the dataset as it is now; a question is its prompt and what its reward depends on."""

import collections
import shutil

import pytest
import trl
from datasets import Dataset, IterableDataset
from packaging.version import Version
from ranks import run_ranks
from same_rollouts import left_out
from tiny import CHAT_TEMPLATE, first_letter_reward, make_trainer, tiny_tokenizer

from exgrpo_trl import ExperienceBuffer, question_id_of
from exgrpo_trl.questions import TrainingQuestions

TAKES_STREAMS = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="TRL streams datasets since a later release"
)


def questions(num_rows=16, version="old", conversational=False, system=None, **columns):
    prompts = [f"{i} + {i} = " for i in range(num_rows)]
    if conversational:
        first = [] if system is None else [{"role": "system", "content": system}]
        prompts = [[*first, {"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict({"prompt": prompts, "version": [version] * num_rows, **columns})


@pytest.fixture
def told(monkeypatch):
    from exgrpo_trl import replayer, trainer

    messages = []
    for module in (replayer, trainer):
        monkeypatch.setattr(module.logger, "warning", lambda message, *args: messages.append(message))
    return messages


def lines_of(trainer, after=0):
    return [line for line in trainer.state.log_history if "loss" in line and line["step"] > after]


def fractions(trainer, after=0):
    return [line["replay/fraction"] for line in lines_of(trainer, after)]


OPTIONS = {"retire_solved": False, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 4}


def first_run(output_dir, dataset, **options):
    trainer = make_trainer(output_dir, train_dataset=dataset, max_steps=4, **OPTIONS | options)
    trainer.train()
    assert trainer.experience_buffer.num_questions > 4
    return trainer


def resumed(output_dir, dataset, **options):
    trainer = make_trainer(output_dir, train_dataset=dataset, max_steps=8, **OPTIONS | options)
    trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-4"))
    return trainer


def test_rewards_see_the_present_row(tmp_path):
    versions = []

    def reward(completions, version, **kwargs):
        versions.append(set(version))
        return first_letter_reward(completions)

    first_run(tmp_path, questions(version="old"), reward_funcs=reward)
    versions.clear()
    trainer = resumed(tmp_path, questions(version="corrected"), reward_funcs=reward)
    assert versions == [{"corrected"}] * 4
    assert min(fractions(trainer, after=4)) == 0.5


def test_a_column_may_be_added(tmp_path):
    def weighted(completions, weight, **kwargs):
        assert set(weight) == {2.5}
        return first_letter_reward(completions)

    first_run(tmp_path, questions())
    trainer = resumed(tmp_path, questions(weight=[2.5] * 16), reward_funcs=[first_letter_reward, weighted])
    assert min(fractions(trainer, after=4)) == 0.5


def test_a_column_may_be_removed(tmp_path):
    first_run(tmp_path, questions(note=["x"] * 16))

    def reward(completions, **kwargs):
        assert "note" not in kwargs
        return first_letter_reward(completions)

    assert min(fractions(resumed(tmp_path, questions(), reward_funcs=reward), after=4)) == 0.5


def replayed_prompts(trainer_class=None):
    """A reward function that keeps the prompts of every batch."""
    seen = []

    def reward(prompts, completions, **kwargs):
        seen.append(collections.Counter(str(prompt) for prompt in prompts))
        return first_letter_reward(completions)

    return reward, seen


def test_questions_that_are_gone_are_not_replayed(tmp_path, told):
    first = first_run(tmp_path, questions(16))
    stored = {question.example["prompt"] for question, _, _ in first.experience_buffer.items()}
    reward, seen = replayed_prompts()
    trainer = resumed(tmp_path, questions(8), reward_funcs=reward)
    gone = stored - set(questions(8)["prompt"])
    assert gone
    assert not any(prompt in batch for prompt in gone for batch in seen)
    assert max(fractions(trainer, after=4)) == 0.5
    (message,) = [message for message in told if "not in the training dataset" in message]
    assert f"{len(gone)} of {len(stored)} questions" in message
    assert gone <= {question.example["prompt"] for question, _, _ in trainer.experience_buffer.items()}, (
        "nothing is lost"
    )
    saved = ExperienceBuffer.load(tmp_path / "checkpoint-8" / "experience_buffer")
    assert saved.num_completions == trainer.experience_buffer.num_completions


def test_none_of_the_questions_is_left(tmp_path, told):
    first_run(tmp_path, questions(16))
    other = Dataset.from_dict({"prompt": [f"{i} - {i} = " for i in range(16)], "version": [""] * 16})
    trainer = resumed(tmp_path, other)
    assert fractions(trainer, after=4)[0] == 0
    assert max(fractions(trainer, after=4)[1:]) == 0.5, "new successes are replayed"
    assert any("not in the training dataset" in message for message in told)


def test_a_reworded_prompt_is_another_question(tmp_path, told):
    column = {"uid": [f"q{i}" for i in range(16)]}
    first_run(tmp_path, questions(**column), question_id_column="uid")
    reworded = questions(**column)
    reworded = reworded.map(lambda row: {"prompt": "so, " + row["prompt"]})
    trainer = resumed(tmp_path, reworded, question_id_column="uid")
    (message,) = [message for message in told if "other tokens" in message]
    assert "are not replayed" in message
    assert fractions(trainer, after=4)[0] == 0


SYSTEM = {"conversational": True, "system": "be brief"}
TEMPLATES = {
    "another_system_prompt": ({"conversational": True, "system": "be long"}, {}, {}),
    "another_template": (SYSTEM, {"chat_template": CHAT_TEMPLATE.replace("assistant:", "answer:")}, {}),
    "template_kwargs": (SYSTEM, {}, {"chat_template_kwargs": {"add_generation_prompt": False, "shout": True}}),
}
SHOUTING = CHAT_TEMPLATE.replace("assistant:", "assistant{% if shout %}!{% endif %}:")


@pytest.mark.parametrize("change", TEMPLATES)
def test_another_rendering_is_not_replayed(tmp_path, told, change):
    data, tokenizer, options = TEMPLATES[change]
    template = SHOUTING if change == "template_kwargs" else CHAT_TEMPLATE
    if change == "template_kwargs":
        options = {"chat_template_kwargs": {"shout": True}}
    first_run(tmp_path, questions(**SYSTEM, uid=[f"q{i}" for i in range(16)]), question_id_column="uid",
              processing_class=tiny_tokenizer(template))  # fmt: skip
    trainer = resumed(
        tmp_path, questions(**data, uid=[f"q{i}" for i in range(16)]), question_id_column="uid",
        processing_class=tiny_tokenizer(**{"chat_template": template} | tokenizer), **options,
    )  # fmt: skip
    assert any("renders to other tokens" in message for message in told)
    assert fractions(trainer, after=4)[0] == 0
    assert max(fractions(trainer, after=4)) == 0.5, "what is generated for the new prompt is replayed"


def test_a_template_that_renders_the_same_is_the_same(tmp_path, told):
    first_run(tmp_path, questions(**SYSTEM))
    same = CHAT_TEMPLATE.replace("{% for", "{# a comment #}{% for")
    trainer = resumed(tmp_path, questions(**SYSTEM), processing_class=tiny_tokenizer(same))
    assert min(fractions(trainer, after=4)) == 0.5
    assert not any("other tokens" in message for message in told)


def test_an_imported_buffer_is_compared_as_well(tmp_path, told):
    first = first_run(tmp_path / "first", questions(16))
    copied = ExperienceBuffer.from_dataset(first.experience_buffer.to_dataset(), group_size=4, retire_solved=False)
    trainer = make_trainer(
        tmp_path / "second", train_dataset=questions(8), experience_buffer=copied, max_steps=2, **OPTIONS
    )
    trainer.train()
    assert fractions(trainer)[0] == 0.5
    assert any("not in the training dataset" in message for message in told)


def resume_on_ranks(mode, mode_options, output_dir):
    versions = []

    def reward(completions, version, **kwargs):
        versions.append(set(version))
        return first_letter_reward(completions)

    trainer = make_trainer(
        output_dir + "/resumed", train_dataset=questions(12, "corrected"), max_steps=8, reward_funcs=reward,
        per_device_train_batch_size=8, **OPTIONS, **mode_options,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=output_dir + "/checkpoint-4")
    assert trainer.accelerator.num_processes == 2
    assert versions == [{"corrected"}] * 4
    if trainer.accelerator.is_main_process:
        assert min(fractions(trainer, after=4)) == 0.5


def test_two_processes_see_the_present_rows(tmp_path):
    # Old transformers goes on with the batch size of the checkpoint.
    first_run(tmp_path / "out", questions(16), per_device_train_batch_size=8, gradient_accumulation_steps=2)
    run_ranks(resume_on_ranks, str(tmp_path / "out"), folder=tmp_path)


# One prompt, several rows


def mixed_questions():
    """Eight prompts with an easy and a hard row each, and eight prompts of their own."""
    prompts = [f"{i} = " for i in range(8)] * 2 + [f"alone {i} = " for i in range(8)]
    return Dataset.from_dict({"prompt": prompts, "kind": ["easy"] * 8 + ["hard"] * 8 + ["easy"] * 8})


def by_kind(completions, kind, **kwargs):
    """Easy rows are always right, the first of hard ones never."""
    return [
        1.0 if k == "easy" else float(i % 4 > 0) * r
        for i, (k, r) in enumerate(zip(kind, first_letter_reward(completions), strict=True))
    ]


def test_rows_of_one_prompt_are_questions_of_their_own(tmp_path, told):
    dataset = mixed_questions()
    trainer = make_trainer(
        tmp_path, train_dataset=dataset, reward_funcs=by_kind, num_train_epochs=2, learning_rate=0.0
    )
    trainer.train()
    buffer, index = trainer.experience_buffer, trainer.replayer.questions
    rows = [row for question_id in buffer.retired for row in index.rows_of(question_id)]
    assert rows
    assert {dataset[row]["kind"] for row in rows} == {"easy"}
    stored = [question for question, _, _ in buffer.items()]
    assert {question.example["kind"] for question in stored} == {"hard"}
    for question in stored:
        (row,) = index.rows_of(question.question_id)
        assert dataset[row] == question.example
    assert [message for message in told if "8 prompts of the training dataset stand for several rows" in message]


def train_mixed(mode, mode_options, output_dir):
    trainer = make_trainer(
        output_dir, train_dataset=mixed_questions(), reward_funcs=by_kind, num_train_epochs=1, learning_rate=0.0,
        per_device_train_batch_size=8, **mode_options,
    )  # fmt: skip
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    dropped = left_out(trainer)
    assert dropped
    assert {mixed_questions()[row]["kind"] for row in dropped} == {"easy"}


def test_two_processes_tell_rows_apart(tmp_path):
    run_ranks(train_mixed, str(tmp_path / "out"), folder=tmp_path)


def test_ids():
    dataset = mixed_questions()
    index = TrainingQuestions(dataset, None)
    ids = [index.id_of(row) for row in dataset]
    assert len(set(ids)) == 24
    assert ids[16:] == [question_id_of(prompt) for prompt in dataset["prompt"][16:]], "as they have always been"
    assert [list(index.rows_of(question_id)) for question_id in ids] == [[row] for row in range(24)]
    # Their order says nothing, and rows that are equal in everything are one question.
    again = TrainingQuestions(dataset.select([*range(23, -1, -1), 3]).select_columns(["kind", "prompt"]), None)
    assert [again.id_of(row) for row in dataset] == ids
    assert again.rows_of(ids[3]) == [20, 24]
    assert TrainingQuestions(Dataset.from_dict({"prompt": ["a", "a"]}), None).rows_of(question_id_of("a")) == [0, 1]


def test_one_id_for_several_prompts_is_refused_before_training(tmp_path):
    dataset = Dataset.from_dict({"prompt": ["a = ", "b = "] * 8, "uid": ["x"] * 15 + ["y"]})
    with pytest.raises(ValueError, match=r"'uid'.*'x' to two different prompts"):
        make_trainer(tmp_path, train_dataset=dataset, question_id_column="uid")


@TAKES_STREAMS
def test_rows_of_a_stream_may_lack_columns(tmp_path):
    hints = []

    def rows():
        for i in range(400):
            row = {"prompt": f"{i % 24} = ", "answer": i % 24}
            if (i // 8) % 2:
                row["hint"] = "h"
            yield row

    def reward(completions, answer, hint=None, **kwargs):
        hints.append(hint)
        return first_letter_reward(completions)

    trainer = make_trainer(
        tmp_path, train_dataset=IterableDataset.from_generator(rows), reward_funcs=reward, max_steps=12,
        per_device_train_batch_size=8, gradient_accumulation_steps=2, shuffle_dataset=False,
    )  # fmt: skip
    trainer.train()
    assert max(fractions(trainer)) > 0
    assert None in hints
    assert any(hint and "h" in hint for hint in hints)


@TAKES_STREAMS
def test_a_stream_replays_the_rows_that_were_stored(tmp_path):
    first_run(tmp_path / "first", questions(16, "old"))
    versions = []

    def reward(completions, version, **kwargs):
        versions.extend(version)
        return first_letter_reward(completions)

    shutil.copytree(tmp_path / "first" / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = resumed(
        tmp_path, questions(64, "new").to_iterable_dataset(), reward_funcs=reward, drop_retired_questions=False
    )
    assert max(fractions(trainer, after=4)) == 0.5
    assert set(versions) == {"old", "new"}
