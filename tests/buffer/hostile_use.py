"""What anyone may do with a buffer of a stranger, and what it may raise."""

import contextlib
import copy
import io
import shutil

import datasets

from exgrpo_trl import ExperienceBuffer, ExperienceBufferError
from exgrpo_trl.cli import main
from exgrpo_trl.examples import encode_example
from exgrpo_trl.values import copied

FILES = ("questions.parquet", "completions.parquet", "retired.parquet", "images.parquet", "metadata.json")
datasets.disable_progress_bars()


@contextlib.contextmanager
def stage(name):
    """What raises in there says so."""
    try:
        yield
    except Exception as error:
        error.add_note(f"stage: {name}")
        raise


def stage_of(error):
    """Where an error was raised."""
    notes = [note.removeprefix("stage: ") for note in getattr(error, "__notes__", ())]
    return notes[0] if notes else "?"


def use(path, elsewhere):
    """Load a buffer and do everything with it; returns what happened."""
    try:
        with stage("load"):
            buffer = ExperienceBuffer.load(path)
    except ExperienceBufferError as error:
        with stage("message"):
            text = str(error)
            assert str(path) in text, text
            assert any(name in text for name in FILES), text
            assert len(text) < 4000, text[:4000]
        with stage("show"):
            assert show(path) == 1
        return "refused"
    with stage("show"):
        assert show(path) == 0
        assert show(path, "--json") == 0
        for options in ([], ["--json"]):
            assert show(path, "--list", *options) == 0
            for question_id in [question.question_id for question, _, _ in buffer.items()][:2]:
                assert show(path, f"--question={question_id}", *options) == 0
    with stage("use"):
        used(buffer)
    with stage("save"):
        buffer.save(elsewhere)
        assert ExperienceBuffer.load(elsewhere).num_completions == buffer.num_completions
    with stage("commands"):
        merged = elsewhere.with_name("merged")
        assert call("merge", path, elsewhere, "-o", merged, "--force") == 0
        assert call("diff", path, merged) == 0
        shutil.rmtree(elsewhere.with_name("merged.quarantine"), ignore_errors=True)  # of another buffer
        assert call("prune", path, "-o", merged, "--force", "--filter", "bucket>=2", "--filter", "prompt!~x") == 0
        assert call("export", path, "-o", elsewhere.with_name("export.jsonl"), "--force") == 0
    with stage("to_dataset"):
        dataset = buffer.to_dataset()
    with stage("from_dataset"), contextlib.suppress(ExperienceBufferError):  # images are decoded only now
        ExperienceBuffer.from_dataset(dataset, group_size=buffer.group_size or 1, unit=buffer.unit)
    return "loaded"


def show(path, *options):
    """`exgrpo-trl show`, see `call`."""
    return call("show", str(path), *options)


def call(*arguments):
    """`exgrpo-trl`, which may write text and line breaks, and nothing that a terminal obeys."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, arguments)])
    printed = out.getvalue() + err.getvalue()
    printed.encode()
    unreadable = [c for c in printed if not c.isprintable() and c not in "\n"]
    assert not unreadable, unreadable
    return code


def used(buffer):
    """Look at everything in a buffer, draw from it, and let it go."""
    assert buffer.check_valid() == (True, "")
    repr(buffer), buffer.metrics(), buffer.sample_questions(3), buffer.rng.random(), buffer.rng.integers(5)
    for question, _, experience in buffer.items():
        with contextlib.suppress(ExperienceBufferError):  # images are decoded only now
            copied(question.example)
        encode_example(question.example), repr(question), repr(experience)
        assert len(experience.token_ids) == len(experience.behavior_per_token_logps) == len(experience.is_model)
        assert buffer.reuse(experience).num_replays >= 0
        details = experience.details
        if details is not None:
            repr(details), details.messages, details.prompt, details.prompt_ids
            assert isinstance(details.fields, dict)
            assert all(isinstance(reward, float | int) for reward in (details.rewards or {}).values())
    other = copy.deepcopy(buffer)
    while other.num_completions:
        other.evict(*other.oldest())


def use_dataset(unit, table):
    """Make a buffer of a dataset; returns what happened."""
    try:
        dataset = datasets.Dataset(table)
    except Exception:
        return "no dataset"
    try:
        with stage("from_dataset"):
            buffer = ExperienceBuffer.from_dataset(dataset, group_size=4, unit=unit)
    except ExperienceBufferError as error:
        refusal = str(error)
    else:
        with stage("use"):
            used(buffer)
        return "loaded"
    assert "dataset" in refusal, refusal
    return "refused"
