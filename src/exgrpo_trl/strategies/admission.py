"""What is stored of a group, in which bucket its question goes, and when it retires."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .base import Strategy


@dataclass(frozen=True, slots=True)
class Admission:
    """
    What a generation batch may add to the buffer.

    Args:
        is_worth_storing (`np.ndarray`):
            Which rollouts would be stored if they were fresh, booleans of shape `(num_groups, group_size)`. A replayed
            completion that is not leaves the buffer.
        num_successes (`np.ndarray`):
            Successes of each group, shape `(num_groups,)`; nothing changes for a question that has none.
        buckets (`np.ndarray`):
            Bucket of each question, integers from 0 to `group_size`, shape `(num_groups,)`.
        is_solved (`np.ndarray`):
            Which questions retire, booleans of shape `(num_groups,)`.

    Raises:
        ValueError: if a shape is another one, or a bucket is out of range.
    """

    is_worth_storing: np.ndarray
    num_successes: np.ndarray
    buckets: np.ndarray
    is_solved: np.ndarray

    def __post_init__(self) -> None:
        shape = np.shape(self.is_worth_storing)
        of_groups = [np.shape(of_group) for of_group in (self.num_successes, self.buckets, self.is_solved)]
        if len(shape) != 2 or of_groups != [shape[:1]] * 3:
            raise ValueError(
                f"An Admission has shapes {shape} and {of_groups}. `is_worth_storing` must have the shape "
                "(num_groups, group_size) of the rewards, and the others (num_groups,)."
            )
        if not ((np.asarray(self.buckets) >= 0) & (np.asarray(self.buckets) <= shape[1])).all():
            raise ValueError(f"The buckets of an Admission must lie in 0..{shape[1]}, got {self.buckets}.")

    @property
    def concerns_buffer(self) -> np.ndarray:
        """Which groups hold a rollout worth storing, or are solved, shape `(num_groups,)`."""
        return np.asarray(self.is_worth_storing.any(axis=1) | self.is_solved)


AdmissionFunction = Callable[[np.ndarray, np.ndarray, np.ndarray], Admission]
"""What an admission rule is called with, and what it returns."""


class AdmissionRule(Strategy):
    """
    Decides what of a generation batch is stored, in which bucket its questions go, and which of them retire.

    Attributes:
        requires_success (`bool`):
            Whether nothing is stored without correct completions, so that their absence deserves a warning.
    """

    requires_success: bool = True

    @abstractmethod
    def __call__(self, rewards: np.ndarray, is_correct: np.ndarray, is_fresh: np.ndarray) -> Admission:
        """
        What a batch may add to the buffer.

        Args:
            rewards (`np.ndarray`):
                Success rewards, shape `(num_groups, group_size)`; NaN where no reward function gave one.
            is_correct (`np.ndarray`):
                Which of them reach `success_threshold`, same shape.
            is_fresh (`np.ndarray`):
                Which rollouts were generated in this batch; the others were replayed. Same shape.
        """


class SuccessRate(AdmissionRule):
    """
    The paper's rule: correct completions are stored, the bucket is their number, all of them solve the question.

    Stored completions were correct once: where there are several in a group, they count as the one of the paper, and
    the share of correct fresh ones for all others.
    """

    def __call__(self, rewards: np.ndarray, is_correct: np.ndarray, is_fresh: np.ndarray) -> Admission:
        num_correct = is_correct.sum(axis=1)
        group_size, num_fresh = is_correct.shape[1], is_fresh.sum(axis=1)
        buckets = num_correct
        if num_fresh.min() < group_size - 1:
            fresh_rate = (is_correct & is_fresh).sum(axis=1) / np.maximum(num_fresh, 1)
            has_stored_success = (is_correct & ~is_fresh).any(axis=1)
            as_with_one = has_stored_success + np.rint((group_size - 1) * fresh_rate).astype(int)
            buckets = np.where(num_fresh < group_size - 1, as_with_one, num_correct)
        return Admission(is_correct, num_correct, buckets, num_correct == group_size)


class RewardSpread(AdmissionRule):
    """For continuous rewards: what stands out of its group is stored, the bucket is the spread (paper section 5.3)."""

    requires_success = False

    def __call__(self, rewards: np.ndarray, is_correct: np.ndarray, is_fresh: np.ndarray) -> Admission:
        is_above_mean = stands_out(rewards)
        is_solved = np.all(is_correct, axis=1)
        num_successes = np.where(is_solved, rewards.shape[1], (is_above_mean & is_fresh).sum(axis=1))
        return Admission(is_above_mean, num_successes, reward_std_buckets(rewards), is_solved)


ADMISSION_RULES: dict[str, type[AdmissionRule]] = {"success_rate": SuccessRate, "reward_std": RewardSpread}
"""Built-in admission rules by name."""


def stands_out(rewards: np.ndarray) -> np.ndarray:
    """Which rollouts have a positive advantage in their group, shape `(num_groups, num_generations)`; NaN has none."""
    num_rewards = np.maximum((~np.isnan(rewards)).sum(axis=1, keepdims=True), 1)
    means = np.nansum(rewards, axis=1, keepdims=True) / num_rewards
    # Equal rewards differ from their mean by rounding only.
    return np.asarray(rewards > means + 1e-6 * np.maximum(1.0, np.abs(means)))


def reward_std_buckets(rewards: np.ndarray) -> np.ndarray:
    """
    Bucket of each question from the standard deviation of its rewards (paper, section 5.3).

    Args:
        rewards (`np.ndarray`):
            Rewards, shape `(num_groups, num_generations)`; NaN where no reward function gave one.

    Returns:
        `np.ndarray`:
            `round(K (sigma_q - min) / (max - min))` per group, minimum and maximum over the batch; 0 when all spreads
            are equal.
    """
    rewards = np.where(np.isfinite(rewards), rewards, np.nan)
    has_reward = ~np.isnan(rewards).all(axis=1)
    stds = np.zeros(len(rewards))
    stds[has_reward] = np.nanstd(rewards[has_reward], axis=1)
    spread = max(float(stds.max() - stds.min()), 1e-8)
    return np.rint(rewards.shape[1] * (stds - stds.min()) / spread).astype(int)
