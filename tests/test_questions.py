"""Questions of the present dataset, and which stored completions still belong to them."""

import numpy as np
import pytest
from datasets import Dataset

from exgrpo_trl import Experience, ExperienceBuffer, Question, question_id_of
from exgrpo_trl.questions import Replayable, TrainingQuestions
from exgrpo_trl.records import prompt_hash
from exgrpo_trl.strategies.samplers import RandomSampler


def tokenize(rows):
    return [[ord(letter) for letter in row["prompt"]] for row in rows]


def completion(token, prompt=None):
    known = {} if prompt is None else {"prompt_hash": prompt_hash(tokenize([{"prompt": prompt}])[0])}
    return Experience.create([token], [-1.0], policy_version=0, reward=1.0, **known)


def buffer_of(stored):
    buffer = ExperienceBuffer(group_size=4)
    for prompt, completions in stored.items():
        buffer.collect(
            Question(question_id_of(prompt), {"prompt": prompt, "note": "old"}),
            completions,
            num_correct=2,
            group_size=4,
        )
    return buffer


def tokens_of(experiences):
    return [experience.token_ids.tolist() for experience in experiences]


def test_completions_of_another_rendering_are_left_out_one_by_one():
    buffer = buffer_of(
        {"a": [completion(1, "old a"), completion(2, "a"), completion(3)], "b": [completion(4, "old b")]}
    )
    replayable = Replayable(TrainingQuestions(Dataset.from_dict({"prompt": ["a", "b"]}), None), tokenize)
    told = replayable.examine(buffer)
    assert "2 completions were generated for a prompt that now renders to other tokens" in told
    stored = buffer.completions(question_id_of("a"))
    assert tokens_of(replayable.completions(stored)) == [[2], [3]], "one that does not know its prompt counts"
    assert buffer.sample_questions(2, replayable.sampler(RandomSampler())) == [question_id_of("a")]
    replayable.collected(Question(question_id_of("b"), {"prompt": "b"}), [], tuple)
    assert sorted(buffer.sample_questions(2, replayable.sampler(RandomSampler()))) == sorted(map(question_id_of, "ab"))


def test_the_buffer_gets_the_present_rows():
    buffer = buffer_of({"a": [completion(1)], "gone": [completion(2)]})
    replayable = Replayable(TrainingQuestions(Dataset.from_dict({"prompt": ["a"], "note": ["new"]}), None), tokenize)
    assert "1 of 2 questions are not in the training dataset" in replayable.examine(buffer)
    assert buffer.question(question_id_of("a")).example == {"prompt": "a", "note": "new"}
    assert buffer.question(question_id_of("gone")).example["note"] == "old"


def test_nothing_is_said_where_nothing_has_changed():
    buffer = buffer_of({"a": [completion(1, "a")]})
    assert Replayable(TrainingQuestions(Dataset.from_dict({"prompt": ["a"]}), None), tokenize).examine(buffer) is None
    sampler = RandomSampler()
    replayable = Replayable(TrainingQuestions(iter(()), None), tokenize)
    assert replayable.examine(buffer) is None, "of a stream, the stored rows count"
    assert replayable.sampler(sampler) is sampler


@pytest.mark.parametrize("format_type", [None, "numpy", "torch"])
def test_ids_do_not_depend_on_the_format(format_type):
    dataset = Dataset.from_dict({"prompt": ["a", "a", "b"], "answer": [1, 2, 3]})
    plain, formatted = (TrainingQuestions(d, None) for d in (dataset, dataset.with_format(format_type)))
    assert formatted.ids() == plain.ids()
    for row in range(3):
        seen = formatted.dataset.__getitems__([row])[0]
        assert formatted.rows_of(formatted.id_of(seen)) == [row]


def test_a_prompt_hash():
    hashes = {prompt_hash(ids) for ids in ([], [0], [0, 0], [1, 2], [2, 1], [150_000])}
    assert len(hashes) == 6
    assert 0 not in hashes, "which stands for an unknown prompt"
    assert prompt_hash(np.array([1, 2], dtype=np.int32)) == prompt_hash([1, 2])
    assert all(-(2**63) <= number < 2**63 for number in hashes)


def test_rows_of_environments_without_a_prompt_of_their_own():
    rows = {"seed": [1, 2, 3, 3]}
    questions = TrainingQuestions(Dataset.from_dict(rows), None, num_groups_of_environments=2)
    ids = [questions.id_of({"seed": seed}, group) for seed in (1, 2, 3) for group in (0, 1)]
    assert ids[0] == ids[1] != ids[2] == ids[3]
    # Equal rows only hold a place: one question per group of a batch, of which none retires.
    assert ids[4] != ids[5]
    assert [questions.may_retire(question_id) for question_id in ids] == [True] * 4 + [False] * 2
    assert questions.rows_of(ids[4]) == questions.rows_of(ids[5]) == [2, 3]
    assert questions.present(Question(ids[5], {"prompt": None})).example == {"prompt": None, "seed": 3}


def test_rows_of_a_stream():
    image = pytest.importorskip("PIL.Image")
    red, blue = image.new("RGB", (2, 2), (255, 0, 0)), image.new("RGB", (2, 2), (0, 0, 255))
    text = TrainingQuestions(iter(()), None)
    assert text.id_of({"prompt": "a", "answer": 1}) == text.id_of({"prompt": "a", "answer": 2}) == question_id_of("a")
    assert text.id_of({"prompt": "a", "image": red}) == text.id_of({"prompt": "a", "image": red.copy()})
    assert text.id_of({"prompt": "a", "image": red}) != text.id_of({"prompt": "a", "image": blue})
    environments = TrainingQuestions(iter(()), None, num_groups_of_environments=2)
    assert environments.id_of({"prompt": "a", "seed": 1}) != environments.id_of({"prompt": "a", "seed": 2})
