"""One generation batch, from the plan of what it replays until its successes have been collected."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate.utils import find_device, send_to_device

from .examples import image_digests, packed, placed_row, question_of_row, shown_columns
from .fresh import FreshRollouts
from .images import opened
from .plan import Choice, Plan
from .records import Experience, Question, Replay, Scores, prompt_hash
from .rollout_details import RolloutDetails
from .rows import check_rows, checksums, lacks_images, trained_tokens
from .scoring import masked_means, mean_scores
from .strategies.admission import Admission
from .values import copied

# Log-probabilities and entropies of tokens on the CPU, float32 of shape (B, T).
Forwarded = tuple[np.ndarray, np.ndarray]

# What travels with the rows of a batch to their loss, and not to TRL's.
IDENTITY = "rollout_rows"
COLUMNS = ("behavior_per_token_logps", "is_replayed", IDENTITY)


@dataclass(frozen=True, slots=True)
class Share:
    """What one process knows of a batch that the buffer needs: questions by group, completions and scores by row."""

    questions: dict[int, Question]
    experiences: dict[int, Experience]
    generated: tuple[str, ...] = ()  # ids of all fresh groups
    images: dict[int, tuple[str, ...]] = field(default_factory=dict)  # hashes by row, where rows of a group may differ
    scores: dict[int, tuple[Scores, int]] = field(default_factory=dict)


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
        number (`int`, *optional*, defaults to `0`):
            What identifies the batch among all of the run; travels with its rows.
        global_step (`int`, *optional*, defaults to `0`):
            Optimizer steps of this run before it.
        may_differ (`bool`, *optional*, defaults to `False`):
            Whether the rows of a group may differ in their images, as with a random transform.
        stores_groups (`bool`, *optional*, defaults to `False`):
            Whether whole groups are stored, failures included, instead of single successes.
        fills_groups (`bool`, *optional*, defaults to `False`):
            Whether stored successes take the place of failures where a group failed as a whole.
        choices (`dict[int, Choice]`, *optional*):
            Why each stored completion was chosen, by row; on the main process, where the log of replays asks for it.

    Attributes:
        replaced (`dict[int, float]`):
            Success rewards of the failures whose place stored successes have taken, by row; on all processes.
        questions (`dict[int, Question]`):
            Questions by group: those of the fresh groups whose first row belongs to this process; once collected, on
            the main process, those of all groups that concern the buffer.
        token_ids (`list[list[int]]`):
            Completion token ids by position, as the reward functions saw them.
        without_logps (`set[int]`):
            Positions whose completion came without log-probabilities from what sampled it.
        rewards_per_func (`np.ndarray` or `None`):
            What each reward function gave, shape `(num_groups * group_size, num_reward_funcs)`, NaN for no opinion;
            `None` until it is known.
        rewards (`np.ndarray`):
            Success rewards of shape `(num_groups, group_size)`, NaN where no reward function gave one.
        is_correct (`np.ndarray`):
            Which of them reach the success threshold.
        admission ([`Admission`]):
            What may enter the buffer.
        experiences (`dict[int, Experience]`):
            Recorded completions by row; once collected, on the main process, those of all processes.
        scores (`dict[int, tuple[Scores, int]]`):
            Scores of stored completions by row, from the first forward that trained them, with the policy version of
            that forward; once collected, on the main process, those of all processes.
        is_generating (`bool`):
            Whether the batch is being generated and scored right now.
        is_admitted (`bool`):
            Whether rewards are known, and what may enter the buffer is decided.
        is_trained (`bool`):
            Whether a row of this process has been trained. A batch that never is, is not collected: several may be
            generated for one that is trained.
        is_collected (`bool`):
            Whether the successes are in the buffer: nothing more is recorded. The batch may still be trained.
        is_first_turn (`bool`):
            Whether nothing of the batch has been generated yet: only then are stored rows left out.
        is_generated_whole (`bool`):
            Whether stored rows have been generated all the same, and overwritten: nothing was saved.
        forwards (`list[tuple[torch.Tensor, torch.Tensor]]`):
            Log-probabilities and entropies of each forward of the policy meanwhile.
        fresh ([`FreshRollouts`]):
            What rollouts have beyond tokens.
    """

    plan: Plan
    first_row: int
    num_rows: int
    num_groups: int
    group_size: int
    number: int = 0
    global_step: int = 0
    may_differ: bool = False
    stores_groups: bool = False
    fills_groups: bool = False
    choices: dict[int, Choice] = field(default_factory=dict)
    replaced: dict[int, float] = field(default_factory=dict)
    questions: dict[int, Question] = field(default_factory=dict)
    token_ids: list[list[int]] = field(default_factory=list)
    without_logps: set[int] = field(default_factory=set)
    rewards_per_func: np.ndarray | None = None
    rewards: np.ndarray = field(init=False)
    is_correct: np.ndarray = field(init=False)
    admission: Admission = field(init=False)
    experiences: dict[int, Experience] = field(default_factory=dict)
    scores: dict[int, tuple[Scores, int]] = field(default_factory=dict)
    is_generating: bool = False
    is_admitted: bool = False
    is_trained: bool = False
    is_collected: bool = False
    is_first_turn: bool = True
    is_generated_whole: bool = False
    fresh: FreshRollouts = field(default_factory=FreshRollouts)
    forwards: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    _storable: frozenset[int] = frozenset()
    _padded: np.ndarray | None = None  # completion ids as they came back
    _prompts: tuple[np.ndarray, np.ndarray] = field(init=False)  # ids and mask
    _prompt_hashes: dict[int, int] = field(default_factory=dict)
    _examples: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # by group, or position if they may differ
    _images: dict[int, tuple[str, ...]] = field(default_factory=dict)

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

    @property
    def planned(self) -> list[Replay]:
        """What is replayed without having been generated: all but the stored successes in the place of failures."""
        return [replay for replay in self.replays if replay.row not in self.replaced]

    @cached_property
    def is_fresh(self) -> np.ndarray:
        """Which rollouts are generated and trained, booleans of shape `(num_groups, group_size)`."""
        is_fresh = np.ones((self.num_groups, self.group_size), dtype=bool)
        is_fresh.flat[list(self.stored_rows)] = False
        return is_fresh

    @property
    def is_generated(self) -> np.ndarray:
        """Which rollouts are generated, those included whose place stored successes have taken; same shape."""
        is_generated = self.is_fresh.copy()
        for row in self.replaced:
            is_generated.flat[row] = True
        return is_generated

    @property
    def generated_rewards(self) -> np.ndarray:
        """Success rewards of what was generated, NaN elsewhere; same shape."""
        rewards = np.where(self.is_fresh, self.rewards, np.nan)
        for row, reward in self.replaced.items():
            rewards.flat[row] = reward
        return rewards

    @property
    def fresh_pass_rate(self) -> float:
        """Share of the generated rollouts that are successes; NaN where none was generated."""
        num_generated = np.count_nonzero(self.is_fresh) + len(self.replaced)
        num_correct = np.count_nonzero(self.is_correct & self.is_fresh)
        return float(num_correct / num_generated) if num_generated else math.nan

    @property
    def shows_own_prompts(self) -> bool:
        """Whether prompts may differ within a group: an environment shows them, or a rollout function makes them."""
        return self.fresh.prompts is not None or self.fresh.prompt_ids is not None

    def replayed_items(self) -> list[list[Replay]]:
        """What was replayed as it is stored: single completions, or the completions of whole groups together."""
        if not self.stores_groups:
            return [[replay] for replay in self.replays]
        groups: dict[int, list[Replay]] = {}
        for replay in self.replays:
            groups.setdefault(self.group_of(replay), []).append(replay)
        return list(groups.values())

    def group_of(self, replay: Replay) -> int:
        """Group of a replay."""
        return replay.row // self.group_size

    def _key(self, position: int) -> int:
        """Under which the example of a position is kept: its group, or itself where rows of a group may differ."""
        return position if self.may_differ else (self.first_row + position) // self.group_size

    # What happens to it, in this order

    def place(self, inputs: Sequence[Mapping[str, Any]], id_of: Callable[[Mapping[str, Any], int], str]) -> list[Any]:
        """
        Put the stored rows of replayed questions into the rows of their groups, and keep the questions of the others.

        Args:
            inputs (`Sequence[Mapping[str, Any]]`):
                Dataset rows of this process.
            id_of (`Callable`):
                Gives the id of the question of a row and its group.
        """
        placed: list[Any] = []
        examples: dict[int, tuple[dict[str, Any], bool]] = {}  # of replayed groups, with whether there are tensors
        for position, row in enumerate(inputs):
            group, slot = divmod(self.first_row + position, self.group_size)
            key, question = self._key(position), self.replayed_questions.get(group)
            if question is not None:
                self._examples[key] = question.example
                if group not in examples:  # to decode its images once
                    example = opened(question.example)
                    examples[group] = example, find_device(example) is not None
                example, has_tensors = examples[group]
                stored = placed_row(example, row, self.stored.get(position))
                # Questions are kept on the CPU; the data loader brings tensors of fresh rows to the device.
                device = find_device(row) if has_tensors else None
                placed.append(stored if device is None else send_to_device(stored, device))
                continue
            if slot == 0:
                self.questions[group] = question_of_row(row, id_of(row, group))
            if key not in self._examples:  # a copy, because reward functions may draw on images
                known = self.questions.get(group) if slot == 0 or not self.may_differ else None
                self._examples[key] = copied(shown_columns(row)) if known is None else known.example
            placed.append(row)
        return placed

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While the batch is generated and scored: forwards of the policy are kept until the end of the block."""
        self.is_generating = self.is_first_turn = True
        try:
            yield
        finally:
            self.is_generating = False
            self.forwards = []

    def take_rewards(self, rewards_per_func: torch.Tensor, token_ids: list[list[int]]) -> None:
        """
        Take what the reward functions gave, and the completions that they saw.

        Args:
            rewards_per_func (`torch.Tensor`):
                Rewards of the whole batch, shape `(num_groups * group_size, num_reward_funcs)`, NaN for no opinion.
            token_ids (`list[list[int]]`):
                Completion token ids by position.

        Raises:
            `ValueError`:
                When there are not as many rewards as rows.
        """
        num_rows = self.num_groups * self.group_size
        if rewards_per_func.ndim != 2 or len(rewards_per_func) != num_rows:
            raise ValueError(f"rewards have the shape {tuple(rewards_per_func.shape)}, of {num_rows} rows in all")
        self.rewards_per_func, self.token_ids = rewards_per_func.cpu().double().numpy(), token_ids

    def shown(
        self, groups: Collection[int], prompt_ids: Sequence[Sequence[int]]
    ) -> dict[int, tuple[int, tuple[str, ...]]]:
        """
        What the rows of some groups that belong to this process show: hashes of their prompts and of their images.

        Args:
            groups (`Collection[int]`):
                Groups.
            prompt_ids (`Sequence[Sequence[int]]`):
                Prompt token ids by position.
        """
        digests: dict[int, tuple[str, ...]] = {}
        found = {}
        for position, ids in enumerate(prompt_ids):
            row, key = self.first_row + position, self._key(position)
            if row // self.group_size in groups:
                if key not in digests:
                    digests[key] = tuple(image_digests(self._examples[key]))
                found[row] = prompt_hash(ids, digests[key]), digests[key]
        return found

    def fill(self, fills: Sequence[Replay], replaced: Mapping[int, float]) -> None:
        """
        Let stored successes take the place of failures; on all processes.

        Args:
            fills (`Sequence[Replay]`):
                The successes.
            replaced (`Mapping[int, float]`):
                Success rewards of the failures, by row.
        """
        self.replaced.update(replaced)
        replays = sorted((*self.replays, *fills), key=lambda replay: replay.row)
        self.plan = replace(self.plan, replays=tuple(replays))
        for name in ("stored", "stored_rows", "replayed_questions", "is_fresh"):  # of the plan before
            vars(self).pop(name, None)

    def admit(
        self, rewards: np.ndarray, is_correct: np.ndarray, admission: Admission, output: Mapping[str, torch.Tensor]
    ) -> None:
        """
        Take the decision on what is a success, and what may enter the buffer.

        Args:
            rewards (`np.ndarray`):
                Success rewards, shape `(num_groups, group_size)`, NaN where no reward function gave one.
            is_correct (`np.ndarray`):
                Which rollouts are successes, same shape.
            admission ([`Admission`]):
                What may enter the buffer.
            output (`Mapping[str, torch.Tensor]`):
                Rows of this process as TRL made them: `completion_mask` of shape `(num_rows, T)`, where truncated
                completions may have no token, `prompt_ids` and `prompt_mask` of shape `(num_rows, P)`; `tool_mask` of
                the shape of `completion_mask` where others than the model wrote tokens.
        """
        self.rewards, self.is_correct = rewards, is_correct
        self.admission, self.is_admitted = admission, True
        if self.stores_groups:
            is_storable = np.repeat(self.is_group_storable, self.group_size)
        else:
            is_storable = (admission.is_worth_storing & np.isfinite(self.rewards)).ravel()
        is_storable = is_storable[self.first_row : self.first_row + self.num_rows]
        # A truncated failure of a whole group is one, whether it is trained or not.
        if not self.stores_groups or "tool_mask" in output:
            is_storable = is_storable & trained_tokens(output).any(-1)
        if "tool_mask" in output:
            self.fresh.masks = output["tool_mask"].bool().cpu().numpy()
        # Once for all rows: every transfer waits for the device.
        self._prompts = output["prompt_ids"].cpu().numpy(), output["prompt_mask"].bool().cpu().numpy()
        may_store = self.plan.is_started and not lacks_images(output)
        self._storable = frozenset(
            self.first_row + position
            for position in (np.flatnonzero(is_storable).tolist() if may_store else ())
            if position not in self.stored and position not in self.without_logps
        )

    @property
    def is_group_storable(self) -> np.ndarray:
        """Which groups are stored whole if they are fresh: a part is worth storing; shape `(num_groups,)`."""
        is_worth = self.admission.is_worth_storing
        has_both = is_worth.any(axis=1) & ~is_worth.all(axis=1)
        return np.asarray(has_both & np.isfinite(self.rewards).all(axis=1))

    def check_tokens(self, output: Mapping[str, torch.Tensor]) -> None:
        """
        Compare what came back with what was put in, token for token, before anything of it is trained or recorded.

        Args:
            output (`Mapping[str, torch.Tensor]`):
                Rows of this process as TRL made them: `completion_ids` and, where others than the model wrote tokens,
                `tool_mask`, both of shape `(num_rows, T)`.

        Raises:
            `ValueError`:
                When a stored row holds other tokens than the stored completion, or a row others than were rewarded;
                when a row does not know any more which tokens the model wrote.
        """
        self._padded = check_rows(
            output,
            self.token_ids,
            self.stored,
            told_masks=self.fresh.told_masks,
            first_row=self.first_row,
            num_rows=self.num_rows,
        )

    def leave_out_images(self, output: dict[str, Any]) -> None:
        """Train no stored completion without the images that it was generated for, where TRL has dropped them."""
        is_left_out = torch.zeros(self.num_rows, dtype=torch.bool)
        for position, experience in self.stored.items():
            has_own = experience.details is not None and bool(experience.details.images)
            is_left_out[position] = has_own or bool(image_digests(self._examples[self._key(position)]))
        mask = output["completion_mask"]
        output["completion_mask"] = mask.masked_fill(is_left_out.to(mask.device).unsqueeze(1), 0)

    def columns(self, completion_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        What the loss of every row will need; travels through TRL's shuffle with the other columns.

        Args:
            completion_ids (`torch.Tensor`):
                Completion ids with padding, shape `(num_rows, T)`.

        Returns:
            `dict[str, torch.Tensor]`:
                `behavior_per_token_logps` of shape `(num_rows, T)`, 0 in fresh rows and on padding; `is_replayed` of
                shape `(num_rows,)`; `rollout_rows` of shape `(num_rows, 4)`: number of the batch, row, number of
                tokens, and their checksum.
        """
        device = completion_ids.device
        behavior_logps = np.zeros(completion_ids.shape, dtype=np.float32)
        is_replayed = np.zeros(self.num_rows, dtype=bool)
        for position, experience in self.stored.items():
            behavior_logps[position, : experience.num_tokens] = experience.behavior_per_token_logps
            is_replayed[position] = True
        identity = np.empty((self.num_rows, 4), dtype=np.int64)
        identity[:, 0] = self.number
        identity[:, 1] = np.arange(self.first_row, self.first_row + self.num_rows)
        identity[:, 2] = list(map(len, self.token_ids))
        identity[:, 3] = checksums(completion_ids.cpu().numpy(), identity[:, 2])
        return {
            "behavior_per_token_logps": torch.from_numpy(behavior_logps).to(device),
            "is_replayed": torch.from_numpy(is_replayed).to(device),
            IDENTITY: torch.from_numpy(identity).to(device),
        }

    def entropies_of(self, logps: torch.Tensor, is_own: torch.Tensor) -> torch.Tensor:
        """
        Entropies of the forward that gave these log-probabilities while the batch was scored; NaN if none did.

        Args:
            logps (`torch.Tensor`):
                Log-probabilities of shape `(num_rows, T)`.
            is_own (`torch.Tensor`):
                Completion tokens, same shape.
        """
        # By value: TRL may have copied them.
        for of_forward, entropies in self.forwards:
            if of_forward.shape == logps.shape and torch.equal(of_forward[is_own], logps[is_own]):
                return entropies
        return torch.full_like(logps, torch.nan)

    def record(self, at: Mapping[int, int], forward: Forwarded) -> None:
        """
        Record what the policy that generated them says of the rows to be stored, once for each row.

        Args:
            at (`Mapping[int, int]`):
                Positions in the forward by row of the batch.
            forward (`tuple[np.ndarray, np.ndarray]`):
                Log-probabilities and entropies in nats, shape `(B, T)`; padding may be anything.
        """
        wanted = [row for row in at if row in self._storable and row not in self.experiences]
        if not wanted or self.is_collected:
            return
        positions = [row - self.first_row for row in wanted]
        lengths = [len(self.token_ids[position]) for position in positions]
        num_columns = max(lengths)
        indices = [at[row] for row in wanted]
        logps, entropies = (of_forward[indices, :num_columns] for of_forward in forward)
        is_own = np.arange(num_columns) < np.array(lengths)[:, None]
        if self.fresh.masks is not None:  # of tokens that the model never weighed, anything may come
            masks = self.fresh.masks[positions, :num_columns]
            is_own &= masks
            logps = np.where(masks, logps, np.float32(0))
        is_plain = self.fresh.is_plain
        made = Experience.of_rows(
            self._ids_of(positions, num_columns),
            logps,
            lengths,
            policy_version=self.policy_version,
            rewards=self.rewards.flat[wanted],
            entropies=masked_means(entropies, is_own),
            prompt_hashes=self._hashes_of(positions),
            details=[None if is_plain else self._details(position) for position in positions],
        )
        self.experiences.update(zip(wanted, made, strict=True))

    def score_replayed(
        self, at: Mapping[int, int], inputs: Mapping[str, torch.Tensor], forward: Forwarded, global_step: int
    ) -> None:
        """
        Keep what a forward that trains stored completions says of them, once for each row.

        Args:
            at (`Mapping[int, int]`):
                Positions in the micro-batch by row of the batch.
            inputs (`Mapping[str, torch.Tensor]`):
                Inputs of the loss: masks and `behavior_per_token_logps`, shape `(B, T)`.
            forward (`tuple[np.ndarray, np.ndarray]`):
                Log-probabilities and entropies in nats, shape `(B, T)`.
            global_step (`int`):
                Optimizer steps of this run before the forward.
        """
        wanted = [row for row in at if row in self.stored_rows and row not in self.scores]
        if not wanted or self.is_collected:
            return
        indices = [at[row] for row in wanted]
        of_tokens = (*forward, inputs["behavior_per_token_logps"].cpu().numpy(), trained_tokens(inputs))
        scores = mean_scores(*(part[indices] for part in of_tokens))
        for row, of_row in zip(wanted, scores, strict=True):
            if not math.isnan(of_row.entropy):  # NaN where nothing of the row is trained
                self.scores[row] = of_row, self.policy_version + global_step - self.global_step

    def _ids_of(self, positions: Sequence[int], num_columns: int) -> np.ndarray:
        if self._padded is not None:  # the same, and faster to store
            return self._padded[positions, :num_columns]
        padded = np.zeros((len(positions), num_columns), dtype=np.int64)
        for of_row, position in zip(padded, positions, strict=True):
            of_row[: len(self.token_ids[position])] = self.token_ids[position]
        return padded

    def _details(self, position: int) -> RolloutDetails | None:
        row = self.first_row + position
        question = self.replayed_questions.get(row // self.group_size) or self.questions.get(row // self.group_size)
        return self.fresh.details(
            position,
            len(self.token_ids[position]),
            None if question is None else question.example["prompt"],
            None if self.rewards_per_func is None else self.rewards_per_func[row].tolist(),
        )

    def _hashes_of(self, positions: Sequence[int]) -> list[int]:
        # Prompts of a group are the same, unless an environment or a function has made them.
        keys = positions if self.shows_own_prompts else [self._key(position) for position in positions]
        for key, position in zip(keys, positions, strict=True):
            if key in self._prompt_hashes:
                continue
            ids, mask = self._prompts
            own = ids[position][mask[position]]
            # Images of one size have the same tokens.
            digests = image_digests(self._examples.get(self._key(position), {}))
            self._prompt_hashes[key] = prompt_hash(own, digests)
            if self.may_differ and digests:
                self._images[self.first_row + position] = tuple(digests)
        return [self._prompt_hashes[key] for key in keys]

    # What comes of it

    @cached_property
    def concerns_buffer(self) -> np.ndarray:
        """Which groups change the buffer, shape `(num_groups,)`; before replay has started, those that are solved."""
        concerns = self.admission.concerns_buffer if self.plan.is_started else self.admission.is_solved
        return np.asarray(concerns & self.is_fresh.any(axis=1))  # replayed as a whole, a group tells nothing new

    def share(self, pack: Callable[[Question], Question] = packed) -> Share:
        """What this process knows that the buffer needs, its images encoded by `pack`."""
        # Images of the others are never encoded.
        questions = {
            group: pack(question) for group, question in self.questions.items() if self.concerns_buffer[group]
        }
        ids = tuple(question.question_id for question in self.questions.values())
        return Share(questions, self.experiences, ids, self._images, self.scores)

    def unite(self, shares: Sequence[Share]) -> None:
        """Bring together what all processes know; on the main process."""
        self.questions = {
            group: question for group, question in self.replayed_questions.items() if self.concerns_buffer[group]
        }
        self.experiences = {}
        for share in shares:
            self.questions.update(share.questions)
            self.experiences.update(share.experiences)
            self.scores.update(share.scores)
            self._images.update(share.images)

    def groups(self) -> Iterator[tuple[int, Question, list[Experience]]]:
        """Number, question and recorded completions of the groups that change the buffer, in batch order."""
        for group, question in sorted(self.questions.items(), key=lambda item: item[0]):
            rows: Iterable[int] = range(group * self.group_size, (group + 1) * self.group_size)
            if self._images:  # a completion of another image than the question's answers another question
                shown = tuple(image_digests(question.example))
                rows = [row for row in rows if self._images.get(row, shown) == shown]
            experiences = [self.experiences[row] for row in rows if row in self.experiences]
            is_complete = not self.stores_groups or len(experiences) == self.group_size
            yield group, question, experiences if is_complete else []
