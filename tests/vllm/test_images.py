"""Questions about images with a real vLLM in the process of the trainer."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

import numpy as np
import torch
import transformers
from engines import counted_engine, use_engines_on_cpu, use_llava_on_cpu
from packaging.version import Version
from recorder import SAME_POLICY, RowRecorder, assert_replayed_rows_are_left_alone, make_recorder, replayed_rows
from tiny import completion_logps, first_letter_reward
from transformers import LlavaForConditionalGeneration
from vision import plain_processor, served_folder, vision_dataset
from watched import pixels_of

pytestmark = [
    pytest.mark.xdist_group("colocate"),
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("5.20"), reason="vLLM is told the names of the newest parameters"
    ),
]


class ImageRecorder(RowRecorder):
    """Records the images of each row, and what the policy says of its completion given these and others."""

    def _calculate_rewards(self, inputs, *args):
        self.images = [np.asarray(row["image"]) for row in inputs]
        return super()._calculate_rewards(inputs, *args)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        for row, of_row in enumerate(self.batches[-1]["rows"]):
            pixels = pixels_of(output, row)
            others = pixels | {"pixel_values": pixels["pixel_values"].flip(-1) + 1.0}
            with torch.no_grad():
                for name, shown in (("logps", pixels), ("other_logps", others)):
                    of_row[name], _ = completion_logps(self.model, of_row["prompt"], of_row["completion"], **shown)
            of_row["image"] = self.images[row]
        return output


def test_nothing_is_generated_in_vain(tmp_path):
    use_engines_on_cpu()
    use_llava_on_cpu()
    folder = served_folder()
    trainer = make_recorder(
        tmp_path,
        folder,
        trainer_class=ImageRecorder,
        model=LlavaForConditionalGeneration.from_pretrained(folder),
        processing_class=plain_processor(side=14),
        train_dataset=vision_dataset(16),
        reward_funcs=first_letter_reward,
        vllm_mode="colocate",
        learning_rate=1e-3,
    )
    engine, shown = trainer.vllm_generation.llm, []
    with counted_engine(engine) as asked:
        generate = engine.generate

        def watched(prompts, *args, **kwargs):
            shown.extend(np.asarray(prompt["multi_modal_data"]["image"]) for prompt in prompts)
            return generate(prompts, *args, **kwargs)

        engine.generate = watched
        trainer.train()
    fresh = [row for batch in trainer.batches for row in batch["rows"] if not row["is_replayed"]]
    assert len(replayed_rows(trainer.batches)) >= 2 * (len(trainer.batches) - 2)
    assert asked == [row["prompt"] for row in fresh]
    assert all(np.array_equal(*pair) for pair in zip(shown, [row["image"] for row in fresh], strict=True))
    for row in fresh:
        sampled = row["sampling_per_token_logps"]
        assert (sampled - row["logps"]).abs().max() < SAME_POLICY
    assert np.mean([(row["sampling_per_token_logps"] - row["other_logps"]).abs().max() > 1e-3 for row in fresh]) > 0.95
    assert_replayed_rows_are_left_alone(trainer.batches)
    for row in replayed_rows(trainer.batches):
        source = next(
            of_one for of_one in fresh
            if (of_one["prompt"], of_one["completion"]) == (row["prompt"], row["completion"])
        )  # fmt: skip
        assert np.array_equal(source["image"], row["image"])
    for line in trainer.state.log_history:
        assert line.get("sampling/sampling_logp_difference/max", 0) < SAME_POLICY
