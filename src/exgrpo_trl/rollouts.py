"""A generation batch between its generation and its collection: groups, rewards, log-probabilities as they arrive."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .experience import Experience, Question


@dataclass(frozen=True, slots=True)
class Replay:
    """One replayed question of a generation batch.

    Attributes:
        question (`Question`):
            The question.
        experience (`Experience`):
            The stored completion that takes the first slot of the group.
        group (`int`):
            Index of the group in the generation batch.
        entropy (`float` or `None`):
            Mean token entropy of the completion under the current policy, nats; `None` when not scored.
    """

    question: Question
    experience: Experience
    group: int
    entropy: float | None = None


@dataclass(frozen=True, slots=True)
class CollectedGroup:
    """What a group adds to the buffer: the arguments of `ExperienceBuffer.collect`."""

    question: Question
    experiences: list[Experience]
    num_correct: int
    bucket: int
    is_solved: bool


@dataclass
class PendingBatch:
    """
    Rollouts of a generation batch that wait for their log-probabilities under the policy that generated them.

    Args:
        questions (`list[Question]`):
            One question per group, in batch order.
        replays (`dict[int, Replay]`):
            Replayed questions by group; their first rollout is the stored one.
        rewards (`np.ndarray`):
            Success rewards, shape `(num_groups, num_generations)`, NaN where no reward function scored.
        is_correct (`np.ndarray`):
            Whether the reward reaches the threshold, same shape.
        is_storable (`np.ndarray`):
            Fresh rollouts that enter the buffer if their group does, same shape.
        token_ids (`list[list[int]]`):
            Completion token ids, one per row.
        policy_version (`int`):
            Optimizer steps taken when the rollouts were generated.
        difficulty (`str`):
            `"success_rate"` or `"reward_std"`.
    """

    questions: list[Question]
    replays: dict[int, Replay]
    rewards: np.ndarray
    is_correct: np.ndarray
    is_storable: np.ndarray
    token_ids: list[list[int]]
    policy_version: int
    difficulty: str
    _logps: dict[int, np.ndarray] = field(default_factory=dict)
    _entropies: dict[int, float] = field(default_factory=dict)

    @property
    def is_fresh(self) -> np.ndarray:
        """Which rollouts were generated in this batch, shape `(num_groups, num_generations)`."""
        is_fresh = np.ones_like(self.is_correct)
        is_fresh[list(self.replays), 0] = False
        return is_fresh

    def wants(self, row: int) -> bool:
        """Whether the log-probabilities of a row are still to be recorded."""
        return row not in self._logps and bool(self.is_storable.flat[row])

    def record(self, row: int, logps: np.ndarray, entropy: float) -> None:
        """Record per-token log-probabilities, shape `(num_tokens,)`, and the mean token entropy of a row, in nats."""
        self._logps[row] = logps
        self._entropies[row] = entropy

    def still_counts(self, group: int) -> bool:
        """Whether the stored completion of a replayed group would be stored again."""
        if self.difficulty == "reward_std":
            return bool(stands_out(self.rewards)[group, 0])
        return bool(self.is_correct[group, 0])

    def groups(self) -> list[CollectedGroup]:
        """The groups in batch order, with their storable rollouts whose log-probabilities are known."""
        group_size = self.rewards.shape[1]
        by_spread = self.difficulty == "reward_std"
        buckets = reward_std_buckets(self.rewards) if by_spread else self.is_correct.sum(axis=1).tolist()
        collected = []
        for group, question in enumerate(self.questions):
            rows = group * group_size + np.flatnonzero(self.is_storable[group])
            experiences = [self._experience(row) for row in rows.tolist() if row in self._logps]
            is_solved = bool(self.is_correct[group].all())
            num_correct = int(self.is_correct[group].sum())
            if by_spread and not is_solved:
                # Continuous rewards: what counts is that something stands out of its group (paper, section 5.3).
                num_correct = len(rows)
            collected.append(CollectedGroup(question, experiences, num_correct, buckets[group], is_solved))
        return collected

    def _experience(self, row: int) -> Experience:
        return Experience.create(
            self.token_ids[row],
            self._logps[row],
            policy_version=self.policy_version,
            reward=float(self.rewards.flat[row]),
            entropy=self._entropies[row],
        )


def success_rewards(rewards_per_func: np.ndarray, weights: np.ndarray, index: int | None) -> np.ndarray:
    """
    Reward that decides whether a completion is correct.

    Args:
        rewards_per_func (`np.ndarray`):
            Rewards, shape `(N, num_reward_funcs)`, NaN where a function returned None.
        weights (`np.ndarray`):
            Weights of the functions, shape `(num_reward_funcs,)`.
        index (`int` or `None`):
            Function that decides. `None` takes the weighted sum.

    Returns:
        `np.ndarray`:
            Shape `(N,)`, NaN where no function that counts has scored.
    """
    if index is not None:
        return rewards_per_func[:, index]
    is_scored = ~np.isnan(rewards_per_func).all(axis=1)
    return np.where(is_scored, np.nansum(rewards_per_func * weights, axis=1), np.nan)


def reaches(rewards: np.ndarray, threshold: float) -> np.ndarray:
    """
    Which rewards are at least the threshold; NaN is not.

    TRL keeps rewards in float32, where 0.9 is a little less than 0.9: a relative difference of 1e-6 is no difference.
    """
    return np.asarray(rewards >= threshold - 1e-6 * max(1.0, abs(threshold)))


def stands_out(rewards: np.ndarray) -> np.ndarray:
    """Which rollouts have a positive advantage in their group, shape `(num_groups, num_generations)`; NaN has none."""
    num_scored = np.maximum((~np.isnan(rewards)).sum(axis=1, keepdims=True), 1)
    means = np.nansum(rewards, axis=1, keepdims=True) / num_scored
    # Equal rewards differ from their mean by rounding only.
    return np.asarray(rewards > means + 1e-6 * np.maximum(1.0, np.abs(means)))


def reward_std_buckets(rewards: np.ndarray) -> list[int]:
    """
    Bucket of each question from the standard deviation of its rewards (paper, section 5.3).

    Args:
        rewards (`np.ndarray`):
            Rewards, shape `(num_groups, num_generations)`; NaN where no reward function scored.

    Returns:
        `list[int]`:
            `round(K (sigma_q - min) / (max - min))` per group, minimum and maximum over the batch; 0 when all spreads
            are equal.
    """
    rewards = np.where(np.isfinite(rewards), rewards, np.nan)
    is_scored = ~np.isnan(rewards).all(axis=1)
    stds = np.zeros(len(rewards))
    stds[is_scored] = np.nanstd(rewards[is_scored], axis=1)
    spread = max(float(stds.max() - stds.min()), 1e-8)
    return np.rint(rewards.shape[1] * (stds - stds.min()) / spread).astype(int).tolist()


def plan_groups(num_groups: int, num_replayed: int, rng: np.random.Generator) -> Sequence[int]:
    """
    Groups of a generation batch that are given to replayed questions.

    Drawn at random, so that an unshuffled dataset does not lose the same questions on every pass.

    Args:
        num_groups (`int`):
            Groups in the batch.
        num_replayed (`int`):
            Groups to replay.
        rng (`np.random.Generator`):
            Source of randomness.

    Returns:
        `Sequence[int]`:
            Ascending group indices.
    """
    return sorted(rng.choice(num_groups, num_replayed, replace=False).tolist())
