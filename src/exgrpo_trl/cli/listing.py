"""Questions of a buffer in lines: sorted, filtered, cut off."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..inspection.opened import Opened, Row
from ..inspection.readable import one_line
from ..inspection.text import plain_text, prompt_of

# What a listing is sorted by; ages are those of the newest completion.
SORT_FIELDS = ("question", "bucket", "completions", "age", "reward", "length", "replays")
_COLUMNS = ("question", "correct", "stored", "age", "reward", "tokens", "replays", "prompt")
_SHORTEST_ID = 8
_MOST_OF_A_PROMPT = 200
_MOST_OF_AN_ID = 40


def questions_of(opened: Opened, rows: Sequence[Row], sort: str | None, *, reverse: bool) -> list[dict[str, Any]]:
    """
    The questions of completions, with what is said of these completions alone.

    Args:
        opened ([`Opened`]):
            The buffer.
        rows (`Sequence[Row]`):
            Completions; those of a question follow each other.
        sort (`str` or `None`):
            One of `SORT_FIELDS`; `None` for the order of the buffer.
        reverse (`bool`):
            Whether the highest comes first.
    """
    questions = []
    for question_id, run in groupby(rows, lambda row: row.question.question_id):
        group = list(run)
        ages = [opened.now - row.experience.policy_version for row in group]
        rewards = [row.experience.reward for row in group]
        questions.append(
            {
                "question": question_id,
                "bucket": group[0].bucket,
                "completions": len(group),
                "age": min(ages),
                "oldest": max(ages),
                "reward": sum(rewards) / len(group),
                "length": sum(row.experience.num_tokens for row in group) / len(group),
                "replays": sum(row.num_replays for row in group),
                "prompt": plain_text(prompt_of(group[0].question.example, group[0].experience)),
            }
        )
    if sort is not None:
        questions.sort(key=lambda question: question[sort], reverse=reverse)
    elif reverse:
        questions.reverse()
    return questions


def print_questions(opened: Opened, questions: Sequence[dict[str, Any]], limit: int, console: Console) -> None:
    """Print the first questions, with beginnings of their ids that are unique in the buffer."""
    shown = questions[:limit] if limit else questions
    short = short_ids(opened)
    lines = [_COLUMNS]
    for of in shown:
        lines.append(
            (
                one_line(short[of["question"]], _MOST_OF_AN_ID),
                f"{of['bucket']}/{opened.buffer.group_size}",
                f"{of['completions']:,}",
                f"{of['age']:,}" if of["age"] == of["oldest"] else f"{of['age']:,}-{of['oldest']:,}",
                f"{of['reward']:.3g}",
                f"{of['length']:.0f}",
                f"{of['replays']:,}",
                one_line(of["prompt"], _MOST_OF_A_PROMPT),
            )
        )
    table = Table(box=box.SIMPLE)
    for name, *cells in zip(*lines, strict=True):
        # Prompts alone give way where a terminal is narrow.
        width = None if name == "prompt" else max(map(cell_len, [name, *cells]))
        is_text = name in ("question", "prompt")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True, overflow="crop", min_width=width)
    for line in lines[1:]:
        table.add_row(*map(Text, line))
    title = f"{len(shown):,} of {len(questions):,} questions of {opened.directory}"
    console.print(Text(one_line(title), style="bold"), soft_wrap=True)
    if shown:
        console.print(table)
    if len(shown) < len(questions):
        console.print(Text(f"{len(questions) - len(shown):,} more; --limit 0 shows all."))


def short_ids(opened: Opened) -> dict[str, str]:
    """Beginning of every stored id, as long as needed to be the only one with it."""
    ids = sorted(question_id for ids in opened.buffer.buckets().values() for question_id in ids)
    shared = [0, *(_num_shared(one, other) for one, other in pairwise(ids)), 0]
    return {
        question_id: _beginning(question_id, max(_SHORTEST_ID, before + 1, after + 1))
        for question_id, before, after in zip(ids, shared, shared[1:], strict=False)
    }


def _beginning(question_id: str, length: int) -> str:
    while question_id[length - 1 : length].isspace():  # nobody would see it
        length += 1
    return question_id[:length]


def _num_shared(one: str, other: str) -> int:
    return next(
        (position for position, (mine, its) in enumerate(zip(one, other, strict=False)) if mine != its),
        min(len(one), len(other)),
    )
