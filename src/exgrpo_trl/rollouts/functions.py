"""Rollout functions of a user: which rows they are asked for, and where stored completions go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..batch import Batch
from ..records import Experience

MASK = "env_mask"
_PER_ROW = ("prompt_ids", "completion_ids", "logprobs", MASK)


def call_rollout_function(
    function: Callable[..., Mapping[str, Any]],
    prompts: Sequence[Any],
    trainer: Any,
    *,
    batch: Batch,
    fresh_only: bool,
    stand_in: list[int] | None,
    tokenize: Callable[[Sequence[int]], list[list[int]]],
) -> dict[str, Any]:
    """
    What a rollout function returns for all rows of this process, stored completions in their rows.

    Args:
        function (`Callable`):
            Rollout function of the user.
        prompts (`Sequence`):
            Prompts of all rows.
        trainer ([`~trl.GRPOTrainer`]):
            Second argument of the function.
        batch ([`Batch`]):
            The batch; takes note of what the function returned for fresh rows.
        fresh_only (`bool`):
            Whether to ask for fresh rows alone, for at least one: functions of several processes may wait for another.
        stand_in (`list[int]` or `None`):
            Token ids in the place of stored completions, where tools follow.
        tokenize (`Callable`):
            Prompt token ids of some positions, for stored completions that came without.

    Raises:
        ValueError: if the function returns too few rows, or parts of a row that do not fit together.
    """
    num_rows = len(prompts)
    asked = [row for row in range(num_rows) if row not in batch.stored] or [0] if fresh_only else list(range(num_rows))
    batch.is_generated_whole = not fresh_only
    output = dict(function([prompts[row] for row in asked], trainer))
    _check(output, asked, batch.first_row)
    by_row = {
        name: dict(zip(asked, values, strict=True))
        for name, values in output.items()
        if isinstance(values, list | tuple) and len(values) == len(asked)
    }
    own = [name for name in by_row if name not in _PER_ROW]
    fresh = [row for row in range(num_rows) if row not in batch.stored]
    batch.fresh.prompt_ids = [list(by_row["prompt_ids"].get(row, ())) for row in range(num_rows)]
    batch.fresh.fields = {row: {name: by_row[name][row] for name in own} for row in fresh}
    if MASK not in by_row and any(not e.is_model.all() for e in batch.stored.values()):
        by_row[MASK] = {row: [1] * len(by_row["completion_ids"][row]) for row in fresh}
    for position, experience in batch.stored.items():
        values = _values_of(experience, stand_in)
        if values["prompt_ids"] is None:
            values["prompt_ids"] = tokenize([position])[0]
        for name, of_rows in by_row.items():
            of_rows[position] = values.get(name)
    merged = {name: [of_rows[row] for row in range(num_rows)] for name, of_rows in by_row.items()}
    if stand_in is None:
        batch.fresh.told_masks = merged.get(MASK)
    return output | merged


def _values_of(experience: Experience, stand_in: list[int] | None) -> dict[str, Any]:
    """What a stored completion puts into its row."""
    details = experience.details
    prompt_ids = None if details is None else details.prompt_ids
    is_late = stand_in is not None
    return (details.fields if details is not None else {}) | {
        "prompt_ids": None if prompt_ids is None else prompt_ids.tolist(),
        "completion_ids": stand_in if is_late else experience.token_ids.tolist(),
        "logprobs": [0.0] * len(stand_in or ()) if is_late else experience.behavior_per_token_logps.tolist(),
        MASK: [1] * len(stand_in or ()) if is_late else experience.is_model.astype(int).tolist(),
    }


def _check(output: Mapping[str, Any], asked: Sequence[int], first_row: int) -> None:
    way_out = (
        "A rollout function returns prompt_ids, completion_ids and logprobs with one entry for each prompt that it is "
        "given, and an env_mask, if any, with one number for each completion token; logprobs may be None. Set "
        "rollout_fresh_only=False if it counts on whole groups."
    )
    for name in _PER_ROW:
        values = output.get(name)
        if values is None and name in ("logprobs", MASK):
            continue
        if values is None:
            raise ValueError(f"rollout_func returned no {name}, only {sorted(output)}. {way_out}")
        if len(values) != len(asked):
            raise ValueError(f"rollout_func returned {len(values)} {name} for {len(asked)} prompts. {way_out}")
    for name in ("logprobs", MASK):
        for row, ids, values in zip(asked, output["completion_ids"], output.get(name) or (), strict=False):
            if len(ids) != len(values):
                raise ValueError(
                    f"rollout_func returned {len(values)} numbers of {name} for the {len(ids)} tokens of row "
                    f"{first_row + row}. {way_out}"
                )
            if name == MASK and not np.isin(values, (0, 1)).all():
                raise ValueError(
                    f"rollout_func returned an env_mask in row {first_row + row} that is not 0 or 1. {way_out}"
                )
