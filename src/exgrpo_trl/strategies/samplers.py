"""Which questions are replayed (paper section 3.1)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..records import Experience
from .base import Strategy


class QuestionPool(Protocol):
    """What a question sampler may look at; [`ExperienceBuffer`] is one."""

    @property
    def group_size(self) -> int | None:
        """Completions per question at training time (K), `None` while nothing has been collected."""

    @property
    def num_questions(self) -> int:
        """Number of stored questions."""

    def buckets(self) -> Mapping[int, Sequence[str]]:
        """Question ids by number of correct completions; non-empty buckets only, keys ascending."""

    def completions(self, question_id: str) -> Sequence[Experience]:
        """Stored completions of a question, oldest first."""


SamplingFunction = Callable[[QuestionPool, int, np.random.Generator], Sequence[str]]
"""What a question sampler is called with, and what it returns."""


class QuestionSampler(Strategy):
    """Draws the questions to replay."""

    @abstractmethod
    def __call__(self, pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> Sequence[str]:
        """
        Draw distinct question ids out of a pool.

        Args:
            pool ([`QuestionPool`]):
                What is stored.
            num_questions (`int`):
                Most questions to draw.
            rng (`numpy.random.Generator`):
                Source of randomness, part of the state of the buffer.
        """


class GaussianSampler(QuestionSampler):
    """
    Sampler of the paper: a bucket's share is a Gaussian of its number of correct completions `s`.

    The weight `exp(-(s - K * bucket_mean)^2 / (2 * bucket_std^2))` belongs to the bucket, however many questions it
    holds. Counts per bucket are multinomial; what does not fit into a bucket is drawn again over the buckets with
    room. Within a bucket every question is equally likely. The standard deviation is in counts, as in the paper's
    code (its text prints `s / K`).

    Args:
        bucket_mean (`float`, *optional*, defaults to `0.5`):
            Centre as a share of the group size, from 0 to 1.
        bucket_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation in correct completions.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(self, bucket_mean: float = 0.5, bucket_std: float = 1.0) -> None:
        if not 0 <= bucket_mean <= 1:
            raise ValueError(f"`bucket_mean` is a share of the group size and must lie in [0, 1], got {bucket_mean}.")
        if not 0 < bucket_std < math.inf:
            raise ValueError(f"`bucket_std` must be positive and finite, got {bucket_std}.")
        self.bucket_mean = bucket_mean
        self.bucket_std = bucket_std

    def __call__(self, pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> list[str]:
        buckets = pool.buckets()
        if not buckets:
            return []
        if pool.group_size is None:
            raise ValueError("The Gaussian over buckets needs the pool's `group_size`, which is None.")
        distances = np.array(list(buckets), dtype=np.float64) - pool.group_size * self.bucket_mean
        # Below this every weight but the nearest bucket's is zero anyway, and the square would overflow.
        std = max(self.bucket_std, 1e-100)
        return _draw(buckets, _allocate(-0.5 * (distances / std) ** 2, buckets, num_questions, rng), rng)


class UniformSampler(QuestionSampler):
    """Gives every non-empty bucket the same weight, however many questions it holds."""

    def __call__(self, pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> list[str]:
        buckets = pool.buckets()
        if not buckets:
            return []
        return _draw(buckets, _allocate(np.zeros(len(buckets)), buckets, num_questions, rng), rng)


class RandomSampler(QuestionSampler):
    """Gives every stored question the same weight."""

    def __call__(self, pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> list[str]:
        buckets = pool.buckets()
        if not buckets:
            return []
        sizes = [len(bucket) for bucket in buckets.values()]
        return _draw(buckets, rng.multivariate_hypergeometric(sizes, min(num_questions, sum(sizes))), rng)


def check_drawn(drawn: Sequence[str], most: int, is_stored: Callable[[str], bool], source: str) -> None:
    """
    Check what was drawn.

    Raises:
        ValueError: if there are too many, repeated or unknown ids; says where they come from.
    """
    if len(drawn) > most:
        raise ValueError(f"{source} returned {len(drawn)} questions, at most {most} were asked for.")
    repeated = sorted({question_id for question_id in drawn if drawn.count(question_id) > 1})
    if repeated:
        raise ValueError(f"{source} returned {repeated} more than once. No question may come twice.")
    for question_id in drawn:
        if not is_stored(question_id):
            raise ValueError(
                f"{source} returned {question_id!r}, which has no stored completion. Return ids of stored questions."
            )


QUESTION_SAMPLERS: dict[str, type[QuestionSampler]] = {
    "gaussian": GaussianSampler,
    "uniform": UniformSampler,
    "random": RandomSampler,
}
"""Built-in question samplers by name."""


def _allocate(
    log_weights: NDArray[np.float64], buckets: Mapping[int, Sequence[str]], total: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Multinomial counts per bucket, none above the bucket's size; the excess is drawn again where there is room."""
    sizes = np.array([len(bucket) for bucket in buckets.values()], dtype=np.int64)
    counts = np.zeros_like(sizes)
    remaining = total = min(total, int(sizes.sum()))
    # Each round that leaves an excess has filled a bucket, so there are at most as many rounds as buckets.
    while remaining > 0:
        room = counts < sizes
        # Relative to the best bucket that is left: when only far ones are, their weights must not all vanish.
        weights = np.where(room, np.exp(np.minimum(log_weights - log_weights[room].max(), 0)), 0)
        counts = np.minimum(counts + rng.multinomial(remaining, weights / weights.sum()), sizes)
        remaining = total - int(counts.sum())
    return counts


def _draw(buckets: Mapping[int, Sequence[str]], counts: NDArray[np.int64], rng: np.random.Generator) -> list[str]:
    """The given number of questions out of each bucket, without replacement, in random order."""
    drawn = [
        bucket[int(index)]
        for bucket, count in zip(buckets.values(), counts, strict=True)
        if count
        for index in rng.choice(len(bucket), size=int(count), replace=False, shuffle=False)
    ]
    # Otherwise the place in the batch would tell the difficulty.
    return [drawn[index] for index in rng.permutation(len(drawn))]
