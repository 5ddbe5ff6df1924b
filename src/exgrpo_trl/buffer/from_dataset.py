"""Buffers from datasets of stored completions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .as_dataset import ImportedRow, check_is_dataset, completions_from_dataset, provenance_from_dataset
from .boundary import reading_dataset
from .groups import whole_groups
from .settings import GROUP, checked_count

if TYPE_CHECKING:
    from datasets import Dataset

    from .buffer import ExperienceBuffer


def fill_from_dataset(buffer: ExperienceBuffer, dataset: Dataset, group_size: int) -> None:
    """
    Put the completions of a dataset into an empty buffer, without a look at its limits; provenance included.

    Args:
        buffer ([`ExperienceBuffer`]):
            What is filled.
        dataset (`datasets.Dataset`):
            Dataset with the columns of [`completions_to_dataset`].
        group_size (`int`):
            Completions per question at training time (K).

    Raises:
        TypeError: if it is not a dataset.
        ExperienceBufferError: if a column is missing or holds something else, a number is out of range, or a group is
            not whole.
    """
    check_is_dataset(dataset)
    with reading_dataset():
        _fill(buffer, dataset, group_size)


def _fill(buffer: ExperienceBuffer, dataset: Dataset, group_size: int) -> None:
    for rows in _stored_together(completions_from_dataset(dataset), buffer.unit, group_size):
        question, bucket = rows[-1].question, checked_count("bucket", rows[-1].bucket, group_size)
        buffer._check_prompt(question)
        reuse = {row.experience: row.reuse for row in rows if row.reuse is not None}
        _, num_duplicates = buffer._store.insert(question, [row.experience for row in rows], bucket, reuse)
        buffer.num_duplicates += num_duplicates
    buffer.provenance = provenance_from_dataset(dataset)


def _stored_together(rows: Iterable[ImportedRow], unit: str, group_size: int) -> Iterator[list[ImportedRow]]:
    if unit == GROUP:
        yield from whole_groups(rows, lambda row: (row.question.question_id, row.group), group_size)
        return
    for row in rows:
        if row.group is not None:
            raise ValueError(
                f"The dataset holds whole groups, failures included. Pass unit={GROUP!r} to "
                "ExperienceBuffer.from_dataset."
            )
        yield [row]
