"""Which questions of the training dataset an epoch leaves out, and the sampler that does it."""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from torch.utils.data import Sampler
from transformers.utils import logging

from .config import ExGRPOConfig
from .examples import encode_example
from .questions import TrainingQuestions

logger = logging.get_logger(__name__)


def check_dataset(dataset: Any, args: ExGRPOConfig) -> None:
    """Look for trouble while nothing is lost yet: rows that cannot be saved, ids that identify nothing."""
    if isinstance(dataset, Dataset):
        if len(dataset):
            encode_example(dataset[0])
    elif args.drop_retired_questions and args.retire_solved:
        logger.warning(
            "drop_retired_questions has no effect on an iterable dataset: retired questions leave the buffer, but "
            "still come up in the stream. Set drop_retired_questions=False to silence this."
        )


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
        self.num_retired = 0

    def begin_epoch(self, epoch: int, retired: Collection[str]) -> set[int]:
        """Rows to leave out of an epoch that begins, or that a resumed run is in the middle of."""
        if epoch != self.epoch:
            self.epoch, self.num_retired = epoch, len(retired)
        dropped: set[int] = set()
        for question_id in itertools.islice(retired, self.num_retired):
            rows = self.questions.rows_of(question_id)
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
        self.epoch, self.num_retired = state["epoch"], state["num_retired"]


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
