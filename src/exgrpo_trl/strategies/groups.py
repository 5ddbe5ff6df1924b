"""Which stored group of a drawn question is replayed, where whole groups are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np

from ..records import Experience
from .base import Strategy

GroupSelectionFunction = Callable[[Sequence[Sequence[Experience]], np.random.Generator], int]
"""What a group selector is called with, and what it returns."""


class GroupSelector(Strategy):
    """Picks one of the stored groups of a question (`replay_unit="group"`)."""

    @abstractmethod
    def __call__(self, groups: Sequence[Sequence[Experience]], rng: np.random.Generator) -> int:
        """
        Index of the group to replay.

        Args:
            groups (`Sequence[Sequence[Experience]]`):
                Stored groups of one question, oldest first; each has all of its completions, failures included.
            rng (`numpy.random.Generator`):
                Source of randomness, part of the state of the trainer.
        """


class MostRecentGroup(GroupSelector):
    """Group of the newest policy; of several, the one that was stored last (DOTS with rollout replay, 2506.05316)."""

    def __call__(self, groups: Sequence[Sequence[Experience]], rng: np.random.Generator) -> int:
        return max(range(len(groups)), key=lambda index: (groups[index][0].policy_version, index))


class LargestSpread(GroupSelector):
    """Group whose rewards, as they were when it was stored, differ most; of several, the newest."""

    def __call__(self, groups: Sequence[Sequence[Experience]], rng: np.random.Generator) -> int:
        spreads = [float(np.std([experience.reward for experience in group])) for group in groups]
        return max(range(len(groups)), key=lambda index: (spreads[index], groups[index][0].policy_version, index))


class RandomGroup(GroupSelector):
    """Any of the stored groups."""

    def __call__(self, groups: Sequence[Sequence[Experience]], rng: np.random.Generator) -> int:
        return int(rng.integers(len(groups)))


GROUP_SELECTORS: dict[str, type[GroupSelector]] = {
    "most_recent": MostRecentGroup,
    "largest_spread": LargestSpread,
    "random": RandomGroup,
}
"""Built-in group selectors by name."""
