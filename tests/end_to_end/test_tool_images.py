"""Replay of rollouts with pictures that tools return and environments show, through `trainer.train()`."""

import copy
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import trl
from agents import Rooms, environment_reward
from packaging.version import Version
from ranks import run_ranks, whole_parameters
from test_agents import AgentTrainer, calls_in, mask_of, own
from test_checkpoints import contents
from tiny import completion_logps, make_trainer, parameters_of
from tool_images import (
    PictureRoom,
    Pictures,
    images_in,
    picture_dataset,
    picture_of,
    picture_options,
    picture_reward,
)
from watched import WatchedTrainer, pixels_of

from exgrpo_trl import ExperienceBuffer
from exgrpo_trl.images import opened, pixel_digest, referenced

if Version(trl.__version__) < Version("1.10"):
    pytest.skip("TRL below 1.10 does not take images that tools return", allow_module_level=True)


def draws(model_kind, images, **changes):
    def options(anew=False):
        pictures = Pictures(anew)
        changes_of_kind = {"tools": pictures.tools, "train_dataset": picture_dataset(images=images)} | changes
        return picture_options(model_kind, **changes_of_kind), pictures

    return options


def shows(observe, images):
    def options(anew=False):
        rooms = Rooms(PictureRoom, observe=observe)
        changes = {
            "environment_factory": rooms,
            "train_dataset": picture_dataset(images=images, placeholders=images),
            "reward_funcs": environment_reward,
            "success_threshold": 0.1,
        }
        return picture_options("grid", **changes), rooms

    return options


# In TRL a later turn fails where no row of it has a picture but another row had one before.
ONE_TURN = {"max_tool_calling_iterations": 1}
KINDS = {
    "tools": draws("grid", images=False, **ONE_TURN),
    "tools_and_dataset": draws("grid", images=True),
    "gemma": draws("gemma", images=False),
    "gemma_and_dataset": draws("gemma", images=True),
    "environment": shows("anew", images=False),
    "environment_and_dataset": shows("anew", images=True),
    "environment_shows_row": shows("row", images=False),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def options_of(kind, anew=False, **changes):
    options, watched = KINDS[kind](anew)
    return options | changes, watched


class PictureTrainer(AgentTrainer):
    """Keeps the pixels of every batch, too."""

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.batches[-1]["output"]["num_images"] = output.get("num_images")
        return output


def train(folder, kind, trainer_class=PictureTrainer, anew=False, **changes):
    options, watched = options_of(kind, anew, **changes)
    trainer = make_trainer(folder, trainer_class, **options)
    trainer.train()
    assert sum(len(batch["stored"]) for batch in trainer.batches) > 4, "hardly anything was replayed"
    return trainer, watched


def shown_images(batch, row):
    """Pictures of a row in the order of their tokens: those of its prompt, and those of tools."""
    return images_in(batch["prompts"][row]) + images_in(batch["completions"][row])


def source_of(trainer, experience, prompt):
    """Where a stored rollout was fresh: batch and row with its tokens and its pictures."""
    batch = trainer.batches[experience.policy_version]
    messages = referenced(experience.details.messages)
    return next(
        (batch, row)
        for row in range(16)
        if row not in batch["stored"]
        if own(batch, row) == experience.token_ids.tolist()
        if referenced(batch["completions"][row]) == messages and referenced(batch["prompts"][row]) == prompt
    )


def pixels_of_images(processor, images):
    return processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


def test_a_rollout_comes_back_whole(tmp_path, kind):
    trainer, watched = train(tmp_path, kind, anew=True, max_steps=8)
    num_of_tools = num_of_prompts = num_moved = 0
    for batch in trainer.batches:
        for row, experience in batch["stored"].items():
            assert own(batch, row) == experience.token_ids.tolist()
            assert mask_of(batch, row) == experience.is_model.astype(int).tolist()
            source, its_row = source_of(trainer, experience, referenced(batch["prompts"][row]))
            assert own(source, its_row, "prompt") == own(batch, row, "prompt")
            assert referenced(batch["completions"][row]) == referenced(source["completions"][its_row])
            images = shown_images(batch, row)
            assert [pixel_digest(image) for image in images] == list(map(pixel_digest, shown_images(source, its_row)))
            pixels = pixels_of(batch["output"], row)
            assert ("pixel_values" in pixels) == bool(images)
            if images:
                expected = pixels_of_images(trainer.processing_class, images)
                torch.testing.assert_close(pixels["pixel_values"], expected, rtol=0, atol=0)
                torch.testing.assert_close(pixels, pixels_of(source["output"], its_row), rtol=0, atol=0)
            num_of_tools += len(images_in(batch["completions"][row]))
            num_of_prompts += len(images_in(batch["prompts"][row]))
            num_moved += row != its_row
    assert num_of_tools > 3, "hardly a tool returned a picture in a replayed rollout"
    assert num_moved
    if kind not in ("tools", "gemma"):
        assert num_of_prompts > 4

    fresh = [(batch, row) for batch in trainer.batches for row in range(16) if row not in batch["stored"]]
    if isinstance(watched, Pictures):
        done = Counter(name for name, _, _ in watched.calls)
    else:
        done = Counter(event for _, event, _ in watched.log)
        assert done.pop("reset") == len(fresh)
        done = {name: done[name] for name in done if name in ("look", "find")}
    num_turns = 1 if kind == "tools" else None
    heard = [batch["completions"][row][:num_turns] for batch, row in fresh]
    expected = Counter(name for completion in heard for name in calls_in(completion, {}))
    assert {name: expected[name] for name in done} == dict(done)
    assert done["look"] > 3


def test_stored_log_probabilities_need_the_images(tmp_path, kind):
    trainer, _ = train(tmp_path, kind, anew=True, retire_solved=False)
    processor = trainer.processing_class
    is_image = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>" if "gemma" not in kind else "<|image|>")
    changed, num_checked = [], 0
    for question, _, experience in trainer.experience_buffer.items():
        batch = trainer.batches[experience.policy_version]
        messages = referenced(experience.details.messages)
        prompt = referenced(experience.details.prompt)
        row = next(
            row
            for row in range(16)
            if row not in batch["stored"]
            if own(batch, row) == experience.token_ids.tolist()
            if batch["inputs"][row]["seed"] == question.example["seed"]
            if referenced(batch["completions"][row]) == messages
            if prompt is None or images_in(prompt)[-1] == images_in(referenced(batch["prompts"][row]))[-1]
        )
        ids, pixels = experience.token_ids.copy(), pixels_of(batch["output"], row)
        prompt_ids, is_model = own(batch, row, "prompt"), experience.is_model
        images = shown_images(batch, row)
        with torch.no_grad():
            logps, entropies = completion_logps(batch["policy"], prompt_ids, ids, **pixels)
        np.testing.assert_allclose(experience.behavior_per_token_logps[is_model], logps.numpy()[is_model], atol=1e-4)
        assert not experience.behavior_per_token_logps[~is_model].any()
        assert experience.entropy == pytest.approx(entropies.numpy()[is_model].mean(), abs=1e-4)
        num_checked += 1
        if not images:
            continue
        torch.testing.assert_close(pixels["pixel_values"], pixels_of_images(processor, images), rtol=0, atol=0)
        wrong = pixels | {"pixel_values": pixels["pixel_values"].flip(-1) + 1.0}
        with torch.no_grad():
            other, _ = completion_logps(batch["policy"], prompt_ids, ids, **wrong)
        error = np.abs(experience.behavior_per_token_logps - other.numpy())
        comes_after = np.cumsum(np.r_[prompt_ids, ids] == is_image)[len(prompt_ids) :] > 0
        assert not comes_after.all() or images_in(batch["prompts"][row])
        changed += error[is_model & comes_after].tolist()
        assert (error[is_model & ~comes_after] < 1e-4).all()
    assert num_checked > 6
    assert len(changed) > 4
    assert np.median(changed) > 1e-3, "another image would not have been noticed"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "environment_shows_row"])
def test_candidates_are_scored_with_all_images(tmp_path, kind):
    scored = []

    class Scored(PictureTrainer):
        def _score(self, prompted):
            scores = super()._score(prompted)
            policy = copy.deepcopy(self.pristine).double()
            policy.load_state_dict(self.model.state_dict())
            scored.extend((policy, *pair) for pair in zip(prompted, scores, strict=True))
            return scores

    trainer, _ = train(tmp_path, kind, Scored, anew=True, completion_selection="lowest_entropy", max_steps=8)
    processor, num_of_tools = trainer.processing_class, 0
    by_seed = {row["seed"]: row for row in trainer.train_dataset}
    token = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>" if "gemma" not in kind else "<|image|>")
    stored = {e.token_ids.tobytes(): e for b in trainer.batches for e in b["stored"].values()}
    for policy, of_one, (entropy, negative_log_likelihood, _) in scored:
        images, prompt_ids, completion = [], of_one.prompt, torch.tensor(of_one.completion)
        if of_one.row is not None:
            prompt = opened(of_one.row["prompt"])
            own_images = [by_seed[of_one.row["seed"]]["image"]] if "dataset" in kind else []
            prompt = trl.data_utils.prepare_multimodal_messages(prompt, own_images)
            images = images_in(prompt)
            rendered = processor.apply_chat_template(
                prompt, tools=trainer.tools, add_generation_prompt=True, tokenize=True, return_dict=True
            )
            prompt_ids = rendered["input_ids"][0]
            tool_images = images_in(opened(of_one.messages or []))
            num_of_tools += len(tool_images)
            images += tool_images
        pixels = {}
        if images:
            pixels = dict(processor.image_processor(images=images, return_tensors="pt"))
        types = (torch.tensor([*prompt_ids, *completion.tolist()]) == token).long()[None]
        assert bool(types.any()) == bool(images)
        pixels["token_type_ids" if "gemma" in kind else "mm_token_type_ids"] = types
        with torch.no_grad():
            logps, entropies = completion_logps(policy, prompt_ids, completion, **pixels)
        is_model = np.ones(len(completion), dtype=bool) if of_one.is_model is None else of_one.is_model
        assert entropy == pytest.approx(entropies.numpy()[is_model].mean(), abs=5e-5)
        assert negative_log_likelihood == pytest.approx(-logps.numpy()[is_model].mean(), abs=5e-5)
        if (replayed := stored.get(of_one.completion.tobytes())) is not None:
            assert (replayed.is_model == is_model).all()
    assert len(scored) > 4
    assert num_of_tools, "no candidate had a picture of a tool"


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "num_iterations": {"num_iterations": 2, "loss_type": "grpo"},
    "kl": {"beta": 0.1, "loss_type": "grpo"},
    "sequence_level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}
CASES = [(kind, "plain") for kind in KINDS] + [
    (kind, setting)
    for kind in ("tools_and_dataset", "gemma")
    for setting in SETTINGS
    # TRL gives Gemma's vision tower empty pixels where a micro-batch has no picture.
    if setting != "plain" and (kind, setting) != ("gemma", "accumulation")
]


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_loss_and_gradient(tmp_path, kind, setting):
    options, _ = options_of(kind, anew=True, learning_rate=2e-3, **SETTINGS[setting])
    trainer = make_trainer(tmp_path, WatchedTrainer, **options)
    trainer.train()
    assert len(trainer.log_ratios) > 4, "hardly anything was replayed"
    assert max(ratio.abs().max() for ratio in trainer.log_ratios) > 0.02, "the policy never moved"
    assert trainer.num_foreign > 50, "hardly a tool spoke"


@pytest.mark.parametrize("kind", ["tools", "tools_and_dataset", "gemma", "environment_shows_row"])
def test_resume_is_exact(tmp_path, kind):
    def make(name):
        changes = {"save_strategy": "steps", "save_steps": 3, "completion_selection": "lowest_entropy"}
        return make_trainer(tmp_path / name, **options_of(kind, **changes)[0])

    whole = make("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-6" / "experience_buffer"
    kept = pq.read_table(checkpoint / "images.parquet")["digest"].to_pylist()
    assert len(kept) == len(set(kept)), "an image is kept twice"
    assert set(kept) == digests_of(ExperienceBuffer.load(checkpoint)) == digests_of(whole.experience_buffer)
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    expected, actual = parameters_of(whole), parameters_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)
    assert rollouts_of(resumed.experience_buffer) == rollouts_of(whole.experience_buffer)


def digests_of(buffer):
    found = set()
    for question, _, experience in buffer.items():
        found |= {image.digest for image in images_of_question(question)}
        found |= {image.digest for image in experience.details.images}
    return found


def images_of_question(question):
    return [value for value in question.example.values() if hasattr(value, "digest")]


def rollouts_of(buffer):
    """Messages, prompts and the pixels of their images, in order."""
    return [
        (
            question.question_id,
            referenced(experience.details.messages),
            referenced(experience.details.prompt),
            experience.is_model.tolist(),
            experience.details.rewards,
            [(image.digest, pixel_digest(image.open())) for image in experience.details.images],
        )
        for question, _, experience in buffer.items()
    ]


def test_export_and_import_keep_messages_and_images(tmp_path, kind):
    trainer, _ = train(tmp_path / "first", kind, anew=True, retire_solved=False)
    buffer = trainer.experience_buffer
    buffer.to_dataset().save_to_disk(tmp_path / "exported")
    exported = datasets.load_from_disk(str(tmp_path / "exported"))
    imported = ExperienceBuffer.from_dataset(exported, group_size=4)
    assert digests_of(imported) == digests_of(buffer)
    expected = rollouts_of(buffer)
    assert sorted(map(repr, rollouts_of(imported))) == sorted(map(repr, expected))
    assert sum(len(images) for *_, images in expected) > 3
    for row, (question, _, experience) in zip(exported, buffer.items(), strict=True):
        assert len(row["images"]) == len(images_of_question(question)) + len(experience.details.images)

    again, _ = options_of(kind, anew=True, experience_buffer=imported, max_steps=2)
    second = make_trainer(tmp_path / "second", PictureTrainer, **again)
    second.train()
    known = {e.token_ids.tobytes(): referenced(e.details.messages) for _, _, e in buffer.items()}
    replayed = list(second.batches[0]["stored"].items())
    assert replayed
    for row, experience in replayed:
        assert own(second.batches[0], row) == experience.token_ids.tolist()
        assert referenced(second.batches[0]["completions"][row]) == known[experience.token_ids.tobytes()]


def test_an_environment_shows_the_image_that_it_showed(tmp_path):
    trainer, rooms = train(tmp_path, "environment_and_dataset", max_steps=8)
    resets = {pixel_digest(picture_of(room.number, n)) for room in numbered(rooms) for n in range(1, 9)}
    by_seed = {row["seed"]: pixel_digest(row["image"]) for row in trainer.train_dataset}
    seen = set()
    for batch in trainer.batches:
        for row in batch["stored"]:
            of_dataset, of_reset = map(pixel_digest, images_in(batch["prompts"][row]))
            assert of_dataset == by_seed[batch["inputs"][row]["seed"]]
            assert of_reset in resets
            seen.add(of_reset)
    assert len(seen) > 3


def numbered(rooms):
    for number, room in enumerate(rooms.made):
        room.number = number
        yield room


class DropsImages(PictureTrainer):
    """In one batch the model writes an image token, so that TRL drops all images of it."""

    dropped_at = 4

    def _tool_call_loop(self, *args, **kwargs):
        masks, messages, ids, *rest = super()._tool_call_loop(*args, **kwargs)
        if self.state.global_step == self.dropped_at:
            row = next(row for row in range(16) if row not in self.replayer.batch.stored and rest[-1][row])
            ids[row] = [*ids[row], self._image_pad_token_id]
            masks[row] = [*masks[row], 1]
        return masks, messages, ids, *rest


@pytest.mark.parametrize("setting", ["plain", "num_iterations", "kl"])
def test_what_trl_trains_without_its_images_is_neither_stored_nor_replayed(tmp_path, setting):
    options, _ = options_of("tools", anew=True, retire_solved=False, **SETTINGS[setting])
    watched = make_trainer(tmp_path, DropsImages, **options)
    watched.train()
    batch = watched.batches[DropsImages.dropped_at // options.get("num_iterations", 1)]
    assert "pixel_values" not in batch["output"], "TRL has not dropped the images"
    with_images = [row for row in range(16) if shown_images(batch, row)]
    assert with_images
    versions = [experience.policy_version for _, _, experience in watched.experience_buffer.items()]
    assert versions
    assert DropsImages.dropped_at not in versions
    # Rows whose images are gone are not trained with the log-probabilities that they had with images.
    for row in batch["stored"]:
        assert batch["output"]["completion_mask"][row].any() == (not shown_images(batch, row))
    assert any(row in batch["stored"] for row in with_images), "no rollout with images was replayed there"


def draw_on(completions, image, **kwargs):
    for pictures in [*map(images_in, completions), image]:
        for picture in pictures if isinstance(pictures, list) else [pictures]:
            picture.paste((0, 0, 0), (0, 0, picture.width, picture.height))
    return picture_reward(completions)


def test_a_reward_function_may_draw_on_images(tmp_path):
    options, pictures = options_of("tools_and_dataset", reward_funcs=draw_on)
    trainer = make_trainer(tmp_path / "first", **options)
    trainer.train()
    drawn = {pixel_digest(picture_of(name, place)) for name, place, image in pictures.calls if image is not None}
    found = set()
    for _, _, experience in trainer.experience_buffer.items():
        found |= {image.digest for image in experience.details.images}
    assert found
    assert found <= drawn
    # The prompts are those of the images that were shown.
    options, _ = options_of("tools_and_dataset", experience_buffer=trainer.experience_buffer)
    second = make_trainer(tmp_path / "second", PictureTrainer, **options)
    assert second.replayer.replayable.examine(second.experience_buffer) is None
    second.train()
    assert second.batches[0]["stored"]


def test_a_tool_may_return_the_path_of_an_image(tmp_path):
    class Paths(Pictures):
        def _draw(self, name, place):
            path = tmp_path / f"{name}{place}.png"
            super()._draw(name, place).save(path)
            return str(path)

    options, _ = options_of("tools_and_dataset", completion_selection="lowest_entropy", tools=Paths().tools)
    trainer = make_trainer(tmp_path / "out", PictureTrainer, **options)
    trainer.train()
    paths = [
        path
        for batch in trainer.batches
        for row in batch["stored"]
        for path in images_in(batch["completions"][row])
        if isinstance(path, str)
    ]
    assert paths


def test_an_environment_may_show_an_image_of_its_row_again(tmp_path):
    class Again(PictureRoom):
        def reset(self, **row):
            return [{"type": "image", "image": row["image"]}]

    options, _ = options_of("environment_and_dataset", environment_factory=Rooms(Again))
    trainer = make_trainer(tmp_path, PictureTrainer, **options)
    trainer.train()
    assert sum(len(batch["stored"]) for batch in trainer.batches) > 2
    for batch in trainer.batches:
        for row in batch["stored"]:
            first, second = images_in(batch["prompts"][row])
            assert pixel_digest(first) == pixel_digest(second)


def train_ranks(mode, mode_options, folder, kind):
    # To log images, TRL waits for all processes where one has images, even if another has none.
    changes = {"completion_selection": "lowest_entropy", "log_multimodal": False, "max_steps": 8} | mode_options
    options, _ = options_of(kind, per_device_train_batch_size=8, **changes)
    trainer = make_trainer(Path(folder) / "out", PictureTrainer, **options)
    trainer.train()
    num_images = 0
    for batch in trainer.batches:
        for row, experience in batch["stored"].items():
            assert own(batch, row) == experience.token_ids.tolist()
            assert referenced(batch["completions"][row]) == referenced(experience.details.messages)
            images = shown_images(batch, row)
            pixels = pixels_of(batch["output"], row)
            assert ("pixel_values" in pixels) == bool(images)
            if images:
                expected = pixels_of_images(trainer.processing_class, images)
                torch.testing.assert_close(pixels["pixel_values"], expected, rtol=0, atol=0)
            num_images += len(images)
    result = {"parameters": whole_parameters(trainer), "num_images": num_images}
    torch.save(result, Path(folder) / f"result{trainer.accelerator.process_index}.pt")


@pytest.mark.parametrize("kind", ["tools", "tools_and_dataset", "environment"])
def test_images_reach_the_process_that_replays_them(tmp_path, kind):
    run_ranks(train_ranks, str(tmp_path), kind, folder=tmp_path)
    first, second = (torch.load(tmp_path / f"result{rank}.pt", weights_only=False) for rank in range(2))
    assert first["num_images"]
    assert second["num_images"]
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, second["parameters"][name]), name
