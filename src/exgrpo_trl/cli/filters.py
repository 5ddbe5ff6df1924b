"""Filters of stored completions, such as `bucket>=3` or `text~sqrt`."""

from __future__ import annotations

import argparse
import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..buffer import ExperienceBuffer
from ..inspection.opened import Opened, Row
from ..inspection.text import Decoder, find_decoder, plain_text, prompt_of
from ..records import ExperienceBufferError

_OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "!~": lambda text, part: part.lower() not in text.lower(),
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
    "~": lambda text, part: part.lower() in text.lower(),
}
_OF_TEXT = ("=", "==", "!=", "~", "!~")
NUMBERS = {
    "bucket": "correct completions of the latest group of its question",
    "age": "optimizer steps since it was generated",
    "version": "optimizer step at which it was generated",
    "reward": "reward at generation",
    "length": "tokens",
    "replays": "how often it was replayed",
    "entropy": "mean token entropy at generation, nats",
}
TEXTS = {
    "question": "id of its question",
    "prompt": "text of the prompt",
    "completion": "its text",
    "text": "either of the two",
}
_DECODED = ("completion", "text")
_FILTER = re.compile(r"\s*(\w+)\s*(<=|>=|!=|==|!~|[<>=~])\s*(.*)", flags=re.DOTALL)
_HELP = (
    f"Fields with numbers: {', '.join(NUMBERS)} (< <= = != >= >). Fields with text: {', '.join(TEXTS)} (= != for the "
    "whole text, ~ !~ for a part of it, in any case). For example: --filter 'bucket>=3' --filter 'text~sqrt'."
)


class Filter(NamedTuple):
    """A condition: a field, an operator and what it is compared with."""

    field: str
    operator: str
    value: float | str


class Facts(NamedTuple):
    """What the fields of a completion are computed from, besides itself."""

    now: int
    decoder: Decoder | None
    where: str


def facts_of(opened: Opened, decoder: Decoder | None) -> Facts:
    """Facts of a buffer."""
    return Facts(opened.now, decoder, str(opened.directory))


def decoder_for(opened: Opened, given: Path | None, filters: Sequence[Filter]) -> Decoder | None:
    """What decodes completions, where a filter asks for their text."""
    return find_decoder(opened, given)[0] if given or any(of.field in _DECODED for of in filters) else None


def add_filters(parser: argparse.ArgumentParser, what: str) -> None:
    """Declare `--filter` and `--tokenizer`."""
    parser.add_argument(
        "--filter",
        dest="filters",
        metavar="CONDITION",
        type=parsed_filter,
        action="append",
        default=[],
        help=f"{what}; all conditions must hold for the same completion. {_HELP}".replace("%", "%%"),
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="tokenizer.json, or a directory with one; by default that of the checkpoint",
    )


def parsed_filter(text: str) -> Filter:
    """
    The filter that a text means.

    Raises:
        argparse.ArgumentTypeError: if it means none; the message names the fields.
    """
    match = _FILTER.fullmatch(text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no condition. {_HELP}")
    field, sign, value = match.groups()
    if field in TEXTS:
        if sign not in _OF_TEXT:
            raise argparse.ArgumentTypeError(f"{text!r}: {field} is text, which {sign} cannot compare. {_HELP}")
        return Filter(field, sign, value)
    if field not in NUMBERS:
        raise argparse.ArgumentTypeError(f"{text!r}: there is no field {field!r}. {_HELP}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if math.isnan(number) or "~" in sign:
        raise argparse.ArgumentTypeError(f"{text!r}: {field} is a number and must be compared with one. {_HELP}")
    return Filter(field, sign, number)


def matches(row: Row, filters: Sequence[Filter], facts: Facts) -> bool:
    """
    Whether all filters hold for a completion. An unknown entropy is neither above nor below anything.

    Raises:
        ExperienceBufferError: if the text of completions is asked for, and there is no tokenizer.
    """
    return all(_OPERATORS[of.operator](_value(row, of.field, facts), of.value) for of in filters)


def matching(rows: Iterable[Row], filters: Sequence[Filter], facts: Facts) -> list[Row]:
    """Those completions for which all filters hold."""
    return [row for row in rows if matches(row, filters, facts)]


def take_matching(buffer: ExperienceBuffer, filters: Sequence[Filter], facts: Facts) -> ExperienceBuffer:
    """Take the completions out of a buffer for which all filters hold; a whole group where they hold for one of it."""
    return buffer.set_aside(
        lambda question, bucket, experience: matches(
            Row(question, bucket, experience, buffer.reuse(experience).num_replays), filters, facts
        )
    )


def _value(row: Row, field: str, facts: Facts) -> Any:
    experience = row.experience
    if field in NUMBERS:
        return {
            "bucket": row.bucket,
            "age": facts.now - experience.policy_version,
            "version": experience.policy_version,
            "reward": experience.reward,
            "length": experience.num_tokens,
            "replays": row.num_replays,
            "entropy": experience.entropy,
        }[field]
    if field == "question":
        return row.question.question_id
    texts = []
    if field != "completion":
        texts.append(plain_text(prompt_of(row.question.example, experience)))
    if field != "prompt":
        if facts.decoder is None:
            raise ExperienceBufferError(
                f"The filter on {field!r} needs the text of the completions, and no tokenizer was found for the "
                f"experience buffer at {facts.where}. Name it with --tokenizer, or filter on 'prompt'."
            )
        texts += facts.decoder.texts([experience.token_ids.tolist()])
    return "\n".join(texts)
