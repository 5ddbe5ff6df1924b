"""Which checkpoint and which buffer a trainer goes on with, and whether they mean the same to it."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from transformers.utils import get_json_schema, logging

from .buffer import ExperienceBuffer, RemoteBuffer, ReplayBuffer
from .buffer.locations import TRAINER_STATE_FILE, checkpoints_of, is_complete
from .buffer.settings import COMPLETION, GROUP
from .config import ExGRPOConfig
from .records import UNKNOWN_PROMPT, ExperienceBufferError

logger: Any = logging.get_logger(__name__)

Location = str | PathLike[str]

# Attributes of a buffer, and the fields of the configuration that must agree with them.
_SETTINGS = {
    "group_size": "num_generations",
    "capacity": "buffer_capacity",
    "max_completions_per_question": "max_completions_per_question",
    "retire_solved": "retire_solved",
}
# Parts of a buffer that a user's own may lack, and the configurations that make use of them.
_NEEDED_FOR: dict[str, Callable[[ExGRPOConfig], bool]] = {
    "reuse": lambda args: args.candidate_scores == "last_known" or args.max_replays is not None,
    "note_reuse": lambda args: args.max_replays is not None,
    "groups": lambda args: args.replays_groups,
    "unit": lambda args: args.replays_groups,
}
_UNITS = {COMPLETION: "single completions", GROUP: "whole groups"}


def begin_checkpoint(folder: str | Path) -> None:
    """Mark a checkpoint as incomplete that is about to be written over."""
    (Path(folder) / TRAINER_STATE_FILE).unlink(missing_ok=True)


def newest_complete_checkpoint(output_dir: Location) -> str | None:
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


def rollout_fingerprint(trainer: Any) -> dict[str, Any]:
    """
    What else stored rollouts depend on: tools, how prompts and images are prepared, and who gave the rewards.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            The trainer. What it makes no use of is not part of the result.
    """
    described: dict[str, Any] = {}
    if trainer.tools:
        schemas = [get_json_schema(tool) for tool in trainer.tools]
        described["tools"] = _digest(schemas)
        described["reward_functions"] = list(trainer.reward_func_names)
    if trainer.tools and trainer.chat_template is not None:  # TRL's own, which keeps prefixes
        described["training_chat_template"] = _digest(trainer.chat_template)
    if trainer.chat_template_kwargs:
        described["chat_template_kwargs"] = _digest(trainer.chat_template_kwargs)
    image_processor = getattr(trainer.processing_class, "image_processor", None)
    if image_processor is not None:
        described["image_processor"] = _digest(image_processor.to_dict())
    return described


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def resolve_buffer(buffer: ReplayBuffer | Location | None, args: ExGRPOConfig) -> ReplayBuffer | RemoteBuffer:
    """The given buffer, the one at a path, or an empty one of that shape; a stand-in where it lives elsewhere."""
    if not (buffer is None or isinstance(buffer, str | PathLike | RemoteBuffer)):
        _check_kind(buffer, args)
        check_settings(buffer, args, "given to the trainer")
    if args.process_index != 0:
        return RemoteBuffer()
    if buffer is None:
        return ExperienceBuffer(
            group_size=args.num_generations,
            capacity=args.buffer_capacity,
            max_completions_per_question=args.max_completions_per_question,
            retire_solved=args.retire_solved,
            seed=args.seed,
            unit=args.replay_unit,
        )
    if isinstance(buffer, str | PathLike):
        loaded = ExperienceBuffer.load(buffer)
        check_settings(loaded, args, str(buffer))
        return loaded
    return buffer


def _check_kind(buffer: Any, args: ExGRPOConfig) -> None:
    spared = _NEEDED_FOR.keys() - {name for name, needs in _NEEDED_FOR.items() if needs(args)}
    members = [name for name in vars(ReplayBuffer) if not name.startswith("_") and name not in spared]
    missing = [name for name in members if not hasattr(buffer, name)]
    if missing or isinstance(buffer, type):
        what = "a class" if isinstance(buffer, type) else f"no buffer: it lacks {', '.join(missing)}"
        raise TypeError(
            f"experience_buffer={buffer!r} is {what}. Pass an ExperienceBuffer, the path of a saved one, or an object "
            "with the methods of ReplayBuffer. A dataset becomes one with ExperienceBuffer.from_dataset(dataset, "
            f"group_size={args.num_generations})."
        )


def check_settings(
    buffer: ReplayBuffer, args: ExGRPOConfig, source: str, settings: Iterable[str] = tuple(_SETTINGS)
) -> None:
    """Check that buffer and configuration agree, in these attributes of the buffer."""
    unit = getattr(buffer, "unit", COMPLETION)
    if unit != args.replay_unit:
        raise ValueError(
            f"The experience buffer {source} holds {_UNITS[unit]}, but replay_unit={args.replay_unit!r} replays "
            f"{_UNITS[args.replay_unit]}. Set replay_unit={unit!r}, or start with an empty buffer."
        )
    for attribute in settings:
        field = _SETTINGS[attribute]
        mine, wanted = getattr(buffer, attribute, None), getattr(args, field)
        if wanted is not None and mine is not None and mine != wanted:
            raise ValueError(
                f"The experience buffer {source} has {attribute}={mine}, but {field}={wanted} in the configuration. "
                f"Set {field}={mine}, or use a buffer with {attribute}={wanted}; an empty one takes it over."
            )


def find_checkpoint(resume_from: str | bool, output_dir: Location, *, trains_adapter: bool) -> str | bool:
    """The checkpoint to resume from, checked before anything is loaded; `True` where there is none to find."""
    checkpoint = (newest_complete_checkpoint(output_dir) or True) if resume_from is True else resume_from
    if isinstance(checkpoint, bool):
        return checkpoint
    folder = Path(checkpoint)
    holds_adapter = any(any(folder.glob(pattern)) for pattern in ("adapter_config.json", "*/adapter_config.json"))
    if holds_adapter and not trains_adapter:
        raise ValueError(
            f"The checkpoint {folder} holds an adapter (LoRA), but this trainer trains the whole model. Pass the "
            "peft_config that the checkpoint was written with, or merge the adapter into the model and start without "
            "resume_from_checkpoint."
        )
    if trains_adapter and not holds_adapter and (folder / "config.json").is_file():
        raise ValueError(
            f"The checkpoint {folder} holds a whole model, but this trainer trains an adapter (LoRA). Leave out "
            f"peft_config, or start an adapter on that model: model={str(folder)!r} without resume_from_checkpoint."
        )
    return checkpoint


def check_buffer(
    buffer: ReplayBuffer,
    *,
    provenance: Mapping[str, Any],
    max_completion_length: int | None,
    vocab_size: int,
    source: str,
) -> None:
    """Check that a buffer can be replayed by this trainer. Walks the buffer once."""
    is_prompt_known = all(experience.prompt_hash != UNKNOWN_PROMPT for _, _, experience in buffer.items())
    for name in ("tokenizer", "chat_template"):
        if name == "chat_template" and is_prompt_known:
            continue  # what counts are the tokens of the prompts, which are compared one by one
        if name in buffer.provenance and buffer.provenance[name] != provenance[name]:
            raise ExperienceBufferError(
                f"The experience buffer {source} was collected with another {name.replace('_', ' ')}: its stored "
                "tokens would mean something else to this model. Use the one it was collected with, or start with an "
                "empty buffer."
            )
    images = buffer.provenance.get("image_processor")
    if images is not None and images != provenance.get("image_processor", images):
        raise ExperienceBufferError(
            f"The experience buffer {source} was collected with other settings of the image processor: its stored "
            "log-probabilities belong to other pixels. Use the settings it was collected with, or start with an empty "
            "buffer."
        )
    temperature = buffer.provenance.get("temperature", provenance["temperature"])
    if temperature != provenance["temperature"]:
        logger.warning(
            f"The experience buffer {source} was collected at temperature={temperature}, but the trainer samples at "
            f"temperature={provenance['temperature']}. Importance ratios of its completions compare the two."
        )
    column = buffer.provenance.get("question_id_column", provenance["question_id_column"])
    if column != provenance["question_id_column"] and (buffer.num_questions or buffer.retired):
        raise ExperienceBufferError(
            f"The experience buffer {source} was collected with question_id_column={column!r}, but the trainer has "
            f"question_id_column={provenance['question_id_column']!r}: its questions would not be recognised, neither "
            f"stored nor retired ones. Set question_id_column={column!r}, or start with an empty buffer."
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


def check_rollouts(buffer: ReplayBuffer, *, knows_turns: bool, reward_names: Sequence[str], source: str) -> None:
    """
    Check that stored rollouts of several turns can be replayed by this trainer. Walks the buffer once.

    Args:
        buffer ([`ReplayBuffer`]):
            The buffer.
        knows_turns (`bool`):
            Whether the trainer tells what the model wrote from what others did.
        reward_names (`Sequence[str]`):
            Reward functions whose rewards stored completions keep.
        source (`str`):
            Where the buffer comes from, for messages.

    Raises:
        ExperienceBufferError: if one cannot.
    """
    for question, _, experience in buffer.items():
        details = experience.details
        if details is not None and details.run_bytes and not knows_turns:
            raise ExperienceBufferError(
                f"The experience buffer {source} holds a rollout for question {question.question_id!r} in which tools "
                "or an environment wrote tokens, but this trainer has neither tools, nor environments, nor a "
                "rollout_func: it would train on them. Pass what it was collected with, or start with an empty buffer."
            )
        rewards = (details.rewards if details is not None else None) or {}
        missing = [name for name in reward_names if name not in rewards]
        if missing:
            raise ExperienceBufferError(
                f"The experience buffer {source} holds a completion for question {question.question_id!r} without a "
                f"reward of {', '.join(missing)} (it has {sorted(rewards)}), but stored completions keep the rewards "
                "that they had. Train with the reward functions that it was collected with, or set "
                "replay_rewards='recomputed'."
            )
