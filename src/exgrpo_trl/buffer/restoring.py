"""A buffer from the data files of a directory, which are read one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import pyarrow as pa

from ..images import StoredImage
from ..records import Experience, Question, Reuse
from ..rollout_details import RolloutDetails, check_texts
from .boundary import reading
from .detail_columns import DETAIL_SCHEMA, details_from_columns, require
from .groups import whole_groups
from .image_files import example_from_text
from .limits import Budget, json_bytes
from .metadata import COMPLETIONS_FILE, METADATA_FILE, QUESTIONS_FILE, RESUME_HINT, RETIRED_FILE, fail
from .reuse_columns import REUSE_SCHEMA, reuse_from_table
from .settings import GROUP
from .tables import (
    EXPERIENCE_SCHEMA,
    GROUP_SCHEMA,
    QUESTION_SCHEMA,
    array_of,
    experiences_from_table,
    num_tokens_in,
    numbers_in,
    row_groups,
    with_later_columns,
)

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer

Buffer = TypeVar("Buffer", bound="ExperienceBuffer")

# `question` is a row number of the questions file. `age_rank` orders the completions of a policy version, which need
# not be the order of the rows: these go by question.
COMPLETION_SCHEMA = pa.unify_schemas(
    [
        pa.schema([("question", pa.int64()), ("age_rank", pa.int64())]),
        EXPERIENCE_SCHEMA,
        DETAIL_SCHEMA,
        REUSE_SCHEMA,
        GROUP_SCHEMA,
    ]
)
# Schema version that wrote a column first, where that is not the first one.
_ADDED_IN = {
    "prompt_hash": 2,
    **dict.fromkeys(DETAIL_SCHEMA.names, 3),
    **dict.fromkeys((*REUSE_SCHEMA.names, *GROUP_SCHEMA.names), 4),
    "is_scored": 5,
}
# Characters of a JSON text from which on the objects that it is parsed into, and let go again, are counted.
_LONG_TEXT = 2**18
RETIRED_SCHEMA = pa.schema([("question_id", pa.string())])


class _Completions(NamedTuple):
    """What the rows of the completions file hold, by question; groups are empty where there are none."""

    of_question: list[list[Experience]]
    group_numbers: list[list[int | None]]
    by_age: list[tuple[Experience, str]]
    reuse: dict[Experience, Reuse]


def restored(
    directory: Path,
    metadata: Mapping[str, Any],
    buffer_class: type[Buffer],
    images: Mapping[str, StoredImage],
    budget: Budget,
) -> Buffer:
    """
    The buffer that a directory holds.

    Args:
        directory (`Path`):
            Its directory; what the data files declare was checked.
        metadata (`Mapping[str, Any]`):
            Its metadata, checked.
        buffer_class (`type`):
            Class of the buffer.
        images (`Mapping[str, StoredImage]`):
            Its images by digest.
        budget ([`Budget`]):
            What may still be decoded.

    Raises:
        ExperienceBufferError: if a file holds what cannot be.
    """
    with reading(directory, METADATA_FILE):
        buffer = buffer_class(**metadata["settings"])
        buffer.rng.bit_generator.state = metadata["rng"]
    buffer.provenance, buffer.replay_state = metadata["provenance"], metadata["replay_state"]
    counts = metadata["counts"]
    buffer.num_evicted, buffer.num_duplicates = counts["evicted"], counts["duplicates"]
    with reading(directory, QUESTIONS_FILE):
        questions = list(_questions_in(directory, images, budget))
    with reading(directory, COMPLETIONS_FILE):
        found = _completions_in(directory, metadata, questions, images, budget, is_grouped=buffer.unit == GROUP)
        parts = [
            (question, bucket, _groups_of(question, stored, numbers, buffer.group_size or 0) if numbers else [stored])
            for (question, bucket), stored, numbers in zip(
                questions, found.of_question, found.group_numbers, strict=True
            )
        ]
    with reading(directory, RETIRED_FILE):
        retired = _retired_in(directory)
    buffer._restore(parts, found.by_age, retired, found.reuse, images.values())
    reason = buffer._violation(has_checked_details=True)
    if not reason and any(buffer.metrics()[name] != count for name, count in counts.items()):
        reason = f"{METADATA_FILE} says {counts}, and there are {buffer.metrics()}"
    if reason:
        fail(directory, f"contradicts itself: {reason} ({QUESTIONS_FILE}, {COMPLETIONS_FILE}). {RESUME_HINT}")
    return buffer


def _questions_in(
    directory: Path, images: Mapping[str, StoredImage], budget: Budget
) -> Iterator[tuple[Question, int]]:
    """Questions with their buckets."""
    known: set[str] = set()
    for batch in row_groups(directory / QUESTIONS_FILE, QUESTION_SCHEMA):
        require(not any(column.null_count for column in batch.columns), "questions have an id, a row and a bucket")
        for question_id, example, bucket in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            require(question_id not in known, f"question {question_id!r} is there once")
            known.add(question_id)
            budget.spend(json_bytes(example))
            yield Question(question_id, example_from_text(example, images)), bucket


def _completions_in(
    directory: Path,
    metadata: Mapping[str, Any],
    questions: Sequence[tuple[Question, int]],
    images: Mapping[str, StoredImage],
    budget: Budget,
    *,
    is_grouped: bool,
) -> _Completions:
    num_completions = metadata["counts"]["completions"]
    of_question: list[list[Experience]] = [[] for _ in questions]
    numbers_of_question: list[list[int | None]] = [[] for _ in questions]
    by_age: list[tuple[Experience, str] | None] = [None] * num_completions
    reuse: dict[Experience, Reuse] = {}
    known_rewards: set[str] = set()
    version = metadata["schema_version"]
    written = pa.schema([field for field in COMPLETION_SCHEMA if _ADDED_IN.get(field.name, 1) <= version])
    for batch in row_groups(directory / COMPLETIONS_FILE, written):
        table = with_later_columns(batch, COMPLETION_SCHEMA)
        rows = numbers_in(table, "question", 0, len(questions)).tolist()
        ranks = numbers_in(table, "age_rank", 0, num_completions).tolist()
        details = details_from_columns(
            {name: array_of(table, name) for name in DETAIL_SCHEMA.names}, num_tokens_in(table), images
        )
        _check_texts(details, known_rewards, budget)
        experiences = experiences_from_table(table, details)
        records = zip(experiences, reuse_from_table(table), strict=True)
        reuse.update((experience, record) for experience, record in records if record is not None)
        for row, rank, experience in zip(rows, ranks, experiences, strict=True):
            of_question[row].append(experience)
            by_age[rank] = (experience, questions[row][0].question_id)
        if is_grouped:
            for row, number in zip(rows, table.column("group").to_pylist(), strict=True):
                numbers_of_question[row].append(number)
        else:
            require(table.column("group").null_count == len(table), "single completions are in no group")
    owned = [one for one in by_age if one is not None]
    require(len(owned) == num_completions, "every `age_rank` is there once")
    return _Completions(of_question, numbers_of_question, owned, reuse)


def _check_texts(all_details: Sequence[RolloutDetails | None], known_rewards: set[str], budget: Budget) -> None:
    for details in all_details:
        if details is not None:
            for text in details.texts:
                if len(text) > _LONG_TEXT:
                    budget.check(json_bytes(text))
            check_texts(details, known_rewards)


def _groups_of(
    question: Question, experiences: Sequence[Experience], numbers: Sequence[int | None], group_size: int
) -> list[list[Experience]]:
    rows = zip(experiences, numbers, strict=True)
    groups = whole_groups(rows, lambda row: (question.question_id, row[1]), group_size)
    return [[experience for experience, _ in group] for group in groups]


def _retired_in(directory: Path) -> list[str]:
    retired: list[str] = []
    for batch in row_groups(directory / RETIRED_FILE, RETIRED_SCHEMA):
        column = batch.column("question_id")
        require(not column.null_count, "retired questions have an id")
        retired += column.to_pylist()
    require(len(set(retired)) == len(retired), "a question retires once")
    return retired
