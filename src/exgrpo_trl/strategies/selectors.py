"""Which stored completion of a drawn question is replayed (paper section 3.2)."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence, Sized

import numpy as np

from ..records import Candidate
from .base import Strategy

SelectionFunction = Callable[[Sequence[Candidate], np.random.Generator], int]
"""What a completion selector is called with, and what it returns."""


class CompletionSelector(Strategy):
    """
    Picks one of the stored completions of a question.

    Attributes:
        requires_scores (`bool`):
            Whether it looks at entropy or likelihood under the current policy, so that candidates must be scored.
    """

    requires_scores: bool = True

    @abstractmethod
    def __call__(self, candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
        """
        Index of the completion to replay.

        Args:
            candidates (`Sequence[Candidate]`):
                Stored completions of one question, oldest first.
            rng (`numpy.random.Generator`):
                Source of randomness, part of the state of the trainer.
        """


class LowestEntropy(CompletionSelector):
    """Lowest mean token entropy under the current policy, the paper's choice (section 3.2)."""

    def __call__(self, candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
        return _lowest([_score("entropy", candidate.entropy) for candidate in candidates])


class HighestEntropy(CompletionSelector):
    """Highest mean token entropy under the current policy, an ablation of the paper."""

    def __call__(self, candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
        return _lowest([-_score("entropy", candidate.entropy) for candidate in candidates])


class LowestNegativeLogLikelihood(CompletionSelector):
    """Most likely completion per token under the current policy, the metric of the paper's Algorithm 1."""

    def __call__(self, candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
        return _lowest(
            [_score("negative log-likelihood", candidate.negative_log_likelihood) for candidate in candidates]
        )


class RandomCompletion(CompletionSelector):
    """Any of the stored completions."""

    requires_scores = False

    def __call__(self, candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
        return int(rng.integers(_checked_count(candidates)))


class MostRecent(CompletionSelector):
    """Completion of the newest policy; of several, the one that was stored last."""

    requires_scores = False

    def __call__(self, candidates: Sequence[Candidate], rng: np.random.Generator) -> int:
        newest = range(_checked_count(candidates) - 1, -1, -1)
        return max(newest, key=lambda index: candidates[index].experience.policy_version)


COMPLETION_SELECTORS: dict[str, type[CompletionSelector]] = {
    "lowest_entropy": LowestEntropy,
    "lowest_negative_log_likelihood": LowestNegativeLogLikelihood,
    "highest_entropy": HighestEntropy,
    "random": RandomCompletion,
    "most_recent": MostRecent,
}
"""Built-in completion selectors by name."""


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
