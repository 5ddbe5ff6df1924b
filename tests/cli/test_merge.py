"""`exgrpo-trl merge` of checkpoints of real runs, compared with a merge by hand."""

import pytest
from saved_runs import new_trainer

from exgrpo_trl import ExperienceBuffer

KINDS = ["ids", "tools", "images", "groups"]


def parts_of(buffer, question_id):
    if buffer.unit == "group":
        return buffer.groups(question_id)
    return [(experience,) for experience in buffer.completions(question_id)]


def by_hand(buffers):
    """Versions and tokens of everything by question, and the bucket of each question."""
    retired = {question_id for buffer in buffers for question_id in buffer.retired}
    parts, buckets = {}, {}
    for buffer in buffers:
        for bucket, question_ids in buffer.buckets().items():
            for question_id in set(question_ids) - retired:
                buckets.setdefault(question_id, bucket)
                for part in parts_of(buffer, question_id):
                    tokens = tuple(tuple(e.token_ids.tolist()) for e in part)
                    of_question = parts.setdefault(question_id, {})
                    of_question[tokens] = min(part[0].policy_version, of_question.get(tokens, 99))
    return parts, buckets, retired


@pytest.mark.parametrize("kind", KINDS)
def test_two_checkpoints(run_of, command, tmp_path, kind):
    paths = [run_of(kind) / f"checkpoint-{step}" for step in (3, 6)]
    buffers = [ExperienceBuffer.load(path) for path in paths]
    printed = command("merge", *paths, "-o", "merged")
    merged = ExperienceBuffer.load(tmp_path / "merged")
    parts, buckets, retired = by_hand(buffers)
    assert {q: bucket for bucket, ids in merged.buckets().items() for q in ids} == buckets
    for question_id, expected in parts.items():
        found = parts_of(merged, question_id)
        assert {tuple(tuple(e.token_ids.tolist()) for e in part): part[0].policy_version for part in found} == expected
        versions = [part[0].policy_version for part in found]
        assert versions == sorted(versions)
    assert set(merged.retired) == retired
    assert merged.provenance == buffers[0].provenance
    assert merged.replay_state == {}
    assert (
        f"Wrote merged: {merged.num_completions} completions of {len(parts)} questions, {len(retired)} ret" in printed
    )
    twice = sum(map(len, buffers)) - len(merged)
    of_retired = sum(
        len(buffer.completions(q))
        for buffer in buffers
        for q in set().union(*map(set, buffer.buckets().values())) & retired
    )
    assert f"Left out: {twice - of_retired} completions there twice" in printed
    if of_retired:
        assert f"Left out: {of_retired} completions of questions that retired in another" in printed
    assert max(map(len, buffers)) <= len(merged) + of_retired


def test_the_new_one_is_replayed(run_of, command, tmp_path):
    command("merge", run_of("ids") / "checkpoint-3", run_of("ids"), "-o", "merged", "--capacity", "12")
    merged = ExperienceBuffer.load(tmp_path / "merged")
    assert (merged.capacity, merged.num_completions) == (12, 12)
    trainer = new_trainer(
        tmp_path / "run", "ids", experience_buffer=str(tmp_path / "merged"), max_steps=2, buffer_capacity=12
    )
    trainer.train()
    assert trainer.replayer.metrics.tokens_saved > 0
    command("merge", tmp_path / "merged", "-o", "free", "--capacity", "0", "--max-completions-per-question", "1")
    free = ExperienceBuffer.load(tmp_path / "free")
    assert (free.capacity, free.max_completions_per_question) == (None, 1)
    assert free.num_completions == merged.num_questions


def test_what_does_not_belong_together(run_of, command, tmp_path):
    for other, expected in (("tools", "tokenizer="), ("groups", "unit='completion' and unit='group'")):
        error = command("merge", run_of("ids"), run_of(other), "-o", "merged", code=1)
        assert expected in error
        for kind in ("ids", other):
            assert str(run_of(kind) / "checkpoint-6" / "experience_buffer") in error
    error = command("merge", run_of("ids"), run_of("chat"), "-o", "merged", code=1)  # the same prompts, other ids
    assert "question_id_column='uid' and question_id_column=None" in error
    error = command("merge", run_of("groups"), "-o", "merged", "--capacity", "3", code=1)
    assert "can never hold a group of 4" in error
    assert not (tmp_path / "merged").exists()


def test_what_is_there_is_kept(run_of, command, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    assert "folder exists" in command("merge", run_of("ids"), "-o", "folder", code=1)
    assert "thesis.txt is not part of one" in command("merge", run_of("ids"), "-o", "folder", "--force", code=1)
    assert (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    command("merge", run_of("ids"), "-o", "merged")
    assert "--force" in command("merge", run_of("ids") / "checkpoint-3", "-o", "merged", code=1)
    before = ExperienceBuffer.load(tmp_path / "merged").num_completions
    command("merge", run_of("ids") / "checkpoint-3", "-o", "merged", "--force")
    assert ExperienceBuffer.load(tmp_path / "merged").num_completions != before
    # Also where a save died that would have replaced it.
    (tmp_path / "merged").rename(tmp_path / ".merged.replaced")
    assert "merged exists" in command("merge", run_of("ids"), "-o", "merged", code=1)
