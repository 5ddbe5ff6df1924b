"""Prompts of stored completions as TRL renders them: with tools, as an environment showed them, with their images."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from trl.data_utils import prepare_multimodal_messages

from .images import opened
from .records import Experience
from .rollouts.environments import names_of
from .rollouts.multi_turn import images_of_tools
from .scoring import Prompted

# What TRL shows in the place of a prompt where an environment owns the data.
_PLACEHOLDER = [{"role": "user", "content": ""}]


class Shown(NamedTuple):
    """A row of the dataset, and the stored completion that answers it."""

    example: Mapping[str, Any]
    experience: Experience

    @property
    def row(self) -> dict[str, Any]:
        """The row with its prompt as it was shown."""
        details = self.experience.details
        prompt = None if details is None else details.prompt
        return dict(self.example) if prompt is None else dict(self.example) | {"prompt": prompt}

    @property
    def prompt_text(self) -> str | None:
        """What tells the prompts of a row apart: how an environment showed it."""
        return None if self.experience.details is None else self.experience.details.prompt_text

    @property
    def prompt_ids(self) -> Sequence[int] | None:
        """Prompt token ids, where a rollout function made them."""
        ids = None if self.experience.details is None else self.experience.details.prompt_ids
        return None if ids is None else ids.tolist()


class Prompts:
    """
    Renders prompts outside of a generation batch.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer that renders them.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def token_ids(self, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """Prompt token ids of dataset rows."""
        return [list(ids) for ids in self._render(rows)[0]] if rows else []

    def prompted(self, shown: Sequence[Shown]) -> list[Prompted]:
        """Stored completions with their prompts; those with images are rendered by the process that scores them."""
        rows = [of_one.row for of_one in shown]
        messages = [_tool_messages(of_one) for of_one in shown]
        with_images = [has_images(row) or said is not None for row, said in zip(rows, messages, strict=True)]
        ids: list[Any] = [of_one.prompt_ids for of_one in shown]
        to_render: dict[int, int] = {}  # where each row is rendered: once for all completions that share it
        first: dict[tuple[int, str | None], int] = {}
        for number, of_one in enumerate(shown):
            if ids[number] is None and not with_images[number]:
                to_render[number] = first.setdefault((id(of_one.example), of_one.prompt_text), number)
        numbers = sorted(set(to_render.values()))
        rendered = dict(zip(numbers, self.token_ids([rows[number] for number in numbers]), strict=True))
        return [
            Prompted(
                ids[number] if ids[number] is not None else rendered[to_render[number]] if number in to_render else (),
                of_one.experience.token_ids,
                of_one.experience.is_model if of_one.experience.num_model_tokens < len(of_one.experience) else None,
                rows[number] if with_images[number] else None,
                messages[number],
            )
            for number, of_one in enumerate(shown)
        ]

    def with_pixels(self, of_one: Prompted) -> tuple[Prompted, dict[str, Any]]:
        """
        A stored completion with its prompt rendered, and what a forward needs of its images.

        Args:
            of_one ([`Prompted`]):
                The completion, with its row.

        Returns:
            `tuple`: the completion, and arguments of `_get_per_token_logps_and_entropies`.
        """
        if of_one.row is None:
            return of_one, {}
        (prompt_ids,), images, fields = self._render([of_one.row])
        prompt = list(of_one.prompt) or list(prompt_ids)
        tool_images = images_of_tools(opened(of_one.messages)) if of_one.messages is not None else []
        all_images = [*((images or [None])[0] or ()), *tool_images]
        arguments: dict[str, Any] = {}
        if tool_images:
            arguments = dict(self.trainer.processing_class.image_processor(images=all_images, return_tensors="pt"))
            ids = torch.tensor([[*prompt, *of_one.completion.tolist()]])
            token = getattr(self.trainer, "_image_pad_token_id", None)
            types = (ids == token).long() if token is not None else torch.zeros_like(ids)
            arguments["mm_token_type_ids" if "image_grid_thw" in arguments else "token_type_ids"] = types
        else:
            for name, value in fields.items():
                tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.array(value))
                if name.endswith("token_type_ids"):
                    tensor = torch.cat([tensor, tensor.new_zeros((1, len(of_one.completion)))], dim=1)
                arguments[name] = tensor
        if all_images and "pixel_values" in arguments:
            arguments["num_images"] = [len(all_images)]
            pixels = arguments["pixel_values"]
            if "spatial_shapes" in arguments or (pixels.ndim == 4 and len(pixels) != len(all_images)):
                arguments["num_tiles"] = [len(pixels)]
        return of_one._replace(prompt=prompt), {name: arguments[name] for name in arguments if name in self._known}

    @property
    def _known(self) -> Mapping[str, Any]:
        # What the training forward is given: TRL leaves out the rest of what a processor returns.
        trainer_class = type(self.trainer)
        parameters = inspect.signature(trainer_class._get_per_token_logps_and_entropies).parameters
        # TRL 1.14 passes everything on to a method of another name.
        passed_on = getattr(trainer_class, "_full_logits_logps", None) if "kwargs" in parameters else None
        return parameters if passed_on is None else inspect.signature(passed_on).parameters

    def _render(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Any, Any, Any]:
        prompts = [_with_images(row) for row in rows]
        with self._environments_of(rows):
            return self.trainer._tokenize_prompts(prompts)

    @contextmanager
    def _environments_of(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """TRL renders each prompt with the tools of its environment, which it looks up by row."""
        if getattr(self.trainer, "environment_factories", None) is None:
            yield
            return
        before = vars(self.trainer).get("_batch_environments")
        self.trainer._batch_environments = names_of(self.trainer, rows)
        try:
            yield
        finally:
            self.trainer._batch_environments = before


def images_of(row: Mapping[str, Any]) -> list[Any]:
    """Images of a dataset row, as TRL reads its columns."""
    if "images" in row:
        return list(row["images"] or ())
    return [] if row.get("image") is None else [row["image"]]


def has_images(row: Mapping[str, Any]) -> bool:
    """Whether a row has images, in a column or inside its prompt."""
    return bool(images_of(row)) or any(_image_parts(row.get("prompt")))


def _image_parts(messages: Any) -> Iterator[Mapping[str, Any]]:
    """Parts of messages that are images, by value or by path."""
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and part.get("type") == "image":
                yield part


def _with_images(row: Mapping[str, Any]) -> Any:
    row = opened(dict(row))
    prompt = _PLACEHOLDER if row.get("prompt") is None else row["prompt"]
    images = images_of(row)
    return prepare_multimodal_messages(prompt, images) if images else prompt


def _tool_messages(of_one: Shown) -> Any:
    """Completion messages, if tools returned images in them."""
    details = of_one.experience.details
    if details is None or details.messages_text is None or '"image"' not in details.messages_text:
        return None
    messages = details.messages
    return messages if images_of_tools(messages) else None
