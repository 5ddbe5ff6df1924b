"""One generation batch, from the plan of what it replays until its successes have been collected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_device, send_to_device

from .examples import question_of_row, stored_row
from .records import Experience, Question, Replay
from .strategies.admission import Admission, reaches


@dataclass(frozen=True, slots=True)
class Plan:
    """
    What a generation batch replays, as the main process tells it to all.

    Args:
        policy_version (`int`):
            Version of the policy that generates the batch.
        is_started (`bool`):
            Whether replay has started: before, only solved questions are of interest.
        replays (`tuple[Replay, ...]`):
            What is replayed, ascending by row.
    """

    policy_version: int
    is_started: bool
    replays: tuple[Replay, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """What one process knows of a batch that the buffer needs: questions by group, completions by row."""

    questions: dict[int, Question]
    experiences: dict[int, Experience]


@dataclass(eq=False)
class Batch:
    """
    All state of one generation batch.

    Rows are those of the whole batch, those of the first process first; `group_size` rows in a row are a group. Rows
    of this process alone are called positions. Plan, rewards and admission are known to all processes; questions,
    tokens and log-probabilities are those of this process until they are collected on the main process.

    Args:
        plan ([`Plan`]):
            What it replays.
        first_row (`int`):
            First row of this process.
        num_rows (`int`):
            Rows of this process.
        num_groups (`int`):
            Groups of the whole batch.
        group_size (`int`):
            Rows of a group.

    Attributes:
        questions (`dict[int, Question]`):
            Questions by group: those of the fresh groups whose first row belongs to this process; once collected, on
            the main process, those of all groups that concern the buffer.
        token_ids (`list[list[int]]`):
            Completion token ids by position.
        without_logps (`set[int]`):
            Positions whose completion came without log-probabilities from what sampled it.
        rewards (`np.ndarray`):
            Success rewards of shape `(num_groups, group_size)`, NaN where no reward function gave one.
        is_correct (`np.ndarray`):
            Which of them reach the success threshold.
        admission ([`Admission`]):
            What may enter the buffer.
        experiences (`dict[int, Experience]`):
            Recorded completions by row; once collected, on the main process, those of all processes.
        is_generating (`bool`):
            Whether the batch is being generated and scored right now.
        is_admitted (`bool`):
            Whether rewards are known, and what may enter the buffer is decided.
        is_collected (`bool`):
            Whether the successes are in the buffer: nothing more is recorded. The batch may still be trained.
        forwards (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Log-probabilities and entropies of each forward of the policy meanwhile.
        micro_batch (`dict[str, Any]` or `None`):
            Inputs of the loss that is being computed, until their forward has been seen.
    """

    plan: Plan
    first_row: int
    num_rows: int
    num_groups: int
    group_size: int
    questions: dict[int, Question] = field(default_factory=dict)
    token_ids: list[list[int]] = field(default_factory=list)
    without_logps: set[int] = field(default_factory=set)
    rewards: np.ndarray = field(init=False)
    is_correct: np.ndarray = field(init=False)
    admission: Admission = field(init=False)
    experiences: dict[int, Experience] = field(default_factory=dict)
    is_generating: bool = False
    is_admitted: bool = False
    is_collected: bool = False
    forwards: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    micro_batch: dict[str, Any] | None = None
    _storable: frozenset[int] = frozenset()

    # What is planned

    @property
    def replays(self) -> tuple[Replay, ...]:
        """What is replayed, on all processes."""
        return self.plan.replays

    @property
    def policy_version(self) -> int:
        """Version of the policy that generated the batch."""
        return self.plan.policy_version

    @cached_property
    def stored(self) -> dict[int, Experience]:
        """Stored completions by position."""
        rows = range(self.first_row, self.first_row + self.num_rows)
        return {replay.row - self.first_row: replay.experience for replay in self.replays if replay.row in rows}

    @cached_property
    def stored_rows(self) -> frozenset[int]:
        """Rows that stored completions take, on all processes."""
        return frozenset(replay.row for replay in self.replays)

    @cached_property
    def replayed_questions(self) -> dict[int, Question]:
        """Replayed questions by group, on all processes."""
        return {self.group_of(replay): replay.question for replay in self.replays}

    @cached_property
    def is_fresh(self) -> np.ndarray:
        """Which rollouts are generated, booleans of shape `(num_groups, group_size)`."""
        is_fresh = np.ones((self.num_groups, self.group_size), dtype=bool)
        is_fresh.flat[list(self.stored_rows)] = False
        return is_fresh

    def group_of(self, replay: Replay) -> int:
        """Group of a replay."""
        return replay.row // self.group_size

    # What happens to it, in this order

    def place(self, inputs: Sequence[Mapping[str, Any]], question_id_column: str | None) -> list[Any]:
        """
        Put the stored rows of replayed questions into the rows of their groups, and keep the questions of the others.

        Args:
            inputs (`Sequence[Mapping[str, Any]]`):
                Dataset rows of this process.
            question_id_column (`str` or `None`):
                Column that identifies a question.
        """
        placed: list[Any] = []
        for position, row in enumerate(inputs):
            group, slot = divmod(self.first_row + position, self.group_size)
            if group in self.replayed_questions:
                stored = stored_row(self.replayed_questions[group], row)
                # Questions are kept on the CPU; the data loader brings tensors of fresh rows to the device.
                device = find_device(row)
                placed.append(stored if device is None else send_to_device(stored, device))
                continue
            if slot == 0:
                self.questions[group] = question_of_row(row, question_id_column)
            placed.append(row)
        return placed

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While the batch is generated and scored: forwards of the policy are kept until the end of the block."""
        self.is_generating = True
        try:
            yield
        finally:
            self.is_generating = False
            self.forwards = []

    def take_rewards(self, rewards: np.ndarray, success_threshold: float) -> None:
        """
        Take the success rewards of all rollouts.

        Args:
            rewards (`np.ndarray`):
                Shape `(num_groups * group_size,)`, NaN where no reward function gave one.
            success_threshold (`float`):
                Reward from which a rollout is correct.
        """
        self.rewards = rewards.reshape(self.num_groups, self.group_size)
        self.is_correct = reaches(self.rewards, success_threshold)

    def admit(self, admission: Admission, completion_mask: torch.Tensor) -> None:
        """
        Take the decision on what may enter the buffer.

        Args:
            admission ([`Admission`]):
                The decision.
            completion_mask (`torch.Tensor`):
                Tokens of this process that are trained, shape `(num_rows, T)`; truncated completions may have none.
        """
        self.admission, self.is_admitted = admission, True
        is_storable = (admission.is_worth_storing & np.isfinite(self.rewards)).flat
        has_loss = completion_mask.any(-1).tolist()
        self._storable = frozenset(
            self.first_row + position
            for position in range(self.num_rows)
            if self.plan.is_started and has_loss[position] and is_storable[self.first_row + position]
            if position not in self.stored and position not in self.without_logps
        )

    def columns(self, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What the loss of every row will need; travels through TRL's shuffle with the other columns.

        Args:
            like (`torch.Tensor`):
                Completion ids with padding, shape `(num_rows, T)`.

        Returns:
            `dict[str, torch.Tensor]`:
                `behavior_per_token_logps` of shape `(num_rows, T)`, 0 in fresh rows and on padding; `is_replayed` and
                `rollout_rows` of shape `(num_rows,)`.
        """
        behavior_logps = torch.zeros(like.shape, dtype=torch.float32)
        is_replayed = torch.zeros(len(like), dtype=torch.bool)
        for position, experience in self.stored.items():
            behavior_logps[position, : experience.num_tokens] = torch.tensor(experience.behavior_per_token_logps)
            is_replayed[position] = True
        return {
            "behavior_per_token_logps": behavior_logps.to(like.device),
            "is_replayed": is_replayed.to(like.device),
            "rollout_rows": torch.arange(self.first_row, self.first_row + len(like), device=like.device),
        }

    def entropies_of(self, logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Entropies of the forward that gave these log-probabilities while the batch was scored; NaN if none did.

        Args:
            logps (`torch.Tensor`):
                Log-probabilities of shape `(num_rows, T)`.
            mask (`torch.Tensor`):
                Completion tokens, same shape.
        """
        # By value: TRL may have copied them.
        for of_forward, entropies in self.forwards:
            if of_forward.shape == logps.shape and torch.equal(of_forward[mask], logps[mask]):
                return entropies
        return torch.full_like(logps, torch.nan)

    def record(self, rows: torch.Tensor, mask: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor) -> None:
        """
        Record what the policy that generated them says of the rows to be stored, once for each row.

        Args:
            rows (`torch.Tensor`):
                Rows of the batch, shape `(B,)`.
            mask (`torch.Tensor`):
                Completion tokens, boolean, shape `(B, T)`.
            logps, entropies (`torch.Tensor`):
                Log-probabilities and entropies in nats, shape `(B, T)`.
        """
        numbers = rows.tolist()
        wanted = [i for i, row in enumerate(numbers) if row in self._storable and row not in self.experiences]
        if not wanted or self.is_collected:
            return
        # All of them at once: every transfer waits for the device.
        is_own = mask[wanted]
        means = torch.where(is_own, entropies[wanted].detach().float(), 0.0).sum(-1) / is_own.sum(-1)
        of_rows = zip(wanted, logps[wanted].detach().float().cpu().numpy(), is_own.cpu().numpy(), strict=True)
        for (i, row_logps, own), entropy in zip(of_rows, means.tolist(), strict=True):
            row = numbers[i]
            self.experiences[row] = Experience.create(
                self.token_ids[row - self.first_row],
                row_logps[own],
                policy_version=self.policy_version,
                reward=float(self.rewards.flat[row]),
                entropy=entropy,
            )

    # What comes of it

    @cached_property
    def concerns_buffer(self) -> np.ndarray:
        """Which groups change the buffer, shape `(num_groups,)`; before replay has started, those that are solved."""
        return self.admission.concerns_buffer if self.plan.is_started else self.admission.is_solved

    def share(self) -> Share:
        """What this process knows that the buffer needs."""
        questions = {group: question for group, question in self.questions.items() if self.concerns_buffer[group]}
        return Share(questions, self.experiences)

    def unite(self, shares: Sequence[Share]) -> None:
        """Bring together what all processes know; on the main process."""
        self.questions = {
            group: question for group, question in self.replayed_questions.items() if self.concerns_buffer[group]
        }
        self.experiences = {}
        for share in shares:
            self.questions.update(share.questions)
            self.experiences.update(share.experiences)

    def groups(self) -> Iterator[tuple[int, Question, list[Experience]]]:
        """Number, question and recorded completions of the groups that change the buffer, in batch order."""
        for group, question in sorted(self.questions.items(), key=lambda item: item[0]):
            rows = range(group * self.group_size, (group + 1) * self.group_size)
            yield group, question, [self.experiences[row] for row in rows if row in self.experiences]


def plan_rows(num_groups: int, group_size: int, num_replayed: int, rng: np.random.Generator) -> list[int]:
    """
    Rows of a generation batch that stored completions take, each in a group of its own.

    Evenly spaced from a random start: every group is as likely as any other, so that an unshuffled dataset does not
    lose the same questions on every pass, and however many processes share the batch, each gets its share of stored
    completions (or one more), without the plan depending on their number.

    Args:
        num_groups (`int`):
            Groups in the batch.
        group_size (`int`):
            Rows of a group.
        num_replayed (`int`):
            Groups to replay, at most `num_groups`.
        rng (`np.random.Generator`):
            Source of randomness.

    Returns:
        `list[int]`:
            Ascending rows.
    """
    num_rows = num_groups * group_size
    start = int(rng.integers(num_rows))
    return [(i * num_rows + start) // num_replayed for i in range(num_replayed)]
