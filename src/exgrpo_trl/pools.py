"""What a question sampler may draw from, without some of the questions: those that are gone, and those that rest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from typing import overload

from .records import Experience
from .strategies.samplers import QuestionPool


class PoolWithout:
    """
    A pool without some of its questions. Each of them is looked up; the others are not walked.

    Args:
        pool ([`QuestionPool`]):
            What is stored.
        left_out (`Collection[str]`):
            Ids of the questions that may not be drawn, stored or not.
    """

    def __init__(self, pool: QuestionPool, left_out: Collection[str]) -> None:
        self._pool, self._left_out = pool, left_out

    @property
    def group_size(self) -> int | None:
        """Completions per question at training time."""
        return self._pool.group_size

    @property
    def num_questions(self) -> int:
        """Number of questions that may be drawn."""
        return sum(map(len, self.buckets().values()))

    def buckets(self) -> Mapping[int, Sequence[str]]:
        """Question ids by bucket, in the order of the pool."""
        found = {}
        for bucket, ids in self._pool.buckets().items():
            positions = sorted(ids.index(question_id) for question_id in self._left_out if question_id in ids)
            if len(positions) < len(ids):
                found[bucket] = _Without(ids, positions) if positions else ids
        return found

    def completions(self, question_id: str) -> Sequence[Experience]:
        """Stored completions of a question, oldest first."""
        return self._pool.completions(question_id)


class _Without(Sequence[str]):
    """A sequence of ids without those at some positions, which ascend."""

    def __init__(self, ids: Sequence[str], positions: Sequence[int]) -> None:
        self._ids, self._positions = ids, positions
        # How many ids stay before each position that is left out.
        self._num_before = [position - number for number, position in enumerate(positions)]

    def __len__(self) -> int:
        return len(self._ids) - len(self._positions)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self._ids[index + bisect_right(self._num_before, index)]
