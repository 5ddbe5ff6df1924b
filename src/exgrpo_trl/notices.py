"""What a run says in words: whether replay will happen, why it waits, and at the end whether it did."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from transformers.utils import logging

from .batch import Batch
from .buffer import ReplayBuffer
from .config import ExGRPOConfig
from .saved_state import count_or_none_of, number_of
from .success import SuccessRule

logger: Any = logging.get_logger(__name__)

# Generation batches without a success, or below the pass rate of the delayed start, after which that is said.
_PATIENCE = 10


class Notices:
    """
    Tells what happens, on the main process.

    Args:
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        rule ([`SuccessRule`]):
            What counts as a success.
        requires_success (`bool`):
            Whether nothing is stored without correct completions.
    """

    def __init__(self, args: ExGRPOConfig, rule: SuccessRule, *, requires_success: bool) -> None:
        self.args = args
        self.rule = rule
        self.best_reward: float = -np.inf
        # None once a success was seen or the warning given; continuous rewards need none to be stored.
        needs_success = requires_success or args.replay_start_pass_rate is not None
        self.num_batches_without_success: int | None = 0 if needs_success else None
        self._begin()

    def _begin(self) -> None:
        self._num_batches = self._num_replaying = self._num_replayed = 0
        self._pass_rates: list[float] = []  # of the last batches before the delayed start
        self._has_told_of_waiting = False
        self._num_successes = self._num_infinite = 0  # of fresh completions

    def start(self, buffer: ReplayBuffer, is_started: bool) -> None:
        """Say what is going to happen, before the first batch of a run."""
        self._begin()
        threshold = self.args.replay_start_pass_rate
        when = "" if is_started else f", once its pass rate has exceeded replay_start_pass_rate={threshold:g}"
        told = [
            f"{self._what}{when}.",
            self.rule.description,
            self.rule.way_out,
        ]
        if not is_started and buffer.num_questions:
            told.append(
                f"The experience buffer holds completions of {buffer.num_questions} questions, which wait for that: "
                "replay_start_pass_rate=None uses them at once."
            )
        bounds = (self.args.max_replays, self.args.max_staleness, self.args.max_drift)
        if self.args.replays_groups and bounds == (None, None, None):
            told.append(
                "Nothing bounds how often a group comes back: the same failures, pushed down again and again, have "
                "ruined learning in our benchmark. Set max_replays=1, max_staleness or max_drift."
            )
        if self.args.max_staleness == 0:
            told.append(
                "max_staleness=0 evicts every completion before it can be replayed: use at least 1, or None for no "
                "limit."
            )
        logger.warning(" ".join(told))

    @property
    def _what(self) -> str:
        share = self.args.replay_fraction * self.args.num_groups
        fills = "A stored success takes the place of a failure in groups that fail as a whole"
        if not share:
            return fills
        most = self.args.num_groups_to_replay
        replays = f"Replay takes up to {most} of the {self.args.num_groups} questions of a generation batch"
        if share < most:
            replays += f" ({share:.3g} on average)"
        return f"{replays}; {fills[0].lower()}{fills[1:]}" if self.args.fill_failed_groups else replays

    def observe(self, batch: Batch) -> None:
        """Take note of a batch that is trained."""
        self._num_batches += 1
        self._num_replaying += bool(batch.replays)
        self._num_replayed += len(batch.replays)
        self._num_successes += int(np.count_nonzero(batch.is_correct & batch.is_fresh))
        self._doubt_rewards(batch)
        self._doubt_threshold(batch)
        if not batch.plan.is_started and self.args.replay_start_pass_rate is not None:
            self._pass_rates = [*self._pass_rates, batch.fresh_pass_rate][-_PATIENCE:]
            if len(self._pass_rates) == _PATIENCE and not self._has_told_of_waiting:
                self._has_told_of_waiting = True
                logger.warning(self._waiting())

    def _doubt_rewards(self, batch: Batch) -> None:
        num_infinite = int(np.count_nonzero(np.isinf(batch.rewards) & batch.is_fresh))
        if num_infinite and not self._num_infinite:
            logger.warning(
                f"The rewards of {num_infinite} completions of a generation batch are infinite: they are not stored, "
                "and GRPO has no advantages for their groups. Let the reward functions return numbers, or None."
            )
        self._num_infinite += num_infinite

    def _doubt_threshold(self, batch: Batch) -> None:
        if self.num_batches_without_success is None:
            return
        self.best_reward = np.fmax.reduce(batch.rewards[batch.is_fresh], initial=self.best_reward)
        if batch.is_correct.any():
            self.num_batches_without_success = None
            return
        self.num_batches_without_success += 1
        if self.num_batches_without_success >= _PATIENCE:
            self._warn_no_success()

    def _warn_no_success(self) -> None:
        if np.isneginf(self.best_reward):
            cause = "No completion has got a reward: the reward functions gave None or NaN. Look into them."
        else:
            cause = (
                f"The best reward seen is {self.best_reward:g}. Lower success_threshold. {self.rule.way_out} "
                "Continuous rewards want difficulty='reward_std' with replay_start_pass_rate=None."
            )
        logger.warning(
            f"No completion of {self.num_batches_without_success} generation batches was a success, so nothing was "
            f"stored or replayed. {self.rule.description} {cause}"
        )
        self.num_batches_without_success = None

    def _waiting(self) -> str:
        rates = self._pass_rates
        return (
            f"Replay has not started: the pass rate of the last {len(rates)} generation batches is "
            f"{np.mean(rates):.2g} (at most {max(rates):.2g}), and replay starts above replay_start_pass_rate="
            f"{self.args.replay_start_pass_rate:g}. Lower it, or set it to None to start at once."
        )

    def end(self, buffer: ReplayBuffer, tokens_saved: int) -> None:
        """Say what has happened, at the end of a run."""
        if self.num_batches_without_success:
            self._warn_no_success()
        if not self._num_batches:
            return
        holds = (
            f"The experience buffer holds {sum(1 for _ in buffer.items())} completions of {buffer.num_questions} "
            f"questions; {len(buffer.retired)} questions have retired."
        )
        if self._num_replayed:
            logger.warning(
                f"{self._num_replaying} of {self._num_batches} generation batches replayed {self._num_replayed} "
                f"stored completions; {tokens_saved} tokens were not generated. {holds}"
            )
            return
        if self._pass_rates and not self._has_told_of_waiting:
            logger.warning(self._waiting())
        logger.warning(
            f"Nothing was replayed in {self._num_batches} generation batches, in which {self._num_successes} "
            f"completions were successes. {holds}{self._why_not_stored}"
        )

    @property
    def _why_not_stored(self) -> str:
        if not self._num_successes or not self.args.mask_truncated_completions:
            return ""
        return " Truncated ones are not stored with mask_truncated_completions=True: raise max_completion_length."

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; survives JSON."""
        return {
            "best_reward": None if np.isinf(self.best_reward) else float(self.best_reward),
            "num_batches_without_success": self.num_batches_without_success,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best_reward = -np.inf if state.get("best_reward", 0) is None else number_of(state, "best_reward")
        self.num_batches_without_success = count_or_none_of(state, "num_batches_without_success")
