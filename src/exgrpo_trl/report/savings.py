"""What replay has saved, and what it cost: tokens are counted, seconds estimated from TRL's own measurements."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .history import Series
from .run import Run

_NONE = Series(np.zeros(0, np.int64), np.zeros(0))


class Savings(NamedTuple):
    """
    What is known of savings, all of them since the start of the run.

    Attributes:
        tokens (`float`, *optional*):
            Completion tokens of the model that came from the buffer; `None` if unknown.
        share (`float`, *optional*):
            Their share of all tokens that TRL counted, prompts included.
        token_series, second_series, scoring_series ([`Series`]):
            Tokens, estimated seconds and measured seconds of scoring up to each log line; empty if unknown.
    """

    tokens: float | None
    share: float | None
    token_series: Series
    second_series: Series
    scoring_series: Series

    @property
    def seconds(self) -> float | None:
        """Estimated seconds of generation, `None` if they cannot be estimated."""
        return self.second_series.last if len(self.second_series) else None

    @property
    def scoring_seconds(self) -> float | None:
        """Seconds of scoring candidates, `None` if unknown."""
        return self.scoring_series.last if len(self.scoring_series) else None


def savings_of(run: Run) -> Savings:
    """
    What a run has saved.

    Seconds are the tokens of every log line, at the tokens in a second of the steps of that line: `num_tokens` less
    what was saved, prompts included, over `step_time` less the scoring.
    """
    saved = run.history.series("replay/tokens_saved")
    scoring, processed = _scoring(run), run.history.series("num_tokens")
    tokens = saved.last if len(saved) else _tokens_of_buffer(run)
    share = tokens / processed.last if tokens is not None and len(processed) and processed.last else None
    return Savings(tokens, share, saved, _seconds(run, saved, processed, scoring), scoring)


def _tokens_of_buffer(run: Run) -> float | None:
    """The count in a saved buffer, of a run that logged none."""
    state = run.buffer.buffer.replay_state.get("replayer") if run.buffer is not None else None
    tokens = state.get("tokens_saved") if isinstance(state, dict) else None
    return float(tokens) if type(tokens) is int and 0 <= tokens < 2**63 else None


def _steps_between(series: Series) -> np.ndarray:
    """Steps that each log line is about."""
    return np.asarray(np.diff(series.steps, prepend=0), dtype=np.float64)


def _steps_per_batch(run: Run) -> float:
    """Optimizer steps that a generation batch trains: as replays tell, else one as by TRL's defaults."""
    steps = run.replay_column("last_step") - run.replay_column("step") + 1
    return float(max(np.median(steps), 1.0)) if len(steps) else 1.0


def _scoring(run: Run) -> Series:
    per_batch = run.history.series("replay/scoring_seconds")
    if not len(per_batch):
        return _NONE
    return Series(per_batch.steps, np.cumsum(per_batch.values * _steps_between(per_batch) / _steps_per_batch(run)))


def _seconds(run: Run, saved: Series, processed: Series, scoring: Series) -> Series:
    step_time = run.history.series("step_time")
    # All of them stand in every training log line; where one does not, nothing is guessed.
    steps = np.intersect1d(saved.steps, np.intersect1d(processed.steps, step_time.steps))
    if not len(steps):
        return _NONE
    at = {name: _at(series, steps) for name, series in (("saved", saved), ("all", processed), ("time", step_time))}
    new_saved, new_all = (np.diff(at[name], prepend=0.0) for name in ("saved", "all"))
    between = np.diff(steps.astype(np.float64), prepend=0.0)
    cost = np.diff(_at(scoring, steps), prepend=0.0) if len(scoring) else 0.0
    fresh, seconds = new_all - new_saved, np.maximum(at["time"] * between - cost, 0.0)
    is_known = (fresh > 0) & (new_saved >= 0)
    estimated = np.where(is_known, new_saved * seconds / np.where(is_known, fresh, 1.0), 0.0)
    return Series(steps, np.cumsum(estimated))


def _at(series: Series, steps: np.ndarray) -> np.ndarray:
    """Values at steps, of the last line before where there is none."""
    found = np.searchsorted(series.steps, steps, side="right") - 1
    return np.where(found >= 0, series.values[np.maximum(found, 0)], 0.0)
