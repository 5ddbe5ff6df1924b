"""The stored questions of a report: an index of all, and their completions in chunks that a page opens one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..buffer.settings import GROUP
from ..inspection.opened import Opened, Row, rows_of
from ..inspection.text import Decoder, content_text, messages_of, plain_text, prompt_of
from ..inspection.tokens import turns_of
from .shown import cut, packed, visible

# Characters of a completion, of a message of a prompt, of another column.
MOST_OF_A_TEXT = 50_000
MOST_OF_A_COLUMN = 2_000
# Of the prompt in the index, which is searched without opening a chunk.
MOST_OF_AN_INDEXED_PROMPT = 400
# Characters of text in a chunk, about.
CHUNK_CHARACTERS = 400_000
# Bytes of all chunks, as they stand in the page. Of what is beyond, the index alone is shown.
MOST_BYTES = 80_000_000
NO_CHUNK = -1


class Stored(NamedTuple):
    """
    What a page shows of a buffer.

    Attributes:
        columns (`dict[str, list]`):
            Of the index: a value for each question, those updated last first.
        chunks (`list[str]`):
            Packed questions with their completions.
        num_questions, num_completions (`int`):
            In the index.
        num_left_out (`int`):
            Completions that no chunk holds.
    """

    columns: dict[str, list[Any]]
    chunks: list[str]
    num_questions: int
    num_completions: int
    num_left_out: int


_COLUMNS = ("id", "prompt", "bucket", "stored", "updated", "reward", "tokens", "replays", "chunk", "place")
NOTHING = Stored({name: [] for name in _COLUMNS}, [], 0, 0, 0)


def stored_questions(found: Opened, decoder: Decoder | None, most_bytes: int) -> Stored:
    """The questions of a buffer with their completions, newest first."""
    groups = [list(run) for _, run in groupby(rows_of(found.buffer), lambda row: row.question.question_id)]
    groups.sort(key=lambda rows: -max(row.experience.policy_version for row in rows))
    columns: dict[str, list[Any]] = {name: [] for name in _COLUMNS}
    chunks: list[str] = []
    num_bytes = num_left_out = 0
    for some in _in_chunks(groups):
        chunk = packed(_described(found, some, decoder)) if num_bytes < most_bytes else ""
        num_bytes += len(chunk)
        is_left_out = not chunk or num_bytes > most_bytes
        if is_left_out:
            num_bytes = most_bytes  # all others are left out as well: the newest are there
            num_left_out += sum(map(len, some))
        else:
            chunks.append(chunk)
        for place, rows in enumerate(some):
            values = _summary(rows)
            values |= {"chunk": NO_CHUNK if is_left_out else len(chunks) - 1, "place": place}
            for name in _COLUMNS:
                columns[name].append(values[name])
    return Stored(columns, chunks, len(groups), found.buffer.num_completions, num_left_out)


def _in_chunks(groups: Sequence[list[Row]]) -> Iterator[list[list[Row]]]:
    """Questions that make a chunk together; about four characters for each token."""
    some: list[list[Row]] = []
    size = 0
    for rows in groups:
        some.append(rows)
        size += 4 * sum(row.experience.num_tokens for row in rows)
        if size >= CHUNK_CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _summary(rows: list[Row]) -> dict[str, Any]:
    """A row of the table."""
    of = [row.experience for row in rows]
    prompt = plain_text(prompt_of(rows[0].question.example, of[0]))
    shown = visible(prompt[:MOST_OF_AN_INDEXED_PROMPT])
    return {
        "id": cut(rows[0].question.question_id, MOST_OF_A_COLUMN),
        "prompt": f"{shown}..." if len(prompt) > MOST_OF_AN_INDEXED_PROMPT else shown,
        "bucket": rows[0].bucket,
        "stored": len(rows),
        "updated": max(experience.policy_version for experience in of),
        "reward": sum(experience.reward for experience in of) / len(of),
        "tokens": sum(experience.num_tokens for experience in of) / len(of),
        "replays": sum(row.num_replays for row in rows),
    }


def _described(found: Opened, questions: Sequence[list[Row]], decoder: Decoder | None) -> list[dict[str, Any]]:
    """Questions with all of their completions; decoded together."""
    turns = [_turns_of(row) for rows in questions for row in rows]
    texts = iter(_texts([row for rows in questions for row in rows], turns, decoder))
    its_turns = iter(turns)
    described = []
    for rows in questions:
        example = rows[0].question.example
        prompt = _prompt(prompt_of(example, rows[0].experience))
        completions = []
        for row in rows:
            completion = _completion(row)
            # One text where the model wrote all of it.
            roles = [role for role, _, _ in next(its_turns)]
            completion["text"] = [["" if len(roles) == 1 else visible(role), next(texts)] for role in roles]
            own = _prompt(prompt_of(example, row.experience))
            if own != prompt:
                completion["prompt"] = own
            completions.append(completion)
        columns = {name: cut(content_text(of), MOST_OF_A_COLUMN) for name, of in example.items() if name != "prompt"}
        question = {"prompt": prompt, "columns": [[cut(name, 100), text] for name, text in columns.items()]}
        if found.buffer.unit == GROUP:
            groups = found.buffer.groups(rows[0].question.question_id)
            number_of = {id(one): number for number, group in enumerate(groups, start=1) for one in group}
            for completion, row in zip(completions, rows, strict=True):
                completion["group"] = number_of[id(row.experience)]
        described.append(question | {"completions": completions})
    return described


def _turns_of(row: Row) -> list[tuple[str, int, int]]:
    experience = row.experience
    if experience.num_model_tokens == experience.num_tokens:  # nearly all, and there are many tokens
        return [("", 0, experience.num_tokens)]
    return turns_of(experience)


def _prompt(prompt: Any) -> list[list[str]]:
    return [[cut(role, 100), cut(text, MOST_OF_A_TEXT)] for role, text in messages_of(prompt)]


def _texts(rows: list[Row], turns: list[list[tuple[str, int, int]]], decoder: Decoder | None) -> list[str]:
    """Text of every turn of every completion, or its token ids."""
    ids = [
        row.experience.token_ids[start:end].tolist()
        for row, of_row in zip(rows, turns, strict=True)
        for _, start, end in of_row
    ]
    texts = [" ".join(map(str, some)) for some in ids] if decoder is None else decoder.texts(ids)
    return [cut(text, MOST_OF_A_TEXT) for text in texts]


def _completion(row: Row) -> dict[str, Any]:
    """Numbers of a completion; `None` where one is unknown."""
    experience = row.experience
    logps = experience.behavior_per_token_logps[experience.is_model]
    return {
        "reward": experience.reward,
        "version": experience.policy_version,
        "replays": row.num_replays,
        "tokens": experience.num_tokens,
        "logp": float(logps.mean(dtype=np.float64)) if logps.size else None,
        "entropy": None if math.isnan(experience.entropy) else experience.entropy,
        "scored": experience.is_scored,
    }
