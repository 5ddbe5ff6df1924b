"""What a run has logged: the lines of `trainer_state.json`, as numbers over steps."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Series(NamedTuple):
    """Numbers over optimizer steps, ascending; both of shape `(N,)`."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    def recent(self, most: int) -> float:
        """Mean of the newest values."""
        newest = self.values[-most:].tolist()
        return math.fsum(newest) / len(newest)  # exact: equal values are their mean


class History:
    """
    Log lines of a run, one for each step.

    Args:
        lines (`Sequence[Any]`):
            `log_history` as it was read: whatever is no finite number is left out.
        step (`int`, *optional*, defaults to `0`):
            The last step of the state that they come from.
        max_steps (`int`, *optional*):
            The step with which the run is to end, if known.
        source (`Path`, *optional*):
            The file.
    """

    def __init__(
        self, lines: Sequence[Any] = (), step: int = 0, max_steps: int | None = None, source: Path | None = None
    ) -> None:
        self.step: int = step
        self.max_steps: int | None = max_steps
        self.source: Path | None = source
        self._lines: dict[int, dict[str, float]] = {}
        for line in lines:
            at = line.get("step") if isinstance(line, dict) else None
            if type(at) is int and 0 <= at < 2**53:
                # A resumed run may log a step again; an evaluation and the end of a run have lines of their own.
                self._lines.setdefault(at, {}).update(
                    {name: float(value) for name, value in line.items() if _is_number(value)}
                )

    @property
    def num_lines(self) -> int:
        """Steps with a line."""
        return len(self._lines)

    @property
    def names(self) -> set[str]:
        """All metrics with a number."""
        return {name for line in self._lines.values() for name in line}

    def series(self, name: str) -> Series:
        """A metric over the steps; empty where it was never logged."""
        known = sorted((step, line[name]) for step, line in self._lines.items() if name in line)
        return series_of(known)


def series_of(pairs: Sequence[tuple[int, float]]) -> Series:
    """Steps with their values, ascending."""
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))


def read_history(file: Path) -> History | None:
    """The log lines of a `trainer_state.json`; `None` if it is not there or is none."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        lines = state["log_history"]
        step, max_steps = state["global_step"], state.get("max_steps")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError):
        return None
    if not isinstance(lines, list) or type(step) is not int:
        return None
    is_known = type(max_steps) is int and max_steps > 0
    return History(lines, step, max_steps if is_known else None, file)


def newest_history(files: Sequence[Path]) -> History:
    """The one that went furthest of those that can be read; without lines if there is none."""
    found = [history for history in map(read_history, files) if history is not None]
    return max(found, key=lambda history: history.step, default=History())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False
