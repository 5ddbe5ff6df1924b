"""`exgrpo-trl diff` between the checkpoints of real runs, compared with sets."""

import json

import pytest

from exgrpo_trl import Experience, ExperienceBuffer, Question

KINDS = ["ids", "tools", "images", "groups"]


def described(buffer):
    """Bucket of every question, its completions or groups, and the retired questions; without the code under test."""
    buckets = {question_id: bucket for bucket, ids in buffer.buckets().items() for question_id in ids}
    parts = {}
    for question_id in buckets:
        of = buffer.groups(question_id) if buffer.unit == "group" else [(e,) for e in buffer.completions(question_id)]
        parts[question_id] = {tuple(tuple(e.token_ids.tolist()) for e in part) for part in of}
    return buckets, parts, set(buffer.retired)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_questions(run_of, command, kind):
    paths = [run_of(kind) / f"checkpoint-{step}" for step in (3, 6)]
    (old, old_parts, old_retired), (new, new_parts, new_retired) = (
        described(ExperienceBuffer.load(path)) for path in paths
    )
    found = json.loads(command("diff", *paths, "--json"))
    came = sum(len(part) for q in new for part in new_parts[q] - old_parts.get(q, set()))
    went = sum(len(part) for q in old for part in old_parts[q] - new_parts.get(q, set()))
    assert found["counts"] == {
        "questions_came": len(new.keys() - old.keys()),
        "questions_went": len(old.keys() - new.keys()),
        "questions_moved": sum(old[q] != new[q] for q in old.keys() & new.keys()),
        "questions_retired": len(new_retired - old_retired),
        "questions_unretired": 0,
        "completions_came": came,
        "completions_went": went,
    }
    assert came > 0
    assert (found["before"]["version"], found["after"]["version"]) == (3, 6)
    named = {of["question"]: of for of in found["questions"]}
    changed = {q for q in old.keys() | new.keys() if old.get(q) != new.get(q) or old_parts.get(q) != new_parts.get(q)}
    assert named.keys() == changed | (new_retired - old_retired)
    for question_id, of in named.items():
        assert of["bucket_before"] == old.get(question_id)
        assert of["bucket_after"] == new.get(question_id)
        assert ("retired" in of["changes"]) == (question_id in new_retired - old_retired)
        new_ones = new_parts.get(question_id, set()) - old_parts.get(question_id, set())
        assert of["completions_came"] == sum(map(len, new_ones))


def test_text(run_of, command):
    paths = [run_of("ids") / f"checkpoint-{step}" for step in (3, 6)]
    found = json.loads(command("diff", *paths, "--json"))
    lines = command("diff", *paths).splitlines()
    assert lines[0] == f"before: {paths[0]}/experience_buffer (step 3)"
    rows = [" ".join(line.split()) for line in lines]
    for name, count in found["counts"].items():
        assert f"{name.replace('_', ' that ')} {count}" in rows
    first_line = next(number for number, row in enumerate(rows) if row.startswith("completions that went")) + 1
    assert len(lines) - first_line == len(found["questions"])
    of = next(of for of in found["questions"] if "came" in of["changes"])
    expected = f"{of['question']}: came, bucket none to {of['bucket_after']}, +{of['completions_came']} -0"
    assert expected in lines
    limited = command("diff", *paths, "--limit", "1").splitlines()
    assert limited[: first_line + 1] == lines[: first_line + 1]
    assert limited[-1] == f"{len(found['questions']) - 1} more; --limit 0 shows all."
    # The other way round, what retired is no longer.
    back = json.loads(command("diff", *reversed(paths), "--json", "--limit", "1"))
    assert back["counts"]["questions_unretired"] == found["counts"]["questions_retired"]
    assert back["counts"]["completions_went"] == found["counts"]["completions_came"]
    assert len(back["questions"]) == 1


def test_the_same(run_of, command):
    found = json.loads(command("diff", run_of("chat"), run_of("chat"), "--json"))
    assert not any(found["counts"].values())
    assert found["questions"] == []


def test_what_cannot_be_compared(run_of, command, tmp_path):
    error = command("diff", run_of("ids"), run_of("groups"), code=1)
    for path in (run_of("ids"), run_of("groups")):
        assert str(path) in error
    assert "unit='completion' and unit='group'" in error
    assert f"{tmp_path / 'none'} does not exist" in command("diff", run_of("ids"), tmp_path / "none", code=1)


def test_other_provenance_is_told(command, tmp_path):
    for name in ("a", "b"):
        buffer = ExperienceBuffer()
        experience = Experience.create([1], [-1.0], policy_version=1, reward=1.0)
        buffer.collect(Question("q", {"prompt": "p"}), [experience], num_correct=1, group_size=2)
        buffer.provenance = {"tokenizer": name}
        buffer.save(tmp_path / name)
    assert "They were collected with another: tokenizer" in command("diff", "a", "b")
