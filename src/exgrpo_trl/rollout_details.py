"""What a stored rollout has beyond the tokens of one answer: several turns, messages, rewards, images."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .images import StoredImage, referenced, resolved, stored
from .values import from_json, to_text, value_and_digests


@dataclass(frozen=True, slots=True, eq=False)
class RolloutDetails:
    """
    What a rollout of several turns, of an environment or of a rollout function has beyond tokens.

    Build it with [`RolloutDetails.create`]. Everything is kept as text and bytes; methods and properties give it back.

    Args:
        run_bytes (`bytes`):
            Lengths of the runs of tokens that the model and others wrote, in turn, the model first; native int32.
            Empty where the model wrote all of them.
        messages_text (`str` or `None`):
            Completion messages, JSON.
        prompt_text (`str` or `None`):
            Prompt as the environment showed it, where it differs from that of the question; JSON.
        prompt_bytes (`bytes`):
            Prompt token ids of a rollout function, native int32; empty if the prompt is rendered.
        fields_text (`str` or `None`):
            What a rollout function returned of its own, JSON.
        rewards_text (`str` or `None`):
            Reward of each function by name, JSON; NaN for no opinion.
        images (`tuple[StoredImage, ...]`):
            Images of messages, prompt and fields, which refer to them.
    """

    run_bytes: bytes = b""
    messages_text: str | None = None
    prompt_text: str | None = None
    prompt_bytes: bytes = b""
    fields_text: str | None = None
    rewards_text: str | None = None
    images: tuple[StoredImage, ...] = ()

    @classmethod
    def create(
        cls,
        *,
        is_model: ArrayLike | None = None,
        messages: Sequence[Mapping[str, Any]] | str | None = None,
        prompt: Sequence[Mapping[str, Any]] | str | None = None,
        prompt_ids: ArrayLike | None = None,
        fields: Mapping[str, Any] | None = None,
        rewards: Mapping[str, float] | None = None,
    ) -> RolloutDetails | None:
        """
        Details of a rollout; `None` where there is nothing to keep.

        Args:
            is_model (array of shape `(num_tokens,)`, *optional*):
                1 for tokens that the model wrote, 0 for those of tools or an environment. By default all are the
                model's.
            messages (`list[dict]` or `str`, *optional*):
                Completion, with what tools and the environment said.
            prompt (`list[dict]` or `str`, *optional*):
                Prompt as the environment showed it.
            prompt_ids (array of shape `(num_prompt_tokens,)`, *optional*):
                Prompt token ids that a rollout function returned.
            fields (`dict`, *optional*):
                What a rollout function returned of its own.
            rewards (`dict[str, float]`, *optional*):
                Reward of each function by name; `None` or NaN for no opinion.

        Raises:
            TypeError: if a value cannot be stored.
            ValueError: if the model wrote no token, or an image cannot be stored.
        """
        images: dict[str, StoredImage] = {}

        def text(value: Any, what: str) -> str | None:
            return None if value is None else to_text(referenced(stored(value, images)), what)

        runs = b"" if is_model is None else _runs(np.asarray(is_model)).tobytes()
        rewards_text = None
        if rewards is not None:
            known = {name: math.nan if reward is None else float(reward) for name, reward in rewards.items()}
            rewards_text = json.dumps(known)
        parts = (
            runs,
            text(messages, "messages"),
            text(prompt, "prompt"),
            b"" if prompt_ids is None else np.asarray(prompt_ids, dtype=np.int32).tobytes(),
            text(fields or None, "fields"),
            rewards_text,
        )
        return cls(*parts, tuple(images.values())) if any(parts) else None

    @property
    def texts(self) -> list[str]:
        """The JSON texts that are there."""
        texts = (self.messages_text, self.prompt_text, self.fields_text, self.rewards_text)
        return [text for text in texts if text is not None]

    @property
    def run_lengths(self) -> NDArray[np.int32]:
        """Lengths of the runs, the model's first; empty where the model wrote all tokens."""
        return np.frombuffer(self.run_bytes, dtype=np.int32)

    @property
    def prompt_ids(self) -> NDArray[np.int32] | None:
        """Prompt token ids of a rollout function."""
        return np.frombuffer(self.prompt_bytes, dtype=np.int32) if self.prompt_bytes else None

    @property
    def messages(self) -> Any:
        """Completion messages, with stored images; `None` if they are not kept."""
        return self._value(self.messages_text)

    @property
    def prompt(self) -> Any:
        """Prompt as the environment showed it, with stored images; `None` where it is that of the question."""
        return self._value(self.prompt_text)

    @property
    def fields(self) -> dict[str, Any]:
        """What a rollout function returned of its own."""
        return self._value(self.fields_text) or {}

    @property
    def rewards(self) -> dict[str, float] | None:
        """Reward of each function by name, NaN for no opinion; `None` if they are not kept."""
        return None if self.rewards_text is None else dict(json.loads(self.rewards_text))

    def _value(self, text: str | None) -> Any:
        if text is None:
            return None
        value = from_json(text)
        return resolved(value, {image.digest: image for image in self.images}) if self.images else value


def check_texts(details: RolloutDetails, known_rewards: set[str]) -> None:
    """
    Check that the texts of details from a file are what [`RolloutDetails.create`] makes, so that no later step fails.

    Args:
        details ([`RolloutDetails`]):
            The details.
        known_rewards (`set[str]`):
            Texts of rewards that were checked before, to which these are added: many completions have the same.

    Raises:
        ValueError: if one is not.
    """
    for name, text in (("messages", details.messages_text), ("shown_prompt", details.prompt_text)):
        if text is not None:
            value = _checked_value(name, text, details.images)
            if not isinstance(value, str) and not _is_list_of_dicts(value):
                raise ValueError(f"`{name}` is neither text nor a list of messages")
    if details.fields_text is not None:
        value = _checked_value("fields", details.fields_text, details.images)
        if not isinstance(value, dict) or not all(type(name) is str for name in value):
            raise ValueError("`fields` is no object")
    if details.rewards_text is not None and details.rewards_text not in known_rewards:
        rewards = _checked_value("rewards", details.rewards_text, ())
        if not isinstance(rewards, dict) or not all(map(_is_reward, rewards.values())):
            raise ValueError("`rewards` is no object of numbers")
        known_rewards.add(details.rewards_text)


def _checked_value(name: str, text: str, images: Sequence[StoredImage]) -> Any:
    try:
        value, digests = value_and_digests(text)
    except ValueError as error:
        raise ValueError(f"`{name}` is not JSON of a rollout: {error}") from error
    if digests:
        missing = digests.difference([image.digest for image in images])
        if missing:
            raise ValueError(f"`{name}` refers to the images {sorted(missing)}, which its completion has not")
    return value


def _is_list_of_dicts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(message, dict) for message in value)


def _is_reward(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**53)


def is_model_of(run_lengths: NDArray[np.int32], num_tokens: int) -> NDArray[np.bool_]:
    """Which tokens the model wrote, shape `(num_tokens,)`."""
    if not len(run_lengths):
        return np.ones(num_tokens, dtype=bool)
    return np.repeat(np.arange(len(run_lengths)) % 2 == 0, run_lengths)


def _runs(is_model: NDArray[Any]) -> NDArray[np.int32]:
    """Lengths of runs of ones and zeros in turn, ones first; nothing where all are ones."""
    flags = is_model.astype(bool)
    if flags.all():
        return np.zeros(0, dtype=np.int32)
    if not flags.any():
        raise ValueError("The model wrote no token of this rollout, so there is nothing to learn from it.")
    changes = np.flatnonzero(flags[1:] != flags[:-1]) + 1
    lengths = np.diff(np.concatenate(([0], changes, [len(flags)])))
    return np.concatenate(([] if flags[0] else [0], lengths)).astype(np.int32)
