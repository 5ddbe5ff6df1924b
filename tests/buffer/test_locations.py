"""A buffer is found in its directory, in a checkpoint, and in the newest complete checkpoint of a run."""

import os

import pytest

from exgrpo_trl.buffer import ExperienceBuffer
from exgrpo_trl.buffer.locations import BUFFER_FOLDER, TRAINER_STATE_FILE, find_buffer
from exgrpo_trl.records import ExperienceBufferError


def save(folder, state="{}", capacity=1):
    """A buffer that its capacity tells from others; with the state of a trainer, a checkpoint."""
    ExperienceBuffer(capacity=capacity).save(folder / BUFFER_FOLDER)
    if state is not None:
        (folder / TRAINER_STATE_FILE).write_text(state)


@pytest.fixture
def run(tmp_path):
    for step in (2, 9, 10):
        save(tmp_path / f"checkpoint-{step}", capacity=step)
    return tmp_path


def test_the_newest_complete_checkpoint_of_a_run(run):
    assert ExperienceBuffer.load(run).capacity == 10
    assert ExperienceBuffer.load(str(run / "checkpoint-9")).capacity == 9
    assert ExperienceBuffer.load(run / "checkpoint-2" / BUFFER_FOLDER).capacity == 2
    assert find_buffer(run) == run / "checkpoint-10" / BUFFER_FOLDER


@pytest.mark.parametrize("state", [None, "", "{", "[]"])
def test_an_incomplete_checkpoint_is_passed_over_unless_it_is_named(run, state):
    save(run / "checkpoint-11", state, capacity=11)
    assert ExperienceBuffer.load(run).capacity == 10
    assert ExperienceBuffer.load(run / "checkpoint-11").capacity == 11


def test_other_folders_are_no_checkpoints(run):
    for name in ("checkpoint-best", "checkpoint-99-old", "my-checkpoint-98"):
        save(run / name)
    (run / "checkpoint-97").touch()
    (run / "checkpoint-96").mkdir()
    assert ExperienceBuffer.load(run).capacity == 10


def test_a_checkpoint_without_a_buffer_is_passed_over(run):
    (run / "checkpoint-11").mkdir()
    (run / "checkpoint-11" / TRAINER_STATE_FILE).write_text("{}")
    assert ExperienceBuffer.load(run).capacity == 10


def test_a_buffer_of_the_run_comes_before_those_of_its_checkpoints(run):
    save(run, state=None, capacity=5)
    assert ExperienceBuffer.load(run).capacity == 5


def test_a_buffer_whose_save_died_is_found(run):
    folder = run / "checkpoint-10" / BUFFER_FOLDER
    os.rename(folder, folder.with_name(f".{BUFFER_FOLDER}.replaced"))
    for path in (run, run / "checkpoint-10", folder):
        assert ExperienceBuffer.load(path).capacity == 10


def refusal(path):
    with pytest.raises(ExperienceBufferError) as caught:
        ExperienceBuffer.load(path)
    assert "save(" not in str(caught.value), "nothing is to be written where nothing was found"
    return str(caught.value)


def test_messages_name_what_was_looked_at(tmp_path):
    assert f"{tmp_path / 'none'} does not exist. Check the path" in refusal(tmp_path / "none")
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in refusal(tmp_path / "file")
    for step in (3, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for looked_at in (
        "metadata.json",
        BUFFER_FOLDER,
        f"checkpoint-3/{BUFFER_FOLDER}",
        f"checkpoint-20/{BUFFER_FOLDER}",
    ):
        assert str(tmp_path / looked_at) in refusal(tmp_path)
    (tmp_path / "checkpoint-20" / TRAINER_STATE_FILE).write_text("{}")
    assert f"no {tmp_path / 'checkpoint-20' / BUFFER_FOLDER}. It was written without replay" in refusal(
        tmp_path / "checkpoint-20"
    )


def test_a_run_without_a_complete_checkpoint(tmp_path):
    for step in (3, 20):
        save(tmp_path / f"checkpoint-{step}", state=None)
    message = refusal(tmp_path)
    assert "missing from checkpoint-3, checkpoint-20" in message
    assert f"for example {tmp_path / 'checkpoint-20'}." in message


def test_names_are_those_of_transformers():
    trainer = pytest.importorskip("transformers.trainer")
    utils = pytest.importorskip("transformers.trainer_utils")
    assert trainer.TRAINER_STATE_NAME == TRAINER_STATE_FILE
    assert utils.PREFIX_CHECKPOINT_DIR == "checkpoint"
