"""Which of a user's completions are stored, in which bucket, and how they come into a buffer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..records import Experience
from .own_checks import Rules, inner_bucket
from .own_rows import OwnRow
from .protocol import ReplayBuffer
from .report import ExperienceReport, RefusedRow
from .settings import GROUP

# What is stored together: one completion, or a group.
Item = list[OwnRow]


def choose(
    rows: Sequence[OwnRow], buffer: ReplayBuffer, rules: Rules
) -> tuple[list[Item], list[RefusedRow], dict[str, int]]:
    """
    What of the rows is stored.

    Args:
        rows (`Sequence[OwnRow]`):
            Rows with a completion, failures included.
        buffer ([`ReplayBuffer`]):
            Where they are going.
        rules ([`Rules`]):
            What is stored.

    Returns:
        `tuple`: completions one by one, or groups; the rows that are not stored; and buckets by question id.
    """
    refused: list[RefusedRow] = []
    items: list[Item] = []
    known = _stored_tokens(buffer, {row.question.question_id for row in rows}, rules)
    for item in _groups(rows, rules, refused) if rules.unit == GROUP else ([row] for row in rows):
        question_id, tokens = item[0].question.question_id, tuple(row.token_ids.tobytes() for row in item)
        reason = _reason_against(item, buffer, rules)
        if reason is None and tokens in known[question_id]:
            what = "the same group" if rules.unit == GROUP else "a completion of the same tokens"
            reason = f"its question has {what} already"
        if reason is not None:
            refused += [RefusedRow(row.row, reason) for row in item]
        else:
            known[question_id].add(tokens)
            items.append(item)
    return items, refused, _buckets(rows, items, buffer, rules)


def store(
    buffer: ReplayBuffer,
    items: Iterable[Item],
    buckets: dict[str, int],
    rules: Rules,
    experience_of: Callable[[OwnRow], Experience],
) -> None:
    """
    Put completions or groups into a buffer.

    No question retires by what another policy could do, and none that the buffer holds moves to another bucket.
    """
    by_question: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_question[item[0].question.question_id].append(item)
    for question_id, of_question in by_question.items():
        bucket = buckets[question_id]
        together = of_question if rules.unit == GROUP else [[row for item in of_question for row in item]]
        for rows in together:
            buffer.collect(
                rows[0].question,
                [experience_of(row) for row in rows],
                num_correct=max(1, min(bucket, rules.group_size - 1)),
                group_size=rules.group_size,
                bucket=bucket,
            )


def report_on(
    items: Sequence[Item], refused: Iterable[RefusedRow], *, num_scored: int = 0, num_evicted: int = 0
) -> ExperienceReport:
    """What became of the rows."""
    refused = tuple(sorted(refused))
    num_stored = sum(map(len, items))
    num_questions = len({item[0].question.question_id for item in items})
    return ExperienceReport(num_stored + len(refused), num_stored, num_scored, num_questions, num_evicted, refused)


def num_evicted(buffer: Any) -> int:
    """Completions that have left a buffer, if it counts them."""
    return int(getattr(buffer, "num_evicted", 0))


def _stored_tokens(
    buffer: ReplayBuffer, question_ids: Iterable[str], rules: Rules
) -> dict[str, set[tuple[bytes, ...]]]:
    """Tokens of what the buffer holds of questions: of each completion, or of those of each group."""
    stored = {question_id for ids in buffer.buckets().values() for question_id in ids}
    known: dict[str, set[tuple[bytes, ...]]] = defaultdict(set)
    for question_id in stored.intersection(question_ids):
        of_question = (
            buffer.groups(question_id)
            if rules.unit == GROUP
            else [[experience] for experience in buffer.completions(question_id)]
        )
        known[question_id] = {tuple(e.token_ids.astype(np.int64).tobytes() for e in group) for group in of_question}
    return known


def _groups(rows: Iterable[OwnRow], rules: Rules, refused: list[RefusedRow]) -> Iterable[Item]:
    """Rows of one group, if all of it is there."""
    groups: dict[tuple[str, int | None], Item] = defaultdict(list)
    for row in rows:
        groups[row.question.question_id, row.group].append(row)
    for (_, number), item in groups.items():
        if number is None or len(item) != rules.group_size:
            whole = f"{len(item)} rows of it can be stored, and a group has {rules.group_size}"
            reason = "it has no group" if number is None else f"its group {number} is not whole: {whole}"
            refused += [RefusedRow(row.row, reason) for row in item]
        else:
            yield item


def _reason_against(item: Item, buffer: ReplayBuffer, rules: Rules) -> str | None:
    if item[0].question.question_id in buffer.retired:
        return "its question has retired from the buffer"
    successes = [row.is_success for row in item]
    threshold = f"success_threshold={rules.success_threshold:g}"
    if rules.unit != GROUP:
        return None if all(successes) else f"its reward {item[0].reward:g} is below {threshold}"
    if all(successes) or not any(successes):
        which = "all completions" if any(successes) else "no completion"
        return f"{which} of its group reach {threshold}: there is nothing to tell them apart by"
    return None


def _buckets(rows: Sequence[OwnRow], items: Sequence[Item], buffer: ReplayBuffer, rules: Rules) -> dict[str, int]:
    """Bucket of each question that something is stored of."""
    default = max(1, rules.group_size // 2) if rules.bucket is None else rules.bucket
    buckets = {item[0].question.question_id: default for item in items}
    told: dict[str, int] = {}
    successes: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        question_id = row.question.question_id
        successes[question_id].append(row.is_success)
        if row.bucket is not None:
            told[question_id] = row.bucket
    # Successes alone tell no pass rate: who collected them may have left out the failures.
    seen = {
        question_id: inner_bucket(sum(of_question) / len(of_question), rules.group_size)
        for question_id, of_question in successes.items()
        if not all(of_question)
    }
    present = {question_id: bucket for bucket, ids in buffer.buckets().items() for question_id in ids}
    for known in (seen, told, present):
        buckets |= {question_id: known[question_id] for question_id in buckets if question_id in known}
    return buckets
