"""`exgrpo-trl export`, read back and compared with the buffer."""

import json
import math
import os

import datasets
import pyarrow.parquet as pq
import pytest
from saved_runs import options_of

from exgrpo_trl import ExperienceBuffer
from exgrpo_trl.buffer.files import save_buffer

KINDS = ["ids", "chat", "tools", "images", "groups"]


def contents(buffer):
    """Everything of the stored completions, images aside."""
    return [
        (
            question.question_id,
            bucket,
            experience.token_bytes,
            experience.logp_bytes,
            experience.policy_version,
            experience.reward,
            None if math.isnan(experience.entropy) else experience.entropy,
            experience.prompt_hash,
            buffer.reuse(experience).num_replays,
            None if experience.details is None else (experience.details.run_bytes, experience.details.texts),
        )
        for question, bucket, experience in buffer.items()
    ]


def texts_of(kind, buffer):
    tokenizer = options_of(kind)[1]
    return [tokenizer.decode(experience.token_ids, skip_special_tokens=True) for _, _, experience in buffer.items()]


@pytest.mark.parametrize("kind", KINDS)
def test_parquet(run_of, command, tmp_path, kind):
    printed = command("export", run_of(kind), "-o", "out/export.parquet")
    buffer = ExperienceBuffer.load(run_of(kind))
    assert printed.startswith(f"Wrote out/export.parquet: {len(buffer)} completions of {buffer.num_questions} ")
    assert os.listdir(tmp_path / "out") == ["export.parquet"]
    table = pq.read_table(tmp_path / "out" / "export.parquet")
    items = list(buffer.items())
    assert table.column("question_id").to_pylist() == [question.question_id for question, _, _ in items]
    assert table.column("token_ids").to_pylist() == [experience.token_ids.tolist() for _, _, experience in items]
    assert table.column("completion").to_pylist() == texts_of(kind, buffer)
    prompts = [question.example["prompt"] for question, _, _ in items]
    read = table.column("prompt").to_pylist()
    assert (read if kind in ("ids", "groups") else list(map(json.loads, read))) == prompts
    # A buffer again.
    dataset = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "export.parquet"), cache_dir=str(tmp_path / "cache")
    )
    again = ExperienceBuffer.from_dataset(dataset, group_size=4, unit=buffer.unit)
    assert contents(again) == contents(buffer)
    assert again.provenance == buffer.provenance
    if kind == "images":
        assert dataset[0]["images"][0].size == (28, 28)


@pytest.mark.parametrize("kind", KINDS)
def test_jsonl(run_of, command, tmp_path, kind):
    command("export", run_of(kind), "-o", "export.jsonl")
    buffer = ExperienceBuffer.load(run_of(kind))
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "export.jsonl").open()]
    dataset = buffer.to_dataset()
    assert {"prompt", "completion", *dataset.column_names} - {"images"} == rows[0].keys()
    for row, own, text, (question, _, experience) in zip(
        rows, dataset, texts_of(kind, buffer), buffer.items(), strict=True
    ):
        assert row["prompt"] == question.example["prompt"]
        assert row["completion"] == text
        assert row["behavior_per_token_logps"] == experience.behavior_per_token_logps.tolist()
        for name in ("question_id", "example", "bucket", "token_ids", "policy_version", "reward", "entropy"):
            assert row[name] == own[name], name
        if "messages" in own:
            messages = own["messages"]  # JSON where `datasets` has no feature for it
            assert row["messages"] == (json.loads(messages) if isinstance(messages, str) else messages)
            assert row["is_model"] == own["is_model"]
            assert row["image_digests"] == own["image_digests"]
    if kind not in ("images", "tools"):  # `datasets` reads nested objects with fewer digits
        rows = datasets.Dataset.from_json(str(tmp_path / "export.jsonl"), cache_dir=str(tmp_path / "cache"))
        again = ExperienceBuffer.from_dataset(rows, group_size=4, unit=buffer.unit)
        assert contents(again) == contents(buffer)


def test_filtered(run_of, command, tmp_path):
    buffer = ExperienceBuffer.load(run_of("ids"))
    command("export", run_of("ids"), "-o", "export.jsonl", "--filter", "bucket=3", "--filter", "length=8")
    rows = [json.loads(line) for line in (tmp_path / "export.jsonl").open()]
    expected = [e.token_ids.tolist() for _, bucket, e in buffer.items() if bucket == 3 and e.num_tokens == 8]
    assert [row["token_ids"] for row in rows] == expected
    assert 0 < len(expected) < len(buffer)
    # Of whole groups, those of which one completion fulfils it.
    buffer = ExperienceBuffer.load(run_of("groups"))
    question, _, one = next(item for item in buffer.items() if item[2].reward == 1)
    [group] = [group for group in buffer.groups(question.question_id) if one in group]
    conditions = ["--filter", f"entropy={one.entropy!r}", "--filter", f"question={question.question_id}"]
    command("export", run_of("groups"), "-o", "groups.jsonl", *conditions)
    rows = [json.loads(line) for line in (tmp_path / "groups.jsonl").open()]
    assert [row["token_ids"] for row in rows] == [experience.token_ids.tolist() for experience in group]


def test_without_a_tokenizer(run_of, command, tmp_path):
    ExperienceBuffer.load(run_of("ids")).save(tmp_path / "alone")
    printed = command("export", "alone", "-o", "export.jsonl")
    assert "Without the text of completions. Token ids, as no tokenizer.json belongs to the buffer." in printed
    row = json.loads((tmp_path / "export.jsonl").read_text().splitlines()[0])
    assert "completion" not in row
    assert row["token_ids"]
    command("export", "alone", "-o", "export.parquet")
    assert "completion" not in pq.read_schema(tmp_path / "export.parquet").names


def test_what_is_there_is_kept(run_of, command, tmp_path):
    (tmp_path / "export.jsonl").write_text("mine")
    error = command("export", run_of("ids"), "-o", "export.jsonl", code=1)
    assert "export.jsonl exists" in error
    assert "--force" in error
    assert (tmp_path / "export.jsonl").read_text() == "mine"
    command("export", run_of("ids"), "-o", "export.jsonl", "--force")
    assert (tmp_path / "export.jsonl").read_text().startswith("{")
    for name in ("export.csv", "export"):
        assert ".parquet or .jsonl" in command("export", run_of("ids"), "-o", name, code=1)
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a directory" in command("export", run_of("ids"), "-o", "folder.jsonl", "--force", code=1)


def test_a_write_that_fails_leaves_what_was_there(run_of, command, tmp_path, monkeypatch):
    from exgrpo_trl.cli import export, main

    def fail(*arguments):
        arguments[-1].write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_write_jsonl", fail)
    (tmp_path / "export.jsonl").write_text("mine")
    assert main(["export", str(run_of("ids")), "-o", str(tmp_path / "export.jsonl"), "--force"]) == 1
    assert (tmp_path / "export.jsonl").read_text() == "mine"
    assert os.listdir(tmp_path) == ["export.jsonl"]


def test_an_empty_buffer(command, tmp_path):
    save_buffer(ExperienceBuffer(), tmp_path / "empty")
    for name in ("export.jsonl", "export.parquet"):
        assert "0 completions" in command("export", "empty", "-o", name)
    assert (tmp_path / "export.jsonl").read_text() == ""
    assert pq.read_table(tmp_path / "export.parquet").num_rows == 0
