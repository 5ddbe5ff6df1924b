"""Replay of questions about images, through `trainer.train()` on tiny vision-language models."""

import copy
import io

import datasets
import numpy as np
import pytest
import torch
import trl
from packaging.version import Version
from peft import get_peft_model
from PIL import Image
from test_checkpoints import contents
from tiny import completion_logps, first_letter_reward, lora_config, make_trainer, parameters_of
from trl import GRPOTrainer
from vision import SIZES, vision_dataset, vision_model
from watched import WatchedTrainer, pixels_of

from exgrpo_trl import ExGRPOTrainer

TRL = Version(trl.__version__)
MANY = Version("1.11") <= TRL  # several images a row, of every kind of model

KINDS = {
    "grid": ("grid", {}),
    "grid_of_sizes": ("grid", {"sizes": SIZES}),
    "plain": ("plain", {}),
    "same_text": ("grid", {"same_text": True}),
    "grid_images": ("grid", {"column": "images", "images_per_row": (1, 2)}),
}
if MANY:
    KINDS |= {
        "plain_images": ("plain", {"column": "images", "images_per_row": (2, 1)}),
        "tiled": ("tiled", {"sizes": ((28, 28), (56, 28))}),
    }


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def options_of(kind, **changes):
    model, processor = vision_model(KINDS[kind][0])
    dataset = vision_dataset(16, **KINDS[kind][1])
    options = {"model": model, "processing_class": processor, "train_dataset": dataset, "max_steps": 6}
    return options | {"reward_funcs": first_letter_reward, "learning_rate": 1e-3} | changes


class VisionTrainer(ExGRPOTrainer):
    """Keeps what every batch was, and the rows that reward functions saw."""

    def __init__(self, *args, model, **kwargs):
        self.pristine = copy.deepcopy(model)
        super().__init__(model, *args, **kwargs)
        self.batches, self.generated = [], []
        generate = self.model.generate

        def counted(*args, **kwargs):
            self.generated.append({name: kwargs[name].clone() for name in ("input_ids", "pixel_values")})
            return generate(*args, **kwargs)

        self.model.generate = counted

    def _calculate_rewards(self, inputs, *args):
        self.rows = [dict(row) for row in inputs]
        return super()._calculate_rewards(inputs, *args)

    def _generate_and_score_completions(self, inputs):
        policy = None
        if self.accelerator.num_processes == 1:  # sharded parameters cannot be copied
            policy = copy.deepcopy(self.pristine).double()
            policy.load_state_dict(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        replays = {replay.row: replay for replay in self.replayer.batch.replays}
        self.batches.append({"policy": policy, "replays": replays, "rows": self.rows, "output": dict(output)})
        return output


def images_of(row):
    return [row["image"]] if "image" in row else list(row["images"])


def same_image(one, other):
    return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def own(output, row, part):
    return output[f"{part}_ids"][row][output[f"{part}_mask"][row].bool()].tolist()


def test_the_right_image_comes_back(tmp_path, kind):
    trainer = make_trainer(tmp_path, VisionTrainer, **options_of(kind))
    dataset = trainer.train_dataset
    by_answer = {row["answer"]: row for row in dataset}
    trainer.train()
    processor, num_replayed = trainer.processing_class, 0
    for batch, generated in zip(trainer.batches, trainer.generated, strict=True):
        output, replays = batch["output"], batch["replays"]
        # Nobody can tell which tile belongs to which image before TRL does.
        asked = [row for row in range(16) if kind == "tiled" or row not in replays]
        assert [ids[ids != 0].tolist() for ids in generated["input_ids"]] == [
            own(output, row, "prompt") for row in asked
        ]
        shown = [image for row in asked for image in images_of(by_answer[batch["rows"][row]["answer"]])]
        pixels = processor.image_processor(images=shown, return_tensors="pt")["pixel_values"]
        if kind != "tiled":  # whose tiles the processor decides on
            torch.testing.assert_close(generated["pixel_values"], pixels)
        for row, replay in replays.items():
            original = by_answer[batch["rows"][row]["answer"]]
            assert replay.question.example["answer"] == original["answer"]
            shown = images_of(batch["rows"][row])
            assert len(shown) == len(images_of(original))
            assert all(same_image(*pair) for pair in zip(shown, images_of(original), strict=True))
            assert own(output, row, "completion") == replay.experience.token_ids.tolist()
            if kind != "tiled":
                alone = processor.image_processor(images=images_of(original), return_tensors="pt")["pixel_values"]
                torch.testing.assert_close(pixels_of(output, row)["pixel_values"], alone)
            num_replayed += 1
    assert num_replayed > 4
    assert len({r.question.question_id for b in trainer.batches for r in b["replays"].values()}) > 2


def test_stored_log_probabilities_need_the_image(tmp_path, kind):
    if kind == "tiled":
        pytest.skip("the oracle does not cut tiles")
    trainer = make_trainer(tmp_path, VisionTrainer, **options_of(kind, retire_solved=False))
    trainer.train()
    errors, num_checked = [], 0
    for _, _, experience in trainer.experience_buffer.items():
        batch = trainer.batches[experience.policy_version]
        output, ids = batch["output"], experience.token_ids.copy()
        row = next(i for i in range(16) if own(output, i, "completion") == ids.tolist() and i not in batch["replays"])
        pixels = pixels_of(output, row)
        is_own = np.r_[output["prompt_mask"][row].bool().numpy(), output["completion_mask"][row].bool().numpy()]
        assert all(value.shape[1] == is_own.sum() for name, value in pixels.items() if name.endswith("type_ids"))
        prompt = own(output, row, "prompt")
        with torch.no_grad():
            logps, entropies = completion_logps(batch["policy"], prompt, ids, **pixels)
            wrong = pixels | {"pixel_values": pixels["pixel_values"].flip(-1) + 1.0}
            other, _ = completion_logps(batch["policy"], prompt, ids, **wrong)
        np.testing.assert_allclose(experience.behavior_per_token_logps, logps.numpy(), atol=2e-5)
        assert experience.entropy == pytest.approx(entropies.mean().item(), abs=2e-5)
        errors.append(np.abs(experience.behavior_per_token_logps - other.numpy()).max())
        num_checked += 1
    assert num_checked > 8
    assert min(errors) > 1e-3, "another image would not have been noticed"


@pytest.mark.parametrize("selection", ["lowest_entropy", "lowest_negative_log_likelihood"])
def test_candidates_are_scored_with_their_image(tmp_path, kind, selection, monkeypatch):
    if kind == "tiled":
        pytest.skip("the oracle does not cut tiles")
    scored = []

    class Scored(VisionTrainer):
        def _score(self, prompted):
            scores = super()._score(prompted)
            policy = copy.deepcopy(self.pristine).double()
            policy.load_state_dict(self.model.state_dict())
            scored.extend((policy, *pair) for pair in zip(prompted, scores, strict=True))
            return scores

    trainer = make_trainer(tmp_path, Scored, **options_of(kind, completion_selection=selection, max_steps=5))
    trainer.train()
    assert len(scored) > 4
    processor = trainer.processing_class
    by_answer = {row["answer"]: row for row in trainer.train_dataset}
    for policy, of_one, (entropy, negative_log_likelihood, _) in scored:
        row = by_answer[of_one.row["answer"]]
        content = [*({"type": "image"} for _ in images_of(row)), {"type": "text", "text": row["prompt"][0]["content"]}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=images_of(row), text=[text], return_tensors="pt")
        prompt = inputs.pop("input_ids")[0]
        del inputs["attention_mask"]
        completion = torch.tensor(of_one.completion)
        for name in inputs:
            if name.endswith("token_type_ids"):
                inputs[name] = torch.cat([inputs[name], torch.zeros((1, len(completion)), dtype=torch.long)], dim=1)
        with torch.no_grad():
            logps, entropies = completion_logps(policy, prompt, completion, **inputs)
        assert entropy == pytest.approx(entropies.mean().item(), abs=2e-5)
        assert negative_log_likelihood == pytest.approx(-logps.mean().item(), abs=2e-5)


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "num_iterations": {"num_iterations": 2, "loss_type": "grpo"},
    "kl": {"beta": 0.1, "loss_type": "grpo"},
    "sequence_level": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "balanced": {"replay_weighting": "balanced"},
    "lora": {"use_lora": True},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tiled"])
def test_loss_and_gradient(tmp_path, kind, setting):
    if setting not in ("plain", "lora") and kind not in ("grid_of_sizes", "plain"):
        pytest.skip("one kind of each layout is enough")
    options = options_of(kind, learning_rate=5e-3, **SETTINGS[setting])
    if options.pop("use_lora", False):
        options["model"] = get_peft_model(options["model"], lora_config())
    trainer = make_trainer(tmp_path, WatchedTrainer, **options)
    trainer.train()
    assert len(trainer.log_ratios) > 4, "hardly anything was replayed"
    assert max(ratio.abs().max() for ratio in trainer.log_ratios) > 0.02, "the policy never moved"


def test_resume_is_exact(tmp_path, kind):
    def make(name):
        return make_trainer(tmp_path / name, **options_of(kind, save_strategy="steps", save_steps=3))

    whole = make("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "experience_buffer" / "images.parquet").exists()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected, actual = parameters_of(whole), parameters_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)


def test_replay_off_is_grpo(tmp_path, kind):
    def parameters(name, trainer_class, **changes):
        trainer = make_trainer(tmp_path / name, trainer_class, **options_of(kind, max_steps=3, **changes))
        trainer.train()
        return parameters_of(trainer)

    theirs, ours = parameters("grpo", GRPOTrainer), parameters("exgrpo", None, replay_fraction=0.0)
    for name in theirs:
        assert torch.equal(theirs[name], ours[name]), name


def test_one_text_with_other_images_is_another_question(tmp_path):
    trainer = make_trainer(tmp_path, VisionTrainer, **options_of("same_text", max_steps=8))
    trainer.train()
    examples = {question.question_id: question.example for question, _, _ in trainer.experience_buffer.items()}
    assert len(examples) > 4
    assert len({example["image"].digest for example in examples.values()}) == len(examples)


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    options = options_of("plain")
    rows = options["train_dataset"]
    feature = rows.features["image"]
    encoded = rows.cast_column("image", type(feature)(decode=False))
    content = [row["bytes"] for row in encoded["image"]]
    content[5] = content[5][: len(content[5]) // 2]
    damaged = rows.remove_columns("image").add_column("image", [{"bytes": of_row, "path": None} for of_row in content])
    trainer = make_trainer(tmp_path, **options | {"train_dataset": damaged.cast_column("image", feature)})
    with pytest.raises(ValueError, match="row 5 of the training dataset"):
        trainer.train()


@pytest.mark.parametrize("column", ["image", "images"])
def test_files_of_the_dataset_are_kept_as_they_are(tmp_path, column):
    photographs = []
    for number in range(16):
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).resize((28, 28), Image.Resampling.BICUBIC).save(content, "JPEG", quality=80)
        photographs.append(content.getvalue())
    options = options_of("plain")
    files = [{"bytes": photograph, "path": None} for photograph in photographs]
    rows = options["train_dataset"].remove_columns("image")
    feature = datasets.Image() if column == "image" else [datasets.Image()]
    rows = rows.add_column(column, files if column == "image" else [[file] for file in files])
    trainer = make_trainer(tmp_path, VisionTrainer, **options | {"train_dataset": rows.cast_column(column, feature)})
    trainer.train()
    kept = [question.example[column] for question, _, _ in trainer.experience_buffer.items()]
    assert len(kept) > 4
    for images in kept:
        for image in [images] if column == "image" else images:
            assert image.content in photographs
    assert any(batch["replays"] for batch in trainer.batches)


def test_a_random_transform_evicts_completions_of_other_images(tmp_path):
    options = options_of("plain", max_steps=10, retire_solved=False, learning_rate=0.0)
    draw = np.random.default_rng(0)

    def blurred(rows):
        noise = [draw.integers(0, 40, (28, 28, 3), dtype=np.uint8) for _ in rows["image"]]
        rows["image"] = [Image.fromarray(np.asarray(i) // 2 + n) for i, n in zip(rows["image"], noise, strict=True)]
        return rows

    options["train_dataset"] = options["train_dataset"].with_transform(blurred)
    trainer = make_trainer(tmp_path, VisionTrainer, **options)
    trainer.train()
    for batch in trainer.batches:
        for row, replay in batch["replays"].items():
            pixels = pixels_of(batch["output"], row)
            with torch.no_grad():
                logps, _ = completion_logps(
                    batch["policy"], own(batch["output"], row, "prompt"), replay.experience.token_ids.copy(), **pixels
                )
            # The policy does not move, so that stored log-probabilities are those of the image that comes back.
            np.testing.assert_allclose(replay.experience.behavior_per_token_logps, logps.numpy(), atol=2e-5)
    assert sum(len(batch["replays"]) for batch in trainer.batches) > 4
    assert trainer.experience_buffer.num_evicted
