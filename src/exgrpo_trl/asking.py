"""Reward functions that are asked twice: about all rows, and then about those alone that hold another completion."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import torch

from .compatibility import wrapped_value
from .rewards import is_async, keeping

_Logs = defaultdict[str, list[Any]]


class AskedTwice:
    """
    The reward functions of a batch, and what they gave the first time.

    What functions log is kept apart until the end, so that TRL's tables get one entry for each row.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer whose functions are asked.
        num_rows (`int`):
            Rows of this process.
    """

    def __init__(self, trainer: Any, num_rows: int) -> None:
        self.trainer = trainer
        self.num_rows = num_rows
        self.functions: list[Any] = list(trainer.reward_funcs)
        self.rewards: torch.Tensor | None = None
        self._given: list[list[Any]] = []
        self._logs: _Logs = defaultdict(list)
        self._metrics: _Logs = defaultdict(list)

    def first(self, calculate: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Ask the present functions of the trainer about all rows."""
        present = list(self.trainer.reward_funcs)
        self._given = [[] for _ in present]
        asked = [_remembering(function, given) for function, given in zip(present, self._given, strict=True)]
        self.rewards = self._ask(asked, self._logs, self._metrics, calculate, *args, **kwargs)
        return self.rewards

    def again(
        self,
        changed: Sequence[int],
        known: Sequence[Mapping[int, Any]],
        calculate: Callable[..., torch.Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Ask about the rows that hold another completion than the first time; the others keep what they were given.

        Args:
            changed (`Sequence[int]`):
                Their positions.
            known (`Sequence[Mapping[int, Any]]`):
                Rewards of these by function and position, as far as functions need not be asked.
            calculate (`Callable`):
                TRL's `_calculate_rewards`, with its arguments.
        """
        asked = [
            self._about(changed, function, name, given, of_function)
            for function, name, given, of_function in zip(
                self.functions, self.trainer.reward_func_names, self._given, known, strict=True
            )
        ]
        logs: _Logs = defaultdict(list)
        rewards = self._ask(asked, logs, defaultdict(list), calculate, *args, **kwargs)
        for column, values in self._logs.items():
            anew = logs.get(column) or [None] * self.num_rows
            if len(anew) == len(values) == self.num_rows:
                self._logs[column] = [anew[row] if row in changed else values[row] for row in range(self.num_rows)]
        return rewards

    def hand_over(self) -> None:
        """Give TRL what the functions have logged; of metrics, those of the first time, which speak of all rows."""
        for mine, of_trainer in (
            (self._logs, self.trainer._pending_extra_logs),
            (self._metrics, self.trainer._pending_metrics),
        ):
            for name, values in mine.items():
                of_trainer[name].extend(values)

    def _about(
        self, rows: Sequence[int], function: Any, name: str, given: Sequence[Any], known: Mapping[int, Any]
    ) -> Any:
        if isinstance(function, torch.nn.Module):
            return _OfRows(function, rows, given[0])
        kept = {row: given[row] for row in range(self.num_rows) if row not in rows}
        return keeping(function, name, kept | dict(known), self.num_rows)

    def _ask(
        self,
        functions: list[Any],
        logs: _Logs,
        metrics: _Logs,
        calculate: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        changes = {"reward_funcs": functions, "_pending_extra_logs": logs, "_pending_metrics": metrics}
        with ExitStack() as stack:
            for name, value in changes.items():
                stack.enter_context(wrapped_value(self.trainer, name, value))
            rewards: torch.Tensor = calculate(*args, **kwargs)
        return rewards


def _remembering(function: Any, given: list[Any]) -> Any:
    """A reward function that puts what it gives into a list: one reward for each row, or the logits of a model."""
    if isinstance(function, torch.nn.Module):
        return _Remembering(function, given)

    def remembered(rewards: Any) -> list[Any]:
        given[:] = list(rewards)
        return list(given)

    if is_async(function):

        async def ask_later(**kwargs: Any) -> list[Any]:
            return remembered(await function(**kwargs))

        return ask_later

    def ask(**kwargs: Any) -> list[Any]:
        return remembered(function(**kwargs))

    return ask


class _Remembering(torch.nn.Module):
    """A reward model that keeps the logits that it gave."""

    def __init__(self, model: torch.nn.Module, given: list[Any]) -> None:
        super().__init__()
        self.model, self.given = model, given

    def forward(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        self.given[:] = [output.logits]
        return output


class _OfRows(torch.nn.Module):
    """A reward model that is asked about some rows; the others have the logits that they had."""

    def __init__(self, model: torch.nn.Module, rows: Sequence[int], logits: torch.Tensor) -> None:
        super().__init__()
        self.model, self.rows, self.logits = model, list(rows), logits

    def forward(self, **inputs: Any) -> Any:
        asked = self.rows or [0]  # where the model is sharded, the other processes wait for this one
        of_rows = {
            name: value[asked] if isinstance(value, torch.Tensor) and len(value) == len(self.logits) else value
            for name, value in inputs.items()
        }
        anew = self.model(**of_rows).logits
        logits = self.logits.clone()
        if self.rows:
            logits[self.rows] = anew
        return SimpleNamespace(logits=logits)
