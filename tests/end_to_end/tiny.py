"""Tiny real models, tokenizers and datasets, made on the spot."""

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=:?.\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE, extra: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A random two-layer model of about 40,000 parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.2,  # far from uniform, so that log-probabilities and entropies differ
    )
    return LlamaForCausalLM(config).to(dtype)


def tiny_dataset(num_rows: int = 16, conversational: bool = False) -> Dataset:
    """Questions that differ in their prompt, with two further columns."""
    prompts: list[Any] = [f"{i} + {i * i} = " for i in range(num_rows)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict(
        {"prompt": prompts, "answer": [i + i * i for i in range(num_rows)], "uid": [f"q{i}" for i in range(num_rows)]}
    )


def tiny_arguments(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    """Arguments of a config for 4 questions of 4 completions a step on one CPU core."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    } | overrides
