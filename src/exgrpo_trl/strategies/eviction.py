"""Which stored completion leaves where the buffer, or a question in it, holds more than it may."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from ..records import Experience
from .base import Strategy


class EvictionPool(Protocol):
    """What an eviction rule may look at; [`ExperienceBuffer`] is one."""

    def oldest(self, question_id: str | None = None) -> tuple[str, Experience]:
        """The oldest completion, of a question or at all, with the id of its question."""

    def buckets(self) -> Mapping[int, Sequence[str]]:
        """Question ids by number of correct completions; non-empty buckets only, keys ascending."""

    def completions(self, question_id: str) -> Sequence[Experience]:
        """Stored completions of a question, oldest first."""


EvictionFunction = Callable[[EvictionPool, str | None], tuple[str, Experience]]
"""What an eviction rule is called with, and what it returns."""


class EvictionRule(Strategy):
    """
    Chooses the completion that leaves. Called as long as a limit is exceeded.

    Where a buffer keeps whole groups, the group of that completion leaves.
    """

    @abstractmethod
    def __call__(self, pool: EvictionPool, question_id: str | None) -> tuple[str, Experience]:
        """
        Id of a question, and the completion of it that leaves.

        Args:
            pool ([`EvictionPool`]):
                What is stored.
            question_id (`str` or `None`):
                Question that has too many completions; `None` where the buffer as a whole has.
        """


class Oldest(EvictionRule):
    """The completion that was stored first or, of the whole buffer, one of the oldest policy version."""

    def __call__(self, pool: EvictionPool, question_id: str | None) -> tuple[str, Experience]:
        return pool.oldest(question_id)


EVICTION_RULES: dict[str, type[EvictionRule]] = {"oldest": Oldest}
"""Built-in eviction rules by name."""
