"""Dataset rows: the id of a question, and codecs that keep a row as text and give it back."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

from .records import Question

_TYPE_KEY = "__exgrpo_type__"


def question_id_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """
    Identifier of a question that depends on its prompt only.

    Equal prompts have equal ids in every process and every run; the order of the keys inside a message does not
    matter.

    Args:
        prompt (`str` or `list[dict]`):
            Plain or conversational prompt.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        TypeError: if the prompt is neither text nor a list of messages, or holds a value that JSON cannot carry.
    """
    if not isinstance(prompt, str | list | tuple):
        raise TypeError(
            f"A prompt must be a string or a list of messages, got {type(prompt).__name__}. "
            "Set `question_id_column` if questions are identified by another column."
        )
    plain = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    canonical = json.dumps(_to_json(plain, "prompt"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def encode_example(example: Mapping[str, Any]) -> str:
    """
    JSON text of a dataset row; [`decode_example`] gives the row back exactly.

    Args:
        example (`Mapping[str, Any]`):
            Row of `str`, `int`, `float` (NaN and infinities too), `bool`, `None`, `list`, `dict`, `datetime`, `date`
            and `bytes` values, nested to any depth.

    Raises:
        TypeError: if a column holds any other type.
    """
    if not all(type(column) is str for column in example):
        raise TypeError(f"The columns of an example must be strings, got {list(example)}.")
    return json.dumps(_to_json_dict({column: _to_json(value, column) for column, value in example.items()}))


def decode_example(text: str) -> dict[str, Any]:
    """
    Row that [`encode_example`] turned into `text`.

    Args:
        text (`str`):
            Output of [`encode_example`].

    Raises:
        ValueError: if `text` is not the JSON of a row.
    """
    example = json.loads(text, object_hook=_from_json_dict)
    if not isinstance(example, dict):
        raise ValueError(f"An encoded example must be a JSON object, got {text[:80]!r}.")
    return example


def _to_json(value: Any, column: str) -> Any:
    # Exact types on purpose: a NumPy scalar, an enum or a tuple would come back as something else.
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if kind is list:
        return [_to_json(item, column) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return _to_json_dict({key: _to_json(item, column) for key, item in value.items()})
    if kind in (datetime, date):
        return {_TYPE_KEY: kind.__name__, "value": value.isoformat()}
    if kind is bytes:
        return {_TYPE_KEY: "bytes", "value": base64.b64encode(value).decode()}
    what = "dict with keys that are not strings" if kind is dict else f"{kind.__module__}.{kind.__qualname__}"
    raise TypeError(
        f"Column {column!r} holds a value of type {what}, which an experience buffer cannot save. Drop the column "
        "from the dataset or convert it to plain Python values (str, int, float, bool, None, list, dict, datetime, "
        "date, bytes)."
    )


def _to_json_dict(value: dict[str, Any]) -> dict[str, Any]:
    # A dict that happens to use our own key goes as a list of pairs, so that it is never taken for a tagged value.
    return {_TYPE_KEY: "dict", "value": [[*pair] for pair in value.items()]} if _TYPE_KEY in value else value


def _from_json_dict(value: dict[str, Any]) -> Any:
    if _TYPE_KEY not in value:
        return value
    kind, content = value[_TYPE_KEY], value["value"]
    if kind == "datetime":
        return datetime.fromisoformat(content)
    if kind == "date":
        return date.fromisoformat(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dict":
        return dict(content)
    raise ValueError(f"An encoded example holds the unknown type {kind!r}.")


def row_question_id(row: Mapping[str, Any], question_id_column: str | None, index: int | None = None) -> str:
    """Id of the question of a dataset row; the index of the row, if known, is for the message."""
    if question_id_column is None:
        return question_id_of(row["prompt"])
    if row.get(question_id_column) is None:
        where = f"the row with prompt {str(row.get('prompt'))[:80]!r}" if index is None else f"row {index}"
        raise ValueError(
            f"question_id_column={question_id_column!r} has no value in {where} of the training dataset, which has "
            f"{sorted(row)}. Name a column that every row fills, or use None to identify questions by their prompt."
        )
    return str(row[question_id_column])


def dataset_question_ids(dataset: Any, question_id_column: str | None) -> list[str]:
    """Ids of all questions of a map-style dataset, in row order."""
    if question_id_column is None:
        return [question_id_of(prompt) for prompt in dataset["prompt"]]
    if question_id_column not in dataset.column_names:
        raise ValueError(
            f"question_id_column={question_id_column!r} is not a column of the training dataset, which has "
            f"{dataset.column_names}. Name one of these, or use None to identify questions by their prompt."
        )
    rows = dataset.select_columns(sorted({question_id_column, "prompt"}))
    question_ids = [row_question_id(row, question_id_column, index) for index, row in enumerate(rows)]
    first_prompts: dict[str, str] = {}
    for question_id, prompt in zip(question_ids, rows["prompt"], strict=True):
        prompt_hash = question_id_of(prompt)
        if first_prompts.setdefault(question_id, prompt_hash) != prompt_hash:
            raise ValueError(
                f"question_id_column={question_id_column!r} gives the id {question_id!r} to two different prompts. "
                "Give every prompt an id of its own, or use None to identify questions by their prompt."
            )
    return question_ids


def stored_row(question: Question, like: Mapping[str, Any]) -> dict[str, Any]:
    """The stored row of a question with the columns of the batch, in a copy that reward functions may write into."""
    missing = sorted(like.keys() - question.example.keys())
    if missing:
        raise ValueError(
            f"The stored row of question {question.question_id!r} lacks the columns {missing} of the training "
            "dataset, which a reward function may need. Import rows with all columns of the dataset."
        )
    return {column: copy.deepcopy(question.example[column]) for column in like}


def question_of_row(row: Mapping[str, Any], question_id_column: str | None) -> Question:
    """
    Question of a dataset row, with a copy of the row: reward functions may write into the rows that they are given.
    """
    encode_example(row)
    return Question(row_question_id(row, question_id_column), copy.deepcopy(dict(row)))
