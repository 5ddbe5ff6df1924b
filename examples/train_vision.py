"""
Train a vision-language model on pictures with experience replay.

    accelerate launch examples/train_vision.py

trains a tiny model on generated pictures, on a CPU and without a hub. Each shows one coloured square on a noisy
ground, and the question is which colour it has. The model is made on the spot. A few supervised steps teach it to
answer with a colour, but hardly which one: the reinforcement learning has to find that. `--replay_fraction 0` is plain
GRPO. Task and settings were chosen so that replay helps; README.md has the numbers, also those where it loses.

Every field of `ExGRPOConfig` is a flag; `--config file.yaml` reads them from a file. For a model and pictures of
yours, replace `make_model`, `make_processor` and `make_dataset`; the call of `ExGRPOTrainer` stays as it is.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import set_seed
from datasets import Dataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from trl import TrlParser

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer

COLOURS = {
    "red": (220, 50, 50),
    "green": (50, 180, 50),
    "blue": (60, 80, 220),
    "yellow": (220, 210, 60),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
    "white": (240, 240, 240),
    "black": (10, 10, 10),
    "pink": (250, 150, 190),
    "brown": (110, 60, 20),
    "cyan": (60, 210, 220),
    "grey": (170, 170, 170),
    "navy": (20, 30, 90),
    "lime": (160, 240, 60),
    "olive": (110, 110, 20),
    "teal": (20, 120, 120),
}
SIDE, PATCH, SQUARE = 24, 8, 10  # pixels of the sides of a picture, of a patch of the vision tower, and of a square
QUESTION = "which colour has the square ?"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}"
)

# Chosen by measurement: the run fits into two minutes on one CPU core, and replay helps. Any flag overrides them.
DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/train_vision",
    "max_steps": 300,
    "per_device_train_batch_size": 128,
    "per_device_eval_batch_size": 128,
    "num_generations": 8,
    "num_generations_eval": 1,
    "max_completion_length": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "linear",
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "replay_fraction": 0.5,
    "replay_start_pass_rate": None,
    "replay_weighting": "balanced",  # with "shaped" the failures of a group outweigh its stored success
    "bucket_mean": 0.125,  # hard pictures first: 0.5 narrows the answers to the colours that were learned first
    "drop_retired_questions": False,  # those of a colour retire together, and a longer run might forget it
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "log_replay": "all",  # for the number of stored completions
    "disable_tqdm": True,
}


@dataclass
class Arguments:
    """The pictures and the warm-up, besides the fields of `ExGRPOConfig`."""

    num_train: int = field(default=512, metadata={"help": "Pictures to train on."})
    num_held_out: int = field(default=256, metadata={"help": "Pictures held out to measure the accuracy."})
    warm_up_steps: int = field(default=15, metadata={"help": "Supervised steps before the reinforcement learning."})


def parse_arguments() -> tuple[Arguments, ExGRPOConfig]:
    """Flags and YAML over the defaults above."""
    parser = TrlParser((Arguments, ExGRPOConfig))
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:  # so that no flag is required
        action.required = action.required and action.dest not in DEFAULTS
    return parser.parse_args_and_config()


def draw(generator: np.random.Generator) -> tuple[Image.Image, str]:
    """A picture and the colour of its square."""
    pixels = generator.normal(110, 30, (SIDE, SIDE, 3))
    colour = str(generator.choice(list(COLOURS)))
    x, y = (int(i) for i in generator.integers(0, SIDE - SQUARE + 1, 2))
    shade = COLOURS[colour] + generator.normal(0, 15, 3)
    pixels[y : y + SQUARE, x : x + SQUARE] = shade + generator.normal(0, 15, (SQUARE, SQUARE, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), colour


def make_dataset(number: int, seed: int) -> Dataset:
    """Pictures, all with the same question, and the answers."""
    generator = np.random.default_rng(seed)
    pictures, answers = zip(*(draw(generator) for _ in range(number)), strict=True)
    prompt = [{"role": "user", "content": QUESTION}]
    return Dataset.from_dict({"prompt": [prompt] * number, "image": list(pictures), "answer": list(answers)})


def make_processor() -> LlavaProcessor:
    """A tokenizer of one token a word, and pictures in patches."""
    words = ["user", "assistant", ":", *QUESTION.split(), *COLOURS]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    fast.add_tokens(["<image>"], special_tokens=True)
    # The image processor that needs no torchvision; transformers 5 has it under a name of its own.
    image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    size = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        image_processor(size=size, crop_size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights."""
    layers = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = processor.tokenizer
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                max_position_embeddings=64,
                **layers,
            ),
            vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, projection_dim=64, **layers),
            image_token_index=processor.image_token_id,
            image_seq_length=(SIDE // PATCH) ** 2,
            vision_feature_layer=-1,
        )
    )
    # A sampled image token would have no image behind it, which is an error of the model.
    model.generation_config.suppress_tokens = [processor.image_token_id]
    return model


def warm_up(model: Any, processor: Any, steps: int, seed: int) -> None:
    """Supervised steps on pictures that are neither trained on nor held out."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(prompt, add_generation_prompt=True)
    model.train()
    for _ in range(steps):
        pictures, answers = zip(*(draw(generator) for _ in range(64)), strict=True)
        texts = [f"{text} {answer} <eos>" for answer in answers]
        batch = processor(images=list(pictures), text=texts, return_tensors="pt")
        labels = batch["input_ids"].clone()
        labels[:, :-2] = -100  # what is learned: the colour and the end
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def answer_reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """1 for the right answer, 0 for any other."""
    texts = [completion[0]["content"].strip() for completion in completions]
    return [float(text == right) for text, right in zip(texts, answer, strict=True)]


class Progress(TrainerCallback):
    """One short line per log; and the first evaluation has the seed of the last one."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_seed(args.seed, device_specific=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        shown = [f"step {state.global_step}", f"fresh pass rate {logs.get('fresh/pass_rate', logs['reward']):.2f}"]
        if "replay/questions" in logs:
            shown.append(f"replayed {logs['replay/fraction']:.0%} of the questions")
            held = "completions" if "replay/completions" in logs else "questions"  # of a short log line
            shown.append(f"buffer {logs[f'replay/{held}']:.0f} {held}")
        print(" | ".join(shown), flush=True)


def main() -> None:
    arguments, config = parse_arguments()
    torch.set_num_threads(1)  # the model is so small that more threads only wait for each other
    set_seed(config.seed)
    processor = make_processor()
    # TRL loads the reference model from where the model came from, so it goes through a folder.
    folder = Path(config.output_dir) / "warm_up"
    with config.main_process_first(desc="warming up"):
        if config.process_index == 0:
            model = make_model(processor)
            warm_up(model, processor, arguments.warm_up_steps, config.seed + 1)
            model.save_pretrained(folder)
    trainer = ExGRPOTrainer(
        model=LlavaForConditionalGeneration.from_pretrained(folder),
        reward_funcs=answer_reward,
        args=config,
        train_dataset=make_dataset(arguments.num_train, config.seed + 2),
        eval_dataset=make_dataset(arguments.num_held_out, config.seed + 3),
        processing_class=processor,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Progress)

    trainer.args.eval_on_start = True
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()
    set_seed(config.seed, device_specific=True)
    trainer.evaluate()
    history = trainer.state.log_history
    accuracies = [line["eval_reward"] for line in history if "eval_reward" in line]
    if trainer.accelerator.is_main_process:
        table = Table(title="ExGRPO on held-out pictures", show_header=False)
        table.add_row("Held-out accuracy before", f"{accuracies[0]:.3f}")
        table.add_row("Held-out accuracy after", f"{accuracies[-1]:.3f}")
        if last := next((line for line in reversed(history) if "replay/tokens_saved" in line), None):
            buffer = trainer.experience_buffer
            groups_per_step = config.generation_batch_size / config.num_generations / config.num_iterations
            lines = [line for line in history if "replay/fraction" in line]
            steps = np.diff([0, *(line["step"] for line in lines)])
            replayed = groups_per_step * np.dot(steps, [line["replay/fraction"] for line in lines])
            table.add_row("Pictures replayed", f"{replayed:.0f}")
            table.add_row("Tokens not generated", f"{last['replay/tokens_saved']:.0f}")
            table.add_row("In the buffer", f"{buffer.num_completions} completions of {buffer.num_questions} pictures")
            table.add_row("Retired pictures", f"{len(buffer.retired)}")
        table.add_row("Model", config.output_dir)
        Console().print(table)
    # A process that ends with its group open may abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
