"""Buffers from datasets of stored completions."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ExperienceBufferError
from ..examples import row_question_id
from ..records import UNKNOWN_PROMPT, Experience, Question, prompt_hash
from .as_dataset import ImportedRow, check_is_dataset, completions_from_dataset, provenance_from_dataset
from .boundary import reading_dataset
from .bringing import choose, report_on, store
from .continuations import Continuations, tokenizer_fingerprint
from .groups import whole_groups
from .own_checks import LOGPS, Rules
from .own_rows import OWN_COLUMNS, OwnRow, is_own, read_own_rows
from .report import RefusedRow
from .settings import GROUP, checked_count

if TYPE_CHECKING:
    from datasets import Dataset

    from .buffer import ExperienceBuffer

logger: logging.Logger = logging.getLogger(__name__)


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


def fill_from_own_rows(
    buffer: ExperienceBuffer, dataset: Dataset, group_size: int, options: Mapping[str, Any]
) -> bool:
    """
    Put the rows of a user into an empty buffer, without a look at its limits.

    Args:
        buffer ([`ExperienceBuffer`]):
            What is filled.
        dataset (`datasets.Dataset`):
            A completion with its log-probabilities in every row.
        group_size (`int`):
            Completions per question at training time (K).
        options (`Mapping[str, Any]`):
            Arguments of [`~ExperienceBuffer.from_dataset`] for such rows by name, `None` where not given.

    Returns:
        `bool`: whether it is a dataset of a user.

    Raises:
        ExperienceBufferError: if a column is missing, or no row can be stored.
        ValueError: if an option is out of range, or given for another dataset.
    """
    check_is_dataset(dataset)
    given = {name: value for name, value in options.items() if value is not None}
    if not is_own(dataset):
        if given:
            raise ValueError(
                f"The dataset has neither `completion` nor `completion_ids`, so {', '.join(given)} would do nothing: "
                f"it has {dataset.column_names}."
            )
        return False
    if LOGPS not in dataset.column_names:
        raise ExperienceBufferError(
            f"The dataset has no column {LOGPS}, and nothing is replayed without the log-probability of every token. "
            "trainer.score_experience(dataset) computes them under the policy that is about to be trained."
        )
    rules = Rules(group_size, buffer.unit, given.get("success_threshold", 1.0), given.get("bucket"))
    tokenizer, column = given.get("tokenizer"), given.get("question_id_column")
    continuations = None
    if tokenizer is not None:
        template = given.get("chat_template_kwargs")
        continuations = Continuations(tokenizer, template=template, add_eos=given.get("add_eos", True))
    prompts: dict[str, Question] = {}

    def find(content: Mapping[str, Any]) -> Question:
        example = {name: value for name, value in content.items() if name not in OWN_COLUMNS}
        if example.get("prompt") is None:
            raise ValueError("it has no prompt")
        question = Question(row_question_id(example, column), example)
        first = prompts.setdefault(question.question_id, question)
        if first.example["prompt"] != example["prompt"]:
            raise ValueError(f"question {question.question_id!r} has another prompt in an earlier row")
        return first

    def render(questions: Iterable[Question]) -> list[list[int]]:
        assert continuations is not None, "prompts stay unknown without a tokenizer"
        return continuations.prompt_ids([question.example["prompt"] for question in questions])

    rows, refused = read_own_rows(dataset, rules, find, render if continuations else None, continuations)
    unknown = [row for row in rows if row.logps is None]
    refused += [
        RefusedRow(row.row, "it has no log-probabilities; trainer.score_experience computes them") for row in unknown
    ]
    items, others, buckets = choose([row for row in rows if row.logps is not None], buffer, rules)
    store(buffer, items, buckets, rules, _experience)
    buffer.import_report = report = report_on(items, [*refused, *others])
    if report.refused and not items:
        raise ExperienceBufferError(f"No row of the dataset can be stored. {report}")
    if report.refused:
        logger.warning(str(report))
    buffer.provenance = {"question_id_column": column}
    if tokenizer is not None:
        buffer.provenance |= tokenizer_fingerprint(tokenizer)
    return True


def _experience(row: OwnRow) -> Experience:
    assert row.logps is not None, "rows without log-probabilities are refused"
    return Experience.create(
        row.token_ids,
        row.logps,
        policy_version=0,
        reward=row.reward,
        prompt_hash=UNKNOWN_PROMPT if row.prompt_ids is None else prompt_hash(row.prompt_ids),
    )
