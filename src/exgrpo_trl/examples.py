"""Dataset rows: the id of a question, and codecs that keep a row as text and give it back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from .images import StoredImage, images_in, opened, pixel_digest, referenced, stored
from .records import Experience, Question
from .values import copied, from_json, plain, to_json, to_text

# Of rows whose environment owns the data.
NO_PROMPT = ""
# Made once: `json.dumps` makes an encoder for every prompt.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def question_id_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """
    Identifier of a question that depends on its prompt only.

    Equal prompts have equal ids in every process and every run; the order of the keys inside a message does not
    matter.

    Args:
        prompt (`str` or `list[dict]`):
            Plain or conversational prompt. NumPy values, tensors and tuples in it count as the plain Python values
            that they stand for: a formatted dataset has the ids of the unformatted one.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        TypeError: if the prompt is neither text nor a list of messages, or holds a value that JSON cannot carry.
    """
    unformatted = referenced(plain(prompt))
    if not isinstance(unformatted, str | list):
        raise TypeError(
            f"A prompt must be a string or a list of messages, got {type(prompt).__name__}. "
            "Set `question_id_column` if questions are identified by another column."
        )
    if isinstance(unformatted, list):
        unformatted = [dict(message) for message in unformatted]
    canonical = _CANONICAL.encode(to_json(unformatted, "prompt"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def encode_example(example: Mapping[str, Any]) -> str:
    """
    JSON text of a dataset row; [`decode_example`] gives the row back exactly: values, types, dtypes and shapes.

    Args:
        example (`Mapping[str, Any]`):
            Row of `str`, `int`, `float` (NaN and infinities too), `complex`, `bool`, `None`, `bytes`, `Decimal`,
            `datetime`, `date`, `time`, `timedelta`, `list`, `tuple`, `dict`, `set` and `frozenset` values, NumPy
            scalars and arrays, dense torch tensors (which come back on the CPU, without gradient), images
            (which come back as [`StoredImage`]), and pandas' `Timestamp`, `Timedelta`, `NaT` and `NA`; nested to any
            depth.

    Raises:
        TypeError: if a column holds any other type, subclasses of these included, or is nested more than 200 levels
            deep as JSON.
    """
    if not all(type(column) is str for column in example):
        raise TypeError(f"The columns of an example must be strings, got {list(example)}.")
    return to_text(dict(example))


def decode_example(text: str) -> dict[str, Any]:
    """
    Row that [`encode_example`] turned into `text`.

    This never imports torch. As long as nothing else has, tensors come as NumPy arrays: bfloat16 as float32, any other
    dtype that NumPy lacks as its bytes.

    Args:
        text (`str`):
            Output of [`encode_example`].

    Raises:
        ValueError: if `text` is not the JSON of a row.
    """
    example = from_json(text)
    if not isinstance(example, dict):
        raise ValueError(f"An encoded example must be a JSON object, got {text[:80]!r}.")
    return example


def row_question_id(row: Mapping[str, Any], question_id_column: str | None, index: int | None = None) -> str:
    """Id of the question of a dataset row; the index of the row, if known, is for the message."""
    if question_id_column is None:
        return question_id_of(_own_prompt(row))
    value = plain(row.get(question_id_column))
    if value is None:
        where = f"the row with prompt {str(row.get('prompt'))[:80]!r}" if index is None else f"row {index}"
        raise ValueError(
            f"question_id_column={question_id_column!r} has no value in {where} of the training dataset, which has "
            f"{sorted(row)} for the data loader (see remove_unused_columns). Name a column that every row fills, or "
            "use None to identify questions by their prompt."
        )
    return str(value)


def dataset_question_ids(dataset: Any, question_id_column: str | None) -> list[str]:
    """Ids of all questions of a map-style dataset, in row order; its format does not matter."""
    rows = dataset
    if dataset.format["type"] != "custom":  # a transform may give the rows columns that the dataset has not
        if question_id_column is not None and question_id_column not in dataset.column_names:
            raise ValueError(
                f"question_id_column={question_id_column!r} is not a column of the training dataset, which has "
                f"{dataset.column_names} for the data loader (see remove_unused_columns). Name one of these, or use "
                "None to identify questions by their prompt."
            )
        # Without the format: to make arrays of all rows takes several times longer.
        wanted = {question_id_column or "prompt", "prompt"} & set(dataset.column_names)
        if not wanted:
            return [question_id_of(NO_PROMPT)] * len(dataset)
        rows = dataset.with_format(None).select_columns(sorted(wanted))
    if question_id_column is None and rows is dataset:
        return [question_id_of(_own_prompt(row)) for row in rows]
    if question_id_column is None:
        return [question_id_of(prompt) for batch in rows.iter(batch_size=1000) for prompt in batch["prompt"]]
    question_ids = []
    first_prompts: dict[str, str] = {}
    for index, row in enumerate(rows):
        question_id, prompt_hash = row_question_id(row, question_id_column, index), question_id_of(_own_prompt(row))
        question_ids.append(question_id)
        if first_prompts.setdefault(question_id, prompt_hash) != prompt_hash:
            raise ValueError(
                f"question_id_column={question_id_column!r} gives the id {question_id!r} to two different prompts. "
                "Give every prompt an id of its own, or use None to identify questions by their prompt."
            )
    return question_ids


def _own_prompt(row: Mapping[str, Any]) -> Any:
    return NO_PROMPT if row.get("prompt") is None else row["prompt"]


def canonical_rest(row: Mapping[str, Any]) -> str:
    """Text of a row without its prompt that is the same for equal rows, whatever their format and order of columns."""
    return encode_example({column: referenced(plain(row[column])) for column in sorted(row) if column != "prompt"})


def placed_row(
    example: Mapping[str, Any], like: Mapping[str, Any], stored: Experience | None = None
) -> dict[str, Any]:
    """
    A row of a replayed question, in a copy that reward functions may write into.

    It has the columns of the row whose place it takes; in a stream of ragged rows it may lack one, which is then None.

    Args:
        example (`Mapping[str, Any]`):
            Row of the question, its images decoded.
        like (`Mapping[str, Any]`):
            Row whose place it takes.
        stored ([`Experience`], *optional*):
            Stored completion that it shows, with its prompt as the environment showed it.
    """
    row = {column: copied(example.get(column)) for column in like}
    prompt = None if stored is None or stored.details is None else stored.details.prompt
    return row if prompt is None else row | {"prompt": opened(prompt)}


def question_of_row(row: Mapping[str, Any], question_id: str) -> Question:
    """
    Question of a dataset row, with a copy of the row: reward functions may write into the rows that they are given.

    Raises:
        TypeError: if a column holds what cannot be stored.
    """
    return Question(question_id, with_prompt(copied(dict(row))))


def with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with a prompt, None if it has none of its own: environments may own the data."""
    return row if "prompt" in row else row | {"prompt": None}


def shown_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that may show images."""
    return {column: row[column] for column in ("prompt", "image", "images") if column in row}


def image_digests(row: Mapping[str, Any]) -> list[str]:
    """Hashes of the images that a row shows: in its prompt and its image columns."""
    return [getattr(image, "digest", None) or pixel_digest(image) for image in images_in(shown_columns(row))]


def packed(
    question: Question,
    known: MutableMapping[str, StoredImage] | None = None,
    originals: Callable[[], list[bytes]] = list,
) -> Question:
    """The question with its images encoded, see [`stored`]."""
    example = stored(question.example, known, originals)
    return question if example is question.example else Question(question.question_id, example)
