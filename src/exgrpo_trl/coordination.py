"""One buffer for all processes: the main process decides, the others are told their part and report what they saw."""

import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from .checkpoints import begin_checkpoint
from .config import ExGRPOConfig
from .experience import Candidate
from .messages import (
    Prompted,
    decode_forwards,
    decode_plan,
    decode_records,
    decode_scores,
    encode_forwards,
    encode_plan,
    encode_records,
    encode_scores,
)
from .processes import Processes
from .protocols import ReplayBuffer
from .questions import DroppedQuestions
from .replay import Replayer
from .rollouts import PendingBatch, Plan, Records, Replay
from .scoring import deal_forwards


class Coordinator:
    """
    Carries the decisions of the main process to all processes, and their rollouts to the main process.

    All processes call each method, at the same point of the run. A row of a generation batch belongs to one process:
    the rows of the first process come first.

    Args:
        replayer ([`Replayer`]):
            Decides on the main process; its state is mirrored on the others.
        dropped_questions ([`DroppedQuestions`]):
            Questions that leave the dataset.
        processes ([`Processes`]):
            The processes of the run.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        most (`int`):
            Most questions of a generation batch that are replayed.
        tokenize (`Callable`):
            Maps prompts to their token ids.
        score (`Callable`):
            Scores prompts and completions in one forward.
    """

    def __init__(
        self,
        replayer: Replayer,
        dropped_questions: DroppedQuestions,
        processes: Processes,
        args: ExGRPOConfig,
        *,
        most: int,
        tokenize: Callable[[list[Any]], list[list[int]]],
        score: Callable[[Prompted], list[Candidate]],
    ) -> None:
        self.replayer = replayer
        self.dropped_questions = dropped_questions
        self.processes = processes
        self.args = args
        self.most = most
        self.tokenize = tokenize
        self.score = score
        self._replays: list[Replay] = []  # of the batch that is being generated; on the main process
        self._pending: PendingBatch | None = None
        self._log_ratios: list[np.ndarray] = []
        self._num_retired = 0  # retired questions that all processes know of
        self._seconds = dict.fromkeys(processes.seconds, 0.0)  # already in the metrics

    # State

    def begin_training(self) -> None:
        """Start a run with what the buffer holds."""
        with self.processes.together("reading the experience buffer"):
            if self.processes.is_main:
                self.replayer.begin_training()
        self.dropped_questions.epoch = None
        self._share_state()

    def begin_epoch(self, epoch: int) -> set[int]:
        """Dataset rows that an epoch leaves out."""
        self.collect()
        return self.dropped_questions.begin_epoch(epoch, self.replayer.buffer.retired)

    def save(self, checkpoint: str) -> None:
        """Save buffer and state of replay into a checkpoint that is about to be written, the last batch included."""
        self.collect()
        with self.processes.together("saving the experience buffer"):
            if self.processes.is_main:
                begin_checkpoint(checkpoint)
                self.replayer.buffer.replay_state = self.state_dict()
                self.replayer.buffer.save(os.path.join(checkpoint, "experience_buffer"))

    def load(self, load_buffer: Callable[[], ReplayBuffer]) -> None:
        """
        Replace the buffer, and go on with the state that it was saved with.

        Args:
            load_buffer (`Callable`):
                Loads the buffer. Called on the main process.
        """
        with self.processes.together("loading the experience buffer"):
            if self.processes.is_main:
                self.replayer.buffer = load_buffer()
                if self.replayer.buffer.replay_state:  # none in a buffer that was saved by hand
                    self.load_state_dict(self.replayer.buffer.replay_state)
                else:
                    self.replayer.begin_training()
        self._pending = None
        self._share_state()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold besides the buffer; survives JSON."""
        return {"replayer": self.replayer.state_dict(), "dropped_questions": self.dropped_questions.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.replayer.load_state_dict(state["replayer"])
        self.dropped_questions.load_state_dict(state["dropped_questions"])

    def finish(self) -> None:
        """Collect the last batch."""
        self.collect()
        if self.processes.is_main:
            self.replayer.finish()

    def _share_state(self) -> None:
        self._num_retired = 0
        mine = json.dumps(self.state_dict()).encode() if self.processes.is_main else None
        state = self.processes.broadcast(mine)
        if not self.processes.is_main:
            self.load_state_dict(json.loads(state))
            self.replayer.buffer.clear()  # type: ignore[attr-defined]
        self._share_progress()

    def _share_progress(self) -> None:
        """Tell all processes whether replay has started, and which questions have been retired since the last time."""
        message = None
        if self.processes.is_main:
            retired = itertools.islice(self.replayer.buffer.retired, self._num_retired, None)
            message = json.dumps({"is_started": self.replayer.is_started, "retired": list(retired)}).encode()
        progress = json.loads(self.processes.broadcast(message))
        self._num_retired += len(progress["retired"])
        if not self.processes.is_main:
            self.replayer.is_started = progress["is_started"]
            for question_id in progress["retired"]:
                self.replayer.buffer.retire(question_id)

    # One generation batch

    def plan(self, num_rows: int, policy_version: int) -> Plan:
        """
        Decide what a generation batch replays.

        Args:
            num_rows (`int`):
                Rows of this process in the batch.
            policy_version (`int`):
                Version of the policy.

        Returns:
            [`Plan`]:
                Rows that stored completions take, and the share of this process.
        """
        self._replays = []
        if not self.replayer.is_started:
            self.replayer.metrics.add(
                replay__candidates_scored=0, replay__selection_seconds=0, replay__scoring_seconds=0
            )
            return Plan()
        start = time.perf_counter()
        candidates: dict[str, list[Candidate]] = {}
        with self.processes.together("drawing the questions to replay"):
            if self.processes.is_main:
                candidates = self.replayer.draw(self.most, policy_version)
        before_scoring = time.perf_counter()
        candidates |= self._score(candidates)
        after_scoring = time.perf_counter()
        shares: list[bytes] | None = None
        with self.processes.together("choosing the completions to replay"):
            if self.processes.is_main:
                num_groups = num_rows * self.processes.count // self.args.num_generations
                self._replays = self.replayer.select(candidates, num_groups)
                rows = frozenset(replay.row for replay in self._replays)
                shares = [
                    encode_plan(Plan(rows, self._share(rank * num_rows, num_rows)))
                    for rank in range(self.processes.count)
                ]
        plan = decode_plan(self.processes.scatter(shares))
        scoring_seconds = after_scoring - before_scoring
        self.replayer.metrics.add(
            replay__selection_seconds=time.perf_counter() - start - scoring_seconds,
            replay__scoring_seconds=scoring_seconds,
        )
        return plan

    def _share(self, first_row: int, num_rows: int) -> Records:
        """What the process with these rows has to know of the replays."""
        group_size = self.args.num_generations
        first_group, last_group = first_row // group_size, (first_row + num_rows - 1) // group_size
        return Records(
            {
                replay.row // group_size: replay.question
                for replay in self._replays
                if first_group <= replay.row // group_size <= last_group
            },
            {r.row: r.experience for r in self._replays if first_row <= r.row < first_row + num_rows},
        )

    def _score(self, candidates: Mapping[str, list[Candidate]]) -> dict[str, list[Candidate]]:
        """Candidates with their scores where the choice depends on them, on the main process."""
        to_score: list[tuple[str, Candidate]] = []
        shares: list[bytes] | None = None
        dealt: list[list[list[int]]] = []
        with self.processes.together("preparing the candidates"):
            if self.processes.is_main:
                to_score = self.replayer.to_score(candidates)
                pairs = self._prompted(to_score)
                lengths = [len(prompt) + experience.num_tokens for prompt, experience in pairs]
                dealt = deal_forwards(lengths, self.processes.count, self.args.per_device_train_batch_size)
                shares = [encode_forwards([[pairs[i] for i in batch] for batch in share]) for share in dealt]
        forwards = decode_forwards(self.processes.scatter(shares))
        if not forwards:  # then no process has any
            return {}
        with self.processes.together("scoring the candidates"):
            scored = [candidate for pairs in forwards for candidate in self.score(pairs)]
        results: dict[int, Candidate] = {}
        for share, message in zip(dealt, self.processes.gather(encode_scores(scored)), strict=True):
            for i, scores in zip(itertools.chain(*share), decode_scores(message), strict=True):
                results[i] = Candidate(to_score[i][1].experience, *scores)
        by_question: dict[str, list[Candidate]] = {}
        for i, (question_id, _) in enumerate(to_score):
            by_question.setdefault(question_id, []).append(results[i])
        return by_question

    def _prompted(self, candidates: Sequence[tuple[str, Candidate]]) -> Prompted:
        question_ids = list(dict.fromkeys(question_id for question_id, _ in candidates))
        if not question_ids:
            return []
        prompts = [self.replayer.buffer.question(question_id).example["prompt"] for question_id in question_ids]
        prompt_ids = dict(zip(question_ids, self.tokenize(prompts), strict=True))
        return [(prompt_ids[question_id], candidate.experience) for question_id, candidate in candidates]

    def observe(self, batch: PendingBatch) -> None:
        """Take over a scored generation batch; it is collected once its log-probabilities are known."""
        self._pending = batch
        if self.processes.is_main:
            self.replayer.observe(batch, self._replays)

    def wanted_rows(self, rows: Iterable[int]) -> list[int]:
        """Positions in `rows` (rows of the pending batch) whose log-probabilities are still to be recorded."""
        if self._pending is None:
            return []
        return [position for position, row in enumerate(rows) if self._pending.wants(row)]

    def record(self, row: int, logps: np.ndarray, entropy: float) -> None:
        """Record what a forward showed of a row: log-probabilities `(num_tokens,)`, mean entropy (nats)."""
        if self._pending is not None:
            self._pending.record(row, logps, entropy)

    def collect(self) -> None:
        """Bring the pending batch of all processes into the buffer."""
        batch, self._pending = self._pending, None
        if batch is None:
            return
        messages = self.processes.gather(encode_records(batch.records(self.replayer.is_started)))
        with self.processes.together("collecting completions"):
            if self.processes.is_main:
                records = Records()
                for message in messages:
                    part = decode_records(message)
                    records.questions.update(part.questions)
                    records.experiences.update(part.experiences)
                self.replayer.collect(batch, records)
        self._share_progress()
        for name, seconds in self.processes.seconds.items():
            self.replayer.metrics.add(**{f"replay__{name}_seconds": seconds - self._seconds[name]})
            self._seconds[name] = seconds

    # Logs

    def add_log_ratios(self, log_ratios: np.ndarray) -> None:
        """Note the log importance ratios of replayed tokens of this process, shape `(N,)`, nats."""
        self._log_ratios.append(log_ratios.astype(np.float32))

    def log_metrics(self) -> dict[str, float]:
        """Metrics since the last log line, on the main process."""
        mine = b"".join(log_ratios.tobytes() for log_ratios in self._log_ratios)
        self._log_ratios.clear()
        gathered = b"".join(self.processes.gather(mine))
        if not self.processes.is_main:
            return {}
        self.replayer.metrics.add_log_ratios(np.frombuffer(gathered, dtype=np.float32))
        return self.replayer.log_metrics()
