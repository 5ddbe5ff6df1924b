"""Which stored completions a generation batch replays, and in which rows: decided by the main process."""

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .buffer import ReplayBuffer
from .config import ExGRPOConfig
from .plan import Choice, plan_rows, rows_of_group, spare
from .prompts import Prompts, Shown
from .questions import Replayable
from .records import Candidate, Experience, Question, Replay, Reuse, Scores
from .scoring import Prompted
from .strategies import COMPLETION_SELECTORS, Strategies
from .strategies.samplers import check_drawn


class Selection:
    """
    The replays of one generation batch, in the making.

    Args:
        buffer ([`ReplayBuffer`]):
            Experience buffer.
        replayable ([`Replayable`]):
            Which of its completions may be replayed.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        strategies ([`Strategies`]):
            Rules to follow.
        stored_per_group (`int`, *optional*):
            Most stored completions in a group. By default as the configuration says.

    Attributes:
        drifted (`list[tuple[str, Experience]]`):
            Candidates, with their questions, that the policy has left too far behind: they leave the buffer.
        agreements (`list[bool]`):
            For each choice by present scores: whether the last known ones would have led to the same.
        choices (`dict[int, Choice]`):
            Why each of the replays was chosen, by row, for the log of replays.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        replayable: Replayable,
        args: ExGRPOConfig,
        strategies: Strategies,
        stored_per_group: int | None = None,
    ) -> None:
        self.buffer = buffer
        self.replayable = replayable
        self.args = args
        self.strategies = strategies
        self.stored_per_group: int = args.stored_per_group if stored_per_group is None else stored_per_group
        self.questions: dict[str, Question] = {}
        self.candidates: dict[str, list[Candidate]] = {}
        self.groups: dict[str, Sequence[Sequence[Experience]]] = {}
        self.drifted: list[tuple[str, Experience]] = []
        self.agreements: list[bool] = []
        self.choices: dict[int, Choice] = {}
        self._reuses: dict[Experience, Reuse] = {}  # looked up already: none changes before the choice is made

    def draw(self, policy_version: int, num_questions: int, resting: Collection[str] = ()) -> None:
        """
        Draw questions, with their candidates (method, section 3).

        Args:
            policy_version (`int`):
                Version of the policy that generates the batch.
            num_questions (`int`):
                Most questions to draw.
            resting (`Collection[str]`, *optional*):
                Questions that may not be drawn now.
        """
        if self.args.max_staleness is not None:
            self.buffer.evict_older_than(policy_version - self.args.max_staleness)
        n = min(num_questions, self.buffer.num_questions)
        sampler = self.replayable.sampler(self.strategies.question_sampler, resting)
        question_ids = list(self.buffer.sample_questions(n, sampler)) if n else []
        # A buffer of the user may draw as it likes.
        source = f"{type(self.buffer).__name__}.sample_questions({n})"
        check_drawn(question_ids, n, lambda question_id: bool(self._completions(question_id)), source)
        for question_id in question_ids:
            self.take(question_id)

    def take(self, question_id: str) -> None:
        """Consider what is stored of a question, if any of it may be replayed."""
        if self.args.replays_groups:
            groups = [group for group in self.buffer.groups(question_id) if self.replayable.is_whole(group)]
            if groups:
                self.groups[question_id] = groups
        else:
            experiences = self.replayable.completions(self._completions(question_id))
            if experiences:
                is_known = self.args.candidate_scores == "last_known" and self._has_choice(experiences)
                self.candidates[question_id] = [self._known(e) if is_known else Candidate(e) for e in experiences]
        if question_id in self.groups or question_id in self.candidates:
            self.questions[question_id] = self.buffer.question(question_id)

    def _completions(self, question_id: str) -> Sequence[Experience]:
        try:
            return self.buffer.completions(question_id)
        except KeyError:
            return ()

    def _reuse(self, experience: Experience) -> Reuse:
        if experience not in self._reuses:
            self._reuses[experience] = self.buffer.reuse(experience)
        return self._reuses[experience]

    def _known(self, experience: Experience) -> Candidate:
        reuse = self._reuse(experience)
        return Candidate(experience, reuse.entropy, reuse.negative_log_likelihood)

    @property
    def _most_stored(self) -> int:
        return min(self.stored_per_group, self.args.num_generations - 1)

    def _has_choice(self, candidates: Sequence[object]) -> bool:
        return len(candidates) > self._most_stored

    def to_score(self, prompts: Prompts) -> list[Prompted]:
        """Prompt and completion of every candidate that the choice depends on: none where there is no choice."""
        if not self.strategies.completion_selector.requires_scores or self.args.candidate_scores == "last_known":
            return []
        of_choices = {q: choices for q, choices in self.candidates.items() if self._has_choice(choices)}
        shown = [
            Shown(self.questions[question_id].example, candidate.experience)
            for question_id, choices in of_choices.items()
            for candidate in choices
        ]
        prompted = prompts.prompted(shown) if shown else []
        if self.args.max_drift is None:
            return prompted
        experiences = [candidate.experience for choices in of_choices.values() for candidate in choices]
        return [
            of_one._replace(behavior_logps=experience.behavior_per_token_logps)
            for of_one, experience in zip(prompted, experiences, strict=True)
        ]

    def choose(self, scores: Mapping[int, Scores], unseen: Collection[int], rng: np.random.Generator) -> list[Replay]:
        """What is replayed of each drawn question, and its rows (method, section 4); ascending by row."""
        self.add_scores(scores)
        drawn = list(self.groups or self.candidates)
        if not drawn:
            return []
        shape = self.args.num_groups, self.args.num_generations
        rows = plan_rows(*shape, len(drawn), rng)
        if unseen:
            rows = spare(rows, *shape, unseen, self._groups_of_a_process)
        select = self._select_group if self.args.replays_groups else self._select
        replays = [
            replay for row, question_id in zip(rows, drawn, strict=True) for replay in select(question_id, row, rng)
        ]
        return sorted(replays, key=lambda replay: replay.row)

    @property
    def _groups_of_a_process(self) -> int:
        """Groups among which a replayed one may be moved: of one process, where each must keep a fresh one."""
        num_groups, num_processes = self.args.num_groups, self.args.world_size
        is_even = self.args.replays_groups and num_groups % num_processes == 0
        return num_groups // num_processes if is_even else num_groups

    def add_scores(self, scores: Mapping[int, Scores]) -> None:
        """Give candidates their scores, which are counted over those that have a choice; drop those that drifted."""
        if not scores:
            return
        numbers = itertools.count()
        most = self.args.max_drift
        for question_id, choices in list(self.candidates.items()):
            if not self._has_choice(choices):
                continue
            of_choices = [Scores(*scores[next(numbers)]) for _ in choices]
            scored = [
                Candidate(choice.experience, of_one.entropy, of_one.negative_log_likelihood)
                for choice, of_one in zip(choices, of_choices, strict=True)
            ]
            has_drifted = [
                most is not None and of_one.drift is not None and of_one.drift > most for of_one in of_choices
            ]
            self.drifted += [
                (question_id, choice.experience) for choice, is_out in zip(scored, has_drifted, strict=True) if is_out
            ]
            self.candidates[question_id] = [
                choice for choice, is_out in zip(scored, has_drifted, strict=True) if not is_out
            ]
        self.candidates = {question_id: choices for question_id, choices in self.candidates.items() if choices}

    def _select(self, question_id: str, row: int, rng: np.random.Generator) -> list[Replay]:
        candidates = self.candidates[question_id]
        rows = rows_of_group(row, self.args.num_generations, min(self._most_stored, len(candidates)))
        return self.put(question_id, candidates, rows, rng)

    def put(
        self, question_id: str, candidates: Sequence[Candidate], rows: Sequence[int], rng: np.random.Generator
    ) -> list[Replay]:
        """As many of a question's candidates as there are rows, chosen one after the other, in these rows."""
        waiting, chosen = list(candidates), list[Candidate]()
        for row in rows:
            has_choice = len(waiting) > len(rows) - len(chosen)
            index = self._index(waiting, rng) if has_choice else 0
            chosen.append(waiting[index])
            waiting = waiting[:index] + waiting[index + 1 :]  # a selector may keep what it was shown
            self._note(question_id, row, chosen[-1], waiting if has_choice else ())
        return [
            Replay(self.questions[question_id], candidate.experience, of_one, candidate.entropy)
            for of_one, candidate in zip(rows, chosen, strict=True)
        ]

    def _index(self, choices: Sequence[Candidate], rng: np.random.Generator) -> int:
        selector = self.strategies.completion_selector
        index = selector(choices, rng)
        if not 0 <= index < len(choices):
            raise ValueError(
                f"The completion selector returned {index!r} for {len(choices)} candidates. Return the index of one."
            )
        # The built-in ones alone are known to have neither state nor chance.
        is_pure = selector.requires_scores and type(selector) in COMPLETION_SELECTORS.values()
        if is_pure and self.args.candidate_scores == "current" and hasattr(self.buffer, "reuse"):
            known = [self._known(choice.experience) for choice in choices]
            self.agreements.append(selector(known, rng) == index)
        return index

    def _select_group(self, question_id: str, row: int, rng: np.random.Generator) -> list[Replay]:
        groups = self.groups[question_id]
        index = self.strategies.group_selector(groups, rng) if len(groups) > 1 else 0
        if not 0 <= index < len(groups):
            raise ValueError(
                f"The group selector returned {index!r} for {len(groups)} groups. Return the index of one."
            )
        first = row - row % self.args.num_generations
        others = [Candidate(group[0]) for number, group in enumerate(groups) if number != index]
        for slot, experience in enumerate(groups[index]):
            self._note(question_id, first + slot, Candidate(experience), others)
        return [
            Replay(self.questions[question_id], experience, first + slot)
            for slot, experience in enumerate(groups[index])
        ]

    def _note(self, question_id: str, row: int, chosen: Candidate, competitors: Sequence[Candidate]) -> None:
        """Keep why a completion was chosen, before anything of the buffer changes."""
        if not self.args.replay_log:
            return
        buckets = self.buffer.buckets().items()
        bucket = next((bucket for bucket, ids in buckets if question_id in ids), None)
        # A buffer of the user may not know.
        reuse = self._reuse(chosen.experience) if hasattr(self.buffer, "reuse") else None
        self.choices[row] = Choice(chosen, tuple(competitors), bucket, reuse)
