"""Who generates the fresh rows, and where the stored ones go: what all ways of generating share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import Batch
from ..records import Experience

# Generates from prompt token ids and further fields of the same rows; returns completion token ids, log-probabilities
# of what sampled them (or None) and more.
Generate = Callable[[Sequence[Any], Mapping[str, Sequence[Any]]], tuple[Any, ...]]


class Rollouts(ABC):
    """Completions of a batch: what generates is asked for fresh rows only, stored completions take the others."""

    def __call__(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        multimodal_fields: Mapping[str, Sequence[Any]],
        batch: Batch,
    ) -> tuple[Any, ...]:
        """What `generate` returns, for all rows of this process."""
        completion_ids, logps, *rest = self.generate_fresh(generate, prompt_ids, multimodal_fields, batch)
        if logps is not None:
            batch.without_logps = {position for position, of_row in enumerate(logps) if lacks_logps(of_row)}
        return *put_stored(completion_ids, logps, batch.stored), *rest

    @abstractmethod
    def generate_fresh(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        multimodal_fields: Mapping[str, Sequence[Any]],
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
