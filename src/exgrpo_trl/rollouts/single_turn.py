"""Generation with transformers: one turn, by the rows of this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..batch import Batch
from .base import Generate, Rollouts
from .pixels import fields_of_rows


class SingleTurnRollouts(Rollouts):
    """Leaves the rows of stored completions out of what transformers is given."""

    def generate_fresh(
        self,
        generate: Generate,
        prompt_ids: Sequence[Any],
        images: Any,
        multimodal_fields: Mapping[str, Any],
        batch: Batch,
    ) -> tuple[Any, ...]:
        stored = batch.stored
        if len(stored) == batch.num_groups * batch.group_size:
            return [[] for _ in prompt_ids], None  # whole groups alone, and no other process waits
        # At least one, because the other processes may wait for this one to generate; it is dropped.
        rows = [row for row in range(len(prompt_ids)) if row not in stored] or [0]
        fields = fields_of_rows(multimodal_fields, rows, images, len(prompt_ids))
        if fields is None:  # nobody knows which pixels are whose
            rows, fields = list(range(len(prompt_ids))), multimodal_fields
            batch.is_generated_whole = True
        of_rows = None if images is None else [images[row] for row in rows]
        completion_ids, *rest = generate([prompt_ids[row] for row in rows], of_rows, fields)
        fresh = dict(zip(rows, completion_ids, strict=True))
        return [[] if row in stored else fresh[row] for row in range(len(prompt_ids))], *rest
