"""Which questions of the training dataset an epoch leaves out, and the sampler that does it."""

import copy
import itertools
import operator
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from .config import ExGRPOConfig
from .coverage import deal
from .examples import encode_example, row_question_id
from .images import referenced
from .questions import TrainingQuestions
from .saved_state import count_of, count_or_none_of

logger: Any = logging.get_logger(__name__)

# Features whose values, once decoded, are open files or objects of other libraries.
_MEDIA = ("Audio", "BioSequence", "BioStructure", "Mesh", "Nifti", "Pdf", "Video")
# Attributes of an `ActiveQuestionSampler` that are not those of the sampler that it stands for.
_OWN = frozenset({"_sampler", "_begin_epoch", "_num_rows", "_rows_per_batch", "_seed"})


def check_dataset(dataset: Any, args: ExGRPOConfig) -> None:
    """
    Look for trouble while nothing is lost yet: rows that cannot be saved, ids that identify nothing.

    Args:
        dataset ([`~datasets.Dataset`] or anything else that TRL trains on):
            Training dataset, with the columns that the data loader will see.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.

    Raises:
        TypeError: if a column holds what cannot be saved.
        ValueError: if the ids of `args.question_id_column` identify nothing.
    """
    if isinstance(dataset, Dataset):
        _check_features(dataset)
        if len(dataset):
            # As the data loader gets it: where a formatter or a transform decides what a row is, no schema tells.
            row = dataset.__getitems__([0])[0]
            encode_example(referenced(row))  # without the images, which it takes a moment to encode
            row_question_id(row, args.question_id_column)
    elif args.drop_retired_questions and args.retire_solved:
        logger.warning(
            "drop_retired_questions has no effect on an iterable dataset: retired questions leave the buffer, but "
            "still come up in the stream. Set drop_retired_questions=False to silence this."
        )


def undecodable_row(dataset: Any) -> tuple[int, Exception] | None:
    """First row that cannot be read, and why; for a message, as it reads all rows before."""
    for row in range(len(dataset)):
        try:
            dataset.__getitems__([row])
        except Exception as error:
            return row, error
    return None


def _check_features(dataset: Dataset) -> None:
    """Refuse columns whose type cannot be saved, whichever rows are null."""
    row_format = dataset.format
    if row_format["type"] == "custom":
        return
    columns = dataset.column_names if row_format["output_all_columns"] else row_format["columns"]
    for column in columns:
        media = _media_in(dataset.features[column])
        if media is not None:
            raise TypeError(
                f"Column {column!r} of the training dataset holds {media}, which an experience buffer cannot save. "
                f"Drop the column, cast it to {media}(decode=False), set remove_unused_columns=True if no reward "
                "function needs it, or set replay_fraction=0."
            )


def _media_in(feature: Any) -> str | None:
    """Name of a type in a column's feature, nested to any depth, whose values cannot be saved."""
    if isinstance(feature, Mapping):
        parts = list(feature.values())
    elif isinstance(feature, list | tuple):
        parts = list(feature)
    else:
        name = type(feature).__name__
        if name in _MEDIA and getattr(feature, "decode", True):
            return name
        parts = [feature.feature] if hasattr(feature, "feature") else []
    return next((media for part in parts if (media := _media_in(part)) is not None), None)


class DroppedQuestions:
    """
    Which rows of a training dataset an epoch leaves out: those of the questions that were retired when it began.

    Args:
        questions ([`TrainingQuestions`]):
            Questions of the training dataset.
        min_rows (`int`):
            Rows that always stay: the questions of one generation batch. Below that the dataset stops shrinking, as in
            the released code of the paper.
    """

    def __init__(self, questions: TrainingQuestions, min_rows: int) -> None:
        self.questions = questions
        self.min_rows = min_rows
        self.epoch: int | None = None
        self.num_retired: int = 0

    def begin_epoch(self, epoch: int, retired: Collection[str]) -> set[int]:
        """Rows to leave out of an epoch that begins, or that a resumed run is in the middle of."""
        if epoch != self.epoch:
            self.epoch, self.num_retired = epoch, len(retired)
        dropped: set[int] = set()
        for question_id in itertools.islice(retired, self.num_retired):
            rows = self.questions.rows_of(question_id)
            if not rows:
                continue
            if len(dropped) + len(rows) > len(self.questions.dataset) - self.min_rows:
                logger.warning_once(
                    "Fewer questions than one generation batch would be left after dropping the retired ones. Some "
                    "retired questions stay in the dataset, so that training does not run dry."
                )
                break
            dropped.update(rows)
        return dropped

    def state_dict(self) -> dict[str, int | None]:
        """What a checkpoint has to hold; survives JSON."""
        return {"epoch": self.epoch, "num_retired": self.num_retired}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.epoch, self.num_retired = count_or_none_of(state, "epoch"), count_of(state, "num_retired")


class ActiveQuestionSampler(Sampler[int]):
    """
    Stands in for a training sampler and leaves out the questions that were retired before the epoch began.

    Everything else is the sampler's: its attributes are read and set through this one, which is an instance of its
    class to `isinstance`. The length of an epoch stays what it was, so that step counts and learning-rate schedules
    hold. The order is a function of the sampler, the seed, the epoch and the retired questions alone, so a resumed run
    repeats it.

    - TRL's own sampler: the active questions come up more often instead, in a new order on every pass. As long as
      nothing is retired the first epoch is TRL's.
    - Any other one keeps its order; only its retired rows give way to active ones, whole groups at a time.

    Args:
        sampler ([`~torch.utils.data.Sampler`]):
            Sampler over the whole dataset.
        begin_epoch (`Callable[[], tuple[int, set[int], set[int]]]`):
            Called when an epoch begins; returns its number, the dataset indices to leave out, and those that must come
            up.
        num_rows (`int`):
            Rows of the dataset.
        rows_per_batch (`int`):
            Rows of a generation batch of all processes, repetitions included.
        seed (`int`):
            Seed of what takes the place of retired rows.
    """

    def __init__(
        self,
        sampler: Any,
        begin_epoch: Callable[[], tuple[int, set[int], set[int]]],
        num_rows: int,
        rows_per_batch: int,
        seed: int,
    ) -> None:
        self._sampler = sampler
        self._begin_epoch = begin_epoch
        self._num_rows = num_rows
        self._rows_per_batch = rows_per_batch
        self._seed = seed

    # Everything but the order

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return type(self._sampler)

    def __getattr__(self, name: str) -> Any:
        # Not what Python looks for by itself, and nothing of one that is only being built, as copies are.
        if name in _OWN or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self._sampler, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN:
            super().__setattr__(name, value)
        else:
            setattr(self._sampler, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._sampler, name)

    def __len__(self) -> int:
        return len(self._sampler)

    def __copy__(self) -> "ActiveQuestionSampler":
        return self._around(copy.copy(self._sampler))

    def __deepcopy__(self, memo: dict[int, Any]) -> "ActiveQuestionSampler":
        return self._around(copy.deepcopy(self._sampler, memo))  # not what it asks: the trainer, with its model

    def __reduce__(self) -> tuple[Any, ...]:
        own = self._sampler, self._begin_epoch, self._num_rows, self._rows_per_batch, self._seed
        return ActiveQuestionSampler, own

    def _around(self, sampler: Any) -> "ActiveQuestionSampler":
        return ActiveQuestionSampler(sampler, *self.__reduce__()[1][1:])

    # The order

    def __iter__(self) -> Iterator[int]:
        epoch, dropped, first = self._begin_epoch()
        is_of_trl = type(self._sampler).__iter__ is RepeatSampler.__iter__
        if not dropped and (epoch == 0 or not is_of_trl):
            yield from self._sampler
        elif is_of_trl:
            yield from self._drawn_anew(epoch, dropped, first)
        else:
            yield from self._substituted(epoch, dropped)

    def _drawn_anew(self, epoch: int, dropped: set[int], first: set[int]) -> Iterator[int]:
        """TRL's order, over a list of active questions that is as long as the dataset."""
        order = self._order(epoch, dropped)
        if first:
            order = deal(order, first - dropped, self._sampler.batch_size)
        repeated = RepeatSampler(
            data_source=order,
            mini_repeat_count=self._sampler.mini_repeat_count,
            batch_size=self._sampler.batch_size,
            repeat_count=self._sampler.repeat_count,
            shuffle=False,
        )
        for position in repeated:
            yield order[position]

    def _order(self, epoch: int, dropped: set[int]) -> Sequence[int]:
        batch_size, num_samples = self._sampler.batch_size, self._sampler.num_samples
        active = [index for index in range(num_samples) if index not in dropped]
        # A batch that too few are left for is filled with retired ones.
        num_missing = max(0, min(batch_size, num_samples) - len(active))
        active += sorted(set(range(num_samples)) & dropped)[:num_missing]
        # Whole batches only, as TRL does, so that no batch holds a question twice.
        per_pass = len(active) // batch_size * batch_size
        length = num_samples // batch_size * batch_size
        rng = np.random.default_rng([self._sampler.seed or 0, epoch])
        order: list[int] = []
        while len(order) < length:
            order += (rng.permutation(active) if self._sampler.shuffle else np.array(active))[:per_pass].tolist()
        return order[:length]

    def _substituted(self, epoch: int, dropped: set[int]) -> Iterator[int]:
        """The order of any sampler, batch by batch: it may be endless, or look at what training does meanwhile."""
        rng = np.random.default_rng([self._seed, epoch])
        waiting = deque(rng.permutation([row for row in range(self._num_rows) if row not in dropped]).tolist())
        batch: list[int] = []
        substitutes: dict[int, int] = {}
        rows = map(operator.index, self._sampler)
        while following := list(itertools.islice(rows, self._rows_per_batch)):
            if following != batch:  # a batch that comes again stays what it was
                # So does a question that goes on from the batch before.
                kept = {row: substitutes[row] for row in batch[-1:] if row == following[0] and row in substitutes}
                batch, substitutes = following, kept
                taken = set(batch) - dropped | set(kept.values())
                for row in dict.fromkeys(batch):
                    if row not in dropped or row in kept:
                        continue
                    # The one that has waited longest of those that the batch does not hold; a retired one stays if all
                    # are in it.
                    other = next((other for other in waiting if other not in taken), None)
                    if other is not None:
                        waiting.remove(other)
                        waiting.append(other)
                        taken.add(other)
                        substitutes[row] = other
            yield from (substitutes.get(row, row) for row in batch)
