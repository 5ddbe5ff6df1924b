"""Which questions are replayed and with which of their stored completions (paper sections 3.1 and 3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .experience import Candidate, Experience


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


QuestionSampler = Callable[[QuestionPool, int, np.random.Generator], Sequence[str]]
"""Draws at most that many distinct question ids out of a pool."""

CompletionSelector = Callable[[Sequence[Candidate], np.random.Generator], int]
"""Index of the completion to replay among the candidates of one question."""


def gaussian_sampler(bucket_mean: float = 0.5, bucket_std: float = 1.0) -> QuestionSampler:
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
    if not 0 <= bucket_mean <= 1:
        raise ValueError(f"`bucket_mean` is a share of the group size and must lie in [0, 1], got {bucket_mean}.")
    if not 0 < bucket_std < math.inf:
        raise ValueError(f"`bucket_std` must be positive and finite, got {bucket_std}.")
    # Below this every weight but the nearest bucket's is zero anyway, and the square below would overflow.
    std = max(bucket_std, 1e-100)

    def sample(pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> list[str]:
        buckets = pool.buckets()
        if not buckets:
            return []
        if pool.group_size is None:
            raise ValueError("The Gaussian over buckets needs the pool's `group_size`, which is None.")
        distances = np.array(list(buckets), dtype=np.float64) - pool.group_size * bucket_mean
        return _draw(buckets, _allocate(-0.5 * (distances / std) ** 2, buckets, num_questions, rng), rng)

    return sample


def uniform_sampler(pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> list[str]:
    """Sampler that gives every non-empty bucket the same weight, however many questions it holds."""
    buckets = pool.buckets()
    return _draw(buckets, _allocate(np.zeros(len(buckets)), buckets, num_questions, rng), rng) if buckets else []


def random_sampler(pool: QuestionPool, num_questions: int, rng: np.random.Generator) -> list[str]:
    """Sampler that gives every stored question the same weight."""
    buckets = pool.buckets()
    if not buckets:
        return []
    sizes = [len(bucket) for bucket in buckets.values()]
    return _draw(buckets, rng.multivariate_hypergeometric(sizes, min(num_questions, sum(sizes))), rng)


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


QUESTION_SAMPLERS: dict[str, QuestionSampler] = {
    "gaussian": gaussian_sampler(),
    "uniform": uniform_sampler,
    "random": random_sampler,
}
"""Built-in question samplers by name, the Gaussian one with the paper's settings."""


def make_question_sampler(name: str, *, bucket_mean: float = 0.5, bucket_std: float = 1.0) -> QuestionSampler:
    """
    Built-in question sampler of that name.

    Args:
        name (`str`):
            `"gaussian"`, `"uniform"` or `"random"`.
        bucket_mean (`float`, *optional*, defaults to `0.5`):
            See [`gaussian_sampler`]; the other samplers do not use it.
        bucket_std (`float`, *optional*, defaults to `1.0`):
            See [`gaussian_sampler`]; the other samplers do not use it.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in QUESTION_SAMPLERS:
        raise ValueError(f"Unknown question sampler {name!r}; the known ones are {', '.join(QUESTION_SAMPLERS)}.")
    return gaussian_sampler(bucket_mean, bucket_std) if name == "gaussian" else QUESTION_SAMPLERS[name]


def without_scores(selector: CompletionSelector) -> CompletionSelector:
    """Mark a completion selector that does not look at scores, so that candidates are not scored for it."""
    setattr(selector, "requires_scores", False)  # noqa: B010 - a plain assignment does not type-check
    return selector


def requires_scores(selector: CompletionSelector) -> bool:
    """Whether the candidates must be scored under the current policy for this selector."""
    return bool(getattr(selector, "requires_scores", True))


def lowest_entropy(candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
    """Lowest mean token entropy under the current policy, the paper's choice (section 3.2)."""
    return _lowest([_score("entropy", candidate.entropy) for candidate in candidates])


def highest_entropy(candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
    """Highest mean token entropy under the current policy, an ablation of the paper."""
    return _lowest([-_score("entropy", candidate.entropy) for candidate in candidates])


def lowest_negative_log_likelihood(candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
    """Most likely completion per token under the current policy, the metric of the paper's Algorithm 1."""
    return _lowest([_score("negative log-likelihood", candidate.negative_log_likelihood) for candidate in candidates])


@without_scores
def random_completion(candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
    """Any of the stored completions."""
    return int(rng.integers(_checked_count(candidates)))


@without_scores
def most_recent(candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
    """Completion of the newest policy; of several, the one that was stored last."""
    newest = range(_checked_count(candidates) - 1, -1, -1)
    return max(newest, key=lambda index: candidates[index].experience.policy_version)


COMPLETION_SELECTORS: dict[str, CompletionSelector] = {
    "lowest_entropy": lowest_entropy,
    "lowest_negative_log_likelihood": lowest_negative_log_likelihood,
    "highest_entropy": highest_entropy,
    "random": random_completion,
    "most_recent": most_recent,
}
"""Built-in completion selectors by name."""


def get_completion_selector(name: str) -> CompletionSelector:
    """
    Built-in completion selector of that name.

    Args:
        name (`str`):
            A key of `COMPLETION_SELECTORS`.

    Raises:
        ValueError: if the name is unknown.
    """
    if name not in COMPLETION_SELECTORS:
        raise ValueError(
            f"Unknown completion selector {name!r}; the known ones are {', '.join(COMPLETION_SELECTORS)}."
        )
    return COMPLETION_SELECTORS[name]


def _checked_count(candidates: Sized) -> int:
    if not len(candidates):
        raise ValueError("A completion cannot be selected out of an empty list of candidates.")
    return len(candidates)


def _score(name: str, value: float | None) -> float:
    if value is None:
        raise ValueError(
            f"The candidates have no {name}: score them first, or choose a selector that needs no scores."
        )
    return value


def _lowest(scores: Sequence[float]) -> int:
    _checked_count(scores)
    # NaN never wins; without this, whether it does would depend on its place in the list.
    return min(range(len(scores)), key=lambda index: (math.isnan(scores[index]), scores[index]))
