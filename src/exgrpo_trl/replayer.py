"""What is replayed when, and what is collected: one batch at a time, decided by the main process."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .batch import Batch, Plan, Share, plan_rows
from .buffer import RemoteBuffer, ReplayBuffer
from .checkpoints import begin_checkpoint
from .config import ExGRPOConfig
from .dataset import DroppedQuestions
from .metrics import LogRatios, ReplayMetrics, SuccessWatch
from .processes import Processes
from .records import Candidate, Experience, Replay
from .scoring import Prompted, Scores, add_scores, score_candidates
from .strategies import Strategies
from .strategies.samplers import check_drawn

# Of the state that a buffer keeps for the trainer. 1: without the strategies.
_STATE_VERSION = 2


class Replayer:
    """
    Plans generation batches and collects their successes.

    There is one batch at a time: to collect it is the first act of planning the next. All processes call each method
    at the same point of the run. The main process decides; it alone has the buffer and the state of replay.

    Args:
        buffer ([`ReplayBuffer`] or [`RemoteBuffer`]):
            Experience buffer; a stand-in on the processes that do not own it.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        strategies ([`Strategies`]):
            Rules to follow.
        processes ([`Processes`]):
            Processes of the run.
        dropped_questions ([`DroppedQuestions`]):
            Questions that leave the dataset.
        tokenize (`Callable`):
            Maps prompts to their token ids.
        score (`Callable`):
            Scores prompts and completions, given as token ids, under the current policy in one forward.

    Attributes:
        batch ([`Batch`] or `None`):
            The batch that is being generated or trained, until the next one is planned; `None` before the first.
    """

    def __init__(
        self,
        buffer: ReplayBuffer | RemoteBuffer,
        args: ExGRPOConfig,
        strategies: Strategies,
        processes: Processes,
        dropped_questions: DroppedQuestions,
        *,
        tokenize: Callable[[list[Any]], list[list[int]]],
        score: Callable[[Sequence[Prompted]], list[Scores]],
    ) -> None:
        self.args = args
        self.strategies = strategies
        self.processes = processes
        self.dropped_questions = dropped_questions
        self.tokenize = tokenize
        self.score = score
        self.buffer = buffer
        self.batch: Batch | None = None
        self.rng = np.random.default_rng([args.seed, 1])  # a stream apart from the buffer's
        self.metrics = ReplayMetrics()
        self.is_started = args.replay_start_pass_rate is None
        self.log_ratios = LogRatios()  # of this process, since the last log line
        needs_success = strategies.admission.requires_success or not self.is_started
        self.success_watch = SuccessWatch(args.success_threshold, is_needed=needs_success)
        self._version_offset = 0

    @property
    def buffer(self) -> Any:
        """The experience buffer, on the main process; a [`RemoteBuffer`] on the others."""
        return self._buffer

    @buffer.setter
    def buffer(self, buffer: ReplayBuffer | RemoteBuffer) -> None:
        self._buffer = buffer
        if not isinstance(buffer, RemoteBuffer):
            buffer.eviction = self.strategies.eviction

    def begin_training(self) -> None:
        """Let policy versions go on above those in the buffer, so that no stored completion comes from the future."""
        self.collect()  # the last batch of the run before; TRL may go on with what of it was not trained yet
        self.processes.decide("reading the experience buffer", self._begin_training)

    def _begin_training(self) -> None:
        newest = max((experience.policy_version for _, _, experience in self.buffer.items()), default=-1)
        self._version_offset = newest + 1
        self.dropped_questions.epoch = None

    def begin_epoch(self, epoch: int) -> set[int]:
        """Dataset rows that an epoch leaves out."""
        self.collect()
        return self.processes.decide(
            "leaving out the retired questions",
            lambda: self.dropped_questions.begin_epoch(epoch, self.buffer.retired),
        )

    # One generation batch

    def next_batch(self, num_rows: int, global_step: int) -> Batch:
        """
        Collect the last batch, and plan the next.

        Args:
            num_rows (`int`):
                Rows of this process.
            global_step (`int`):
                Optimizer steps of this run so far.
        """
        self.collect()
        start = time.perf_counter()
        candidates: dict[str, list[Candidate]] = {}

        def draw() -> tuple[bool, list[Prompted]]:
            candidates.update(self._draw(global_step))
            return self.is_started, self._to_score(candidates)

        is_started, to_score = self.processes.decide("drawing the questions to replay", draw)
        before_scoring = time.perf_counter()
        scores = score_candidates(to_score, self.score, self.processes, self.args.per_device_train_batch_size)
        scoring_seconds = time.perf_counter() - before_scoring

        def choose() -> Plan:
            chosen = self._choose(add_scores(candidates, scores))
            return Plan(self._version_offset + global_step, self.is_started, tuple(chosen))

        plan = self.processes.decide("choosing the completions to replay", choose)
        self.metrics.add_selection(
            selection_seconds=time.perf_counter() - start - scoring_seconds if is_started else 0.0,
            scoring_seconds=scoring_seconds if is_started else 0.0,
            candidates_scored=len(to_score),
        )
        shape = self.args.num_groups, self.args.num_generations
        self.batch = Batch(plan, self.processes.rank * num_rows, num_rows, *shape)
        return self.batch

    def _draw(self, global_step: int) -> dict[str, list[Candidate]]:
        """Questions to replay with their candidates (method, section 3); none before the delayed start."""
        if not self.is_started:
            return {}
        if self.args.max_staleness is not None:
            self.buffer.evict_older_than(self._version_offset + global_step - self.args.max_staleness)
        n = min(self.args.num_groups_to_replay, self.buffer.num_questions)
        question_ids = list(self.buffer.sample_questions(n, self.strategies.question_sampler)) if n else []
        # A buffer of the user may draw as it likes.
        source = f"{type(self.buffer).__name__}.sample_questions({n})"
        check_drawn(question_ids, n, lambda question_id: bool(self._completions(question_id)), source)
        return {
            question_id: [Candidate(experience) for experience in self._completions(question_id)]
            for question_id in question_ids
        }

    def _completions(self, question_id: str) -> Sequence[Experience]:
        try:
            return self.buffer.completions(question_id)
        except KeyError:
            return ()

    def _to_score(self, candidates: Mapping[str, list[Candidate]]) -> list[Prompted]:
        """Prompt and completion of every candidate that the choice depends on: none where there is no choice."""
        question_ids = [question_id for question_id, choices in candidates.items() if len(choices) > 1]
        if not question_ids or not self.strategies.completion_selector.requires_scores:
            return []
        prompts = self.tokenize([self.buffer.question(question_id).example["prompt"] for question_id in question_ids])
        return [
            (prompt, candidate.experience.token_ids)
            for question_id, prompt in zip(question_ids, prompts, strict=True)
            for candidate in candidates[question_id]
        ]

    def _choose(self, candidates: Mapping[str, Sequence[Candidate]]) -> list[Replay]:
        """One completion per drawn question, and its row (method, section 4); ascending by row."""
        if not candidates:
            return []
        rows = plan_rows(self.args.num_groups, self.args.num_generations, len(candidates), self.rng)
        return [self._select(*drawn, row) for row, drawn in zip(rows, candidates.items(), strict=True)]

    def _select(self, question_id: str, choices: Sequence[Candidate], row: int) -> Replay:
        index = self.strategies.completion_selector(choices, self.rng) if len(choices) > 1 else 0
        if not 0 <= index < len(choices):
            raise ValueError(
                f"The completion selector returned {index!r} for {len(choices)} candidates. Return the index of one."
            )
        return Replay(self.buffer.question(question_id), choices[index].experience, row, choices[index].entropy)

    def observe(self, completion_mask: torch.Tensor) -> None:
        """
        Take note of the rewards of the batch, and decide what of it may enter the buffer.

        Args:
            completion_mask (`torch.Tensor`):
                Completion tokens of this process that are trained, shape `(num_rows, T)`.
        """
        batch = self.batch
        assert batch is not None, "a batch is observed after it has been planned"
        admission = self.processes.decide(
            "deciding what to store",
            lambda: self.strategies.admission(batch.rewards, batch.is_correct, batch.is_fresh),
        )
        batch.admit(admission, completion_mask)
        self.metrics.add_batch(batch)
        if self.processes.is_main:
            self.success_watch.observe(batch)

    def collect(self) -> None:
        """
        Bring the batch into the buffer (method, section 2), retire solved questions, start replay if due; once.

        The comparison of the delayed start comes last: the batch that crosses the threshold is not collected.
        """
        batch = self.batch
        if batch is None or batch.is_collected or not batch.is_admitted:
            return
        # Known to all, so that nothing is sent for nothing.
        shares = self.processes.gather(batch.share()) if batch.concerns_buffer.any() else []
        self.processes.decide("collecting completions", lambda: self._collect(batch, shares))
        batch.is_collected = True
        self.strategies.weighting.observe(batch)
        self.metrics.add_process_seconds(self.processes.seconds)

    def _collect(self, batch: Batch, shares: Sequence[Share]) -> None:
        admission = batch.admission
        evicted = sum(
            self.buffer.evict(replay.question.question_id, replay.experience)
            for replay in batch.replays
            if not admission.is_worth_storing.flat[replay.row]
        )
        batch.unite(shares)
        for group, question, experiences in batch.groups():
            is_solved = bool(admission.is_solved[group])
            if self.is_started:
                self.buffer.collect(
                    question,
                    experiences,
                    num_correct=batch.group_size if is_solved else int(admission.num_successes[group]),
                    group_size=batch.group_size,
                    bucket=int(admission.buckets[group]),
                )
            elif is_solved and self.args.retire_solved:
                self.buffer.retire(question.question_id)
        self.metrics.add_collection(evicted_incorrect=evicted)
        if not self.is_started:
            pass_rate = float(batch.is_correct[batch.is_fresh].mean())
            self.is_started = pass_rate > self.args.replay_start_pass_rate  # type: ignore[operator]
        self.strategies.observe(batch)

    def finish(self) -> None:
        """Collect the last batch, and say so if no completion ever counted as correct."""
        self.collect()
        if self.processes.is_main:
            self.success_watch.warn()

    # Logs and state

    def add_log_ratios(self, log_ratios: np.ndarray) -> None:
        """Note the log importance ratios of replayed tokens of this process, shape `(N,)`, nats."""
        self.log_ratios.add(log_ratios)

    def log_metrics(self) -> dict[str, float]:
        """Metrics since the last log line, on the main process."""
        gathered = self.processes.gather(self.log_ratios)
        self.log_ratios = LogRatios()
        if not self.processes.is_main:
            return {}
        self.metrics.add_log_ratios(gathered)
        return self.metrics.line(self.buffer.metrics(), self.strategies.metrics())

    def save(self, checkpoint: str) -> None:
        """Save buffer and state of replay into a checkpoint that is about to be written, the last batch included."""
        self.collect()

        def save() -> None:
            begin_checkpoint(checkpoint)
            self.buffer.replay_state = self.state_dict()
            self.buffer.save(os.path.join(checkpoint, "experience_buffer"))

        self.processes.decide("saving the experience buffer", save)

    def load(self, load_buffer: Callable[[], ReplayBuffer]) -> None:
        """
        Replace the buffer, and go on with the state that it was saved with.

        Args:
            load_buffer (`Callable`):
                Loads the buffer. Called on the main process.
        """
        self.batch = None

        def load() -> Mapping[str, Any]:
            self.buffer = load_buffer()
            state: Mapping[str, Any] = self.buffer.replay_state
            if state:
                self.load_state_dict(state)
            else:  # a buffer that was saved by hand
                self._begin_training()
            return self.strategies.weighting.state_dict()

        weighting = self.processes.decide("loading the experience buffer", load)
        if not self.processes.is_main and weighting:
            self.strategies.weighting.load_state_dict(weighting)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the buffer; survives JSON. On the main process."""
        return {
            "state_version": _STATE_VERSION,
            "replayer": {
                "is_started": self.is_started,
                "tokens_saved": self.metrics.tokens_saved,
                "rng": self.rng.bit_generator.state,
                "version_offset": self._version_offset,
                **self.success_watch.state_dict(),
            },
            "dropped_questions": self.dropped_questions.state_dict(),
            "strategies": self.strategies.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or what a version before that did."""
        mine = state["replayer"]
        self.is_started = mine["is_started"]
        self.metrics.tokens_saved = mine["tokens_saved"]
        self.rng.bit_generator.state = mine["rng"]
        self._version_offset = mine["version_offset"]
        self.success_watch.load_state_dict(mine)
        self.dropped_questions.load_state_dict(state["dropped_questions"])
        if state.get("state_version", 1) >= 2:
            self.strategies.load_state_dict(state["strategies"])
