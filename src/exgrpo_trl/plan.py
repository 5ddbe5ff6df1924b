"""What a generation batch replays, and where: the arithmetic of rows before there is a batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .images import referenced
from .records import Candidate, Question, Replay, Reuse


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What a generation batch replays, as the main process tells it to all.

    Args:
        policy_version (`int`):
            Version of the policy that generates the batch.
        is_started (`bool`):
            Whether replay has started: before, only solved questions are of interest.
        replays (`tuple[Replay, ...]`):
            What is replayed, ascending by row.
        has_images (`bool`, *optional*, defaults to `False`):
            Whether images belong to it, which are sent apart.
    """

    policy_version: int
    is_started: bool
    replays: tuple[Replay, ...] = ()
    has_images: bool = False

    def without_images(self) -> Plan:
        """The plan with references in the place of images."""
        replays = tuple(map(_without_images, self.replays))
        is_same = all(bare is replay for bare, replay in zip(replays, self.replays, strict=True))
        return self if is_same else replace(self, replays=replays, has_images=True)


@dataclass(frozen=True, slots=True)
class Choice:
    """
    Why a stored completion is replayed, as the main process saw it when it chose.

    Args:
        chosen ([`Candidate`]):
            The completion, with the scores that it was chosen by.
        competitors (`tuple[Candidate, ...]`):
            What it was chosen from besides: the other candidates, or the first completion of each other group. Empty
            where there was no choice.
        bucket (`int` or `None`):
            Bucket of its question; `None` where the buffer has it in none.
        reuse ([`Reuse`] or `None`):
            How it was used before; `None` where the buffer does not know.
    """

    chosen: Candidate
    competitors: tuple[Candidate, ...]
    bucket: int | None
    reuse: Reuse | None


def _without_images(replay: Replay) -> Replay:
    example, details = referenced(replay.question.example), replay.experience.details
    if example is not replay.question.example:
        replay = replace(replay, question=Question(replay.question.question_id, example))
    if details is not None and details.images:
        bare = replace(replay.experience, details=replace(details, images=()))
        replay = replace(replay, experience=bare)
    return replay


def plan_rows(num_groups: int, group_size: int, num_replayed: int, rng: np.random.Generator) -> list[int]:
    """
    Rows of a generation batch that stored completions take, each in a group of its own: one of each replayed question.

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


def rows_of_group(row: int, group_size: int, num_stored: int) -> list[int]:
    """That row and others of its group, as far apart as can be: the processes that share a group share them, too."""
    group, slot = divmod(row, group_size)
    return [group * group_size + (slot + i * group_size // num_stored) % group_size for i in range(num_stored)]


def spare(
    rows: Sequence[int],
    num_groups: int,
    group_size: int,
    unseen: Collection[int],
    num_together: int | None = None,
) -> list[int]:
    """
    Rows for stored completions, in other groups where they would displace a question that was never generated.

    A row stays among `num_together` groups: the first as many, or the next. By default among all.
    """
    num_together = num_together or num_groups
    taken = {row // group_size for row in rows}
    others = [group for group in range(num_groups) if group not in taken and group not in unseen]
    spared = []
    for row in rows:
        group, slot = divmod(row, group_size)
        if group in unseen:
            near = [other for other in others if other // num_together == group // num_together]
            if near:
                group = near[0]
                others.remove(group)
        spared.append(group * group_size + slot)
    return sorted(spared)
