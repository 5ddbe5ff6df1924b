"""What is replayed when, and what is collected: one batch at a time, decided by the main process."""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from transformers.utils import logging

from .batch import COLUMNS, IDENTITY, Batch, Share
from .buffer import RemoteBuffer, ReplayBuffer
from .buffer.boundary import reading_state
from .buffer.metadata_checks import check_rng
from .checkpoints import begin_checkpoint
from .config import ExGRPOConfig
from .coverage import Coverage
from .dataset import DroppedQuestions
from .examples import packed
from .images import StoredImage
from .log_rows import log_rows
from .metrics import LogRatios, RatioSums, ReplayMetrics, merged
from .notices import Notices
from .pacing import Pacing
from .plan import Plan
from .processes import Processes
from .prompts import Prompts
from .questions import Replayable, TrainingQuestions
from .records import Experience, Question, Replay, Scores
from .replay_log_writer import ReplayLog
from .reuse import REASONS, settle
from .rows import checksums
from .saved_state import count_of, flag_of, part_of
from .scoring import Prompted, score_candidates, without_images
from .selection import Selection
from .strategies import Strategies
from .strategies.admission import Admission
from .success import SuccessRule

logger: Any = logging.get_logger(__name__)

# A batch with positions in a micro-batch, by row of the batch.
TrainedRows = tuple[Batch, dict[int, int]]

# Of the state that a buffer keeps for the trainer. 1: without the strategies.
_STATE_VERSION = 2


class Replayer:
    """
    Plans generation batches and collects their successes.

    There is one batch at a time: to collect it is the first act of planning the next. Where a subclass generates
    several to train one of them (dynamic sampling), all of them stay open until the next optimizer step, and those
    with a row that was trained are collected. All processes call each method at the same point of the run. The main
    process decides; it alone has the buffer and the state of replay.

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
        questions ([`TrainingQuestions`]):
            Questions of the training dataset.
        success_rule ([`SuccessRule`]):
            What counts as a success.
        prompts ([`Prompts`]):
            Renders prompts.
        score (`Callable`):
            Scores prompts and completions, given as token ids, under the current policy in one forward.

    Attributes:
        batch ([`Batch`] or `None`):
            The batch that was planned last; `None` before the first.
        num_losses (`int`):
            Losses of training that replay has taken part in.
        log ([`ReplayLog`]):
            What is written down of every replay, on the main process.
    """

    def __init__(
        self,
        buffer: ReplayBuffer | RemoteBuffer,
        args: ExGRPOConfig,
        strategies: Strategies,
        processes: Processes,
        dropped_questions: DroppedQuestions,
        questions: TrainingQuestions,
        success_rule: SuccessRule,
        *,
        prompts: Prompts,
        score: Callable[[Sequence[Prompted]], list[Scores]],
    ) -> None:
        self.args = args
        self.strategies = strategies
        self.processes = processes
        self.dropped_questions = dropped_questions
        self.questions: TrainingQuestions = questions
        self.success_rule = success_rule
        self.prompts = prompts
        self.score = score
        self.replayable: Replayable = Replayable(questions, prompts.token_ids)
        self.buffer = buffer
        self.batch: Batch | None = None
        self.num_losses = 0
        self.is_stopped: bool = False
        self.coverage: Coverage = Coverage()
        self.pacing: Pacing = Pacing(args)
        self._open: dict[int, Batch] = {}  # batches whose rows may still be trained, by number
        self._num_planned = 0
        self.rng: np.random.Generator = np.random.default_rng([args.seed, 1])  # a stream apart from the buffer's
        self.metrics: ReplayMetrics = ReplayMetrics()
        self.is_started: bool = args.replay_start_pass_rate is None
        self.log_ratios: LogRatios = LogRatios()  # of this process, since the last log line
        self.ratio_sums: RatioSums = RatioSums()  # of this process, since the last batch was collected
        self.notices: Notices = Notices(args, success_rule, requires_success=strategies.admission.requires_success)
        self.log: ReplayLog = ReplayLog(args.output_dir, is_on=args.replay_log, warn=logger.warning)
        self._has_begun = False
        self._version_offset = 0
        self._num_drifted = 0  # candidates evicted since the last batch was collected
        self._images: WeakValueDictionary[str, StoredImage] = WeakValueDictionary()  # encoded already

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
        self.is_stopped = self._has_begun = False
        self.processes.decide("reading the experience buffer", self._begin_training)

    def stop(self, reason: str) -> None:
        """Replay nothing from now on, because training goes past it; an error where it has done so already."""
        if self.batch is not None and self.batch.replays:
            raise RuntimeError(reason)
        if not self.is_stopped:
            logger.warning(f"Replay is switched off for this run: {reason}")
        self.is_stopped = True

    def bind(self, questions: TrainingQuestions) -> None:
        """Take the questions of another dataset, at the beginning of a run."""
        self.questions = questions
        self.dropped_questions.questions = questions
        self.coverage.begin_phase(questions.ids())

    def present_version(self, global_step: int, *, is_training: bool) -> int:
        """Policy version of what the present policy thinks of completions from elsewhere; on the main process."""
        version = self._version_offset + global_step
        if is_training:
            return version
        # Above those in the buffer, as those of the next run will be.
        return max([version, *(experience.policy_version + 1 for _, _, experience in self.buffer.items())])

    def _begin_training(self) -> None:
        newest = max((experience.policy_version for _, _, experience in self.buffer.items()), default=-1)
        self._version_offset = newest + 1
        self._examine_buffer()
        self.dropped_questions.epoch = None

    def _examine_buffer(self) -> None:
        self.replayable = Replayable(self.questions, self.prompts.token_ids)
        told = self.replayable.examine(self.buffer)
        if told:
            logger.warning(told)

    def begin_epoch(self, epoch: int) -> tuple[set[int], set[int]]:
        """Dataset rows that an epoch leaves out, and those that must come up."""
        self.collect()

        def begin() -> tuple[set[int], set[int]]:
            first = self.coverage.begin_epoch(is_new=epoch != self.dropped_questions.epoch)
            dropped = self.dropped_questions.begin_epoch(epoch, self.buffer.retired)
            return dropped, {row for question_id in first for row in self.questions.rows_of(question_id)[:1]}

        return self.processes.decide("leaving out the retired questions", begin)

    # One generation batch

    def next_batch(self, inputs: Sequence[Mapping[str, Any]], global_step: int) -> Batch:
        """
        Collect the last batch, and plan the next.

        Args:
            inputs (`Sequence[Mapping[str, Any]]`):
                Dataset rows of this process.
            global_step (`int`):
                Optimizer steps of this run so far.
        """
        self.collect()
        # Those that were not trained before the optimizer step never will be.
        self._open = {n: batch for n, batch in self._open.items() if batch.global_step == global_step}
        start = time.perf_counter()
        num_rows, group_size = len(inputs), self.args.num_generations
        first_row = self.processes.rank * num_rows
        unseen: set[int] = set()
        if self.coverage.is_on:
            own = range(-first_row % group_size, num_rows, group_size)
            groups = {i: (first_row + i) // group_size for i in own}
            ids = {group: self.questions.id_of(inputs[i], group) for i, group in groups.items()}
            unseen = self.coverage.unseen_groups(self.processes.gather(ids))
        selection = Selection(self.buffer, self.replayable, self.args, self.strategies)

        def draw() -> tuple[bool, list[Prompted]]:
            if not self._has_begun:
                self.notices.start(self.buffer, self.is_started)
                self.log.begin(global_step)
            self._has_begun = True
            if self.is_started and not self.is_stopped and self.args.replay_fraction:
                version = self._version_offset + global_step
                selection.draw(version, self.pacing.next_batch(), self.pacing.resting(version))
            drawn.extend(selection.to_score(self.prompts))
            return self.is_started, [without_images(of_one) for of_one in drawn] if is_sent else drawn

        # What the main process alone has: images are sent to those that need them.
        is_sent = self.processes.count > 1
        drawn: list[Prompted] = []
        chosen: list[Plan] = []
        is_started, to_score = self.processes.decide("drawing the questions to replay", draw)
        before_scoring = time.perf_counter()
        scores = score_candidates(to_score, self.score, self.processes, self.args.per_device_train_batch_size, drawn)
        scoring_seconds = time.perf_counter() - before_scoring

        def choose() -> Plan:
            replays = tuple(selection.choose(scores, unseen, self.rng))
            self.note_selection(selection)
            chosen.append(Plan(self._version_offset + global_step, self.is_started and not self.is_stopped, replays))
            return chosen[0].without_images() if is_sent else chosen[0]

        told = self.processes.decide("choosing the completions to replay", choose)
        plan = self._with_images(chosen[0] if chosen else None, told, num_rows)
        self.metrics.add_selection(
            selection_seconds=time.perf_counter() - start - scoring_seconds if is_started else 0.0,
            scoring_seconds=scoring_seconds if is_started else 0.0,
            candidates_scored=len(to_score),
        )
        shape = self.args.num_groups, self.args.num_generations
        self._num_planned += 1
        self.batch = Batch(
            plan,
            first_row,
            num_rows,
            *shape,
            number=self._num_planned,
            global_step=global_step,
            may_differ=self.questions.may_differ,
            stores_groups=self.args.replays_groups,
            fills_groups=self.args.fill_failed_groups,
            choices=selection.choices,
        )
        self._open[self.batch.number] = self.batch
        return self.batch

    def note_selection(self, selection: Selection) -> None:
        """Evict the candidates that have drifted, and keep what the choices say of last known scores."""
        self._num_drifted += sum(self.buffer.evict(*drifted) for drifted in selection.drifted)
        self.metrics.add_agreements(selection.agreements)

    def _with_images(self, whole: Plan | None, told: Plan, num_rows: int) -> Plan:
        """The plan as a process needs it: images are sent to those alone whose groups show them."""
        if not told.has_images:
            return told
        group_size = self.args.num_generations

        def shows(rank: int, replay: Replay) -> bool:
            group = replay.row // group_size
            first, last = (group * group_size) // num_rows, (group * group_size + group_size - 1) // num_rows
            return first <= rank <= last

        of_ranks = range(self.processes.count)
        parts = [{r.row: r for r in whole.replays if shows(rank, r)} for rank in of_ranks] if whole is not None else []
        mine = self.processes.scatter(parts)
        return whole or replace(told, replays=tuple(mine.get(replay.row, replay) for replay in told.replays))

    def observe(self, batch: Batch, output: Mapping[str, torch.Tensor]) -> None:
        """
        Decide what of a batch whose rewards are known is a success, and what may enter the buffer.

        Args:
            batch ([`Batch`]):
                The batch.
            output (`Mapping[str, torch.Tensor]`):
                Rows of this process as TRL made them.
        """

        def judge() -> tuple[np.ndarray, np.ndarray, Admission]:
            assert batch.rewards_per_func is not None, "rewards come before they are judged"
            shape = batch.num_groups, batch.group_size
            rewards, is_correct = (of_rows.reshape(shape) for of_rows in self.success_rule(batch.rewards_per_func))
            admission = self.strategies.admission(rewards, is_correct, batch.is_fresh)
            # Stored successes say nothing of the present policy.
            is_told = batch.is_fresh.sum(axis=1) >= batch.group_size - 1
            if not is_told.all():
                admission = replace(admission, is_solved=admission.is_solved & is_told)
            return rewards, is_correct, admission

        batch.admit(*self.processes.decide("deciding what to store", judge), output)

    def trained_rows(self, inputs: Mapping[str, Any]) -> list[TrainedRows]:
        """
        Whose rows a micro-batch holds; takes note that they are trained.

        Args:
            inputs (`Mapping[str, Any]`):
                Inputs of the loss.

        Raises:
            `ValueError`:
                When a column is missing, or a row holds other tokens than when it was generated.
        """
        missing = [name for name in COLUMNS if name not in inputs]
        if missing:
            raise ValueError(f"the columns {missing} are missing from the inputs of the loss")
        identity, completion_ids = (inputs[name].cpu().numpy() for name in (IDENTITY, "completion_ids"))
        if len(identity) != len(completion_ids):
            raise ValueError(f"{len(completion_ids)} completions have the identity of {len(identity)}")
        numbers, rows, lengths, then = identity.T
        is_other = (checksums(completion_ids, lengths) != then) | (lengths > completion_ids.shape[1])
        if is_other.any():
            row = rows[is_other.argmax()]
            raise ValueError(f"row {row} holds other tokens in the loss than when it was generated")
        trained: list[TrainedRows] = []
        for number in dict.fromkeys(numbers.tolist()):
            batch = self._open.get(number)
            if batch is not None:
                positions = np.flatnonzero(numbers == number)
                trained.append((batch, dict(zip(rows[positions].tolist(), positions.tolist(), strict=True))))
        for batch, _ in trained:
            if not batch.is_trained:
                batch.is_trained = True
                self.metrics.add_batch(batch)
                if self.processes.is_main:
                    self.notices.observe(batch)
        return trained

    def collect(self) -> None:
        """
        Bring what was trained into the buffer (method, section 2), retire solved questions, start replay if due; once.

        The comparison of the delayed start comes last: the batch that crosses the threshold is not collected.
        """
        pending = [batch for batch in self._open.values() if batch.is_admitted and not batch.is_collected]
        if len(pending) > 1:  # processes may have trained different ones
            numbers = self.processes.gather({batch.number for batch in pending if batch.is_trained})
            trained = self.processes.decide("choosing the batch to collect", lambda: set().union(*numbers))
        else:
            trained = {batch.number for batch in pending if batch.is_trained}
        for batch in pending:
            if batch.number in trained:
                self._collect_batch(batch)

    def _collect_batch(self, batch: Batch) -> None:
        # Known to all, so that nothing is sent for nothing.
        is_told = self.coverage.is_on or bool(batch.replays) or bool(batch.concerns_buffer.any())
        shares = self.processes.gather(batch.share(self._pack)) if is_told else []
        sums = self.processes.gather(self.ratio_sums) if self._watches_ratios and batch.replays else []
        self.ratio_sums = RatioSums()
        self.processes.decide("collecting completions", lambda: self._collect(batch, shares, sums))
        batch.is_collected = True
        self.strategies.weighting.observe(batch)
        self.metrics.add_process_seconds(self.processes.seconds)

    def _pack(self, question: Question) -> Question:
        return packed(question, self._images, lambda: self.questions.image_files(question.question_id))

    def _collect(self, batch: Batch, shares: Sequence[Share], sums: Sequence[RatioSums]) -> None:
        admission = batch.admission
        batch.unite(shares)
        for share in shares:
            self.coverage.generated(share.generated)
        self.pacing.replayed((replay.question.question_id for replay in batch.planned), batch.policy_version)
        evicted = settle(self.buffer, self.args, batch)
        counts = Counter(evicted.values())
        counts["drifted"] += self._num_drifted
        self._num_drifted = 0
        self.metrics.add_collection({reason: counts[reason] for reason in REASONS})
        self.log.add(batch.global_step + 1, log_rows(batch, self.args, evicted) if self.log.is_on else ())
        self.pacing.observe(merged(sums).effective_sample_size)
        for group, question, experiences in batch.groups():
            is_solved = bool(admission.is_solved[group])
            if is_solved and not self.questions.may_retire(question.question_id):
                continue
            if self.is_started:
                # Of several stored completions, all that are fresh may be correct, and the question is not solved yet.
                num_successes = min(int(admission.num_successes[group]), batch.group_size - 1)
                self.buffer.collect(
                    question,
                    experiences,
                    num_correct=batch.group_size if is_solved else num_successes,
                    group_size=batch.group_size,
                    bucket=int(admission.buckets[group]),
                )
                self._forget_other_images(question, experiences)
            elif is_solved and self.args.retire_solved:
                self.buffer.retire(question.question_id)
        if not self.is_started:
            self.is_started = batch.fresh_pass_rate > self.args.replay_start_pass_rate  # type: ignore[operator]
        self.strategies.observe(batch)

    def _forget_other_images(self, question: Question, new: Sequence[Experience]) -> None:
        def stored() -> Sequence[Experience]:
            is_stored = question.question_id not in self.buffer.retired
            return self.buffer.completions(question.question_id) if is_stored else ()

        others = self.replayable.collected(question, new, stored)
        for experience in others:
            self.buffer.evict(question.question_id, experience)
        if others:
            self.buffer.update(question)
            logger.warning_once(
                "Images of a question are not what they were when its stored completions were generated, as with a "
                "random transform: completions of other images are evicted. Leave out such a transform to replay more."
            )

    def finish(self) -> None:
        """Collect the last batch, and say so if no completion ever counted as correct."""
        self.collect()
        if self.processes.is_main:
            self.notices.end(self.buffer, self.metrics.tokens_saved)

    # Logs and state

    def add_log_ratios(self, log_ratios: np.ndarray) -> None:
        """Note the log importance ratios of replayed tokens of this process, shape `(N,)`, nats."""
        self.log_ratios.add(log_ratios)
        if self._watches_ratios:
            self.ratio_sums.add(log_ratios)

    @property
    def _watches_ratios(self) -> bool:
        return self.args.min_effective_sample_size is not None

    def log_metrics(self) -> dict[str, float]:
        """Metrics since the last log line, on the main process."""
        gathered = self.processes.gather(self.log_ratios)
        self.log_ratios = LogRatios()
        if not self.processes.is_main:
            return {}
        self.metrics.add_log_ratios(gathered)
        self.metrics.add_fraction_allowed(self.pacing.fraction_allowed)
        is_short = self.args.log_replay == "short"
        return self.metrics.line(self.buffer.metrics(), self.strategies.metrics(), is_short=is_short)

    def save(self, checkpoint: str) -> None:
        """Save buffer and state of replay into a checkpoint that is about to be written, the last batch included."""
        self.collect()

        def save() -> None:
            begin_checkpoint(checkpoint)
            self.log.flush(is_durable=True)
            self.buffer.replay_state = self.state_dict()
            self.buffer.save(os.path.join(checkpoint, "experience_buffer"))

        self.processes.decide("saving the experience buffer", save)

    def load(self, load_buffer: Callable[[], ReplayBuffer], source: str) -> None:
        """
        Replace the buffer, and go on with the state that it was saved with.

        Args:
            load_buffer (`Callable`):
                Loads the buffer. Called on the main process.
            source (`str`):
                Where it comes from, for messages.

        Raises:
            ExperienceBufferError: if the buffer, or the state that it was saved with, cannot be read.
        """
        self.batch, self._open = None, {}  # of the run before

        def load() -> Mapping[str, Any]:
            self.buffer = load_buffer()
            state: Mapping[str, Any] = self.buffer.replay_state
            if state:
                with reading_state(source):
                    self.load_state_dict(state)
                self._examine_buffer()
            else:  # a buffer that was saved by hand
                self._begin_training()
                self.log.load_state_dict({})
            return {"weighting": self.strategies.weighting.state_dict(), "is_covering": self.coverage.is_on}

        told = self.processes.decide("loading the experience buffer", load)
        self.coverage.is_on, weighting = told["is_covering"], told["weighting"]
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
                **self.notices.state_dict(),
            },
            "dropped_questions": self.dropped_questions.state_dict(),
            "strategies": self.strategies.state_dict(),
            "success_rule": self.success_rule.state_dict(),
            "coverage": self.coverage.state_dict(),
            "pacing": self.pacing.state_dict(),
            "log": self.log.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Restore what `state_dict` returned, or what a version before that did.

        Raises:
            ValueError: if it is not such a state; a strategy may raise what it likes.
        """
        mine = part_of(state, "replayer")
        rng = part_of(mine, "rng")
        check_rng(rng)
        self.is_started = flag_of(mine, "is_started")
        self.metrics.tokens_saved = count_of(mine, "tokens_saved")
        self.rng.bit_generator.state = rng
        self._version_offset = count_of(mine, "version_offset")
        self.notices.load_state_dict(mine)
        self.dropped_questions.load_state_dict(part_of(state, "dropped_questions"))
        if "state_version" in state and count_of(state, "state_version") >= 2:
            self.strategies.load_state_dict(part_of(state, "strategies"))
            self.success_rule.load_state_dict(part_of(state, "success_rule"))
            self.coverage.load_state_dict(part_of(state, "coverage"))
        if "pacing" in state:
            self.pacing.load_state_dict(part_of(state, "pacing"))
        self.log.load_state_dict(part_of(state, "log") if "log" in state else {})
