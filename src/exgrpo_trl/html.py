"""
What a notebook shows of a buffer, a question and a completion.

Bounded, whatever they hold; readable on light and on dark, as text has the colour of the page, and colours behind it
are transparent. What is stored may be a stranger's: all of it is escaped.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from itertools import chain, islice, zip_longest
from typing import Any

from .buffer import ExperienceBuffer
from .buffer.settings import GROUP
from .inspection.readable import one_line, readable
from .inspection.text import messages_of, plain_text, prompt_of
from .records import Experience, Question

_MOST_BARS = 32
_MOST_QUESTIONS = 8
_MOST_TOKENS = 300
_MOST_MESSAGES = 20
_MOST_COLUMNS = 20
_MOST_TEXT = 1000
_MOST_IN_A_CELL = 120
_MOST_OF_AN_ID = 20

# Of a token of probability 1, of one of this probability or less, and the steps in between that a legend shows.
_LOWEST = 1e-3
_STRONGEST = 0.6
_LEGEND = (1.0, 0.1, 0.01, 0.001)

_BOX = "border:1px solid rgb(128 128 128 / 40%);border-radius:4px;padding:.5em .8em;margin:.3em 0;max-width:70em"
_CELL = "text-align:left;vertical-align:top;padding:.1em .8em .1em 0;background:transparent;border:none"
_TABLE = "border-collapse:collapse;margin:.3em 0;color:inherit;font:inherit"  # not by itself in every notebook
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;font-family:monospace"
_BAR = "display:inline-block;height:.7em;background:currentColor;opacity:.5"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _MOST_TEXT
_short.maxlist = _short.maxtuple = _short.maxdict = 20


def buffer_html(buffer: ExperienceBuffer) -> str:
    """
    Counts of a buffer, its questions by correct completions, and a few of them.

    Args:
        buffer ([`ExperienceBuffer`]):
            The buffer. It is not walked, however much it holds.

    Returns:
        `str`: HTML without scripts, styles of a page, or anything from elsewhere.
    """
    limits = {"capacity": buffer.capacity, "per question": buffer.max_completions_per_question}
    facts = {
        "questions": f"{buffer.num_questions:,}",
        "completions": f"{buffer.num_completions:,}{' in whole groups' if buffer.unit == GROUP else ''}",
        "tokens": f"{buffer.num_tokens:,}",
        "retired questions": f"{len(buffer.retired):,}",
        "evicted, duplicates": f"{buffer.num_evicted:,}, {buffer.num_duplicates:,}",
        **{name: f"at most {limit:,} completions" for name, limit in limits.items() if limit is not None},
    }
    if buffer.num_completions:
        facts["oldest completion"] = f"of step {buffer.oldest()[1].policy_version:,}"
    parts = [_heading("Experience buffer"), _facts(facts)]
    if buffer.num_questions:
        parts += [_bars(buffer), _questions(buffer)]
    return _framed(parts)


def question_html(question: Question) -> str:
    """The id of a question, its prompt, and its other columns; see [`buffer_html`]."""
    columns = {name: value for name, value in question.example.items() if name != "prompt"}
    shown = {str(name): _short.repr(value) for name, value in islice(columns.items(), _MOST_COLUMNS)}
    parts = [_heading(f"Question {question.question_id}"), _messages(question.example["prompt"]), _facts(shown)]
    if len(columns) > len(shown):
        parts.append(_more(len(columns) - len(shown), "columns"))
    return _framed(parts)


def experience_html(experience: Experience, tokenizer: Any = None, now: int | None = None) -> str:
    """
    A completion: what is known of it, and its tokens, the less likely the stronger their colour.

    Args:
        experience ([`Experience`]):
            The completion.
        tokenizer (`PreTrainedTokenizerBase`, *optional*):
            Decodes its tokens; by default their ids are shown.
        now (`int`, *optional*):
            Optimizer step that its age counts to. By default none is told.

    Returns:
        `str`: HTML, see [`buffer_html`].
    """
    is_model = experience.is_model
    logps = experience.behavior_per_token_logps
    mean = float(logps[is_model].mean()) if is_model.any() else math.nan
    age = "" if now is None else f", {now - experience.policy_version:,} steps ago"
    facts = {
        "tokens": f"{experience.num_tokens:,}",
        "reward": f"{experience.reward:.6g}",
        "entropy": "unknown" if math.isnan(experience.entropy) else f"{experience.entropy:.3g} nats a token",
        "log-probability": f"{mean:.3g} nats a token",
        "scored" if experience.is_scored else "generated": f"at step {experience.policy_version:,}{age}",
    }
    if experience.num_model_tokens < experience.num_tokens:
        facts["tokens"] += f", {experience.num_model_tokens:,} of the model"
    parts = [_heading("Experience"), _facts(facts)]
    if experience.details is not None and experience.details.messages:
        parts.append(_messages(experience.details.messages))
    ids = experience.token_ids[:_MOST_TOKENS].tolist()
    decode: Callable[[list[int]], str] = (lambda ids: f"{ids[0]} ") if tokenizer is None else tokenizer.decode
    tokens = zip(ids, logps[: len(ids)].tolist(), is_model[: len(ids)].tolist(), strict=True)
    spans = "".join(_token(decode([token]), token, logp, is_own) for token, logp, is_own in tokens)
    parts += [_legend(), f'<div style="{_TEXT}">{spans}</div>']
    if experience.num_tokens > len(ids):
        parts.append(_more(experience.num_tokens - len(ids), "tokens"))
    return _framed(parts)


def _token(text: str, token: int, logp: float, is_model: bool) -> str:
    shown = escape(readable(text)) or "&nbsp;"
    if not is_model:
        return f'<span title="id {token}, not of the model" style="opacity:.6;font-style:italic">{shown}</span>'
    title = f"id {token}, log-probability {logp:.3g}, probability {math.exp(min(logp, 0.0)):.3g}"
    return f'<span title="{title}" style="{_shade(logp)}">{shown}</span>'


def _shade(logp: float) -> str:
    """Transparent where a token was certain; orange, so that red and green need not be told apart."""
    strength = min(max(0.0, logp / math.log(_LOWEST)), 1.0) * _STRONGEST
    return f"background:rgb(255 120 0 / {strength:.0%});border-radius:2px"


def _legend() -> str:
    steps = " ".join(
        f'<span style="{_shade(math.log(probability))};padding:0 .4em">{probability:g}</span>'
        for probability in _LEGEND
    )
    return f'<div style="font-size:85%">Probability of a token when it was generated: {steps}</div>'


def _bars(buffer: ExperienceBuffer) -> str:
    size = buffer.group_size or 1
    width = math.ceil((size + 1) / _MOST_BARS)  # buckets of a bar
    counts: Counter[int] = Counter()
    for bucket, question_ids in buffer.buckets().items():
        counts[bucket // width] += len(question_ids)
    most = max(counts.values())
    rows = []
    for part in sorted({*counts, *range(1 // width, (size - 1) // width + 1)}):
        first, last = part * width, min((part + 1) * width - 1, size)
        length = max(round(200 * counts[part] / most), 1 if counts[part] else 0)
        bar = f'<span style="{_BAR};width:{length}px"></span>'
        rows.append([f"{first if first == last else f'{first}-{last}'}/{size}", f"{counts[part]:,}", bar])
    return _heading("Questions by correct completions of their latest group", 1) + _table(rows)


def _questions(buffer: ExperienceBuffer) -> str:
    """A few questions, of every bucket in turn."""
    buckets = buffer.buckets()
    views = [islice(question_ids, _MOST_QUESTIONS) for question_ids in buckets.values()]
    turns = chain.from_iterable(zip_longest(*views))
    shown = set(islice((question_id for question_id in turns if question_id is not None), _MOST_QUESTIONS))
    rows = [["question", "correct", "stored", "of steps", "reward", "tokens", "replays", "prompt"]]
    for bucket, question_ids in buckets.items():
        for question_id in islice(question_ids, _MOST_QUESTIONS):
            if question_id in shown:
                rows.append(_row(buffer, question_id, bucket))
    rest = buffer.num_questions - len(shown)
    title = _heading(f"{len(shown):,} of {buffer.num_questions:,} questions", 1)
    return title + _table(rows, has_header=True) + (_more(rest, "questions") if rest else "")


def _row(buffer: ExperienceBuffer, question_id: str, bucket: int) -> list[str]:
    completions = buffer.completions(question_id)
    versions = [experience.policy_version for experience in completions]
    first, last = min(versions), max(versions)
    prompt = plain_text(prompt_of(buffer.question(question_id).example, completions[0]))
    cells = [
        one_line(question_id, _MOST_OF_AN_ID),
        f"{bucket}/{buffer.group_size}",
        f"{len(completions):,}",
        f"{first:,}" if first == last else f"{first:,}-{last:,}",
        f"{sum(experience.reward for experience in completions) / len(completions):.3g}",
        f"{sum(experience.num_tokens for experience in completions) / len(completions):.0f}",
        f"{sum(buffer.reuse(experience).num_replays for experience in completions):,}",
        one_line(prompt, _MOST_IN_A_CELL),
    ]
    return [escape(cell) for cell in cells]


def _messages(messages: Any) -> str:
    all_of_them = messages_of(messages)
    parts = [
        f'<div style="{_TEXT};margin:.3em 0">{f"<b>{_clipped(role)}:</b> " if role else ""}{_clipped(text)}</div>'
        for role, text in all_of_them[:_MOST_MESSAGES]
    ]
    if len(all_of_them) > len(parts):
        parts.append(_more(len(all_of_them) - len(parts), "messages"))
    return "".join(parts)


def _facts(facts: Mapping[str, str]) -> str:
    return _table([[escape(one_line(name, _MOST_IN_A_CELL)), _clipped(value)] for name, value in facts.items()])


def _table(rows: Iterable[Sequence[str]], *, has_header: bool = False) -> str:
    """A table of cells that are HTML already."""
    lines = []
    for number, row in enumerate(rows):
        tag = "th" if has_header and number == 0 else "td"
        cells = "".join(f'<{tag} style="{_CELL}">{cell}</{tag}>' for cell in row)
        lines.append(f'<tr style="background:transparent">{cells}</tr>')
    return f'<table style="{_TABLE}">{"".join(lines)}</table>' if lines else ""


def _heading(text: str, margin: int = 0) -> str:
    return f'<div style="font-weight:bold;margin-top:{margin}em">{escape(one_line(text, _MOST_IN_A_CELL))}</div>'


def _more(count: int, what: str) -> str:
    return f'<div style="opacity:.7">{count:,} more {what}</div>'


def _clipped(text: str) -> str:
    shown = escape(readable(text[:_MOST_TEXT]))
    return f"{shown} ... {len(text) - _MOST_TEXT:,} more characters" if len(text) > _MOST_TEXT else shown


def _framed(parts: Iterable[str]) -> str:
    return f'<div style="{_BOX}">{"".join(parts)}</div>'
