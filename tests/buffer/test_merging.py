"""Several buffers as one, and parts of a buffer as another."""

import numpy as np
import pytest
from PIL import Image

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question, Reuse, RolloutDetails
from exgrpo_trl.images import StoredImage


def experience(token, version=0, **changes):
    return Experience.create([token, 5], [-0.5, -0.25], policy_version=version, reward=1.0, **changes)


def add(buffer, question_id, *experiences, bucket=1, group_size=4, prompt=None):
    example = {"prompt": f"prompt {question_id}" if prompt is None else prompt}
    buffer.collect(Question(question_id, example), experiences, num_correct=bucket, group_size=group_size)


def tokens(buffer):
    return {
        question_id: [e.token_ids[0] for e in buffer.completions(question_id)]
        for ids in buffer.buckets().values()
        for question_id in ids
    }


def buckets(buffer):
    return {question_id: bucket for bucket, ids in buffer.buckets().items() for question_id in ids}


def test_two_buffers(tmp_path):
    first, second = ExperienceBuffer(capacity=100, seed=3), ExperienceBuffer(capacity=5)
    add(first, "a", experience(1, 5), experience(2, 7), bucket=2)
    add(first, "b", experience(3, 1), bucket=1)
    first.note_reuse("a", first.completions("a")[0], Reuse(4))
    first.replay_state = {"replayer": {}}
    first.retire("r")
    add(second, "a", experience(2, 2), experience(9, 6), bucket=3)
    add(second, "c", experience(4, 0), bucket=3)
    add(second, "r", experience(4, 0), bucket=3)
    second.note_reuse("c", second.completions("c")[0], Reuse(2))
    second.retire("s")
    result = ExperienceBuffer.merge([first, second])
    # By policy version; the older one of two with the same tokens stays.
    assert tokens(result) == {"a": [2, 1, 9], "b": [3], "c": [4]}
    assert [e.policy_version for e in result.completions("a")] == [2, 5, 6]
    assert buckets(result) == {"a": 2, "b": 1, "c": 3}
    assert list(result.retired) == ["r", "s"]
    assert result.reuse(result.completions("a")[1]).num_replays == 4
    assert result.reuse(result.completions("c")[0]).num_replays == 2
    assert (result.capacity, result.group_size, result.num_duplicates) == (100, 4, 1)
    assert result.replay_state == {}
    assert result.rng.bit_generator.state == first.rng.bit_generator.state
    assert result.check_valid() == (True, "")
    # The others stay as they were, and share no generator.
    assert tokens(first) == {"a": [1, 2], "b": [3]}
    result.rng.random()
    assert result.rng.bit_generator.state != first.rng.bit_generator.state
    assert second.check_valid() == (True, "")
    result.save(tmp_path / "merged")
    assert tokens(ExperienceBuffer.load(tmp_path / "merged")) == tokens(result)


def test_limits():
    first, second = ExperienceBuffer(capacity=2), ExperienceBuffer()
    for token in (1, 2):
        add(first, "a", experience(token, token))
        add(second, "b", experience(token, 3 + token))
    assert tokens(ExperienceBuffer.merge([first, second])) == {"b": [1, 2]}
    assert ExperienceBuffer.merge([first, second], capacity=None).num_completions == 4
    result = ExperienceBuffer.merge([first, second], capacity=9, max_completions_per_question=1)
    assert tokens(result) == {"a": [2], "b": [2]}
    assert (result.capacity, result.max_completions_per_question, result.num_evicted) == (9, 1, 2)
    with pytest.raises(TypeError, match="limit"):
        ExperienceBuffer.merge([first], seed=3)
    with pytest.raises(ValueError, match="at least 1"):
        ExperienceBuffer.merge([first], capacity=0)
    with pytest.raises(ValueError, match="no experience buffer"):
        ExperienceBuffer.merge([])


def test_what_does_not_belong_together():
    def one(**changes):
        buffer = ExperienceBuffer(unit=changes.get("unit", "completion"))
        size = changes.get("group_size", 2)
        add(buffer, "a", experience(1), experience(2), group_size=size, prompt=changes.get("prompt"))
        buffer.provenance = {"tokenizer": "t", "temperature": 1.0, **changes.get("provenance", {})}
        return buffer

    for changes, message in (
        ({"unit": "group"}, "unit='completion' and unit='group'"),
        ({"group_size": 3}, "group_size=2 and group_size=3"),
        ({"provenance": {"tokenizer": "u"}}, "tokenizer='t' and tokenizer='u'"),
        ({"provenance": {"temperature": 0.5}}, "temperature=1.0 and temperature=0.5"),
        ({"prompt": "another"}, "belongs to two prompts"),
    ):
        with pytest.raises(ExperienceBufferError, match=message) as caught:
            ExperienceBuffer.merge([one(), one(**changes)], names=["here", "there"])
        assert "here and there cannot be merged" in str(caught.value)
    # What only one of them tells is taken over.
    result = ExperienceBuffer.merge([one(), one(provenance={"chat_template": "c"})])
    assert result.provenance == {"tokenizer": "t", "temperature": 1.0, "chat_template": "c"}
    assert ExperienceBuffer.merge(
        [one(provenance={"x": float("nan")}), one(provenance={"x": float("nan")})]
    ).num_completions
    # Nothing has to agree with a buffer that never held anything.
    assert tokens(ExperienceBuffer.merge([ExperienceBuffer(group_size=2), one(unit="group")])) == {"a": [1, 2]}


def test_chat_templates_may_differ_where_prompts_are_known():
    def one(template, number):
        buffer = ExperienceBuffer()
        add(buffer, "a", experience(1, prompt_hash=number))
        buffer.provenance = {"chat_template": template}
        return buffer

    assert ExperienceBuffer.merge([one("x", 3), one("y", 4)]).provenance == {"chat_template": "x"}
    with pytest.raises(ExperienceBufferError, match="chat_template"):
        ExperienceBuffer.merge([one("x", 3), one("y", 0)])


def test_groups():
    first, second = ExperienceBuffer(unit="group"), ExperienceBuffer(unit="group")
    for buffer, version, start in ((first, 4, 1), (second, 2, 3), (second, 4, 1)):
        add(buffer, "a", *(experience(start + row, version) for row in range(2)), group_size=2)
    result = ExperienceBuffer.merge([first, second])
    assert [[e.token_ids[0] for e in group] for group in result.groups("a")] == [[3, 4], [1, 2]]
    assert result.check_valid() == (True, "")
    assert result.num_duplicates == 2
    aside = result.set_aside(lambda question, bucket, e: e.token_ids[0] == 4)
    assert tokens(aside) == {"a": [3, 4]}
    assert tokens(result) == {"a": [1, 2]}
    assert aside.unit == "group"


def test_images_are_shared():
    pixels = [Image.fromarray(np.full((4, 4, 3), color, dtype=np.uint8)) for color in (10, 200)]
    buffers = []
    for number in range(2):
        buffer = ExperienceBuffer()
        details = RolloutDetails.create(messages=[{"role": "tool", "content": [pixels[1]]}])
        experiences = [experience(number, details=details)]
        buffer.collect(Question("a", {"prompt": [pixels[0]]}), experiences, num_correct=1, group_size=4)
        buffers.append(buffer)
    result = ExperienceBuffer.merge(buffers)
    assert result.check_valid() == (True, "")
    images = [image for e in result.completions("a") for image in e.details.images]
    assert len(images) == 2
    assert images[0] is images[1]
    assert isinstance(result.question("a").example["prompt"][0], StoredImage)


def test_set_aside_and_back(tmp_path):
    buffer = ExperienceBuffer(capacity=50, max_completions_per_question=5)
    for token in range(4):
        add(buffer, "a", experience(token, token), bucket=3)
        add(buffer, "b", experience(token, token), bucket=1)
    buffer.note_reuse("a", buffer.completions("a")[1], Reuse(3))
    buffer.provenance, buffer.replay_state = {"tokenizer": "t"}, {"x": 1}
    seen = []

    def is_chosen(question, bucket, e):
        seen.append((question.question_id, bucket))
        return bucket == 1 or e.policy_version == 1

    aside = buffer.set_aside(is_chosen)
    assert set(seen) == {("a", 3), ("b", 1)}
    assert tokens(buffer) == {"a": [0, 2, 3]}
    assert tokens(aside) == {"a": [1], "b": [0, 1, 2, 3]}
    assert buckets(aside) == {"a": 3, "b": 1}
    assert aside.reuse(aside.completions("a")[0]).num_replays == 3
    assert (aside.capacity, aside.replay_state, aside.provenance) == (None, {}, {"tokenizer": "t"})
    assert (buffer.replay_state, buffer.num_evicted) == ({"x": 1}, 5)
    for of in (buffer, aside):
        assert of.check_valid() == (True, "")
        of.save(tmp_path / "buffer")
    result = ExperienceBuffer.merge([buffer, aside])
    assert tokens(result) == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}
    assert result.reuse(result.completions("a")[1]).num_replays == 3
