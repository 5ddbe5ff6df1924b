"""What stands in for the models, datasets and runs of the documentation: tiny ones, under the names that it uses."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import trl
from agents import save_tool_model, tool_tokenizer
from datasets import Dataset
from tiny import save_tiny_model, tiny_tokenizer
from vision import vision_dataset, vision_model

import exgrpo_trl

# Short, on the CPU, and silent; what a page says itself comes first.
TINY = {
    "max_steps": 3,
    "per_device_train_batch_size": 8,
    "num_generations": 8,
    "max_completion_length": 8,
    "learning_rate": 1e-3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 7,
}
TEXT_MODELS = ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-Math-1.5B", "HuggingFaceTB/SmolLM2-135M-Instruct")
TOOL_MODEL = "Qwen/Qwen3-0.6B"
VISION_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
DATASET = "trl-lib/DeepMath-103K"


def prepare_folder(folder: Path, code: str) -> None:
    """Put into a folder the models and datasets that some code names: from there, their names are paths."""
    for name in TEXT_MODELS:
        if name in code:
            save_tiny_model(folder / name, max_position_embeddings=512)
            tiny_tokenizer().save_pretrained(folder / name)
    if TOOL_MODEL in code:
        save_tool_model(folder / TOOL_MODEL)
        tool_tokenizer().save_pretrained(folder / TOOL_MODEL)
    if VISION_MODEL in code:
        model, processor = vision_model("plain")
        model.save_pretrained(folder / VISION_MODEL)
        processor.save_pretrained(folder / VISION_MODEL)
    if DATASET in code:
        (folder / DATASET).mkdir(parents=True)
        prompts = [[{"role": "user", "content": f"{i} + {i} = "}] for i in range(16)]
        rows = Dataset.from_dict({"prompt": prompts, "solution": [f"${2 * i}$" for i in range(16)]})
        rows.to_parquet(folder / DATASET / "train.parquet")


@contextmanager
def tiny_configs(**changes: Any) -> Iterator[None]:
    """Configurations that name no batch size, length and so on get those above."""
    options = TINY | changes
    with (
        mock.patch.object(exgrpo_trl, "ExGRPOConfig", functools.partial(exgrpo_trl.ExGRPOConfig, **options)),
        mock.patch.object(trl, "GRPOConfig", functools.partial(trl.GRPOConfig, **options)),
    ):
        yield


def questions(conversational: bool = False, num_rows: int = 16) -> Dataset:
    """Sums with answers of one digit, which a random model hits now and then."""
    prompts: list[Any] = [f"{i} + {i} = " for i in range(num_rows)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    digits = [i % 10 for i in range(num_rows)]
    return Dataset.from_dict(
        {"prompt": prompts, "answer": digits, "number": digits, "uid": [f"q{i}" for i in range(num_rows)]}
    )


def play(prompt: Any, trainer: Any) -> tuple[list[int], list[int], list[int], list[int], float]:
    """Two short turns without a model; right where the last one is a letter from a to j."""
    tokenizer = trainer.processing_class
    encoded = functools.partial(tokenizer.encode, add_special_tokens=False)
    letter = "abcdefghijklmnopqrst"[trainer.state.global_step % 20]
    prompt_ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return prompt_ids, encoded("a"), encoded("b"), [*encoded(letter), tokenizer.eos_token_id], float(letter < "c")


# Names that a page takes for granted, as "yours".
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "guide.md": lambda: {"dataset": questions(), "tokenizer": tiny_tokenizer(), **filled_buffer()},
    "strategies.md": lambda: {"dataset": questions(), "correct": correct},
    "migrating.md": lambda: {"dataset": questions()},
    "agents.md": lambda: {"dataset": questions(conversational=True), "play": play},
}


def filled_buffer() -> dict[str, Any]:
    """A buffer with one question, and its id."""
    row = questions()[0]
    buffer = exgrpo_trl.ExperienceBuffer(group_size=8)
    experience = exgrpo_trl.Experience.create([12, 7, 1], [-0.4, -1.2, -0.1], policy_version=0, reward=1.0)
    question_id = exgrpo_trl.question_id_of(row["prompt"])
    buffer.collect(exgrpo_trl.Question(question_id, row), [experience], num_correct=3, group_size=8)
    return {"buffer": buffer, "question_id": question_id}


def correct(completions: list[Any], answer: list[int], **kwargs: Any) -> list[float]:
    """Whether the answer occurs in the completion."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(str(a) in text) for text, a in zip(texts, answer, strict=True)]


# What a random model would never get right is made easy.
REWRITTEN = {
    "own_experience.md": {"completion.startswith(expected)": "'a' <= completion[:1] <= 't'"},
    "start.md": {"line == expected": "'a' <= line[:1] <= 't'"},
}


def pictures() -> Dataset:
    """Questions about pictures."""
    return vision_dataset(16)
