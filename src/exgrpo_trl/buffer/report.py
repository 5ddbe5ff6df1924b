"""What became of a user's rows: which were stored, and why the others were not."""

from __future__ import annotations

from typing import NamedTuple

_MOST_SHOWN = 20


class RefusedRow(NamedTuple):
    """
    A row of a dataset that was not taken.

    Attributes:
        row (`int`):
            Its number, from 0.
        reason (`str`):
            What is wrong with it.
    """

    row: int
    reason: str


class ExperienceReport(NamedTuple):
    """
    What became of the rows of a dataset. `str(report)` lists the first refused ones.

    Attributes:
        num_rows (`int`):
            Rows of the dataset.
        num_stored (`int`):
            Rows that were stored.
        num_scored (`int`):
            Of these, the ones that the present policy gave log-probabilities.
        num_questions (`int`):
            Questions that the stored rows answer.
        num_evicted (`int`):
            Completions that left since, because a limit of the buffer was exceeded.
        refused (`tuple[RefusedRow, ...]`):
            The other rows with the reason, by number.
    """

    num_rows: int
    num_stored: int
    num_scored: int
    num_questions: int
    num_evicted: int
    refused: tuple[RefusedRow, ...]

    def __str__(self) -> str:
        said = (
            f"{self.num_stored} of {self.num_rows} rows are stored, as completions of {self.num_questions} questions"
        )
        said += f"; {self.num_scored} of them were scored by the present policy" if self.num_scored else ""
        said += f"; limits of the buffer have evicted {self.num_evicted} completions" if self.num_evicted else ""
        if not self.refused:
            return f"{said}."
        lines = [f"row {row}: {reason}" for row, reason in self.refused[:_MOST_SHOWN]]
        more = len(self.refused) - len(lines)
        lines += [f"and {more} more"] if more else []
        return "\n".join([f"{said}. {len(self.refused)} are refused:", *lines])
