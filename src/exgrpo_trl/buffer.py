"""Replay buffer of correct completions, bucketed by how often their question was solved (paper section 3.1)."""

from __future__ import annotations

import operator
from collections.abc import Iterable, KeysView, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .experience import Experience, Question
from .indices import Bucket, BucketView, VersionIndex
from .invariants import violations
from .sampling import QuestionSampler, gaussian_sampler

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(slots=True)
class _StoredQuestion:
    question: Question
    bucket: int
    # By token ids, oldest first: the key finds duplicates.
    completions: dict[bytes, Experience] = field(default_factory=dict)


class ExperienceBuffer:
    """
    Correct completions of questions that are solved sometimes but not always (paper section 3.1).

    A question sits in the bucket of its latest number of correct completions. It leaves the buffer for good when it
    is solved every time ("retired"), and until its next success when its last completion is evicted. Inserting,
    removing and drawing take constant time: nothing on the training path walks the buffer.

    Args:
        group_size (`int`, *optional*):
            Completions per question at training time (K). By default that of the first collected group.
        capacity (`int`, *optional*):
            Most completions kept. Beyond it, completions of the oldest policy version go first.
        max_completions_per_question (`int`, *optional*):
            Most completions kept per question. Beyond it, those stored first go first.
        retire_solved (`bool`, *optional*, defaults to `True`):
            Whether a question whose whole group is correct is retired.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `rng`.

    Attributes:
        rng (`numpy.random.Generator`):
            PCG64 generator of every draw; saved with the buffer.
        provenance (`dict[str, Any]`):
            What the stored tokens depend on (tokenizer, temperature, ...); plain JSON, saved with the buffer.
        replay_state (`dict[str, Any]`):
            State of the trainer that uses the buffer; plain JSON, saved with the buffer.
        num_evicted (`int`):
            Completions removed so far by a limit, by age or by [`~ExperienceBuffer.evict`].
        num_duplicates (`int`):
            Completions refused so far because their question already had the same tokens.

    Raises:
        ValueError: if a size is below 1.
    """

    def __init__(
        self,
        *,
        group_size: int | None = None,
        capacity: int | None = None,
        max_completions_per_question: int | None = None,
        retire_solved: bool = True,
        seed: int = 0,
    ) -> None:
        self._group_size = _checked_size("group_size", group_size)
        self._capacity = _checked_size("capacity", capacity)
        self._max_per_question = _checked_size("max_completions_per_question", max_completions_per_question)
        self._retire_solved = retire_solved
        self.rng = np.random.Generator(np.random.PCG64(seed))
        self.provenance: dict[str, Any] = {}
        self.replay_state: dict[str, Any] = {}
        self.num_evicted = 0
        self.num_duplicates = 0
        self._num_completions = 0
        self._num_tokens = 0
        self._questions: dict[str, _StoredQuestion] = {}
        self._buckets: dict[int, Bucket] = {}
        self._retired: dict[str, None] = {}
        self._versions = VersionIndex()

    @property
    def group_size(self) -> int | None:
        """Completions per question at training time (K), `None` until it is known."""
        return self._group_size

    @property
    def capacity(self) -> int | None:
        """Most completions kept, `None` for no limit."""
        return self._capacity

    @property
    def max_completions_per_question(self) -> int | None:
        """Most completions kept per question, `None` for no limit."""
        return self._max_per_question

    @property
    def retire_solved(self) -> bool:
        """Whether a question whose whole group is correct is retired."""
        return self._retire_solved

    @property
    def num_questions(self) -> int:
        """Number of stored questions."""
        return len(self._questions)

    @property
    def num_completions(self) -> int:
        """Number of stored completions."""
        return self._num_completions

    @property
    def num_tokens(self) -> int:
        """Number of stored completion tokens."""
        return self._num_tokens

    @property
    def retired(self) -> KeysView[str]:
        """Read-only set of the retired question ids, in the order in which they retired."""
        return self._retired.keys()

    def __contains__(self, question_id: object) -> bool:
        return question_id in self._questions

    def __repr__(self) -> str:
        return (
            f"ExperienceBuffer(questions={self.num_questions}, completions={self.num_completions}, "
            f"tokens={self.num_tokens}, retired={len(self._retired)}, group_size={self.group_size})"
        )

    def question(self, question_id: str) -> Question:
        """
        The stored question of that id.

        Raises:
            KeyError: if the buffer holds no completion of that question.
        """
        return self._stored(question_id).question

    def completions(self, question_id: str) -> tuple[Experience, ...]:
        """
        The stored completions of a question, oldest first.

        Raises:
            KeyError: if the buffer holds no completion of that question.
        """
        return tuple(self._stored(question_id).completions.values())

    def buckets(self) -> Mapping[int, Sequence[str]]:
        """Question ids by latest number of correct completions: non-empty buckets, ascending; read-only live views."""
        return MappingProxyType({key: BucketView(self._buckets[key]) for key in sorted(self._buckets)})

    def collect(
        self,
        question: Question,
        experiences: Sequence[Experience],
        *,
        num_correct: int,
        group_size: int,
        bucket: int | None = None,
    ) -> int:
        """
        Take in one group (paper section 3.1): retire its question if solved, else store its correct completions.

        Nothing happens when no completion of the group was correct, or when the question is retired. A question
        that is already stored moves to its new bucket even if all its completions are duplicates. Groups of one
        question must arrive in batch order: the latest decides the bucket.

        Args:
            question ([`Question`]):
                The question; of a stored one the first example is kept.
            experiences (`Sequence[Experience]`):
                The correct fresh completions of the group.
            num_correct (`int`):
                Correct completions of the group, a replayed one included.
            group_size (`int`):
                Completions of the group (K).
            bucket (`int`, *optional*):
                Bucket to use in place of `num_correct`, from 0 to `group_size` (paper section 5.3, continuous
                rewards).

        Returns:
            `int`: number of completions inserted, before the limits of the buffer are applied.

        Raises:
            TypeError: if the question or an experience is not one.
            ValueError: if a number is out of range, the group size is not the buffer's, or the question id belongs to
                another prompt.
        """
        if not isinstance(question, Question):
            raise TypeError(f"`question` must be a Question, got {type(question).__name__}.")
        for experience in experiences:
            if not isinstance(experience, Experience):
                raise TypeError(
                    f"`experiences` must be Experience objects, got {type(experience).__name__}; build them with "
                    "Experience.create(...)."
                )
        group_size = _checked_size("group_size", group_size) or 0
        if group_size != (self._group_size or group_size):
            raise ValueError(
                f"This experience buffer holds groups of {self._group_size}, got `group_size`={group_size}. Keep "
                "`num_generations` as it was, or start with an empty buffer."
            )
        num_correct = _checked_count("num_correct", num_correct, group_size)
        bucket = num_correct if bucket is None else _checked_count("bucket", bucket, group_size)
        self._check_prompt(question)
        self._group_size = group_size
        if question.question_id in self._retired:
            return 0
        if num_correct == group_size and self._retire_solved:
            self.retire(question.question_id)
            return 0
        if num_correct == 0:
            return 0
        num_inserted = self._insert(question, experiences, bucket)
        self._apply_question_limit(question.question_id)
        self._apply_capacity()
        return num_inserted

    def sample_questions(self, n: int, sampler: QuestionSampler | None = None) -> list[str]:
        """
        Draw distinct stored questions.

        Args:
            n (`int`):
                Number of questions; no more than are stored come back.
            sampler (`QuestionSampler`, *optional*):
                Rule of the draw, by default [`gaussian_sampler`] with the paper's settings.

        Returns:
            `list[str]`: question ids.

        Raises:
            ValueError: if `n` is negative, or the sampler returned too many, repeated or unknown ids.
        """
        if n < 0:
            raise ValueError(f"The number of questions to draw must not be negative, got {n}.")
        n = min(n, self.num_questions)
        drawn = list((sampler or gaussian_sampler())(self, n, self.rng)) if n else []
        if len(drawn) > n:
            raise ValueError(f"The question sampler returned {len(drawn)} questions, at most {n} were asked for.")
        if len(set(drawn)) < len(drawn):
            raise ValueError("The question sampler returned a question twice; it must draw without replacement.")
        if unknown := [question_id for question_id in drawn if question_id not in self._questions]:
            raise ValueError(f"The question sampler returned {unknown[0]!r}, which is not a stored question.")
        return drawn

    def retire(self, question_id: str) -> None:
        """Remove a question for good, whether stored or not; later groups of it are ignored."""
        self._retired[question_id] = None
        if stored := self._questions.get(question_id):
            for experience in list(stored.completions.values()):
                self._remove(question_id, experience)

    def evict(self, question_id: str, experience: Experience) -> bool:
        """
        Remove one stored completion.

        Args:
            question_id (`str`):
                Its question.
            experience ([`Experience`]):
                The completion; one of the same question with the same tokens counts as the same.

        Returns:
            `bool`: whether it was stored.
        """
        stored = self._questions.get(question_id)
        found = stored.completions.get(experience.token_bytes) if stored else None
        if found is None:
            return False
        self._remove(question_id, found)
        self.num_evicted += 1
        return True

    def evict_older_than(self, policy_version: int) -> int:
        """
        Remove the completions of every policy version below `policy_version`.

        Args:
            policy_version (`int`):
                Oldest version to keep, in optimizer steps.

        Returns:
            `int`: number of completions removed.
        """
        num_before = self._num_completions
        while (oldest := self._versions.oldest()) is not None and oldest < policy_version:
            self._evict_one_of(oldest)
        return num_before - self._num_completions

    def set_limits(self, *, capacity: int | None, max_completions_per_question: int | None) -> None:
        """
        Replace both limits and apply them to what is stored.

        Args:
            capacity (`int` or `None`):
                Most completions kept, `None` for no limit.
            max_completions_per_question (`int` or `None`):
                Most completions kept per question, `None` for no limit.

        Raises:
            ValueError: if a limit is below 1.
        """
        checked_capacity = _checked_size("capacity", capacity)
        self._max_per_question = _checked_size("max_completions_per_question", max_completions_per_question)
        self._capacity = checked_capacity
        for question_id in self._questions:
            self._apply_question_limit(question_id)
        self._apply_capacity()

    def metrics(self) -> dict[str, float]:
        """Sizes and counters by name; `bucket_{s}` is reported for s = 1..K-1 always, for 0 and K if non-empty."""
        counts = {
            "questions": self.num_questions,
            "completions": self.num_completions,
            "tokens": self.num_tokens,
            "retired": len(self._retired),
            "evicted": self.num_evicted,
            "duplicates": self.num_duplicates,
        }
        sizes = dict.fromkeys(range(1, self._group_size or 0), 0)
        sizes |= {bucket: len(ids) for bucket, ids in self._buckets.items()}
        counts |= {f"bucket_{bucket}": sizes[bucket] for bucket in sorted(sizes)}
        return {name: float(count) for name, count in counts.items()}

    def check_valid(self) -> tuple[bool, str]:
        """Whether all invariants hold, and the reason if not. Walks the whole buffer: for tests and loading."""
        reason = next(violations(self), "")
        return not reason, reason

    def save(self, path: str | PathLike[str]) -> None:
        """Save to a directory, see [`save_buffer`]."""
        from .storage import save_buffer

        save_buffer(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Load from a directory that [`~ExperienceBuffer.save`] wrote, see [`load_buffer`]."""
        from .storage import load_buffer

        return load_buffer(path, cls)

    def to_dataset(self) -> Dataset:
        """One row per stored completion, see [`completions_to_dataset`]; retired questions are not in it."""
        from .tables import completions_to_dataset

        return completions_to_dataset(self)

    @classmethod
    def from_dataset(cls, dataset: Dataset, *, group_size: int, **kwargs: Any) -> ExperienceBuffer:
        """
        Buffer of the completions of a dataset, such as [`~ExperienceBuffer.to_dataset`] made.

        Args:
            dataset (`datasets.Dataset`):
                One row per completion, with the columns of [`~ExperienceBuffer.to_dataset`]. Of several rows of a
                question the last one decides the bucket.
            group_size (`int`):
                Completions per question at training time (K).
            **kwargs:
                Further arguments of [`ExperienceBuffer`].

        Raises:
            ValueError: if a column is missing or holds something else.
        """
        from .tables import completions_from_dataset

        buffer = cls(group_size=group_size, **kwargs)
        for question, experience, bucket in completions_from_dataset(dataset):
            buffer._check_prompt(question)
            buffer._insert(question, [experience], _checked_count("bucket", bucket, group_size))
        buffer.set_limits(capacity=buffer.capacity, max_completions_per_question=buffer.max_completions_per_question)
        return buffer

    def _stored(self, question_id: str) -> _StoredQuestion:
        try:
            return self._questions[question_id]
        except KeyError:
            raise KeyError(f"The experience buffer holds no completion of question {question_id!r}.") from None

    def _check_prompt(self, question: Question) -> None:
        stored = self._questions.get(question.question_id)
        if stored is not None and stored.question.example["prompt"] != question.example["prompt"]:
            raise ValueError(
                f"Question id {question.question_id!r} belongs to two prompts: "
                f"{stored.question.example['prompt']!r} and {question.example['prompt']!r}. Identify questions by a "
                "column with one id per prompt, or by the prompt itself (`question_id_column=None`)."
            )

    def _insert(self, question: Question, experiences: Iterable[Experience], bucket: int) -> int:
        """Store what is new among the completions of a question and put the question, if stored, into the bucket."""
        question_id = question.question_id
        stored = self._questions.get(question_id)
        num_before = self._num_completions
        for experience in experiences:
            if stored is None:
                stored = self._questions[question_id] = _StoredQuestion(question, bucket)
                self._buckets.setdefault(bucket, Bucket()).add(question_id)
            if experience.token_bytes in stored.completions:
                self.num_duplicates += 1
                continue
            # One object under two questions would be one entry of the index.
            unique = replace(experience) if experience in self._versions else experience
            stored.completions[unique.token_bytes] = unique
            self._versions.add(unique, question_id)
            self._num_completions += 1
            self._num_tokens += unique.num_tokens
        if stored is not None and stored.bucket != bucket:
            self._leave_bucket(question_id, stored.bucket)
            self._buckets.setdefault(bucket, Bucket()).add(question_id)
            stored.bucket = bucket
        return self._num_completions - num_before

    def _remove(self, question_id: str, experience: Experience) -> None:
        self._versions.remove(experience)
        self._forget(question_id, experience)

    def _forget(self, question_id: str, experience: Experience) -> None:
        """Remove a completion that is no longer in the version index."""
        stored = self._questions[question_id]
        del stored.completions[experience.token_bytes]
        self._num_completions -= 1
        self._num_tokens -= experience.num_tokens
        if not stored.completions:
            del self._questions[question_id]
            self._leave_bucket(question_id, stored.bucket)

    def _leave_bucket(self, question_id: str, bucket: int) -> None:
        self._buckets[bucket].remove(question_id)
        if not self._buckets[bucket]:
            del self._buckets[bucket]

    def _evict_one_of(self, policy_version: int) -> None:
        experience, question_id = self._versions.pop(policy_version)
        self._forget(question_id, experience)
        self.num_evicted += 1

    def _apply_capacity(self) -> None:
        while self._capacity is not None and self._num_completions > self._capacity:
            oldest = self._versions.oldest()
            assert oldest is not None, "a buffer above its capacity is not empty"
            self._evict_one_of(oldest)

    def _apply_question_limit(self, question_id: str) -> None:
        stored = self._questions.get(question_id)
        while stored and self._max_per_question is not None and len(stored.completions) > self._max_per_question:
            self.evict(question_id, next(iter(stored.completions.values())))

    def _restore(
        self,
        questions: Iterable[tuple[Question, int, Sequence[Experience]]],
        by_age: Iterable[tuple[Experience, str]],
        retired: Iterable[str],
    ) -> None:
        """Fill an empty buffer so that every order is as it was: of bucket, question, policy version, retirement."""
        for question, bucket, experiences in questions:
            stored = self._questions[question.question_id] = _StoredQuestion(question, bucket)
            stored.completions.update((experience.token_bytes, experience) for experience in experiences)
            self._buckets.setdefault(bucket, Bucket()).add(question.question_id)
            self._num_completions += len(experiences)
            self._num_tokens += sum(experience.num_tokens for experience in experiences)
        for experience, question_id in by_age:
            self._versions.add(experience, question_id)
        self._retired.update(dict.fromkeys(retired))


def _checked_size(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    try:
        size = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer or None, got {value!r}.") from None
    if size < 1:
        raise ValueError(f"`{name}` must be at least 1, got {size}; use None for no limit.")
    return size


def _checked_count(name: str, value: int, group_size: int) -> int:
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer, got {value!r}.") from None
    if not 0 <= count <= group_size:
        raise ValueError(f"`{name}` must lie in 0..{group_size}, got {count}.")
    return count
