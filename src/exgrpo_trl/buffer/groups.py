"""Groups that a buffer with `unit="group"` keeps whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TypeVar

from ..records import Experience
from .settings import COMPLETION, GROUP

T = TypeVar("T")


def check_whole(experiences: Sequence[Experience], group_size: int) -> None:
    """
    Check that a group is there as a whole, or not at all.

    Raises:
        ValueError: if it is there in part.
    """
    if len(experiences) not in (0, group_size):
        raise ValueError(
            f"A buffer with unit={GROUP!r} takes all {group_size} completions of a group, failures included, got "
            f"{len(experiences)}. Pass them all, or none to move a stored question to its new bucket alone."
        )


def whole_groups(
    rows: Iterable[T], group_of: Callable[[T], tuple[str, int | None]], group_size: int
) -> Iterator[list[T]]:
    """
    Put rows together that follow each other and are of one group.

    Args:
        rows (`Iterable`):
            Rows, group after group.
        group_of (`Callable`):
            Question id and number of the group of a row.
        group_size (`int`):
            Rows of each group.

    Raises:
        ValueError: if a row has no group, or a group another number of rows.
    """
    for (question_id, number), run in groupby(rows, group_of):
        if number is None:
            raise ValueError(
                f"A completion of question {question_id!r} has no `group`, but whole groups are read. Read single "
                f"completions with unit={COMPLETION!r}."
            )
        group = list(run)
        if len(group) != group_size:
            raise ValueError(
                f"Group {number} of question {question_id!r} has {len(group)} rows that follow each other, expected "
                f"{group_size}. Groups must stay whole and in one piece."
            )
        yield group
