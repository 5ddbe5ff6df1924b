"""Generation with transformers: one turn, by the rows of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..batch import Batch
from .base import Generate, Rollouts


class SingleTurnRollouts(Rollouts):
    """Leaves the rows of stored completions out of what transformers is given."""

    def generate_fresh(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        multimodal_fields: Mapping[str, Sequence[Any]],
        batch: Batch,
    ) -> tuple[Any, ...]:
        stored = batch.stored
        # At least one, because the other processes may wait for this one to generate; it is dropped.
        rows = [row for row in range(len(prompt_ids)) if row not in stored] or [0]
        fields = {name: [field[row] for row in rows] for name, field in multimodal_fields.items()}
        completion_ids, *rest = generate([prompt_ids[row] for row in rows], fields)
        fresh = dict(zip(rows, completion_ids, strict=True))
        return [[] if row in stored else fresh[row] for row in range(len(prompt_ids))], *rest
