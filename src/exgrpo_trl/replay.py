"""What is replayed when, and what is collected: the decisions of the main process, free of TRL and of processes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .config import ExGRPOConfig
from .experience import Candidate
from .monitoring import ReplayMetrics
from .protocols import ReplayBuffer
from .rollouts import PendingBatch, Records, Replay, fresh_rollouts, plan_rows
from .sampling import CompletionSelector, QuestionSampler, requires_scores

logger = logging.get_logger(__name__)

# Generation batches without a single success after which the threshold is doubted.
_PATIENCE = 10


class Replayer:
    """
    Draws stored completions for a generation batch and collects the successes of the one before.

    Args:
        buffer ([`ReplayBuffer`]):
            Experience buffer.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        question_sampler ([`QuestionSampler`]):
            Draws questions.
        completion_selector ([`CompletionSelector`]):
            Picks one of the stored completions of a question.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        args: ExGRPOConfig,
        question_sampler: QuestionSampler,
        completion_selector: CompletionSelector,
    ) -> None:
        self.buffer = buffer
        self.args = args
        self.question_sampler = question_sampler
        self.completion_selector = completion_selector
        self.rng = np.random.default_rng([args.seed, 1])  # a stream apart from the buffer's
        self.metrics = ReplayMetrics()
        self.is_started = args.replay_start_pass_rate is None
        self.tokens_saved = 0
        self._replays: list[Replay] = []  # of the batch that is not collected yet
        self._best_reward = -np.inf
        # None once a success was seen or the warning given; continuous rewards need no success to be stored.
        needs_success = args.difficulty == "success_rate" or not self.is_started
        self._num_batches_without_success: int | None = 0 if needs_success else None
        self._version_offset = 0

    def begin_training(self) -> None:
        """Let policy versions go on above those in the buffer, so that no stored completion comes from the future."""
        stored = [
            experience.policy_version
            for question_ids in self.buffer.buckets().values()
            for question_id in question_ids
            for experience in self.buffer.completions(question_id)
        ]
        self._version_offset = max(stored) + 1 if stored else 0

    def policy_version(self, global_step: int) -> int:
        """Version of the policy after `global_step` optimizer steps of this run."""
        return self._version_offset + global_step

    def draw(self, most: int, policy_version: int) -> dict[str, list[Candidate]]:
        """
        Draw the questions that a generation batch replays (method, section 3).

        Args:
            most (`int`):
                Most questions to draw.
            policy_version (`int`):
                Optimizer steps taken so far.

        Returns:
            `dict[str, list[Candidate]]`:
                Candidates by question, without scores; empty before the delayed start.

        Raises:
            `ValueError`:
                When a custom buffer returns too many, duplicate or unknown questions.
        """
        return {
            question_id: [Candidate(experience, None, None) for experience in self.buffer.completions(question_id)]
            for question_id in self._draw_questions(most, policy_version)
        }

    def to_score(self, candidates: Mapping[str, list[Candidate]]) -> list[tuple[str, Candidate]]:
        """Question and candidate of every candidate that the choice depends on: none where there is no choice."""
        if not requires_scores(self.completion_selector):
            return []
        return [(question_id, c) for question_id, choices in candidates.items() if len(choices) > 1 for c in choices]

    def select(self, candidates: Mapping[str, Sequence[Candidate]], num_groups: int) -> list[Replay]:
        """
        Choose one completion per drawn question, and its row (method, section 4).

        Args:
            candidates (`Mapping[str, Sequence[Candidate]]`):
                Candidates by question, with scores where the choice depends on them.
            num_groups (`int`):
                Groups in the batch.

        Returns:
            `list[Replay]`:
                Ascending by row.

        Raises:
            `ValueError`:
                When a custom selector returns no index of a candidate.
        """
        scored = sum(choice.entropy is not None for choices in candidates.values() for choice in choices)
        self.metrics.add(replay__candidates_scored=scored)
        if not candidates:
            return []
        rows = plan_rows(num_groups, self.args.num_generations, len(candidates), self.rng)
        return [self._select(*drawn, row) for row, drawn in zip(rows, candidates.items(), strict=True)]

    def _draw_questions(self, most: int, policy_version: int) -> list[str]:
        if not self.is_started:
            return []
        if self.args.max_staleness is not None:
            self.buffer.evict_older_than(policy_version - self.args.max_staleness)
        n = min(most, self.buffer.num_questions)
        if n == 0:
            return []
        question_ids = list(self.buffer.sample_questions(n, self.question_sampler))
        source = f"{type(self.buffer).__name__}.sample_questions({n})"
        if len(question_ids) > n:
            raise ValueError(f"{source} returned {len(question_ids)} questions. Return at most {n}.")
        duplicates = {question_id for question_id in question_ids if question_ids.count(question_id) > 1}
        if duplicates:
            raise ValueError(f"{source} returned {sorted(duplicates)} more than once. Return distinct question ids.")
        for question_id in question_ids:
            try:
                is_known = len(self.buffer.completions(question_id)) > 0
            except KeyError:
                is_known = False
            if not is_known:
                raise ValueError(
                    f"{source} returned {question_id!r}, which has no stored completion. Return ids of stored ones."
                )
        return question_ids

    def _select(self, question_id: str, choices: Sequence[Candidate], row: int) -> Replay:
        index = self.completion_selector(choices, self.rng) if len(choices) > 1 else 0
        if not 0 <= index < len(choices):
            raise ValueError(
                f"The completion selector returned {index!r} for {len(choices)} candidates. Return the index of one."
            )
        return Replay(self.buffer.question(question_id), choices[index].experience, row, choices[index].entropy)

    def observe(self, batch: PendingBatch, replays: Sequence[Replay]) -> None:
        """Take note of a scored generation batch and of what was replayed in it."""
        self._replays = list(replays)
        is_fresh = fresh_rollouts(replays, batch.rewards.shape)
        fresh = np.where(is_fresh, batch.rewards, np.nan)
        self.tokens_saved += sum(replay.experience.num_tokens for replay in replays)
        self.metrics.add(
            fresh__pass_rate=float(batch.is_correct[is_fresh].mean()),
            fresh__reward=_nanmean(fresh),
            fresh__reward_std=_nanmean(np.nanstd(fresh[~np.isnan(fresh).all(axis=1)], axis=1)),
            fresh__frac_groups_without_signal=float(np.mean(_has_no_signal(fresh))),
            replay__active=float(self.is_started),
            replay__fraction=len(replays) / len(batch.rewards),
        )
        if replays:
            groups = [replay.row // self.args.num_generations for replay in replays]
            staleness = [batch.policy_version - replay.experience.policy_version for replay in replays]
            entropies = [replay.entropy for replay in replays if replay.entropy is not None]
            self.metrics.add(
                replay__reward=_nanmean(batch.rewards[~is_fresh]),
                replay__group_pass_rate=float(batch.is_correct[groups][is_fresh[groups]].mean()),
                replay__staleness_mean=float(np.mean(staleness)),
                replay__staleness_max=max(staleness),
                replay__entropy=float(np.mean(entropies)) if entropies else np.nan,
            )
        self._doubt_threshold(fresh, bool(batch.is_correct.any()))

    def collect(self, batch: PendingBatch, records: Records) -> None:
        """
        Bring a batch into the buffer (method, section 2), retire solved questions, start replay if due.

        The comparison of the delayed start comes last: the batch that crosses the threshold is not collected.

        Args:
            batch (`PendingBatch`):
                The batch that was observed last.
            records (`Records`):
                What all processes know of it.
        """
        replays, self._replays = self._replays, []
        is_fresh = fresh_rollouts(replays, batch.rewards.shape)
        evicted = 0
        for replay in replays:
            group = replay.row // self.args.num_generations
            if not batch.counts.flat[replay.row]:
                evicted += self.buffer.evict(replay.question.question_id, replay.experience)
            if batch.has_success[group]:
                records.questions[group] = replay.question
        for collected in batch.groups(records, is_fresh):
            if self.is_started:
                self.buffer.collect(
                    collected.question,
                    collected.experiences,
                    num_correct=collected.num_correct,
                    group_size=self.args.num_generations,
                    bucket=collected.bucket,
                )
            elif collected.is_solved and self.args.retire_solved:
                self.buffer.retire(collected.question.question_id)
        self.metrics.add(replay__evicted_incorrect=evicted)
        if not self.is_started:
            pass_rate = float(batch.is_correct[is_fresh].mean())
            self.is_started = pass_rate > self.args.replay_start_pass_rate  # type: ignore[operator]

    def log_metrics(self) -> dict[str, float]:
        """Metrics since the last log line, and the present size of the buffer."""
        sizes = {f"replay/{name}": value for name, value in self.buffer.metrics().items()}
        return self.metrics.flush() | sizes | {"replay/tokens_saved": float(self.tokens_saved)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the buffer; survives JSON."""
        return {
            "is_started": self.is_started,
            "tokens_saved": self.tokens_saved,
            "rng": self.rng.bit_generator.state,
            "best_reward": None if np.isinf(self._best_reward) else float(self._best_reward),
            "num_batches_without_success": self._num_batches_without_success,
            "version_offset": self._version_offset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._replays = []
        self.is_started = state["is_started"]
        self.tokens_saved = state["tokens_saved"]
        self.rng.bit_generator.state = state["rng"]
        self._best_reward = -np.inf if state["best_reward"] is None else state["best_reward"]
        self._num_batches_without_success = state["num_batches_without_success"]
        self._version_offset = state["version_offset"]

    def finish(self) -> None:
        """Say so if no completion ever counted as correct."""
        if self._num_batches_without_success:
            self._warn_no_success()

    def _doubt_threshold(self, rewards: np.ndarray, any_success: bool) -> None:
        if self._num_batches_without_success is None:
            return
        self._best_reward = np.fmax.reduce(rewards, axis=None, initial=self._best_reward)
        if any_success:
            self._num_batches_without_success = None
            return
        self._num_batches_without_success += 1
        if self._num_batches_without_success >= _PATIENCE:
            self._warn_no_success()

    def _warn_no_success(self) -> None:
        logger.warning(
            f"No completion of {self._num_batches_without_success} generation batches reached "
            f"success_threshold={self.args.success_threshold}, so nothing was stored or replayed. The best reward "
            f"seen is {self._best_reward:g}. Lower success_threshold, or name the reward that decides in "
            "success_reward; continuous rewards want difficulty='reward_std' with replay_start_pass_rate=None."
        )
        self._num_batches_without_success = None


def _nanmean(values: np.ndarray) -> float:
    scored = values[~np.isnan(values)]
    return float(scored.mean()) if scored.size else float("nan")


def _has_no_signal(fresh: np.ndarray) -> np.ndarray:
    """Which groups have fresh rewards of one value only, or none; `(num_groups, num_generations)`, NaN elsewhere."""
    return ~(np.fmin.reduce(fresh, axis=1) < np.fmax.reduce(fresh, axis=1))
