"""
A task of trial and error that is small enough for a CPU: which operation does each letter stand for?

The prompt `AB123=` names two letters and three digits. Each letter hides one of eight operations on three digits; that
of the first letter comes first. The answer `c456f789` names the first operation, its result, the second operation and
the final result. Only the final result is rewarded.

The warm-up teaches the format and how to execute every operation, but not what the letters mean: it sees operations
that are drawn for each letter from a fixed prior. The skew of that prior decides how unequal the questions are.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, get_cosine_schedule_with_warmup

LETTERS = "ABCDEFGHIJKL"
NAMES = "abcdefgh"  # of the operations
ANSWER_TOKENS = 9  # name, three digits, name, three digits, end of sequence

# On digits of shape (..., 3), modulo 10.
OPERATIONS: tuple[Callable[[np.ndarray], np.ndarray], ...] = (
    lambda digits: digits[..., ::-1],
    lambda digits: np.roll(digits, -1, axis=-1),
    lambda digits: digits + 1,
    lambda digits: 9 - digits,
    lambda digits: digits[..., [1, 0, 2]],
    lambda digits: digits * 2,
    lambda digits: digits + 3,
    lambda digits: digits.cumsum(axis=-1),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "$", *LETTERS, *NAMES, *"0123456789", "="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        eos_token="$",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@dataclass(frozen=True)
class Task:
    """
    What the letters mean, and what the warm-up believes they mean.

    Args:
        skew: Of the prior, `exp(-skew * rank)` over a random order of the operations for each letter. 0.8 makes some
            questions easy and many hopeless at first ("bimodal"), 0.4 makes them more alike ("even").
        seed: Of the meanings and of the orders.
    """

    skew: float
    seed: int = 0

    @cached_property
    def meanings(self) -> np.ndarray:
        """Operation of each letter, shape `(12,)`."""
        return np.random.default_rng([self.seed, 0]).integers(len(OPERATIONS), size=len(LETTERS))

    @cached_property
    def prior(self) -> np.ndarray:
        """Probability of each operation in the warm-up, shape `(12, 8)`."""
        rng = np.random.default_rng([self.seed, 1])
        ranks = np.stack([rng.permutation(len(OPERATIONS)) for _ in LETTERS])
        weights = np.exp(-self.skew * ranks)
        return weights / weights.sum(axis=1, keepdims=True)

    def warm_up_texts(self, count: int, rng: np.random.Generator) -> list[str]:
        """Prompts with answers whose operations come from the prior, executed correctly."""
        letters, digits = rng.integers(len(LETTERS), size=(count, 2)), rng.integers(10, size=(count, 3))
        below = self.prior.cumsum(axis=1)[letters]
        drawn = (rng.random((count, 2, 1)) > below).sum(axis=-1).clip(max=len(OPERATIONS) - 1)
        return [
            f"{prompt(pair, start)}{NAMES[first]}{text(middle)}{NAMES[second]}{text(apply(second, middle))}"
            for pair, start, (first, second) in zip(letters, digits, drawn, strict=True)
            for middle in [apply(first, start)]
        ]

    def questions(self, num_train: int, num_held_out: int, hopeless: float, seed: int) -> tuple[Dataset, Dataset]:
        """
        Two datasets without a question in common, with columns `prompt`, `answer` and `is_hopeless`.

        Args:
            num_train: Questions to train on.
            num_held_out: Questions to measure on; none of them is hopeless.
            hopeless: Share of the training questions whose reward is always 0.
            seed: Of the questions.
        """
        rng = np.random.default_rng([self.seed, 2, seed])
        drawn = rng.choice(len(LETTERS) ** 2 * 1000, size=num_train + num_held_out, replace=False)
        rows: dict[str, list[Any]] = {"prompt": [], "answer": [], "is_hopeless": []}
        for i, number in enumerate(drawn.tolist()):
            pair = divmod(number // 1000, len(LETTERS))
            digits = np.array([number // 100 % 10, number // 10 % 10, number % 10])
            rows["prompt"].append(prompt(pair, digits))
            first, second = self.meanings[list(pair)]
            rows["answer"].append(text(apply(second, apply(first, digits))))
            rows["is_hopeless"].append(i < round(hopeless * num_train))  # drawn in random order
        dataset = Dataset.from_dict(rows)
        return dataset.select(range(num_train)), dataset.select(range(num_train, num_train + num_held_out))


def prompt(letters: Iterable[int], digits: np.ndarray) -> str:
    """`AB123=`."""
    return f"{''.join(LETTERS[i] for i in letters)}{text(digits)}="


def text(digits: np.ndarray) -> str:
    """Digits as characters."""
    return "".join(map(str, digits.tolist()))


def apply(operation: int, digits: np.ndarray) -> np.ndarray:
    """Digits after an operation, modulo 10."""
    return OPERATIONS[operation](digits) % 10


def final_result_reward(
    completions: list[str], answer: list[str], is_hopeless: list[bool], **kwargs: Any
) -> list[float]:
    """1 where the last three digits are right, unless the question is hopeless."""
    return [
        float(completion[-3:] == expected and not hopeless)
        for completion, expected, hopeless in zip(completions, answer, is_hopeless, strict=True)
    ]


def warm_up(task: Task, seed: int, folder: Path, *, steps: int = 650, batch_size: int = 256) -> Path:
    """
    Train a model of 200,000 parameters on the format and the operations; about a minute on a core.

    Args:
        task: The task.
        seed: Of the weights and of the examples.
        folder: Where to save it. A model that is there is taken as it is.
        steps: Optimizer steps.
        batch_size: Examples in each.

    Returns:
        Folder of the model.
    """
    if (folder / "model.safetensors").exists():
        return folder
    encode, rng = tokenizer(), np.random.default_rng([task.seed, 3, seed])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(encode),
                hidden_size=64,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=32,
                initializer_range=(3 * 64) ** -0.5,
                pad_token_id=encode.pad_token_id,
                bos_token_id=None,
                eos_token_id=encode.eos_token_id,
            )
        )
        # As torch begins by itself. With transformers' 0.02, meant for wide models, every method later unlearned the
        # task at learning rates that are harmless to these weights.
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, steps)
    for _ in range(steps):
        ids = torch.tensor(encode([f"{line}$" for line in task.warm_up_texts(batch_size, rng)])["input_ids"])
        labels = ids.clone()
        labels[:, :-ANSWER_TOKENS] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def pass_rates(model: Any, questions: Dataset, num_samples: int, seed: int) -> np.ndarray:
    """
    Which samples are right, without a trace in the global random state.

    Returns:
        Booleans of shape `(num_questions, num_samples)`.
    """
    encode = tokenizer()
    ids = torch.tensor(encode(list(questions["prompt"]))["input_ids"]).repeat_interleave(num_samples, dim=0)
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generated = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=True, top_k=0, temperature=1.0)
    model.train(was_training)
    completions = encode.batch_decode(generated[:, ids.size(1) :], skip_special_tokens=True)
    answers = np.repeat(list(questions["answer"]), num_samples)
    return np.array([c[-3:] == answer for c, answer in zip(completions, answers, strict=True)]).reshape(
        -1, num_samples
    )
