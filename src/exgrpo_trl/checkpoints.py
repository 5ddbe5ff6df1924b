"""Which checkpoint of a run is complete, and whether the tokens of a buffer mean the same to this trainer."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .buffer import ExperienceBuffer, RemoteBuffer, ReplayBuffer
from .buffer.locations import TRAINER_STATE_FILE, checkpoints_of, is_complete
from .config import ExGRPOConfig
from .records import ExperienceBufferError

logger = logging.get_logger(__name__)

# Attributes of a buffer, and the fields of the configuration that must agree with them.
_SETTINGS = {
    "group_size": "num_generations",
    "capacity": "buffer_capacity",
    "max_completions_per_question": "max_completions_per_question",
    "retire_solved": "retire_solved",
}


def begin_checkpoint(folder: str | Path) -> None:
    """Mark a checkpoint as incomplete that is about to be written over."""
    (Path(folder) / TRAINER_STATE_FILE).unlink(missing_ok=True)


def newest_complete_checkpoint(output_dir: str | Path) -> str | None:
    """Newest complete checkpoint; `None` if there is none at all, an error if all of them are incomplete."""
    checkpoints = checkpoints_of(output_dir)
    for folder in reversed(checkpoints.values()):
        if is_complete(folder):
            return str(folder)
    if checkpoints:
        raise ValueError(
            f"None of the checkpoints {list(checkpoints)} in {output_dir} is complete: the run died while it wrote "
            "them. Start without resume_from_checkpoint."
        )
    return None


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of vocabulary and chat template: whether stored token ids and prompts mean the same to a tokenizer."""
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(specials.items())])
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def resolve_buffer(buffer: ReplayBuffer | None, args: ExGRPOConfig) -> ReplayBuffer | RemoteBuffer:
    """The given buffer, or an empty one as the configuration describes it; a stand-in where it lives elsewhere."""
    if buffer is not None:
        check_settings(buffer, args)
    if args.process_index != 0:
        return RemoteBuffer()
    if buffer is None:
        return ExperienceBuffer(
            group_size=args.num_generations,
            capacity=args.buffer_capacity,
            max_completions_per_question=args.max_completions_per_question,
            retire_solved=args.retire_solved,
            seed=args.seed,
        )
    return buffer


def check_settings(buffer: ReplayBuffer, args: ExGRPOConfig, settings: Iterable[str] = tuple(_SETTINGS)) -> None:
    """Check that buffer and configuration agree, in these attributes of the buffer."""
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
    """Check that a buffer can be replayed by this trainer. Walks the buffer once."""
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
    for question, _, experience in buffer.items():
        if max_completion_length is not None and experience.num_tokens > max_completion_length:
            raise ExperienceBufferError(
                f"The experience buffer {source} holds a completion of {experience.num_tokens} tokens for question "
                f"{question.question_id!r}, but max_completion_length={max_completion_length}. Raise "
                "max_completion_length, or evict such completions."
            )
        if experience.token_ids.max() >= vocab_size:
            raise ExperienceBufferError(
                f"The experience buffer {source} holds token id {experience.token_ids.max()} for question "
                f"{question.question_id!r}, but the model knows only {vocab_size} tokens. Use the model family that "
                "the buffer was collected with."
            )
