"""Questions of the training dataset: their ids, and the sampler that leaves retired ones out."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from .experience import question_id_of


def row_question_id(row: Mapping[str, Any], question_id_column: str | None) -> str:
    """
    Id of the question of a dataset row.

    Args:
        row (`Mapping`):
            Dataset row.
        question_id_column (`str` or `None`):
            Column that holds the id. `None` hashes the prompt.

    Returns:
        `str`:
            The id.

    Raises:
        `ValueError`:
            When the column is missing or empty in this row.
    """
    if question_id_column is None:
        return question_id_of(row["prompt"])
    if row.get(question_id_column) is None:
        raise ValueError(
            f"question_id_column={question_id_column!r} is missing from a row of the training dataset, which has "
            f"{sorted(row)}. Name a column that every row fills, or use None to identify questions by their prompt."
        )
    return str(row[question_id_column])


def dataset_question_ids(dataset: Any, question_id_column: str | None) -> list[str]:
    """
    Ids of all questions of a map-style dataset, in row order.

    Args:
        dataset ([`~datasets.Dataset`]):
            Training dataset.
        question_id_column (`str` or `None`):
            Column that holds the id. `None` hashes the prompt.

    Returns:
        `list[str]`:
            One id per row.

    Raises:
        `ValueError`:
            When the column does not exist, is empty in a row, or gives one id to two different prompts.
    """
    if question_id_column is None:
        return [question_id_of(prompt) for prompt in dataset["prompt"]]
    if question_id_column not in dataset.column_names:
        raise ValueError(
            f"question_id_column={question_id_column!r} is not a column of the training dataset, which has "
            f"{dataset.column_names}. Name one of these, or use None to identify questions by their prompt."
        )
    rows = dataset.select_columns(sorted({question_id_column, "prompt"}))
    question_ids = [row_question_id(row, question_id_column) for row in rows]
    first_prompts: dict[str, str] = {}
    for question_id, prompt in zip(question_ids, rows["prompt"], strict=True):
        prompt_hash = question_id_of(prompt)
        if first_prompts.setdefault(question_id, prompt_hash) != prompt_hash:
            raise ValueError(
                f"question_id_column={question_id_column!r} gives the id {question_id!r} to two different prompts. "
                "Give every prompt an id of its own, or use None to identify questions by their prompt."
            )
    return question_ids


class ActiveQuestionSampler(Sampler[int]):
    """
    Wraps TRL's training sampler and leaves out the questions that were retired before the epoch began.

    The length of an epoch stays what it was, so that step counts and learning-rate schedules hold; the active
    questions come up more often instead, in a new order on every pass. As long as nothing is retired the first epoch
    is TRL's own. The order is a function of seed, epoch and retired questions alone, so a resumed run repeats it.

    Args:
        sampler ([`~trl.trainer.utils.RepeatSampler`]):
            TRL's sampler over the whole dataset.
        begin_epoch (`Callable[[], tuple[int, set[int]]]`):
            Called when an epoch begins; returns its number and the dataset indices to leave out.
    """

    def __init__(self, sampler: Any, begin_epoch: Callable[[], tuple[int, set[int]]]) -> None:
        self.sampler = sampler
        self.begin_epoch = begin_epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        epoch, dropped = self.begin_epoch()
        if epoch == 0 and not dropped:
            yield from self.sampler
            return
        order = self._order(epoch, dropped)
        repeated = type(self.sampler)(
            data_source=order,
            mini_repeat_count=self.sampler.mini_repeat_count,
            batch_size=self.sampler.batch_size,
            repeat_count=self.sampler.repeat_count,
            shuffle=False,
        )
        for position in repeated:
            yield order[position]

    def _order(self, epoch: int, dropped: set[int]) -> Sequence[int]:
        batch_size, num_samples = self.sampler.batch_size, self.sampler.num_samples
        active = np.array([index for index in range(num_samples) if index not in dropped])
        # Whole batches only, as TRL does, so that no batch holds a question twice.
        per_pass = len(active) // batch_size * batch_size
        length = num_samples // batch_size * batch_size
        rng = np.random.default_rng([self.sampler.seed or 0, epoch])
        order: list[int] = []
        while len(order) < length:
            order += (rng.permutation(active) if self.sampler.shuffle else active)[:per_pass].tolist()
        return order[:length]
