"""One question of a buffer with its completions side by side."""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..buffer.settings import GROUP
from ..inspection.opened import Opened, Row
from ..inspection.readable import one_line, readable
from ..inspection.text import Decoder, content_text, messages_of, prompt_of
from ..inspection.tokens import has_colours, legend, pieces_of, shown_tokens, turns_of
from ..records import ExperienceBufferError

# A completion in fewer characters a line is hard to read.
_NARROWEST = 36
_MOST_OF_A_COLUMN = 300
_MOST_NAMED = 5


def find_question(opened: Opened, beginning: str) -> str:
    """
    Id of the stored question that begins like this, or is this.

    Raises:
        ExperienceBufferError: if there is none, or several.
    """
    buffer = opened.buffer
    if beginning in buffer:
        return beginning
    where = f"the experience buffer at {opened.directory}"
    ids = [question_id for ids in buffer.buckets().values() for question_id in ids]
    found = sorted(question_id for question_id in ids if question_id.startswith(beginning))
    if len(found) == 1:
        return found[0]
    named = ", ".join(map(repr, found[:_MOST_NAMED])) + (" and others" if len(found) > _MOST_NAMED else "")
    if found:
        raise ExperienceBufferError(f"{len(found)} questions of {where} begin with {beginning!r}: {named}. Give more.")
    if beginning in buffer.retired:
        raise ExperienceBufferError(
            f"Question {beginning!r} of {where} has retired: a whole group of it was correct. None is kept."
        )
    raise ExperienceBufferError(
        f"No question of {where} begins with {beginning!r}. exgrpo-trl show {opened.directory} --list shows the ids."
    )


def describe_question(opened: Opened, rows: list[Row], decoder: Decoder | None) -> dict[str, Any]:
    """A question with its completions."""
    question = rows[0].question
    return {
        "path": str(opened.directory),
        "question_id": question.question_id,
        "bucket": rows[0].bucket,
        "group_size": opened.buffer.group_size,
        "example": question.example,
        "tokenizer": None if decoder is None else str(decoder.file),
        "completions": [_describe(opened, row, decoder) for row in rows],
    }


def _describe(opened: Opened, row: Row, decoder: Decoder | None) -> dict[str, Any]:
    experience, details = row.experience, row.experience.details
    described: dict[str, Any] = {
        "reward": experience.reward,
        "policy_version": experience.policy_version,
        "age": opened.now - experience.policy_version,
        "replays": row.num_replays,
        "entropy": experience.entropy,
        "token_ids": experience.token_ids,
        "behavior_per_token_logps": experience.behavior_per_token_logps,
        "turns": [{"by": role, "start": start, "end": end} for role, start, end in turns_of(experience)],
    }
    if decoder is not None:
        described["completion"] = decoder.texts([experience.token_ids.tolist()])[0]
        described["tokens"] = decoder.pieces(experience.token_ids.tolist())
    if details is not None:
        described |= {"prompt": details.prompt, "messages": details.messages, "rewards": details.rewards}
    return described


def print_question(opened: Opened, rows: list[Row], decoder: Decoder | None, note: str, console: Console) -> None:
    """Print a question with its completions side by side, as many as have room."""
    question = rows[0].question
    console.print(Text(f"Question {one_line(question.question_id)}", style="bold"), soft_wrap=True)
    console.print(_values(opened, rows))
    _print_prompts(rows, console)
    console.print(Text(readable(note), overflow="fold"))
    if has_colours(console):
        console.print(legend())
    most = max(1, console.width // _NARROWEST)
    for start in range(0, len(rows), most):
        table = Table(box=box.SQUARE, expand=True)
        for number, row in enumerate(rows[start : start + most], start=start + 1):
            table.add_column(_heading(opened, row, number), ratio=1, overflow="fold")
        table.add_row(
            *(shown_tokens(row.experience, pieces_of(row.experience, decoder)) for row in rows[start : start + most])
        )
        console.print(table)


def _print_prompts(rows: list[Row], console: Console) -> None:
    """Print the prompt; where environments showed several, each with the completions that answer it."""
    prompts: dict[str, tuple[Text, list[str]]] = {}
    for number, row in enumerate(rows, start=1):
        text = Text(overflow="fold")
        for role, content in messages_of(prompt_of(row.question.example, row.experience)):
            text.append(f"{one_line(role, 30)}: " if role else "", "bold").append(f"{readable(content)}\n")
        prompts.setdefault(text.plain, (text, []))[1].append(str(number))
    for text, numbers in prompts.values():
        console.print(Text("Prompt" if len(prompts) == 1 else f"Prompt of {', '.join(numbers)}", style="bold"))
        console.print(text, end="")


def _values(opened: Opened, rows: list[Row]) -> Table:
    table = Table(box=None, show_header=False)
    values = {"correct": f"{rows[0].bucket} of {opened.buffer.group_size}", "completions": f"{len(rows):,}"}
    for column, value in rows[0].question.example.items():
        if column != "prompt":
            values[one_line(column, 40)] = one_line(content_text(value), _MOST_OF_A_COLUMN)
    for name, text in values.items():
        table.add_row(Text(name), Text(text, overflow="fold"))
    return table


def _heading(opened: Opened, row: Row, number: int) -> Text:
    experience = row.experience
    group = ""
    if opened.buffer.unit == GROUP:
        groups = opened.buffer.groups(row.question.question_id)
        group = f", group {next(n for n, group in enumerate(groups, start=1) if experience in group)}"
    entropy = "unknown" if math.isnan(experience.entropy) else f"{experience.entropy:.2f}"
    lines = [
        f"{number}{group}: reward {experience.reward:g}",
        f"{experience.num_tokens:,} tokens, entropy {entropy}",
        f"step {experience.policy_version:,}, age {opened.now - experience.policy_version:,}, "
        f"replays {row.num_replays:,}",
    ]
    return Text("\n".join(lines))
