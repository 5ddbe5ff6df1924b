"""What a buffer holds of a question: completions one by one, or whole groups."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from ..records import Experience, Question


@dataclass(slots=True)
class StoredQuestion(ABC):
    """A question with its bucket and its completions."""

    question: Question
    bucket: int

    @abstractmethod
    def __len__(self) -> int:
        """Number of completions."""

    @abstractmethod
    def __iter__(self) -> Iterator[Experience]:
        """All completions, oldest first."""

    @abstractmethod
    def new_among(self, experiences: Sequence[Experience]) -> Sequence[Experience]:
        """Those completions that are not stored yet, as far as they can be stored."""

    @abstractmethod
    def add(self, experiences: Sequence[Experience]) -> None:
        """Store completions that [`~StoredQuestion.new_among`] returned."""

    @abstractmethod
    def find(self, experience: Experience) -> Experience | None:
        """This very completion if it is stored, else the oldest with the same tokens."""

    @abstractmethod
    def remove(self, experience: Experience) -> Sequence[Experience]:
        """Remove a stored completion with what belongs to it; returns all that left."""

    @abstractmethod
    def is_consistent(self) -> bool:
        """Whether everything is stored under its own tokens, and once."""


@dataclass(slots=True)
class StoredCompletions(StoredQuestion):
    """A question whose completions come and go one by one."""

    # By token ids, oldest first: the key finds duplicates.
    completions: dict[bytes, Experience] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.completions)

    def __iter__(self) -> Iterator[Experience]:
        return iter(self.completions.values())

    def new_among(self, experiences: Sequence[Experience]) -> list[Experience]:
        new: dict[bytes, Experience] = {}
        for experience in experiences:
            tokens = experience.token_bytes
            if tokens not in self.completions and tokens not in new:
                new[tokens] = experience
        return list(new.values())

    def add(self, experiences: Sequence[Experience]) -> None:
        for experience in experiences:
            self.completions[experience.token_bytes] = experience

    def find(self, experience: Experience) -> Experience | None:
        return self.completions.get(experience.token_bytes)

    def remove(self, experience: Experience) -> tuple[Experience]:
        return (self.completions.pop(experience.token_bytes),)

    def is_consistent(self) -> bool:
        return all(tokens == experience.token_bytes for tokens, experience in self.completions.items())


@dataclass(slots=True)
class StoredGroups(StoredQuestion):
    """A question whose groups come and go whole. What is looked up walks the groups of the question."""

    # By the token ids of their completions, oldest first: the key finds duplicates.
    groups: dict[tuple[bytes, ...], tuple[Experience, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.groups.values()))

    def __iter__(self) -> Iterator[Experience]:
        return chain.from_iterable(self.groups.values())

    def new_among(self, experiences: Sequence[Experience]) -> Sequence[Experience]:
        return () if _tokens_of(experiences) in self.groups else experiences

    def add(self, experiences: Sequence[Experience]) -> None:
        if experiences:
            self.groups[_tokens_of(experiences)] = tuple(experiences)

    def find(self, experience: Experience) -> Experience | None:
        same = [own for own in self if own.token_bytes == experience.token_bytes]
        return experience if experience in same else next(iter(same), None)

    def remove(self, experience: Experience) -> tuple[Experience, ...]:
        return self.groups.pop(next(tokens for tokens, group in self.groups.items() if experience in group))

    def is_consistent(self) -> bool:
        is_keyed = all(tokens == _tokens_of(group) for tokens, group in self.groups.items())
        return is_keyed and len(set(self)) == len(self)


def _tokens_of(experiences: Sequence[Experience]) -> tuple[bytes, ...]:
    return tuple(experience.token_bytes for experience in experiences)
