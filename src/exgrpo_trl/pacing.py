"""How many questions the next generation batch replays, and which of them rest."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from .config import ExGRPOConfig
from .saved_state import count_of, counts_of, number_of


class Pacing:
    """
    Keeps replay at its share of the questions, lets questions rest, and steps back where replay would harm.

    Args:
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
    """

    def __init__(self, args: ExGRPOConfig) -> None:
        self.args = args
        self._share = args.replay_fraction * args.num_groups  # questions of a batch, on average
        self._carried = 0.0
        self._num_halvings = 0
        self._last_replayed: dict[str, int] = {}  # policy version by question, of those that rest

    @property
    def _allowed(self) -> float:
        return max(self._share / 2**self._num_halvings, min(self._share, 1.0))

    @property
    def fraction_allowed(self) -> float:
        """Share of the questions of a batch that may be replayed now, at most `replay_fraction`."""
        return self._allowed / self.args.num_groups

    def next_batch(self) -> int:
        """Most questions that the next batch replays; what is left of one is carried over."""
        quota = self._allowed + self._carried
        # The small addition keeps products such as 0.29 * 100 from falling below their integer.
        num_questions = int(quota + 1e-9)
        self._carried = max(quota - num_questions, 0.0)
        return min(num_questions, self.args.num_groups_to_replay)

    def resting(self, policy_version: int) -> Collection[str]:
        """Questions that were replayed too recently to be drawn now, in the order in which they were."""
        oldest = policy_version - self.args.replay_cooldown
        self._last_replayed = {
            question_id: version for question_id, version in self._last_replayed.items() if version >= oldest
        }
        return self._last_replayed.keys()

    def replayed(self, question_ids: Iterable[str], policy_version: int) -> None:
        """Take note of the questions that a batch of that policy version has replayed."""
        if self.args.replay_cooldown:
            for question_id in question_ids:
                self._last_replayed[question_id] = policy_version

    def observe(self, effective_sample_size: float | None) -> None:
        """Step back or recover, by what a batch has shown: its effective sample size, `None` without a replay."""
        least = self.args.min_effective_sample_size
        if least is None or effective_sample_size is None:
            return
        if effective_sample_size >= least:
            self._num_halvings = max(self._num_halvings - 1, 0)
        elif self._allowed > 1:
            self._num_halvings += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; survives JSON."""
        return {
            "carried": self._carried,
            "num_halvings": self._num_halvings,
            "last_replayed": self._last_replayed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._carried = number_of(state, "carried")
        self._num_halvings = count_of(state, "num_halvings")
        self._last_replayed = counts_of(state, "last_replayed")
