"""Stored successes in the place of failures, where every fresh completion of a question failed."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather
from trl.trainer import grpo_trainer

from .asking import AskedTwice
from .batch import Batch
from .compatibility import wrapped
from .examples import image_digests
from .images import opened
from .plan import Plan
from .questions import has_own_prompt
from .records import UNKNOWN_PROMPT, Experience, Replay
from .replayer import Replayer
from .rewards import stored_rewards
from .scoring import Prompted, score_candidates, without_images
from .selection import Selection

# What rows of a failed group show, by row: hashes of prompt and images.
_ShownRows = dict[int, tuple[int, tuple[str, ...]]]


@contextmanager
def filling(
    trainer: Any, batch: Batch, inputs: list[dict[str, Any]], *, keeps_rewards: bool, rewards_of: Callable[..., Any]
) -> Iterator[None]:
    """
    While a batch is generated: its groups that failed as a whole get a stored success before TRL makes anything of it.

    Rewards are computed right after the generation. TRL is told them when it asks, with those of the stored successes.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer that generates.
        batch ([`Batch`]):
            The batch.
        inputs (`list[dict]`):
            Dataset rows of this process.
        keeps_rewards (`bool`):
            Whether stored completions keep the rewards that they had.
        rewards_of (`Callable`):
            Lets a method compute rewards, on all processes, and the batch take them.
    """
    if not batch.plan.is_started:
        yield
        return
    functions = AskedTwice(trainer, batch.num_rows)
    calculate = trainer._calculate_rewards

    def around_generate(generate: Callable[..., Any], prompts: Any, *args: Any, **kwargs: Any) -> Any:
        result = generate(prompts, *args, **kwargs)
        generated = _Generated(trainer, result)
        ask = functools.partial(functions.first, calculate)
        rewards_of(batch, ask, inputs, prompts, generated.completions, generated.completion_ids)
        fills, replaced = choose_fills(trainer.replayer, batch, generated.prompt_ids)
        if not fills:
            return result
        batch.fill(fills, replaced)
        with trainer.replayer.processes.together("filling failed groups"):
            generated.fill(_filled(batch))
        return generated.result()

    def around_calculate(again: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rewards = functions.rewards
        if rewards is None:  # of an override that does not generate as TRL does
            return again(*args, **kwargs)
        if batch.replaced:
            filled = _filled(batch)
            names = trainer.reward_func_names
            known = stored_rewards(filled, names) if keeps_rewards else [{} for _ in names]
            rewards = functions.again(list(filled), known, again, *args, **kwargs)
        functions.hand_over()
        return rewards

    with ExitStack() as stack:
        stack.enter_context(wrapped(trainer, "_generate", around_generate))
        stack.enter_context(wrapped(trainer, "_calculate_rewards", around_calculate))
        yield


def _filled(batch: Batch) -> dict[int, Experience]:
    """Stored successes of this process that have taken the place of failures, by position."""
    return {
        position: experience
        for position, experience in batch.stored.items()
        if batch.first_row + position in batch.replaced
    }


# What is chosen


def choose_fills(
    replayer: Replayer, batch: Batch, prompt_ids: Sequence[Sequence[int]]
) -> tuple[Sequence[Replay], Mapping[int, float]]:
    """
    Stored successes for the groups that failed as a whole, and the success rewards of the failures they replace.

    Called by all processes, once the batch knows its rewards. Which failure is replaced is drawn at random.

    Args:
        replayer ([`Replayer`]):
            What can be replayed, by which rules.
        batch ([`Batch`]):
            The batch.
        prompt_ids (`Sequence[Sequence[int]]`):
            Prompt token ids of the rows of this process.
    """
    start = time.perf_counter()
    processes = replayer.processes
    failed: dict[int, list[float]] = processes.decide("judging the groups", lambda: _failed_groups(replayer, batch))
    if not failed:
        return (), {}
    ids = {group: question.question_id for group, question in batch.questions.items() if group in failed}
    shares = processes.gather((ids, batch.shown(failed, prompt_ids)))
    choice = _Choice(replayer, batch, failed)
    drawn: list[Prompted] = []  # what the main process alone has: images are sent to those that need them

    def draw() -> tuple[bool, list[Prompted]]:
        for ids, shown in shares:
            choice.question_ids.update(ids)
            choice.shown.update(shown)
        choice.draw()
        drawn.extend(choice.selection.to_score(replayer.prompts))
        to_score = [without_images(of_one) for of_one in drawn] if processes.count > 1 else drawn
        return bool(choice.selection.candidates), to_score

    has_any, to_score = processes.decide("looking for successes of failed questions", draw)
    if not has_any:
        return (), {}
    before_scoring = time.perf_counter()
    scores = score_candidates(to_score, replayer.score, processes, replayer.args.per_device_train_batch_size, drawn)
    scoring_seconds = time.perf_counter() - before_scoring
    whole: list[Replay] = []

    def choose() -> tuple[Sequence[Replay], dict[int, float]]:
        choice.selection.add_scores(scores)
        whole.extend(choice.choose())
        replayer.note_selection(choice.selection)
        batch.choices.update(choice.selection.choices)
        told = Plan(batch.policy_version, True, tuple(whole))
        size = batch.group_size
        rewards = {replay.row: failed[replay.row // size][replay.row % size] for replay in whole}
        return (told.without_images() if processes.count > 1 else told).replays, rewards

    fills, replaced = processes.decide("choosing successes for failed questions", choose)
    replayer.metrics.add_to_selection(
        selection_seconds=time.perf_counter() - start - scoring_seconds,
        scoring_seconds=scoring_seconds,
        candidates_scored=len(to_score),
    )
    return whole or fills, replaced


def _failed_groups(replayer: Replayer, batch: Batch) -> dict[int, list[float]]:
    """Success rewards of the groups that failed as a whole, by group."""
    if not replayer.buffer.num_questions:
        return {}
    assert batch.rewards_per_func is not None, "rewards come before they are judged"
    shape = batch.num_groups, batch.group_size
    rewards, is_correct = (of_rows.reshape(shape) for of_rows in replayer.success_rule(batch.rewards_per_func))
    has_failed = (batch.is_fresh & ~is_correct & ~np.isnan(rewards)).all(axis=1)
    if not replayer.strategies.admission.requires_success:  # what is stored may be no success, only better than others
        has_failed &= rewards.max(axis=1) == rewards.min(axis=1)
    return {group: rewards[group].tolist() for group in np.flatnonzero(has_failed).tolist()}


class _Choice:
    """The choice of the main process."""

    def __init__(self, replayer: Replayer, batch: Batch, failed: Mapping[int, Sequence[float]]) -> None:
        self.replayer, self.batch, self.failed = replayer, batch, failed
        self.question_ids: dict[int, str] = {}
        self.shown: _ShownRows = {}
        self.selection = Selection(
            replayer.buffer, replayer.replayable, replayer.args, replayer.strategies, stored_per_group=1
        )
        self._digests: dict[str, tuple[str, ...]] = {}

    def draw(self) -> None:
        """Find what is stored of the failed questions, and answers what one of their rows shows."""
        most, selection = self.replayer.args.max_staleness, self.selection
        if most is not None:
            self.replayer.buffer.evict_older_than(self.batch.policy_version - most)
        for question_id in dict.fromkeys(self.question_ids[group] for group in self.failed):
            selection.take(question_id)
        for question_id, candidates in list(selection.candidates.items()):
            self._digests[question_id] = tuple(image_digests(selection.questions[question_id].example))
            rows = [
                row for group in self.failed if self.question_ids[group] == question_id for row in self._rows(group)
            ]
            suitable = [c for c in candidates if any(self._answers(question_id, c.experience, row) for row in rows)]
            selection.candidates[question_id] = suitable
            if not suitable:
                del selection.candidates[question_id]

    def choose(self) -> list[Replay]:
        """A failure of each group for which there is a success, drawn at random, and the success that replaces it."""
        fills: list[Replay] = []
        rng = self.replayer.rng
        for group in self.failed:
            question_id = self.question_ids[group]
            candidates = self.selection.candidates.get(question_id, ())
            suitable = {
                row: [c for c in candidates if self._answers(question_id, c.experience, row)]
                for row in self._rows(group)
            }
            rows = [row for row, of_row in suitable.items() if of_row]
            if rows:
                row = rows[int(rng.integers(len(rows)))]
                fills += self.selection.put(question_id, suitable[row], [row], rng)
        return fills

    def _rows(self, group: int) -> range:
        return range(group * self.batch.group_size, (group + 1) * self.batch.group_size)

    def _answers(self, question_id: str, experience: Experience, row: int) -> bool:
        """Whether a completion answers the very prompt and images of a row; what tools showed stays with its row."""
        if has_own_prompt(experience) or (experience.details is not None and experience.details.images):
            return False
        prompt, digests = self.shown[row]
        if experience.prompt_hash == UNKNOWN_PROMPT:
            return digests == self._digests[question_id]
        return experience.prompt_hash == prompt


# Where it goes


class _Generated:
    """What TRL's `_generate` returned, however many parts that has."""

    def __init__(self, trainer: Any, result: Sequence[Any]) -> None:
        self.trainer = trainer
        self.prompt_ids, self.completion_ids, self.masks, self.completions, *self._rest = result
        # Before TRL 1.9, the number of tokens of the whole batch, which dapo's loss is divided by.
        self._total = self._rest.pop(0) if isinstance(self._rest[0], torch.Tensor) else None
        self.logps, *self._rest = self._rest

    def fill(self, stored: Mapping[int, Experience]) -> None:
        """Put stored completions into their rows."""
        before = self._num_tokens
        self.completion_ids, self.completions = list(self.completion_ids), list(self.completions)
        self.masks, self.logps = (None if part is None else list(part) for part in (self.masks, self.logps))
        for position, experience in stored.items():
            self.completion_ids[position] = experience.token_ids.tolist()
            self.completions[position] = self._completion(position, experience)
            if self.masks is not None:
                self.masks[position] = experience.is_model.astype(int).tolist()
            if self.logps is not None:
                self.logps[position] = experience.behavior_per_token_logps.tolist()
        self._num_added = self._num_tokens - before

    def result(self) -> tuple[Any, ...]:
        """The same parts, filled. Called by all processes."""
        total: list[Any] = []
        if self._total is not None:
            total = [self._total + gather(self._total.new_tensor([self._num_added])).sum()]
        return self.prompt_ids, self.completion_ids, self.masks, self.completions, *total, self.logps, *self._rest

    @property
    def _num_tokens(self) -> int:
        """Tokens of this process, as TRL counts them."""
        return sum(map(len, self.completion_ids)) if self.masks is None else sum(map(sum, self.masks))

    def _completion(self, position: int, experience: Experience) -> Any:
        """A stored completion as reward functions see the others."""
        tokenizer, ids = self.trainer._text_tokenizer, experience.token_ids.tolist()
        if isinstance(self.completions[position], str):
            return tokenizer.decode(ids, skip_special_tokens=True)
        kept = None if experience.details is None else experience.details.messages
        if kept is not None:
            return opened(kept)
        parse: Callable[..., Any] = grpo_trainer.parse_response
        takes = inspect.signature(parse).parameters
        # TRL knows templates of responses since it passes on the prompt.
        ways = ("response_template", "response_schema") if "prefix" in takes else ("response_schema",)
        parses = hasattr(tokenizer, "parse_response") and any(getattr(tokenizer, way, None) for way in ways)
        if not parses or self.masks is not None:
            return [{"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}]
        context = {"prefix": self.prompt_ids[position], "tools": self.trainer.tools}
        return [parse(tokenizer, ids, **{name: value for name, value in context.items() if name in takes})]
