"""Rows of a user as completions of questions: what is in them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ExperienceBufferError
from ..images import images_in
from ..records import Question
from .continuations import Continuations
from .own_checks import LOGPS, Rules, bucket_of, checked_ids, checked_logps, group_of, reward_of
from .report import RefusedRow
from .settings import GROUP

if TYPE_CHECKING:
    from datasets import Dataset

# What a row says of its completion; the others are those of its question.
OWN_COLUMNS = frozenset({"completion", "completion_ids", "reward", LOGPS, "num_correct", "group_size", "group"})
_ROWS_AT_ONCE = 256


@dataclass(slots=True)
class OwnRow:
    """
    A completion of a user.

    Args:
        row (`int`):
            Number of its row in the dataset.
        question ([`Question`]):
            Its question.
        reward (`float`):
            Its reward.
        is_success (`bool`):
            Whether that is a success.
        bucket (`int` or `None`):
            Bucket of its question, where the row tells the pass rate.
        group (`int` or `None`):
            Number of its group.
        prompt_ids (`list[int]` or `None`):
            Tokens of its prompt; `None` without a tokenizer.
        token_ids (array of shape `(num_tokens,)`):
            Its tokens.
        logps (array of shape `(num_tokens,)` or `None`):
            Log-probabilities of the tokens under the policy that generated them, nats; `None` if unknown.
    """

    row: int
    question: Question
    reward: float
    is_success: bool
    bucket: int | None
    group: int | None
    prompt_ids: list[int] | None
    token_ids: NDArray[np.int64]
    logps: NDArray[np.float32] | None


def is_own(dataset: Any) -> bool:
    """Whether a dataset is one of a user, not one that [`~ExperienceBuffer.to_dataset`] made."""
    names = set(dataset.column_names)
    return bool(names & {"completion", "completion_ids"}) and not {"example", "token_ids"} <= names


def read_own_rows(
    dataset: Dataset,
    rules: Rules,
    find: Callable[[Mapping[str, Any]], Question],
    render: Callable[[Sequence[Question]], list[list[int]]] | None,
    continuations: Continuations | None,
) -> tuple[list[OwnRow], list[RefusedRow]]:
    """
    The rows of a dataset that hold a completion, failures included, and those that do not.

    Args:
        dataset (`datasets.Dataset`):
            Dataset with a completion in every row.
        rules ([`Rules`]):
            What rows must be.
        find (`Callable`):
            Question of a row; raises where there is none.
        render (`Callable`, *optional*):
            Tokens of the prompts of questions. Without it, prompts stay unknown.
        continuations ([`Continuations`], *optional*):
            Tokenizes completions that are no token ids.

    Raises:
        ExperienceBufferError: if the dataset lacks a column.
    """
    _check_columns(dataset, rules, can_tokenize=continuations is not None)
    names = [name for name in dataset.column_names if name != "provenance"]
    rows, refused = list[OwnRow](), list[RefusedRow]()
    prompts: dict[str, list[int] | ValueError] = {}
    first = 0
    for batch in dataset.with_format(None).select_columns(names).iter(batch_size=_ROWS_AT_ONCE):
        contents = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = _found(contents, rules, find)
        _render_prompts([of.question for of in found.values() if isinstance(of, OwnRow)], render, prompts)
        for number, of_one in _with_tokens(contents, found, prompts, rules, continuations):
            if isinstance(of_one, OwnRow):
                of_one.row = first + number
                rows.append(of_one)
            else:
                refused.append(RefusedRow(first + number, str(of_one).rstrip(".")))
        first += len(contents)
    return rows, refused


def _check_columns(dataset: Dataset, rules: Rules, *, can_tokenize: bool) -> None:
    names = set(dataset.column_names)
    completions = names & {"completion", "completion_ids"}
    missing = [] if completions else ["completion (or completion_ids)"]
    missing += [] if "reward" in names else ["reward"]
    missing += ["group"] if rules.unit == GROUP and "group" not in names else []
    if missing:
        raise ExperienceBufferError(
            f"The dataset lacks the columns {', '.join(missing)}; it has {dataset.column_names}. Every row needs its "
            "question (prompt), a completion and its reward, and a number of its group where whole groups are stored."
        )
    if completions == {"completion"} and not can_tokenize:
        raise ExperienceBufferError(
            "The completions are text. Pass tokenizer=..., or give token ids in a column completion_ids."
        )


def _found(
    contents: Sequence[Mapping[str, Any]], rules: Rules, find: Callable[[Mapping[str, Any]], Question]
) -> dict[int, OwnRow | Exception]:
    """Question, reward and standing of each row, or what is wrong with them."""
    found: dict[int, OwnRow | Exception] = {}
    for number, content in enumerate(contents):
        try:
            question = find(content)
            if question.example["prompt"] is None:
                raise ValueError("it has no prompt")
            if any(images_in(question.example)):
                raise ValueError("its question shows images, which completions from elsewhere are not stored for")
            reward = reward_of(content)
            found[number] = OwnRow(
                number,
                question,
                reward,
                rules.is_success(reward),
                bucket_of(content, rules),
                group_of(content),
                None,
                np.zeros(0, np.int64),
                None,
            )
        except (TypeError, ValueError, KeyError) as error:
            found[number] = error
    return found


def _render_prompts(
    questions: Sequence[Question],
    render: Callable[[Sequence[Question]], list[list[int]]] | None,
    known: dict[str, list[int] | ValueError],
) -> None:
    if render is None:
        return
    new = {question.question_id: question for question in questions if question.question_id not in known}
    try:
        known |= zip(new, render(list(new.values())) if new else [], strict=True)
    except Exception:  # a chat template raises what it likes; which prompt was it?
        for question_id, question in new.items():
            try:
                [known[question_id]] = render([question])
            except Exception as error:
                known[question_id] = ValueError(f"its prompt cannot be rendered ({type(error).__name__}: {error})")


def _with_tokens(
    contents: Sequence[Mapping[str, Any]],
    found: Mapping[int, OwnRow | Exception],
    prompts: Mapping[str, list[int] | ValueError],
    rules: Rules,
    continuations: Continuations | None,
) -> Iterator[tuple[int, OwnRow | Exception]]:
    """The rows with their tokens, or what is wrong with these."""
    ends = () if continuations is None else continuations.eos_token_ids
    is_text = {number for number in found if contents[number].get("completion_ids") is None}
    ids: dict[int, Any] = {n: contents[n]["completion_ids"] for n in found if n not in is_text}
    to_tokenize: dict[int, tuple[Any, list[int], Any]] = {}
    for number, of_one in found.items():
        prompt = prompts.get(of_one.question.question_id) if isinstance(of_one, OwnRow) else None
        if number in is_text and isinstance(of_one, OwnRow) and isinstance(prompt, list):
            to_tokenize[number] = of_one.question.example["prompt"], prompt, contents[number].get("completion")
    if continuations is not None and to_tokenize:
        ids |= zip(to_tokenize, continuations.completion_ids(*zip(*to_tokenize.values(), strict=True)), strict=True)
    for number, of_one in found.items():
        if not isinstance(of_one, OwnRow):
            yield number, of_one
            continue
        prompt = prompts.get(of_one.question.question_id)
        completion: Any = prompt if isinstance(prompt, ValueError) else ids.get(number, ())
        try:
            if isinstance(completion, ValueError):
                raise completion
            of_one.prompt_ids = prompt if isinstance(prompt, list) else None
            of_one.token_ids = checked_ids(completion, len(of_one.prompt_ids or ()), rules, ends)
            of_one.logps = checked_logps(contents[number].get(LOGPS), len(of_one.token_ids))
            yield number, of_one
        except (TypeError, ValueError) as error:
            yield number, error
