"""Which stored completions a generation batch replays, and in which rows: decided by the main process."""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .buffer import ReplayBuffer
from .config import ExGRPOConfig
from .plan import plan_rows, spare
from .prompts import Prompts, Shown
from .questions import Replayable
from .records import Candidate, Experience, Question, Replay
from .scoring import Prompted, Scores, add_scores
from .strategies import Strategies
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
    """

    def __init__(
        self, buffer: ReplayBuffer, replayable: Replayable, args: ExGRPOConfig, strategies: Strategies
    ) -> None:
        self.buffer = buffer
        self.replayable = replayable
        self.args = args
        self.strategies = strategies
        self.questions: dict[str, Question] = {}
        self.candidates: dict[str, list[Candidate]] = {}

    def draw(self, policy_version: int) -> None:
        """Draw questions, with their candidates (method, section 3)."""
        if self.args.max_staleness is not None:
            self.buffer.evict_older_than(policy_version - self.args.max_staleness)
        n = min(self.args.num_groups_to_replay, self.buffer.num_questions)
        sampler = self.replayable.sampler(self.strategies.question_sampler)
        question_ids = list(self.buffer.sample_questions(n, sampler)) if n else []
        # A buffer of the user may draw as it likes.
        source = f"{type(self.buffer).__name__}.sample_questions({n})"
        check_drawn(question_ids, n, lambda question_id: bool(self._completions(question_id)), source)
        for question_id in question_ids:
            candidates = [Candidate(e) for e in self.replayable.completions(self._completions(question_id))]
            if candidates:
                self.candidates[question_id] = candidates
                self.questions[question_id] = self.buffer.question(question_id)

    def _completions(self, question_id: str) -> Sequence[Experience]:
        try:
            return self.buffer.completions(question_id)
        except KeyError:
            return ()

    def to_score(self, prompts: Prompts) -> list[Prompted]:
        """Prompt and completion of every candidate that the choice depends on: none where there is no choice."""
        question_ids = [question_id for question_id, choices in self.candidates.items() if len(choices) > 1]
        if not question_ids or not self.strategies.completion_selector.requires_scores:
            return []
        shown = [
            Shown(self.questions[question_id].example, candidate.experience)
            for question_id in question_ids
            for candidate in self.candidates[question_id]
        ]
        return prompts.prompted(shown)

    def choose(self, scores: Mapping[int, Scores], unseen: Collection[int], rng: np.random.Generator) -> list[Replay]:
        """One completion per drawn question, and its row (method, section 4); ascending by row."""
        if not self.candidates:
            return []
        shape = self.args.num_groups, self.args.num_generations
        rows = plan_rows(*shape, len(self.candidates), rng)
        if unseen:
            rows = spare(rows, *shape, unseen)
        scored = add_scores(self.candidates, scores)
        return [self._select(*drawn, row, rng) for row, drawn in zip(rows, scored.items(), strict=True)]

    def _select(self, question_id: str, choices: Sequence[Candidate], row: int, rng: np.random.Generator) -> Replay:
        index = self.strategies.completion_selector(choices, rng) if len(choices) > 1 else 0
        if not 0 <= index < len(choices):
            raise ValueError(
                f"The completion selector returned {index!r} for {len(choices)} candidates. Return the index of one."
            )
        return Replay(self.questions[question_id], choices[index].experience, row, choices[index].entropy)
