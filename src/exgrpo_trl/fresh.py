"""What fresh rollouts have beyond tokens, from their generation until they are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .rollout_details import RolloutDetails


@dataclass(eq=False, slots=True)
class FreshRollouts:
    """
    What the fresh rows of this process have beyond tokens, by position; only what this run makes use of.

    Attributes:
        told_masks (`Sequence[Sequence[int]]` or `None`):
            Which tokens the model wrote, by row, as whoever generated them told.
        masks (`np.ndarray` or `None`):
            Which tokens the model wrote, shape `(num_rows, T)`; `None` where it wrote all.
        messages (`list` or `None`):
            Completion messages of each row.
        prompts (`dict[int, Any]` or `None`):
            Prompts as environments showed them, position by position; `None` without environments.
        prompt_ids (`list` or `None`):
            Prompt token ids of each row that a rollout function returned.
        fields (`dict[int, dict]`):
            What a rollout function returned of its own.
        reward_names (`list[str]` or `None`):
            Names of the reward functions, where a stored completion keeps the reward of each.
    """

    told_masks: Sequence[Sequence[int]] | None = None
    masks: np.ndarray | None = None
    messages: list[Any] | None = None
    prompts: dict[int, Any] | None = None
    prompt_ids: Sequence[Sequence[int]] | None = None
    fields: dict[int, dict[str, Any]] = field(default_factory=dict)
    reward_names: list[str] | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing beyond tokens in any of the rows."""
        parts = (self.masks, self.messages, self.prompts, self.prompt_ids, self.reward_names)
        return all(part is None for part in parts) and not self.fields

    def details(
        self, position: int, num_tokens: int, prompt: Any, rewards: Sequence[float] | None
    ) -> RolloutDetails | None:
        """
        What a rollout has beyond tokens, as it is stored.

        Args:
            position (`int`):
                Its position.
            num_tokens (`int`):
                Tokens of its completion.
            prompt (`Any`):
                Prompt of its question, which is not kept again.
            rewards (`Sequence[float]` or `None`):
                What each reward function gave.
        """
        shown = None if self.prompts is None else self.prompts[position]
        names = self.reward_names
        return RolloutDetails.create(
            is_model=None if self.masks is None else self.masks[position, :num_tokens],
            messages=None if self.messages is None else self.messages[position],
            prompt=None if shown == prompt else shown,
            prompt_ids=None if self.prompt_ids is None else self.prompt_ids[position],
            fields=self.fields.get(position),
            rewards=None if names is None or rewards is None else dict(zip(names, rewards, strict=True)),
        )
