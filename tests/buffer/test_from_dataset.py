"""Buffers from rows of a user: what becomes of each, and why one is refused."""

import json
import logging
import re

import numpy as np
import pytest
from datasets import Dataset
from tiny import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question, question_id_of
from exgrpo_trl.buffer import own_rows
from exgrpo_trl.buffer.continuations import Continuations, tokenizer_fingerprint
from exgrpo_trl.buffer.report import ExperienceReport, RefusedRow
from exgrpo_trl.cli.show import summarize
from exgrpo_trl.records import prompt_hash

K = 4
EOS = 1


def own(**changes):
    row = {"prompt": "1 + 1 = ", "answer": 2, "completion": "two", "reward": 1.0}
    row |= {"behavior_per_token_logps": [-0.5, -0.25, -1.0, 0.0], "num_correct": None, "group_size": None}
    return row | changes


def imported(*rows, **options):
    return ExperienceBuffer.from_dataset(
        Dataset.from_list(list(rows)), **{"group_size": K, "tokenizer": tiny_tokenizer()} | options
    )


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_text_with_log_probabilities():
    tokenizer = tiny_tokenizer()
    buffer = imported(own(), question_id_column=None)
    [(question, bucket, experience)] = buffer.items()
    assert question == Question(question_id_of("1 + 1 = "), {"prompt": "1 + 1 = ", "answer": 2})
    assert bucket == K // 2
    assert experience.token_ids.tolist() == [*ids_of("two"), EOS]
    assert experience.behavior_per_token_logps.tolist() == [-0.5, -0.25, -1.0, 0.0]
    assert (experience.reward, experience.policy_version, experience.is_scored) == (1.0, 0, False)
    assert experience.prompt_hash == prompt_hash(ids_of("1 + 1 = "))
    assert buffer.provenance == {"question_id_column": None} | tokenizer_fingerprint(tokenizer)
    assert buffer.import_report == ExperienceReport(1, 1, 0, 1, 0, ())
    assert str(buffer.import_report) == "1 of 1 rows are stored, as completions of 1 questions."
    assert buffer.check_valid() == (True, "")


def test_token_ids_need_no_tokenizer():
    row = own(completion_ids=[7, 8], behavior_per_token_logps=[-0.5, -0.25])
    del row["completion"]
    [(_, _, experience)] = imported(row, tokenizer=None).items()
    assert experience.token_ids.tolist() == [7, 8], "taken as they are"
    assert experience.prompt_hash == 0
    [(_, _, experience)] = imported(row).items()
    assert experience.prompt_hash == prompt_hash(ids_of("1 + 1 = "))


def test_one_number_is_the_log_probability_of_every_token():
    [(_, _, experience)] = imported(own(behavior_per_token_logps=0.0)).items()
    assert experience.behavior_per_token_logps.tolist() == [0.0] * 4


def test_a_column_of_ids():
    buffer = imported(own(uid="a"), own(uid="b"), question_id_column="uid")
    assert sorted(question.question_id for question, _, _ in buffer) == ["a", "b"]
    assert buffer.provenance["question_id_column"] == "uid"


REFUSED = {
    "no_prompt": ({"prompt": None}, "it has no prompt"),
    "no_reward": ({"reward": None}, "its reward is None, not a finite number"),
    "nan_reward": ({"reward": float("nan")}, "its reward is nan, not a finite number"),
    "failure": ({"reward": 0.5}, "its reward 0.5 is below success_threshold=1"),
    "nothing": ({"completion": None}, "it has no completion"),
    "empty": ({"completion": ""}, "its completion is empty"),
    "unknown_text": ({"completion": "tWo"}, "characters that the tokenizer does not know"),
    "end_inside": ({"completion": "t<eos>o"}, "an end token is inside its completion, as token 2 of 4"),
    "too_few": ({"behavior_per_token_logps": [-0.5, -0.5]}, "it has 2 log-probabilities for 4 tokens"),
    "positive": ({"behavior_per_token_logps": [0.5, 0.0, 0.0, 0.0]}, "not finite and at most 0"),
    "null_logp": ({"behavior_per_token_logps": [None, 0.0, 0.0, 0.0]}, "not numbers"),
    "unknown": ({"behavior_per_token_logps": None}, "no log-probabilities; trainer.score_experience computes them"),
    "count": ({"num_correct": 5}, "`num_correct` must lie in 0..4, got 5"),
    "size": ({"num_correct": 1, "group_size": 0}, "its group_size is 0"),
    "twice": ({"reward": 1.0}, "its question has a completion of the same tokens already"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_row_is_refused(kind, caplog):
    changes, reason = REFUSED[kind]
    with caplog.at_level(logging.WARNING):
        buffer = imported(own(), own(**changes), own(completion="too"))
    assert [experience.token_ids.tolist()[1] for _, _, experience in buffer] == [*ids_of("w"), *ids_of("o")]
    report = buffer.import_report
    assert (report.num_rows, report.num_stored, len(report.refused)) == (3, 2, 1)
    assert report.refused[0].row == 1
    assert reason in report.refused[0].reason
    assert f"row 1: {report.refused[0].reason}" in caplog.text


IDS = {
    "empty": ([], "its completion is empty"),
    "outside": ([3, -1], "token id -1 is outside of the vocabulary"),
    "huge": ([2**31], "outside of the vocabulary"),
    "end_inside": ([3, 1, 3], "an end token is inside its completion, as token 2 of 3"),
}


@pytest.mark.parametrize("kind", IDS)
def test_token_ids_are_refused(kind):
    ids, reason = IDS[kind]
    buffer = imported(
        own(completion_ids=[5, 1], behavior_per_token_logps=0.0), own(completion_ids=ids, behavior_per_token_logps=0.0)
    )
    [(row, said)] = buffer.import_report.refused
    assert row == 1
    assert reason in said


def test_one_question_has_one_prompt():
    buffer = imported(own(uid="a"), own(uid="a", prompt="2 + 2 = "), question_id_column="uid")
    assert buffer.import_report.refused == (RefusedRow(1, "question 'a' has another prompt in an earlier row"),)


def test_a_prompt_that_the_template_does_not_take():
    broken = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('no') }}{% endif %}" + CHAT_TEMPLATE
    rows = [
        own(prompt=[{"role": "user", "content": content}], completion="two", behavior_per_token_logps=0.0)
        for content in ("a", "bad")
    ]
    buffer = imported(*rows, tokenizer=tiny_tokenizer(broken))
    [(row, reason)] = buffer.import_report.refused
    assert row == 1
    assert "its prompt cannot be rendered" in reason


# Rows as (prompt, completion, reward, num_correct, group_size), the argument, and the bucket of each question.
BUCKETS = {
    "nothing_told": ([("a", "x", 1, None, None)], None, {"a": 2}),
    "argument": ([("a", "x", 1, None, None)], 3, {"a": 3}),
    "told": ([("a", "x", 1, 1, None), ("b", "x", 1, 9, 16)], 3, {"a": 1, "b": 2}),
    "never_solved_for_good": ([("a", "x", 1, 16, 16), ("b", "x", 1, 0, 4)], None, {"a": 3, "b": 1}),
    "failures": ([("a", "x", 1, None, None), *(("a", t, 0, None, None) for t in "pqr")], 3, {"a": 1}),
    "successes_alone_tell_nothing": ([("a", t, 1, None, None) for t in "pqr"], None, {"a": 2}),
    "told_before_seen": ([("a", "x", 1, 3, 4), ("a", "y", 0, None, None)], None, {"a": 3}),
}


@pytest.mark.parametrize("kind", BUCKETS)
def test_buckets(kind):
    rows, bucket, expected = BUCKETS[kind]
    names = ("prompt", "completion", "reward", "num_correct", "group_size")
    contents = [dict(zip(names, row, strict=True)) | {"behavior_per_token_logps": 0.0} for row in rows]
    buffer = imported(*contents, bucket=bucket)
    assert {question.example["prompt"]: found for question, found, _ in buffer} == expected
    assert not buffer.retired


def group(prompt, rewards, number, size=K):
    return [
        own(prompt=prompt, completion="pqrs"[index], reward=reward, group=number, behavior_per_token_logps=-0.5)
        for index, reward in enumerate(rewards[:size])
    ]


def test_whole_groups():
    rows = [
        *group("a", [1.0, 0.0, 0.0, 1.0], 0),
        *group("b", [1.0, 1.0, 1.0, 1.0], 0),
        *group("c", [0.0] * 4, 1),
        *group("d", [1.0, 0.0, 0.0, 0.0], 2, size=3),
        *group("a", [1.0, 0.0, 0.0, 1.0], 3),
        own(prompt="e", group=None, behavior_per_token_logps=0.0),
    ]
    buffer = imported(*rows, unit="group", retire_solved=False)
    [(of_group,)] = [buffer.groups(question_id) for question_id in buffer.buckets()[2]]
    assert [experience.reward for experience in of_group] == [1.0, 0.0, 0.0, 1.0]
    assert len(buffer) == K
    reasons = dict(buffer.import_report.refused)
    assert sorted(reasons) == [*range(4, 20)]
    assert "all completions of its group reach" in reasons[4]
    assert "no completion of its group reach" in reasons[8]
    assert reasons[12] == "its group 2 is not whole: 3 rows of it can be stored, and a group has 4"
    assert reasons[15] == "its question has the same group already"
    assert reasons[19] == "it has no group"
    with pytest.raises(ExperienceBufferError, match="lacks the columns group"):
        imported(own(), unit="group")


def test_limits_hold():
    buffer = imported(*(own(completion=text) for text in ("abc", "def", "ghi")), max_completions_per_question=2)
    assert len(buffer) == 2
    assert (buffer.import_report.num_stored, buffer.import_report.num_evicted) == (3, 1)


def test_what_is_no_dataset_of_completions():
    without = own()
    del without["behavior_per_token_logps"]
    with pytest.raises(ExperienceBufferError, match=r"no column behavior_per_token_logps.*trainer\.score_experience"):
        imported(without)
    with pytest.raises(ExperienceBufferError, match=r"are text\. Pass tokenizer="):
        imported(own(), tokenizer=None)
    with pytest.raises(ExperienceBufferError, match=r"(?s)No row .* can be stored.*row 0: its reward 0"):
        imported(own(reward=0.0))
    row = own()
    del row["reward"]
    with pytest.raises(ExperienceBufferError, match="lacks the columns reward"):
        imported(row)
    with pytest.raises(TypeError, match="got list"):
        ExperienceBuffer.from_dataset([own()], group_size=K)
    with pytest.raises(ValueError, match=r"`bucket` must lie in 0\.\.4, got 5"):
        imported(own(), bucket=5)
    with pytest.raises(ValueError, match="NaN"):
        imported(own(), success_threshold=float("nan"))
    exported = imported(own()).to_dataset()
    with pytest.raises(ValueError, match="neither `completion` nor `completion_ids`, so tokenizer, bucket would"):
        ExperienceBuffer.from_dataset(exported, group_size=K, tokenizer=tiny_tokenizer(), bucket=1)
    assert len(ExperienceBuffer.from_dataset(exported, group_size=K)) == 1


def test_another_threshold():
    assert len(imported(own(reward=0.5), success_threshold=0.5)) == 1
    assert len(imported(own(reward=np.float32(0.9).item()), success_threshold=0.9)) == 1, "as in training"


def test_rows_are_numbered_over_batches(monkeypatch):
    monkeypatch.setattr(own_rows, "_ROWS_AT_ONCE", 2)
    rows = [own(completion=text * 3, behavior_per_token_logps=0.0) for text in "abcdefg"]
    rows[5]["reward"] = 0.0
    buffer = imported(*rows)
    assert buffer.import_report.refused == (RefusedRow(5, "its reward 0 is below success_threshold=1"),)
    assert len(buffer) == 6


def test_a_long_list_is_cut():
    report = ExperienceReport(100, 10, 5, 3, 2, tuple(RefusedRow(row, "bad") for row in range(90)))
    lines = str(report).splitlines()
    assert lines[0] == (
        "10 of 100 rows are stored, as completions of 3 questions; 5 of them were scored by the present policy; "
        "limits of the buffer have evicted 2 completions. 90 are refused:"
    )
    assert lines[1:] == [*(f"row {row}: bad" for row in range(20)), "and 70 more"]


# Tokens behind a prompt


def merging_tokenizer(chat_template=None):
    """A tokenizer that merges characters, over the border of prompt and completion, too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["ab ab ab ab abc", "= 12", "= 13", "= 14"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", chat_template=chat_template
    )


@pytest.mark.parametrize(("prompt", "completion"), [("1 = ", "12"), ("= 1", "4 ab"), ("ab", "c"), ("a", "b abc")])
def test_tokens_go_on_after_those_of_the_prompt(prompt, completion):
    tokenizer = merging_tokenizer()
    continuations = Continuations(tokenizer)
    [prompt_ids] = continuations.prompt_ids([prompt])
    [ids] = continuations.completion_ids([prompt], [prompt_ids], [completion])
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode([*prompt_ids, *ids[:-1]]) == prompt + completion
    whole = tokenizer(prompt + completion)["input_ids"]
    # Where nothing is merged over the border, they are the tokens of the whole text.
    if whole[: len(prompt_ids)] == prompt_ids:
        assert [*prompt_ids, *ids[:-1]] == whole


def test_some_of_them_merge_over_the_border():
    tokenizer = merging_tokenizer()
    assert tokenizer("ab")["input_ids"][:1] != tokenizer("a")["input_ids"]


# The end of an answer, as chat templates write it.
WITH_END = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}\n", "{{ message['content'] }}{{ '<eos>' if message['role'] == 'assistant' else '' }}\n"
)
STRIPPED = CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'].split('</think>')[-1] }}")
OTHER_PROMPT = (
    "{% if messages|length > 1 %}many\n{% endif %}" + CHAT_TEMPLATE
)  # the prompt reads otherwise once an answer follows
PROMPT = [{"role": "user", "content": "q"}]


def answered(template, content, **options):
    continuations = Continuations(tiny_tokenizer(template, extra="<>/"), **options)
    [prompt_ids] = continuations.prompt_ids([PROMPT])
    completion = content if isinstance(content, list) else [{"role": "assistant", "content": content}]
    [result] = continuations.completion_ids([PROMPT], [prompt_ids], [completion])
    if isinstance(result, ValueError):
        return str(result)
    assert text_of(prompt_ids) == "user: q\nassistant:"
    return text_of(result)


def text_of(ids):
    return "".join(tiny_tokenizer(extra="<>/").convert_ids_to_tokens(ids))


def test_messages():
    assert answered(WITH_END, "two") == " two<eos>", "what follows the end is not generated"
    assert answered(CHAT_TEMPLATE, "two") == " two\n<eos>", "the template closes it with a line break alone"
    assert answered(WITH_END, "two", add_eos=False) == " two"
    assert answered(CHAT_TEMPLATE, "two", add_eos=False) == " two"
    assert answered(STRIPPED, "two") == " two\n<eos>"


def test_text_behind_messages_is_taken_word_for_word():
    continuations = Continuations(tiny_tokenizer(STRIPPED, extra="<>/"))
    prompt_ids = continuations.prompt_ids([PROMPT])
    texts = [" <think>a</think>two", "two<eos>"]
    found = continuations.completion_ids([PROMPT] * 2, prompt_ids * 2, texts)
    assert [text_of(ids) for ids in found] == [" <think>a</think>two<eos>", "two<eos>"]


@pytest.mark.parametrize(
    ("template", "content", "reason"),
    [
        (STRIPPED, "<think>a</think>two", "changes its message.*give the completion as text"),
        (OTHER_PROMPT, "two", "renders its prompt in another way once an answer follows"),
        (WITH_END, " ", "its completion is empty"),
        (WITH_END, [{"role": "user", "content": "two"}], "the assistant did not write"),
        (WITH_END, [{"role": "assistant", "content": "a", "tool_calls": [{}]}], "calls of tools"),
        (WITH_END, [{"role": "assistant", "content": ["a"]}], "content of its completion is not text"),
        (WITH_END, [{"role": "assistant", "content": "a"}] * 2, "neither text nor one message"),
        (None, "two", "chat_template|chat template"),
    ],
)
def test_messages_that_are_no_answer(template, content, reason):
    if template is None:
        continuations = Continuations(tiny_tokenizer(None))
        [said] = map(str, continuations.completion_ids([PROMPT], [[3]], ["two"]))
    else:
        said = answered(template, content)
    assert re.search(reason, said), said


def test_text_has_no_messages():
    [said] = Continuations(tiny_tokenizer()).completion_ids(["1"], [[3]], [[{"role": "assistant", "content": "a"}]])
    assert str(said) == "its prompt is text, but its completion is not"


def test_a_tokenizer_without_an_end():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end token.*add_eos=False"):
        Continuations(tokenizer)
    assert Continuations(tokenizer, add_eos=False).completion_ids(["a"], [ids_of("a")], ["b"]) == [ids_of("b")]


# The mark of what was scored


def test_the_mark_is_kept_and_shown(tmp_path):
    buffer = ExperienceBuffer()
    experiences = [
        Experience.create([number], [-0.5], policy_version=0, reward=1.0, is_scored=number == 2) for number in (1, 2)
    ]
    buffer.collect(Question("a", {"prompt": "a"}), experiences, num_correct=2, group_size=K)
    buffer.save(tmp_path / "buffer")
    exported = buffer.to_dataset()
    assert exported["is_scored"][:] == [False, True]
    for again in (ExperienceBuffer.load(tmp_path / "buffer"), ExperienceBuffer.from_dataset(exported, group_size=K)):
        assert [experience.is_scored for experience in again.completions("a")] == [False, True]
    assert summarize(tmp_path / "buffer")["counts"]["scored"] == 1
    without = ExperienceBuffer.from_dataset(exported.remove_columns("is_scored"), group_size=K)
    assert [experience.is_scored for experience in without.completions("a")] == [False, False]
    nulls = Dataset.from_list([row | {"is_scored": None} for row in exported.to_list()], features=exported.features)
    with pytest.raises(ExperienceBufferError, match="`is_scored` is never null"):
        ExperienceBuffer.from_dataset(nulls, group_size=K)
    assert json.loads(json.dumps(summarize(tmp_path / "buffer")))
