import json
import math
import time

import numpy as np
import pytest

from exgrpo_trl import Experience, RolloutDetails, StoredImage
from exgrpo_trl.rollout_details import is_model_of

Image = pytest.importorskip("PIL.Image")


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 9, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("flags", "runs"),
    [
        ([1, 1, 1], []),
        ([1, 1, 0, 0, 0, 1], [2, 3, 1]),
        ([0, 1], [0, 1, 1]),
        ([0, 0, 1, 0], [0, 2, 1, 1]),
        ([1, 0], [1, 1]),
        (np.array([True, False, True]), [1, 1, 1]),
        ([1.0, 0.0], [1, 1]),
    ],
)
def test_who_wrote_which_token(flags, runs):
    details = RolloutDetails.create(is_model=flags, rewards={})
    assert details.run_lengths.tolist() == runs
    assert details.run_lengths.dtype == np.int32
    assert is_model_of(details.run_lengths, len(flags)).tolist() == [bool(flag) for flag in flags]


def test_a_rollout_that_the_model_wrote_nothing_of_is_refused():
    with pytest.raises(ValueError, match="wrote no token"):
        RolloutDetails.create(is_model=[0, 0])


def test_nothing_to_keep_is_none():
    assert RolloutDetails.create() is None
    assert RolloutDetails.create(is_model=[1, 1], fields={}) is None
    assert RolloutDetails.create(fields={"seed": 0}) is not None
    assert RolloutDetails.create(rewards={"correct": None}) is not None


def test_everything_comes_back():
    messages = [
        {"role": "assistant", "tool_calls": [{"function": {"name": "search", "arguments": {"ü": (1, 2.5)}}}]},
        {"role": "tool", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "a\x00b"}]},
    ]
    prompt = [{"role": "user", "content": [{"type": "image", "image": picture(1)}]}]
    fields = {"score": np.float32(1.5), "state": {"seen": {1, 2}, "board": np.arange(6).reshape(2, 3)}}
    details = RolloutDetails.create(
        is_model=[1, 0, 1],
        messages=messages,
        prompt=prompt,
        prompt_ids=[7, 2**31 - 1],
        fields=fields,
        rewards={"correct": 1, "style": None, "length": math.nan},
    )
    assert [type(image) for image in details.images] == [StoredImage] * 2
    assert details.messages[0] == messages[0]
    shown = details.messages[1]["content"]
    assert shown[1] == {"type": "text", "text": "a\x00b"}
    assert shown[0]["image"] is details.images[0]
    assert shown[0]["image"].open().tobytes() == picture().tobytes()
    assert details.prompt[0]["content"][0]["image"] is details.images[1]
    assert details.prompt_ids.tolist() == [7, 2**31 - 1]
    assert details.fields["score"] == 1.5
    assert type(details.fields["score"]) is np.float32
    assert details.fields["state"]["seen"] == {1, 2}
    assert details.fields["state"]["board"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert details.rewards["correct"] == 1.0
    assert list(details.rewards) == ["correct", "style", "length"]
    assert math.isnan(details.rewards["style"])
    assert math.isnan(details.rewards["length"])


def test_what_is_not_given_is_not_there():
    details = RolloutDetails.create(messages="plain text")
    assert details.messages == "plain text"
    assert details.run_lengths.tolist() == []
    assert (details.prompt, details.prompt_ids, details.fields, details.rewards) == (None, None, {}, None)
    assert details.images == ()


def test_an_image_is_kept_once():
    one = picture()
    content = [{"type": "image", "image": image} for image in (one, picture(1), one, picture(), StoredImage.of(one))]
    details = RolloutDetails.create(
        messages=[{"role": "tool", "content": content}], prompt=[{"role": "user", "content": content[:1]}]
    )
    assert len(details.images) == 2
    found = [item["image"] for item in details.messages[0]["content"]]
    assert [image is details.images[0] for image in found] == [True, False, True, True, True]
    assert found[1] is details.images[1]
    assert details.images[0].digest in details.prompt_text
    assert json.loads(details.prompt_text)


def test_what_cannot_be_stored_is_refused():
    with pytest.raises(TypeError, match=r"'fields'.*builtins\.object"):
        RolloutDetails.create(fields={"state": object()})
    with pytest.raises(TypeError, match="'messages'"):
        RolloutDetails.create(messages=[{"role": "tool", "content": object()}])
    with pytest.raises(ValueError, match="Convert it to RGB"):
        RolloutDetails.create(messages=[{"role": "tool", "content": [Image.new("HSV", (2, 2))]}])


def test_an_experience_knows_who_wrote_its_tokens():
    details = RolloutDetails.create(is_model=[1, 1, 0, 0, 1])
    logps = [-0.5, -1.0, math.nan, 3.0, -2.0]
    with pytest.raises(ValueError, match="log"):
        Experience.create([1, 2, 3, 4, 5], logps, policy_version=0, reward=1.0, details=details)
    logps[2:4] = -9.0, -9.0
    experience = Experience.create([1, 2, 3, 4, 5], logps, policy_version=0, reward=1.0, details=details)
    assert experience.is_model.tolist() == [True, True, False, False, True]
    assert (experience.num_model_tokens, experience.num_tokens) == (3, 5)
    assert experience.behavior_per_token_logps.tolist() == [-0.5, -1.0, 0.0, 0.0, -2.0], "others have no policy"
    with pytest.raises(ValueError, match="who wrote 5 tokens, of a completion of 4"):
        Experience.create([1, 2, 3, 4], logps[:4], policy_version=0, reward=1.0, details=details)
    plain = Experience.create([1, 2], logps[:2], policy_version=0, reward=1.0)
    assert plain.is_model.tolist() == [True, True]
    assert plain.num_model_tokens == 2


def test_recording_a_long_rollout_is_cheap():
    """Benchmarks measure it; this is against what is slower by an order, such as a loop over tokens."""
    tokens = np.arange(4000)
    logps = np.full(4000, -0.5)
    is_model = np.arange(4000) % 500 < 400
    messages = [{"role": role, "content": "x" * 1000} for _ in range(8) for role in ("assistant", "tool")]
    times = []
    for _ in range(20):
        start = time.perf_counter()
        details = RolloutDetails.create(is_model=is_model, messages=messages, rewards={"correct": 1.0})
        experience = Experience.create(tokens, logps, policy_version=0, reward=1.0, details=details)
        assert experience.is_model.sum() == 3200
        assert len(experience.details.messages) == 16
        times.append(time.perf_counter() - start)
    assert min(times) < 1e-3
