"""What counts as a success, given what each reward function says of a completion."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .records import reaches
from .saved_state import lists_of_texts_of

logger: Any = logging.get_logger(__name__)

WEIGHTED_SUM = "weighted_sum"


class SuccessRule:
    """
    Decides which completions are successes.

    With several reward functions and none named, a completion is a success when every function that gave an opinion
    (None is none) reaches the threshold: the right form alone is no success. Functions of weight 0 do not count. Where
    a function gave no opinion on a whole batch although it judged completions like these before, as when its service
    is down, there is no verdict.

    Args:
        names (`Sequence[str]`):
            Names of the reward functions.
        weights (`Sequence[float]`):
            Their weights.
        threshold (`float`):
            Reward from which a completion is correct.
        success_reward (`str` or `None`):
            Name of the function that decides, `"weighted_sum"`, or `None` for all of them.

    Raises:
        `ValueError`:
            When no function, or more than one, has the name.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[float], threshold: float, success_reward: str | None
    ) -> None:
        self.success_reward = success_reward
        self._known: set[frozenset[int]] = set()  # which functions have judged one completion together
        self._has_warned = False
        self.names: list[str] = []
        self.follow(names, weights, threshold)

    def follow(self, names: Sequence[str], weights: Sequence[float], threshold: float) -> None:
        """Take over what the trainer has now: functions, weights and threshold may change between batches."""
        if list(names) != self.names:
            self.names, self._known = list(names), set()
            self._check_name()
        self.weights: np.ndarray = np.asarray(weights, dtype=float)
        self.threshold = threshold

    def _check_name(self) -> None:
        if self.success_reward is None or self.success_reward == WEIGHTED_SUM:
            return
        times = Counter(self.names)[self.success_reward]
        if times == 0:
            raise ValueError(
                f"success_reward={self.success_reward!r} is not a reward function of this trainer, which has "
                f"{self.names}. Name one of these, {WEIGHTED_SUM!r} for the weighted sum, or None for all of them."
            )
        if times > 1:
            raise ValueError(
                f"success_reward={self.success_reward!r} is the name of {times} reward functions: {self.names}. Give "
                "the functions names of their own (`__name__`)."
            )

    @property
    def _counting(self) -> list[int]:
        """Functions that count: one of weight 0 is there to be logged, unless all are."""
        counting = np.flatnonzero(self.weights).tolist()
        return counting or list(range(len(self.names)))

    @property
    def description(self) -> str:
        """The rule in words."""
        if self.success_reward == WEIGHTED_SUM:
            rule = f"the weighted sum of {', '.join(self.names)} is"
        elif self.success_reward is not None or len(self.names) == 1:
            rule = f"{self.success_reward or self.names[0]} gives"
        else:
            counting = ", ".join(self.names[index] for index in self._counting)
            rule = f"each of {counting} that has an opinion gives"
        return (
            f"A completion is a success when {rule} at least success_threshold={self.threshold} "
            f"(success_reward={self.success_reward!r})."
        )

    @property
    def way_out(self) -> str:
        """How to choose another rule."""
        return f"Name one of {self.names} in success_reward to let it decide, or {WEIGHTED_SUM!r} for their sum."

    def __call__(self, rewards_per_func: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """
        Success rewards and successes.

        Args:
            rewards_per_func (`np.ndarray`):
                Rewards of a whole batch, shape `(N, num_reward_funcs)`, NaN for no opinion.

        Returns:
            `tuple[np.ndarray, np.ndarray]`:
                Rewards of shape `(N,)`, NaN where there is no verdict: of the one function that decides, else the
                weighted sum. Booleans of shape `(N,)`.
        """
        if self.success_reward == WEIGHTED_SUM:
            rewards = weighted_sum(rewards_per_func, self.weights)
            return rewards, reaches(rewards, self.threshold)
        if self.success_reward is not None or len(self.names) == 1:
            index = 0 if self.success_reward is None else self.names.index(self.success_reward)
            return rewards_per_func[:, index], reaches(rewards_per_func[:, index], self.threshold)
        counts = np.isin(np.arange(len(self.names)), self._counting)
        has_opinion = ~np.isnan(rewards_per_func) & counts
        has_verdict = has_opinion.any(axis=1) & ~self._lacks_a_judge(has_opinion)
        rewards = np.where(has_verdict, weighted_sum(rewards_per_func, self.weights), np.nan)
        return rewards, has_verdict & (reaches(rewards_per_func, self.threshold) | ~has_opinion).all(axis=1)

    def _lacks_a_judge(self, has_opinion: np.ndarray) -> np.ndarray:
        """Which rows miss the opinion of a function that is silent on the whole batch, and judged such rows before."""
        silent = set(self._counting) - set(np.flatnonzero(has_opinion.any(axis=0)).tolist())
        judges = [frozenset(np.flatnonzero(of_row).tolist()) for of_row in has_opinion]
        lacking = {
            pattern
            for pattern in set(judges)
            if silent and any(pattern < known and known - pattern <= silent for known in self._known)
        }
        self._known |= set(judges) - lacking - {frozenset()}
        if lacking and not self._has_warned:
            self._has_warned = True
            logger.warning(
                f"No opinion of {', '.join(self.names[index] for index in sorted(silent))} on a whole generation "
                "batch: while it is silent, nothing that it used to judge is stored, evicted or retired. "
                f"{self.way_out}"
            )
        return np.array([pattern in lacking for pattern in judges])

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; survives JSON."""
        return {"judges": sorted([self.names[index] for index in sorted(known)] for known in self._known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; reward functions that are gone are forgotten."""
        self._known = {
            frozenset(self.names.index(name) for name in names)
            for names in lists_of_texts_of(state, "judges")
            if set(names) <= set(self.names)
        }


def weighted_sum(rewards_per_func: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted sum of what functions gave, shape `(N,)`; NaN where none gave anything."""
    has_reward = ~np.isnan(rewards_per_func).all(axis=1)
    return np.where(has_reward, np.nansum(rewards_per_func * weights, axis=1), np.nan)
