"""Where a buffer comes from: whether its stored tokens mean the same to the trainer that is to replay them."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, cast

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .buffer import ExperienceBuffer
from .config import ExGRPOConfig
from .experience import ExperienceBufferError
from .protocols import RemoteBuffer, ReplayBuffer

logger = logging.get_logger(__name__)

_SETTINGS = {
    "group_size": "num_generations",
    "capacity": "buffer_capacity",
    "max_completions_per_question": "max_completions_per_question",
    "retire_solved": "retire_solved",
}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """
    Hashes that tell whether stored token ids and prompts mean the same to another tokenizer.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the trainer.

    Returns:
        `dict[str, str]`:
            SHA-256 of the vocabulary with its special tokens (`"tokenizer"`) and of the chat template
            (`"chat_template"`).
    """
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(specials.items())])
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def resolve_buffer(buffer: ReplayBuffer | None, args: ExGRPOConfig) -> ReplayBuffer:
    """
    The given buffer, or an empty one as the configuration describes it; on the main process, which owns it.

    Args:
        buffer ([`ReplayBuffer`] or `None`):
            Buffer given to the trainer.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.

    Returns:
        [`ReplayBuffer`]:
            The buffer to use.

    Raises:
        `ValueError`:
            When buffer and configuration set different limits.
    """
    if buffer is not None:
        check_settings(buffer, args, _SETTINGS)
    if args.process_index != 0:
        return cast(ReplayBuffer, RemoteBuffer())
    if buffer is None:
        return ExperienceBuffer(
            group_size=args.num_generations,
            capacity=args.buffer_capacity,
            max_completions_per_question=args.max_completions_per_question,
            retire_solved=args.retire_solved,
            seed=args.seed,
        )
    return buffer


def check_settings(buffer: ReplayBuffer, args: ExGRPOConfig, settings: Iterable[str]) -> None:
    """
    Check that buffer and configuration agree.

    Args:
        buffer ([`ReplayBuffer`]):
            Buffer to check.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        settings (`Iterable[str]`):
            Attributes of the buffer to compare.

    Raises:
        `ValueError`:
            When they set different values.
    """
    for attribute in settings:
        mine, wanted = getattr(buffer, attribute, None), getattr(args, _SETTINGS[attribute])
        if wanted is not None and mine is not None and mine != wanted:
            raise ValueError(
                f"The experience buffer has {attribute}={mine}, but {_SETTINGS[attribute]}={wanted} in the "
                "configuration. Set both to the same value."
            )


def check_buffer(
    buffer: ReplayBuffer,
    *,
    provenance: Mapping[str, Any],
    max_completion_length: int | None,
    vocab_size: int,
    source: str,
) -> None:
    """
    Check that a buffer can be replayed by this trainer. Walks the buffer once.

    Args:
        buffer ([`ReplayBuffer`]):
            Buffer to check.
        provenance (`Mapping[str, Any]`):
            Fingerprints of the trainer's tokenizer and chat template, and its temperature.
        max_completion_length (`int` or `None`):
            Longest completion that the trainer accepts, in tokens. `None` sets no limit.
        vocab_size (`int`):
            Number of token ids that the model knows.
        source (`str`):
            Where the buffer comes from, for the messages.

    Raises:
        [`ExperienceBufferError`]:
            When the tokenizer or the chat template differ, or a completion does not fit.
    """
    for name in ("tokenizer", "chat_template"):
        if name in buffer.provenance and buffer.provenance[name] != provenance[name]:
            raise ExperienceBufferError(
                f"The experience buffer {source} was collected with another {name.replace('_', ' ')}: its stored "
                "tokens would mean something else to this model. Use the one it was collected with, or start with an "
                "empty buffer."
            )
    temperature = buffer.provenance.get("temperature", provenance["temperature"])
    if temperature != provenance["temperature"]:
        logger.warning(
            f"The experience buffer {source} was collected at temperature={temperature}, but the trainer samples at "
            f"temperature={provenance['temperature']}. Importance ratios of its completions compare the two."
        )
    for question_ids in buffer.buckets().values():
        for question_id in question_ids:
            for experience in buffer.completions(question_id):
                if max_completion_length is not None and experience.num_tokens > max_completion_length:
                    raise ExperienceBufferError(
                        f"The experience buffer {source} holds a completion of {experience.num_tokens} tokens for "
                        f"question {question_id!r}, but max_completion_length={max_completion_length}. Raise "
                        "max_completion_length, or evict such completions."
                    )
                if experience.token_ids.max() >= vocab_size:
                    raise ExperienceBufferError(
                        f"The experience buffer {source} holds token id {experience.token_ids.max()} for question "
                        f"{question_id!r}, but the model knows only {vocab_size} tokens. Use the model family that "
                        "the buffer was collected with."
                    )
