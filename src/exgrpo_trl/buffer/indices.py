"""Constant-time indices of the experience buffer: questions by bucket, completions by policy version."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import overload

from ..records import Experience


class Bucket(Sequence[str]):
    """Question ids with insertion, removal, membership and indexing in constant time; a removal reorders."""

    __slots__ = ("_ids", "_positions")

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._positions: dict[str, int] = {}

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._ids[index]

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __contains__(self, question_id: object) -> bool:
        return question_id in self._positions

    def index(self, question_id: str, start: int = 0, stop: int | None = None) -> int:
        """
        Position of an id, in constant time.

        Raises:
            ValueError: if it is not there.
        """
        position = self._positions.get(question_id)
        first, end, _ = slice(start, stop).indices(len(self))
        if position is None or not first <= position < end:
            raise ValueError(f"Question {question_id!r} is not in this bucket.")
        return position

    def add(self, question_id: str) -> None:
        """Append an id that is not in the bucket."""
        self._positions[question_id] = len(self._ids)
        self._ids.append(question_id)

    def remove(self, question_id: str) -> None:
        """Remove an id; the last one takes its place."""
        position = self._positions.pop(question_id)
        last = self._ids.pop()
        if last != question_id:
            self._ids[position] = last
            self._positions[last] = position

    def is_consistent(self) -> bool:
        """Whether ids and positions agree."""
        return self._positions == {question_id: position for position, question_id in enumerate(self._ids)}


class BucketView(Sequence[str]):
    """Read-only live view of a bucket."""

    __slots__ = ("_bucket",)

    def __init__(self, bucket: Bucket) -> None:
        self._bucket = bucket

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._bucket[index]

    def __len__(self) -> int:
        return len(self._bucket)

    def __iter__(self) -> Iterator[str]:
        return iter(self._bucket)

    def __contains__(self, question_id: object) -> bool:
        return question_id in self._bucket

    def index(self, question_id: str, start: int = 0, stop: int | None = None) -> int:
        """
        Position of an id, in constant time.

        Raises:
            ValueError: if it is not there.
        """
        return self._bucket.index(question_id, start, stop)

    def __repr__(self) -> str:
        return f"BucketView({len(self)} questions)"


class VersionIndex:
    """Completions by policy version, each with its question; finds one of the oldest version cheaply."""

    __slots__ = ("_heap", "_owners")

    def __init__(self) -> None:
        # A version stays, possibly empty, until it is the oldest: so the keys are exactly the heap's entries.
        self._owners: dict[int, dict[Experience, str]] = {}
        self._heap: list[int] = []

    def __contains__(self, experience: Experience) -> bool:
        return experience in self._owners.get(experience.policy_version, ())

    def __iter__(self) -> Iterator[tuple[Experience, str]]:
        """All completions and their questions, oldest version first."""
        for version in sorted(self._owners):
            yield from self._owners[version].items()

    def add(self, experience: Experience, question_id: str) -> None:
        """Insert a completion that is not in the index."""
        version = experience.policy_version
        if version not in self._owners:
            self._owners[version] = {}
            heapq.heappush(self._heap, version)
        self._owners[version][experience] = question_id

    def remove(self, experience: Experience) -> None:
        """Remove a completion."""
        del self._owners[experience.policy_version][experience]

    def owner(self, experience: Experience) -> str | None:
        """The question of a completion, `None` if it is not in the index."""
        return self._owners.get(experience.policy_version, {}).get(experience)

    def oldest(self) -> int | None:
        """Oldest policy version that still has a completion."""
        while self._heap and not self._owners[self._heap[0]]:
            del self._owners[heapq.heappop(self._heap)]
        return self._heap[0] if self._heap else None

    def latest(self, version: int) -> tuple[Experience, str]:
        """The completion of a version that came last, with its question; the last one, as that is constant time."""
        owners = self._owners[version]
        experience, question_id = owners.popitem()
        owners[experience] = question_id
        return experience, question_id

    def is_consistent(self) -> bool:
        """Whether heap and versions agree."""
        return sorted(self._heap) == sorted(self._owners) and all(
            experience.policy_version == version for version, owners in self._owners.items() for experience in owners
        )
