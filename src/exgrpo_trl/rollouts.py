"""A generation batch between its generation and its collection: groups, rewards, log-probabilities as they arrive."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .experience import Experience, Question


@dataclass(frozen=True, slots=True)
class Replay:
    """One replayed question of a generation batch.

    Attributes:
        question (`Question`):
            The question.
        experience (`Experience`):
            The stored completion.
        row (`int`):
            Row of the generation batch that the stored completion takes.
        entropy (`float` or `None`):
            Mean token entropy of the completion under the current policy, nats; `None` when not scored.
    """

    question: Question
    experience: Experience
    row: int
    entropy: float | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """Questions by group and completions by row of a generation batch: what processes tell each other."""

    questions: dict[int, Question] = field(default_factory=dict)
    experiences: dict[int, Experience] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a generation batch replays.

    Attributes:
        rows (`frozenset[int]`):
            Rows of the whole batch that stored completions take.
        share ([`Records`]):
            Replayed questions of the groups that have rows on this process, and the stored completions of its rows.
    """

    rows: frozenset[int] = frozenset()
    share: Records = field(default_factory=Records)


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

    Rewards are known to every process; questions and tokens are those of this process alone.

    Args:
        questions (`dict[int, Question]`):
            Questions by group, of the dataset groups whose first row belongs to this process.
        token_ids (`dict[int, list[int]]`):
            Completion token ids by row, of the fresh rollouts of this process that may be stored.
        rewards (`np.ndarray`):
            Success rewards of the whole batch, shape `(num_groups, num_generations)`, NaN where no reward function
            scored.
        success_threshold (`float`):
            Reward from which a rollout is correct.
        policy_version (`int`):
            Optimizer steps taken when the rollouts were generated.
        difficulty (`str`):
            `"success_rate"` or `"reward_std"`.
    """

    questions: dict[int, Question]
    token_ids: dict[int, list[int]]
    rewards: np.ndarray
    success_threshold: float
    policy_version: int
    difficulty: str
    experiences: dict[int, Experience] = field(default_factory=dict)

    @cached_property
    def is_correct(self) -> np.ndarray:
        """Which rollouts reach the threshold, shape `(num_groups, num_generations)`."""
        return reaches(self.rewards, self.success_threshold)

    @cached_property
    def counts(self) -> np.ndarray:
        """Which rollouts are worth storing, shape `(num_groups, num_generations)`."""
        return worth_storing(self.rewards, self.success_threshold, self.difficulty)

    @cached_property
    def is_solved(self) -> np.ndarray:
        """Which groups have correct rollouts only, shape `(num_groups,)`."""
        return np.asarray(self.is_correct.all(axis=1))

    @cached_property
    def has_success(self) -> np.ndarray:
        """Which groups hold a rollout worth storing, or are solved, shape `(num_groups,)`."""
        return np.asarray(self.counts.any(axis=1) | self.is_solved)

    def wants(self, row: int) -> bool:
        """Whether the log-probabilities of a row are still to be recorded."""
        is_storable = self.counts.flat[row] and np.isfinite(self.rewards.flat[row])
        return bool(is_storable) and row in self.token_ids and row not in self.experiences

    def record(self, row: int, logps: np.ndarray, entropy: float) -> None:
        """Record per-token log-probabilities, shape `(num_tokens,)`, and the mean token entropy of a row, in nats."""
        self.experiences[row] = Experience.create(
            self.token_ids[row],
            logps,
            policy_version=self.policy_version,
            reward=float(self.rewards.flat[row]),
            entropy=entropy,
        )

    def records(self, is_started: bool) -> Records:
        """What this process knows that the buffer needs; before replay has started, which questions are solved."""
        is_needed = self.has_success if is_started else self.is_solved
        return Records(
            {group: question for group, question in self.questions.items() if is_needed[group]},
            self.experiences if is_started else {},
        )

    def groups(self, records: Records, is_fresh: np.ndarray) -> Iterator[CollectedGroup]:
        """
        The groups that had a success, in batch order.

        Args:
            records (`Records`):
                What all processes know.
            is_fresh (`np.ndarray`):
                Which rollouts were generated in this batch, shape `(num_groups, num_generations)`.
        """
        group_size = self.rewards.shape[1]
        by_spread = self.difficulty == "reward_std"
        buckets = reward_std_buckets(self.rewards) if by_spread else self.is_correct.sum(axis=1).tolist()
        for group, question in sorted(records.questions.items()):
            rows = range(group * group_size, (group + 1) * group_size)
            is_solved = bool(self.is_solved[group])
            # Continuous rewards: what counts is that something stands out of its group (paper, section 5.3).
            is_success = self.is_correct if is_solved or not by_spread else self.counts & is_fresh
            yield CollectedGroup(
                question,
                [records.experiences[row] for row in rows if row in records.experiences],
                int(is_success[group].sum()),
                buckets[group],
                is_solved,
            )


def fresh_rollouts(replays: Sequence[Replay], shape: tuple[int, int]) -> np.ndarray:
    """
    Which rollouts were generated.

    Args:
        replays (`Sequence[Replay]`):
            Replays of the whole batch.
        shape (`tuple[int, int]`):
            Groups, and rollouts in a group.

    Returns:
        `np.ndarray`:
            Booleans of that shape.
    """
    is_fresh = np.ones(shape, dtype=bool)
    is_fresh.flat[[replay.row for replay in replays]] = False
    return is_fresh


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


def worth_storing(rewards: np.ndarray, threshold: float, difficulty: str) -> np.ndarray:
    """Which rollouts would be stored if they were fresh, shape `(num_groups, num_generations)`."""
    return stands_out(rewards) if difficulty == "reward_std" else reaches(rewards, threshold)


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


def plan_rows(num_groups: int, group_size: int, num_replayed: int, rng: np.random.Generator) -> list[int]:
    """
    Rows of a generation batch that stored completions take, each in a group of its own.

    Evenly spaced from a random start: every group is as likely as any other, so that an unshuffled dataset does not
    lose the same questions on every pass, and however many processes share the batch, each gets its share of stored
    completions (or one more), without the plan depending on their number.

    Args:
        num_groups (`int`):
            Groups in the batch.
        group_size (`int`):
            Rows of a group.
        num_replayed (`int`):
            Groups to replay, at most `num_groups`.
        rng (`np.random.Generator`):
            Source of randomness.

    Returns:
        `list[int]`:
            Ascending rows.
    """
    num_rows = num_groups * group_size
    start = int(rng.integers(num_rows))
    return [(i * num_rows + start) // num_replayed for i in range(num_replayed)]
