"""The garbage collector is as it was, however a load ends."""

import gc

import pytest

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question
from exgrpo_trl.buffer.garbage import without_collection


@pytest.fixture
def collector():
    """Leave it as it was."""
    was_enabled = gc.isenabled()
    yield
    (gc.enable if was_enabled else gc.disable)()


def filled(num_questions=1500):
    buffer = ExperienceBuffer()
    for number in range(num_questions):
        question = Question(f"q{number}", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]})
        experience = Experience.create([1], [-0.5], policy_version=0, reward=1.0)
        buffer.collect(question, [experience], num_correct=1, group_size=2)
    return buffer


@pytest.mark.parametrize("is_enabled", [True, False])
def test_the_collector_is_as_it_was(tmp_path, collector, is_enabled):
    (gc.enable if is_enabled else gc.disable)()
    filled(1).save(tmp_path / "buffer")
    ExperienceBuffer.load(tmp_path / "buffer")
    assert gc.isenabled() == is_enabled
    with pytest.raises(ExperienceBufferError):
        ExperienceBuffer.load(tmp_path / "missing")
    assert gc.isenabled() == is_enabled


def test_a_load_is_not_collected_and_leaves_nothing_to_collect(tmp_path, collector):
    gc.enable()
    filled().save(tmp_path / "buffer")
    ExperienceBuffer.load(tmp_path / "buffer")  # what is made once, such as imports
    gc.collect()
    before = gc.get_stats()
    loaded = ExperienceBuffer.load(tmp_path / "buffer")
    after = gc.get_stats()
    assert len(loaded) == 1500
    # The first objects afterwards may start one.
    assert sum(of["collections"] for of in after) <= sum(of["collections"] for of in before) + 1
    assert gc.collect() < 10, "circles that a load made"


def test_loads_at_the_same_time_leave_it_on(collector):
    gc.enable()
    first, second = without_collection(), without_collection()
    first.__enter__()
    second.__enter__()
    assert not gc.isenabled()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.isenabled()
