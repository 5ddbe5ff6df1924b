"""`exgrpo-trl show` of questions and of one question, on buffers of real runs."""

import json
import os
import re
import subprocess
import sys

import pytest
from saved_runs import CODE, options_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from exgrpo_trl.buffer import ExperienceBuffer
from exgrpo_trl.inspection.text import Decoder

KINDS = ["ids", "chat", "tools", "images", "groups"]


def stored(path):
    """Every stored completion as a dict, without the code under test; the version of its checkpoint is 6."""
    buffer = ExperienceBuffer.load(path)
    for question, bucket, experience in buffer.items():
        prompt = question.example["prompt"]
        yield {
            "question": question.question_id,
            "bucket": bucket,
            "age": 6 - experience.policy_version,
            "version": experience.policy_version,
            "reward": experience.reward,
            "length": len(experience.token_ids),
            "replays": buffer.reuse(experience).num_replays,
            "entropy": experience.entropy,
            "prompt": prompt if isinstance(prompt, str) else prompt[0]["content"],
            "ids": experience.token_ids.tolist(),
            "experience": experience,
        }


def listed(rows):
    """Questions and how many completions of each."""
    counts = {}
    for row in rows:
        counts[row["question"]] = counts.get(row["question"], 0) + 1
    return counts


@pytest.mark.parametrize("kind", KINDS)
def test_list(run_of, command, kind):
    rows = list(stored(run_of(kind)))
    printed = json.loads(command("show", run_of(kind), "--list", "--json"))
    assert [(of["question"], of["completions"]) for of in printed] == list(listed(rows).items())
    for of in printed:
        own = [row for row in rows if row["question"] == of["question"]]
        assert of["bucket"] == own[0]["bucket"]
        assert (of["age"], of["oldest"]) == (min(row["age"] for row in own), max(row["age"] for row in own))
        assert of["reward"] == pytest.approx(sum(row["reward"] for row in own) / len(own))
        assert of["length"] == pytest.approx(sum(row["length"] for row in own) / len(own))
        assert of["replays"] == sum(row["replays"] for row in own)
        assert of["prompt"] == own[0]["prompt"]


@pytest.mark.parametrize("kind", ["ids", "tools"])
def test_filters(run_of, command, kind):
    rows = list(stored(run_of(kind)))
    tokenizer = options_of(kind)[1]
    texts = {row["experience"]: tokenizer.decode(row["ids"], skip_special_tokens=True) for row in rows}
    middle = sorted(row["entropy"] for row in rows)[len(rows) // 2]
    cases = [
        (["bucket>=2"], lambda row: row["bucket"] >= 2),
        (["age<3", "bucket!=3"], lambda row: row["age"] < 3 and row["bucket"] != 3),
        ([" age == 3 "], lambda row: row["age"] == 3),
        (["version=2"], lambda row: row["version"] == 2),
        (["reward>1"], lambda row: row["reward"] > 1),
        (["length<=7.5"], lambda row: row["length"] <= 7.5),
        (["replays>0"], lambda row: row["replays"] > 0),
        ([f"entropy>{middle!r}"], lambda row: row["entropy"] > middle),
        (["prompt~1"], lambda row: "1" in row["prompt"]),
        (["completion~A"], lambda row: "a" in texts[row["experience"]].lower()),
        (["text!~g"], lambda row: "g" not in (row["prompt"] + texts[row["experience"]]).lower()),
        ([f"question={rows[0]['question']}"], lambda row: row["question"] == rows[0]["question"]),
    ]
    some = 0
    for conditions, holds in cases:
        arguments = [part for condition in conditions for part in ("--filter", condition)]
        printed = json.loads(command("show", run_of(kind), "--json", *arguments))
        expected = listed(filter(holds, rows))
        assert {of["question"]: of["completions"] for of in printed} == expected, conditions
        some += 0 < sum(expected.values()) < len(rows)
    assert some > 6


def test_sort_and_limit(run_of, command):
    printed = json.loads(command("show", run_of("ids"), "--sort", "reward", "--reverse", "--json"))
    assert [of["reward"] for of in printed] == sorted((of["reward"] for of in printed), reverse=True)
    printed = json.loads(command("show", run_of("ids"), "--sort", "length", "--json", "--limit", "2"))
    rows = list(stored(run_of("ids")))
    lengths = {}
    for row in rows:
        lengths.setdefault(row["question"], []).append(row["length"])
    means = sorted(sum(of) / len(of) for of in lengths.values())
    assert [of["length"] for of in printed] == pytest.approx(means[:2])
    lines = command("show", run_of("ids"), "--sort", "question", "--limit", "1").splitlines()
    assert lines[0].startswith(f"1 of {len(lengths)} questions of {run_of('ids')}")
    [row] = [line for line in lines if re.match(r" *q\d", line)]
    assert row.split()[0] == min(lengths)
    assert lines[-1] == f"{len(lengths) - 1} more; --limit 0 shows all."
    lines = command("show", run_of("ids"), "--limit", "0").splitlines()
    assert sum(bool(re.match(r" *q\d", line)) for line in lines) == len(lengths)


@pytest.mark.parametrize("wrong", ["bucket", "what>3", "bucket~3", "age>old", "age<nan", "text>3", "prompt<=b", ""])
def test_a_wrong_filter_names_the_fields(run_of, command, wrong):
    error = command("show", run_of("ids"), "--filter", wrong, code=2)
    for expected in (repr(wrong), "bucket", "replays", "question", "--filter 'bucket>=3' --filter 'text~sqrt'"):
        assert expected in error


@pytest.mark.parametrize("kind", KINDS)
def test_question(run_of, command, kind):
    rows = list(stored(run_of(kind)))
    chosen = max(listed(rows).items(), key=lambda item: item[1])[0]
    own = [row for row in rows if row["question"] == chosen]
    tokenizer = options_of(kind)[1]
    beginning = chosen if kind == "ids" else chosen[:10]
    printed = json.loads(command("show", run_of(kind), "--question", beginning, "--json"))
    assert printed["question_id"] == chosen
    assert printed["bucket"] == own[0]["bucket"]
    assert [of["token_ids"] for of in printed["completions"]] == [row["ids"] for row in own]
    for of, row in zip(printed["completions"], own, strict=True):
        experience = row["experience"]
        assert of["behavior_per_token_logps"] == experience.behavior_per_token_logps.tolist()
        assert of["completion"] == tokenizer.decode(row["ids"], skip_special_tokens=True)
        assert "".join(of["tokens"]) == tokenizer.decode(row["ids"], skip_special_tokens=False)
        assert len(of["tokens"]) == len(row["ids"])
        assert (of["age"], of["replays"], of["reward"]) == (row["age"], row["replays"], row["reward"])
        is_model = [turn["by"] == "model" for turn in of["turns"] for _ in range(turn["start"], turn["end"])]
        assert is_model == experience.is_model.tolist()
    text = command("show", run_of(kind), "--question", beginning, COLUMNS="200")
    assert f"Question {chosen}" in text
    assert f"Text by {run_of(kind)}" in text.replace("\n", "")
    assert "\x1b" not in text
    for number, row in enumerate(own, start=1):
        assert re.search(rf"{number}(, group \d)?: reward {row['reward']:g} ", text)
    if kind == "images":
        assert "<image " in text


def test_a_question_with_turns(run_of, command):
    rows = list(stored(run_of("tools")))
    row = next(row for row in rows if not row["experience"].is_model.all())
    [printed] = [
        of
        for of in json.loads(command("show", run_of("tools"), "--question", row["question"], "--json"))["completions"]
        if of["token_ids"] == row["ids"]
    ]
    assert {turn["by"] for turn in printed["turns"]} == {"model", "tool"}
    assert [message["role"] for message in printed["messages"]][:2] == ["assistant", "tool"]
    text = command("show", run_of("tools"), "--question", row["question"])
    assert "-- model:" in text
    assert "-- tool:" in text


def in_terminal(arguments, **environment):
    """What the command writes to a terminal with colours."""
    pty = pytest.importorskip("pty")
    parent, child = pty.openpty()
    names = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *map(str, arguments)],
        stdout=child,
        env={**names, "COLUMNS": "100", "TERM": "xterm-256color", **environment},
    )
    os.close(child)
    output = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # closed by the other side
            break
        if not part:
            break
        output += part
    os.close(parent)
    assert process.wait() == 0
    return output.decode()


COLOURS = ((0.9, "32"), (0.5, "36"), (0.1, "33"), (0.01, "35"), (0.0, "31"))


def test_colours_are_probabilities(run_of):
    rows = list(stored(run_of("tools")))
    row = next(row for row in rows if not row["experience"].is_model.all())
    condition = ["--filter", f"length={row['length']}", "--filter", f"entropy={row['entropy']!r}"]
    arguments = ["show", run_of("tools"), "--question", row["question"], *condition]
    text = in_terminal(arguments)
    assert "Probability of a token when generated:" in text
    tokenizer = options_of("tools")[1]
    body = text[text.index("-- model:") :]
    position = 0
    for token, logp, is_model in zip(
        row["ids"], row["experience"].behavior_per_token_logps, row["experience"].is_model, strict=True
    ):
        piece = tokenizer.decode([token])
        if "\n" in piece or " " in piece:
            continue
        colour = next(code for lowest, code in COLOURS if 2.718281828459045**logp >= lowest) if is_model else "2"
        position = body.index(f"\x1b[{colour}m{piece}\x1b[0m", position)
    # A terminal without colours gets no legend, and no colours.
    text = in_terminal(arguments, NO_COLOR="1")
    assert "Probability" not in text
    assert not re.search(r"\x1b\[3\dm", text)


def test_a_question_that_is_not_there(run_of, command):
    buffer = ExperienceBuffer.load(run_of("ids"))
    for wrong, expected in (
        ("q", "questions of the experience buffer"),
        ("zz", "--list"),
        (next(iter(buffer.retired)), "has retired"),
    ):
        error = command("show", run_of("ids"), "--question", wrong, code=1)
        assert repr(wrong) in error
        assert expected in error
        assert str(run_of("ids")) in error
    stored_id = next(stored(run_of("ids")))["question"]
    error = command("show", run_of("ids"), "--question", stored_id, "--filter", "bucket>99", code=1)
    assert "fulfils all conditions" in error


def test_without_a_tokenizer(run_of, command, tmp_path):
    ExperienceBuffer.load(run_of("ids")).save(tmp_path / "alone")
    row = next(stored(run_of("ids")))
    text = command("show", "alone", "--question", row["question"])
    assert "Token ids, as no tokenizer.json belongs to the buffer. Name its tokenizer with --tokenizer." in text
    assert " ".join(map(str, row["ids"][:4])) in text
    assert (
        "completion"
        not in json.loads(command("show", "alone", "--question", row["question"], "--json"))["completions"][0]
    )
    assert "--tokenizer" in command("show", "alone", "--filter", "text~a", code=1)
    given = ["--tokenizer", run_of("ids") / "checkpoint-6"]
    whole = json.loads(command("show", run_of("ids"), "--filter", "text~a", "--json"))
    found = json.loads(command("show", "alone", "--filter", "text~a", "--json", *given))
    # Ages count from the newest completion: there is no checkpoint that tells the step.
    newest = min(row["age"] for row in stored(run_of("ids")))
    assert newest > 0
    ages = [{name: of[name] - newest for name in ("age", "oldest")} for of in whole]
    assert found == [of | age for of, age in zip(whole, ages, strict=True)]
    # One that belongs to another model.
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    error = command("show", "alone", "--question", row["question"], "--tokenizer", "tokenizer.json", code=1)
    assert "has 1 tokens, but" in error
    (tmp_path / "tokenizer.json").write_text("{")
    error = command("show", "alone", "--question", row["question"], "--tokenizer", "tokenizer.json", code=1)
    assert "tokenizer.json cannot be used" in error
    assert "none.json" in command("show", "alone", "--list", "--tokenizer", "none.json", code=1)
    # A damaged one in a checkpoint is no reason to show nothing.
    ExperienceBuffer.load(run_of("ids")).save(tmp_path / "experience_buffer")
    text = command("show", "experience_buffer", "--question", row["question"])
    assert "Token ids. The tokenizer" in text


def test_pieces_of_characters_that_take_several_tokens(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the theme of them"] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    decoder = Decoder(tmp_path / "tokenizer.json")
    text = "the häßlich 😀 them"
    ids = tokenizer.encode(text).ids
    pieces = decoder.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text
    assert "😀" in pieces
    # What is no character at all does not get lost.
    broken = [ids[text.index("ä")]] * 30 + tokenizer.encode("the").ids
    assert len(decoder.pieces(broken)) == len(broken)
    assert "".join(decoder.pieces(broken)).count("\ufffd") == 30
    assert "".join(decoder.pieces(broken)).endswith("the")
