"""Rewards that stored completions keep: reward functions are asked about the fresh rows alone."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .records import Experience


def keeping_stored(
    functions: Sequence[Any], names: Sequence[str], stored: Mapping[int, Experience], num_rows: int
) -> list[Any]:
    """
    Reward functions of which stored rows keep the reward that they had, of each function.

    Functions are called with fresh rows alone: every list of one entry a row is cut alike. Reward models are left as
    they are: all that they look at is there.

    Args:
        functions (`Sequence`):
            Reward functions of a trainer, synchronous and asynchronous, and reward models.
        names (`Sequence[str]`):
            Their names.
        stored (`Mapping[int, Experience]`):
            Stored completions by position.
        num_rows (`int`):
            Rows of this process.
    """
    return [
        function if isinstance(function, torch.nn.Module) else keeping(function, name, rewards, num_rows)
        for function, name, rewards in zip(functions, names, stored_rewards(stored, names), strict=True)
    ]


def stored_rewards(stored: Mapping[int, Experience], names: Sequence[str]) -> list[dict[int, float | None]]:
    """Rewards that stored completions had, by function and position."""
    kept = [dict((e.details.rewards if e.details is not None else None) or {}) for e in stored.values()]
    return [{position: rewards.get(name) for position, rewards in zip(stored, kept, strict=True)} for name in names]


def keeping(function: Callable[..., Any], name: str, stored: Mapping[int, Any], num_rows: int) -> Callable[..., Any]:
    """A reward function that is asked about the rows alone whose reward is not known, by position."""
    rows = [row for row in range(num_rows) if row not in stored]

    def united(rewards: Sequence[Any]) -> list[Any]:
        given = list(rewards)
        if len(given) != len(rows):
            raise ValueError(
                f"The reward function '{name}' returned {len(given)} rewards for {len(rows)} completions. Return one "
                "for each completion."
            )
        fresh = dict(zip(rows, given, strict=True))
        return [stored[row] if row in stored else fresh[row] for row in range(num_rows)]

    if is_async(function):

        async def ask_later(**kwargs: Any) -> list[Any]:
            return united(await function(**_of_rows(kwargs, rows, num_rows)) if rows else [])

        return ask_later

    def ask(**kwargs: Any) -> list[Any]:
        return united(function(**_of_rows(kwargs, rows, num_rows)) if rows else [])

    return ask


def is_async(function: Any) -> bool:
    """Whether a reward function is asynchronous, an object with such a `__call__` included."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _of_rows(kwargs: Mapping[str, Any], rows: Sequence[int], num_rows: int) -> dict[str, Any]:
    """Arguments of a reward function for some of the rows; what it logs of these gets None in the others."""
    cut: dict[str, Any] = {
        name: [value[row] for row in rows] if isinstance(value, list) and len(value) == num_rows else value
        for name, value in kwargs.items()
    }
    if "log_extra" in cut:
        log_extra = cut["log_extra"]

        def log_rows(column: str, values: Sequence[Any]) -> None:
            by_row = dict(zip(rows, values, strict=True))
            log_extra(column, [by_row.get(row) for row in range(num_rows)])

        cut["log_extra"] = log_rows
    return cut
