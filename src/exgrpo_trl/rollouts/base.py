"""Who generates the fresh rows, and where the stored ones go: what all ways of generating share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import Batch
from ..records import Experience

# Generates from prompt token ids, images and further fields of the same rows; returns completion token ids,
# log-probabilities of what sampled them (or None) and more.
Generate = Callable[[Sequence[Any], Any, Mapping[str, Any]], tuple[Any, ...]]


class Rollouts(ABC):
    """
    Completions of a batch: what generates is asked for fresh rows only, stored completions take the others.

    Args:
        stand_in (`list[int]`, *optional*):
            Token ids that take the place of a stored completion for the time being, where it has to be kept from what
            follows the first turn. By default it takes its place at once.
    """

    def __init__(self, stand_in: list[int] | None = None) -> None:
        self.stand_in = stand_in

    def __call__(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        images: Any,
        multimodal_fields: Mapping[str, Any],
        batch: Batch,
    ) -> tuple[Any, ...]:
        """What `generate` returns, for all rows of this process."""
        completion_ids, logps, *rest = self.generate_fresh(generate, prompt_ids, images, multimodal_fields, batch)
        if logps is not None:
            batch.without_logps = {position for position, of_row in enumerate(logps) if lacks_logps(of_row)}
        if self.stand_in is None:
            return *put_stored(completion_ids, logps, batch.stored), *rest
        for position in batch.stored:
            completion_ids[position] = list(self.stand_in)
            if logps is not None:
                logps[position] = [0.0] * len(self.stand_in)
        return completion_ids, logps, *rest

    @abstractmethod
    def generate_fresh(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        images: Any,
        multimodal_fields: Mapping[str, Any],
        batch: Batch,
    ) -> tuple[Any, ...]:
        """What `generate` returns, with an empty completion in each row that a stored one takes."""


def put_stored(
    completion_ids: Sequence[list[int]],
    sampling_logps: Sequence[Sequence[float | None]] | None,
    stored: Mapping[int, Experience],
) -> tuple[list[list[int]], list[Sequence[float | None]] | None]:
    """Put stored completions into their rows, with the log-probabilities of the policy that generated them."""
    ids = [stored[row].token_ids.tolist() if row in stored else ids for row, ids in enumerate(completion_ids)]
    if sampling_logps is None:
        return ids, None
    return ids, [
        stored[row].behavior_per_token_logps.tolist() if row in stored else logps
        for row, logps in enumerate(sampling_logps)
    ]


def lacks_logps(sampling_logps: Sequence[float | None]) -> bool:
    """Whether what sampled a completion has left out the log-probability of one of its tokens."""
    return bool(np.isnan(np.array(sampling_logps, dtype=float)).any())
