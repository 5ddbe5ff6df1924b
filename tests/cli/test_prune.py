"""`exgrpo-trl prune`: what leaves, what is left, what comes back, and trainers that go on with it."""

import hashlib
import shutil

import pytest
from saved_runs import new_trainer

from exgrpo_trl import ExperienceBuffer
from exgrpo_trl.buffer.metadata import read_metadata


def tokens(buffer):
    """Tokens of everything that is stored, by question."""
    return {
        question_id: [tuple(e.token_ids.tolist()) for e in buffer.completions(question_id)]
        for ids in buffer.buckets().values()
        for question_id in ids
    }


def in_any_order(of_questions):
    return {question_id: sorted(of) for question_id, of in of_questions.items()}


def split(buffer, is_chosen):
    """The same of what is left and of what leaves, by hand."""
    kept, gone = {}, {}
    for question_id, bucket in [(q, bucket) for bucket, ids in buffer.buckets().items() for q in ids]:
        own = buffer.completions(question_id)
        parts = buffer.groups(question_id) if buffer.unit == "group" else [(experience,) for experience in own]
        for part in parts:
            target = gone if any(is_chosen(bucket, experience) for experience in part) else kept
            target.setdefault(question_id, []).extend(tuple(e.token_ids.tolist()) for e in part)
    return kept, gone


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run_folder(run_of, tmp_path):
    """A copy of a run that may be changed."""

    def copied(kind):
        shutil.copytree(run_of(kind), tmp_path / "run")
        return tmp_path / "run"

    return copied


@pytest.mark.parametrize("kind", ["ids", "tools", "images", "groups"])
def test_to_another_path(run_of, command, tmp_path, kind):
    before = digest(run_of(kind))
    buffer = ExperienceBuffer.load(run_of(kind))
    version = sorted(e.policy_version for _, _, e in buffer.items())[len(buffer) // 3]
    kept, gone = split(buffer, lambda bucket, e: bucket >= 2 and e.policy_version <= version)
    assert kept
    assert gone
    conditions = ["--filter", f"version<={version}", "--filter", "bucket>=2"]
    printed = command("prune", run_of(kind), "-o", "pruned", *conditions)
    left, aside = (ExperienceBuffer.load(tmp_path / name) for name in ("pruned", "pruned.quarantine"))
    assert tokens(left) == kept
    assert tokens(aside) == gone
    assert f"Put aside in pruned.quarantine: {len(aside)} completions of {len(gone)} questions" in printed
    assert f"Wrote pruned: {len(left)} completions of {len(kept)} questions" in printed
    assert digest(run_of(kind)) == before
    # What belongs to the run is kept: state of replay, provenance, generator, retired questions.
    old, new = (read_metadata(path) for path in (run_of(kind) / "checkpoint-6/experience_buffer", tmp_path / "pruned"))
    for name in ("settings", "provenance", "replay_state", "rng"):
        assert new[name] == old[name]
    assert list(left.retired) == list(buffer.retired)
    assert aside.provenance == buffer.provenance
    # Either way brings it back.
    command("merge", "pruned", "pruned.quarantine", "-o", "merged")
    command("prune", "pruned", "--restore", "-o", "restored")
    for name in ("merged", "restored"):
        again = ExperienceBuffer.load(tmp_path / name)
        assert in_any_order(tokens(again)) == in_any_order(tokens(buffer))
        assert {q: b for b, ids in again.buckets().items() for q in ids} == {
            q: b for b, ids in buffer.buckets().items() for q in ids
        }
        for question, _, experience in again.items():
            [own] = [e for e in buffer.completions(question.question_id) if e.token_bytes == experience.token_bytes]
            assert again.reuse(experience).num_replays == buffer.reuse(own).num_replays
    assert read_metadata(tmp_path / "restored")["replay_state"] == old["replay_state"]
    assert read_metadata(tmp_path / "merged")["replay_state"] == {}


@pytest.mark.parametrize("kind", ["ids", "tools", "images", "groups"])
def test_a_pruned_checkpoint_resumes(run_folder, command, tmp_path, kind):
    run = run_folder(kind)
    checkpoint = run / "checkpoint-6"
    buffer = ExperienceBuffer.load(checkpoint)
    kept, gone = split(buffer, lambda bucket, e: e.policy_version < 2)
    assert kept
    assert gone
    state = read_metadata(checkpoint / "experience_buffer")["replay_state"]
    printed = command("prune", checkpoint, "--in-place", "--filter", "version<2")
    assert f"Put aside in {checkpoint / 'experience_buffer.quarantine'}" in printed
    assert read_metadata(checkpoint / "experience_buffer")["replay_state"] == state
    assert tokens(ExperienceBuffer.load(checkpoint)) == kept
    assert tokens(ExperienceBuffer.load(checkpoint / "experience_buffer.quarantine")) == gone

    seen = []
    trainer = new_trainer(run, kind, max_steps=8, save_steps=8)
    load = trainer.replayer.load

    def watched(*arguments):
        load(*arguments)
        seen.append((tokens(trainer.experience_buffer), trainer.replayer.metrics.tokens_saved))

    trainer.replayer.load = watched
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert seen == [(kept, state["replayer"]["tokens_saved"])]
    assert trainer.state.global_step == 8
    assert trainer.replayer.metrics.tokens_saved > state["replayer"]["tokens_saved"]

    # In place and back: a checkpoint that a trainer goes on from.
    command("prune", checkpoint, "--in-place", "--restore")
    again = tokens(ExperienceBuffer.load(checkpoint))
    assert in_any_order(again) == in_any_order(tokens(buffer))
    if kind == "ids":
        trainer = new_trainer(run, kind, max_steps=7, save_strategy="no")
        trainer.train(resume_from_checkpoint=str(checkpoint))
        assert trainer.state.global_step == 7


def test_twice_in_place(run_folder, command):
    run = run_folder("ids")
    place = run / "checkpoint-6" / "experience_buffer"
    everything = tokens(ExperienceBuffer.load(place))
    command("prune", run, "--in-place", "--filter", "version<1")
    first = tokens(ExperienceBuffer.load(place.with_name("experience_buffer.quarantine")))
    command("prune", run, "--in-place", "--filter", "bucket=3")
    aside = tokens(ExperienceBuffer.load(place.with_name("experience_buffer.quarantine")))
    assert all(set(of) <= set(aside[question_id]) for question_id, of in first.items())
    assert aside != first
    # A part of it comes back; the text of what is in quarantine is known, too.
    left = ExperienceBuffer.load(place)
    command("prune", run, "--in-place", "--restore", "--filter", "version<1", "--filter", "text~0")
    back = tokens(ExperienceBuffer.load(place))
    assert sum(map(len, back.values())) >= left.num_completions
    command("prune", run, "--in-place", "--restore")
    again = tokens(ExperienceBuffer.load(place))
    assert in_any_order(again) == in_any_order(everything)


def test_nothing_matches(run_of, command, tmp_path):
    printed = command("prune", run_of("ids"), "-o", "pruned", "--filter", "reward>100")
    assert "No completion" in printed
    assert tokens(ExperienceBuffer.load(tmp_path / "pruned")) == tokens(ExperienceBuffer.load(run_of("ids")))
    assert not (tmp_path / "pruned.quarantine").exists()


def test_what_is_refused(run_of, command, tmp_path, run_folder):
    run = run_folder("ids")
    before = digest(run)
    some = ["--filter", "version<2"]
    for arguments, expected in (
        ([run, "-o", "pruned"], "Nothing says which completions"),
        ([run, "-o", run / "checkpoint-6/experience_buffer", *some], "--in-place"),
        ([run, "-o", run, *some], "--force"),
        ([run, "-o", run, "--force", *some], "is not part of one"),
        ([run, "-o", "pruned", "--quarantine", "pruned", *some], "--quarantine must not be pruned"),
        ([run, "--in-place", "--restore"], f"{run}/checkpoint-6/experience_buffer.quarantine does not exist"),
        ([run, "-o", "pruned", "--quarantine", run_of("tools"), *some], "cannot be merged"),
        (["none", "-o", "pruned", *some], "none does not exist"),
    ):
        assert expected in command("prune", *arguments, code=1), arguments
    for arguments in ([run], [run, "-o", "pruned", "--in-place"]):
        assert "usage" in command("prune", *arguments, *some, code=2)
    assert digest(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_in_place_after_a_save_that_died(run_folder, command):
    run = run_folder("ids")
    place = run / "checkpoint-6" / "experience_buffer"
    place.rename(place.with_name(".experience_buffer.replaced"))
    command("prune", run / "checkpoint-6", "--in-place", "--filter", "version<2")
    assert sorted(path.name for path in place.parent.iterdir() if "experience" in path.name) == [
        "experience_buffer",
        "experience_buffer.quarantine",
    ]
    assert ExperienceBuffer.load(place).num_completions
