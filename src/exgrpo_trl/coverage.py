"""Later phases of a curriculum: questions of another dataset that replay has displaced come up in the next epoch."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .saved_state import flag_of, texts_of


class Coverage:
    """
    The questions of a later phase that no completion was generated for yet.

    Replay takes the places of questions of the dataset. In the first phase of a run the paper's order holds; when
    another dataset has been put in place, those that were displaced are dealt evenly over the batches of the next
    epoch, and replay takes the places of others there.

    Attributes:
        is_on (`bool`):
            Whether this is a later phase. The questions are known on the main process alone.
    """

    def __init__(self) -> None:
        self.is_on: bool = False
        self._unseen: dict[str, None] = {}
        self._unseen_at_epoch: list[str] = []

    def begin_phase(self, question_ids: Iterable[str]) -> None:
        """Another dataset has been put in place."""
        self.is_on = True
        self._unseen, self._unseen_at_epoch = dict.fromkeys(question_ids), []

    def begin_epoch(self, *, is_new: bool) -> list[str]:
        """Questions that come up first in an epoch, which begins or is resumed; not in the first one."""
        if is_new:
            self._unseen_at_epoch = list(self._unseen)
        return self._unseen_at_epoch

    def generated(self, question_ids: Iterable[str]) -> None:
        """Take note that completions of these questions were generated for their own row."""
        for question_id in question_ids:
            self._unseen.pop(question_id, None)

    def unseen_groups(self, ids: Iterable[Mapping[int, str]]) -> set[int]:
        """Groups of a batch whose question was never generated; the ids are those of each process, by group."""
        return {
            group for of_process in ids for group, question_id in of_process.items() if question_id in self._unseen
        }

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; survives JSON."""
        return {"is_on": self.is_on, "unseen": list(self._unseen), "unseen_at_epoch": self._unseen_at_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.is_on = flag_of(state, "is_on")
        self._unseen, self._unseen_at_epoch = (
            dict.fromkeys(texts_of(state, "unseen")),
            texts_of(state, "unseen_at_epoch"),
        )


def deal(order: Sequence[int], first: Collection[int], batch_size: int) -> list[int]:
    """An order of whole batches in which the rows that come first are dealt evenly over all batches."""
    # An order of whole batches may lack some of them.
    wanted = list(dict.fromkeys([row for row in order if row in first] + sorted(first)))
    others = [row for row in order if row not in first]
    num_batches = len(order) // batch_size
    dealt: list[int] = []
    for batch in range(num_batches):
        share = wanted[len(wanted) * batch // num_batches : len(wanted) * (batch + 1) // num_batches][:batch_size]
        missing = batch_size - len(share)
        # They come up again where too few others are left.
        dealt += share + (others[:missing] + [row for row in wanted if row not in share])[:missing]
        others = others[missing:]
    return dealt
