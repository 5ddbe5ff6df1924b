"""Replay buffer of completions, or of groups, bucketed by how often their question was solved (paper section 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ..images import StoredImage, referenced
from ..records import Experience, Question, Reuse
from ..strategies.eviction import EvictionFunction, Oldest
from ..strategies.samplers import GaussianSampler, SamplingFunction, check_drawn
from ..values import plain
from .groups import check_whole
from .indices import BucketView
from .invariants import violations
from .settings import (
    COMPLETION,
    GROUP,
    MAX_GROUP_SIZE,
    check_limits,
    checked_count,
    checked_size,
    checked_unit,
)
from .store import Store
from .stored_questions import StoredCompletions, StoredGroups, StoredQuestion

if TYPE_CHECKING:
    from datasets import Dataset

    from .report import ExperienceReport


class ExperienceBuffer:
    """
    Correct completions of questions that are solved sometimes but not always (paper section 3.1).

    A question sits in the bucket of its latest number of correct completions. It leaves the buffer for good when it
    is solved every time ("retired"), and until its next success when its last completion is evicted. Inserting,
    removing and drawing take constant time: nothing on the training path walks the buffer.

    With `unit="group"` it keeps whole groups, failures included, which come and go whole: what is said of a completion
    that leaves holds for its group, while counts and limits are of completions.

    Args:
        group_size (`int`, *optional*):
            Completions per question at training time (K), at most 65,536. By default that of the first collected
            group.
        capacity (`int`, *optional*):
            Most completions kept. Beyond it `eviction` decides; by default the oldest policy version goes first.
        max_completions_per_question (`int`, *optional*):
            Most completions kept per question. Beyond it `eviction` decides; by default those stored first go first.
        retire_solved (`bool`, *optional*, defaults to `True`):
            Whether a question whose whole group is correct is retired.
        seed (`int`, *optional*, defaults to `0`):
            Seed of `rng`.
        unit (`"completion"` or `"group"`, *optional*, defaults to `"completion"`):
            What is kept: correct completions, one by one, or whole groups.

    Attributes:
        eviction (`Callable`):
            Which completion leaves where a limit is exceeded, see [`EvictionRule`]; by default [`Oldest`].
        rng (`numpy.random.Generator`):
            PCG64 generator of every draw; saved with the buffer.
        provenance (`dict[str, Any]`):
            What the stored tokens depend on (tokenizer, temperature, ...); plain JSON, saved with the buffer.
        replay_state (`dict[str, Any]`):
            State of the trainer that uses the buffer; plain JSON, saved with the buffer.
        num_evicted (`int`):
            Completions removed so far by a limit, by age or by [`~ExperienceBuffer.evict`].
        num_duplicates (`int`):
            Completions refused so far because their question already had the same tokens; of whole groups, because it
            had the same ones in the same order.
        import_report ([`ExperienceReport`] or `None`):
            What became of the rows, where [`~ExperienceBuffer.from_dataset`] was given some of your own; not saved.

    Raises:
        ValueError: if a size is below 1 or huge, the unit is none, or a limit could never hold a group that is kept
            whole.
    """

    def __init__(
        self,
        *,
        group_size: int | None = None,
        capacity: int | None = None,
        max_completions_per_question: int | None = None,
        retire_solved: bool = True,
        seed: int = 0,
        unit: str = COMPLETION,
    ) -> None:
        self._unit = checked_unit(unit)
        self._group_size = checked_size("group_size", group_size, MAX_GROUP_SIZE)
        self._capacity = checked_size("capacity", capacity)
        self._max_per_question = checked_size("max_completions_per_question", max_completions_per_question)
        self._check_limits(self._group_size, self._capacity, self._max_per_question)
        self._retire_solved = retire_solved
        self.eviction: EvictionFunction = Oldest()
        self.rng: np.random.Generator = np.random.Generator(np.random.PCG64(seed))
        self.provenance: dict[str, Any] = {}
        self.replay_state: dict[str, Any] = {}
        self.num_evicted: int = 0
        self.num_duplicates: int = 0
        self.import_report: ExperienceReport | None = None
        self._store = Store(StoredGroups if self._unit == GROUP else StoredCompletions)
        self._retired: dict[str, None] = {}

    @property
    def group_size(self) -> int | None:
        """Completions per question at training time (K), `None` until it is known."""
        return self._group_size

    @property
    def unit(self) -> str:
        """What is kept: `"completion"` or `"group"`."""
        return self._unit

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
        return len(self._store.questions)

    @property
    def num_completions(self) -> int:
        """Number of stored completions."""
        return self._store.num_completions

    @property
    def num_tokens(self) -> int:
        """Number of stored completion tokens."""
        return self._store.num_tokens

    @property
    def retired(self) -> KeysView[str]:
        """Read-only set of the retired question ids, in the order in which they retired."""
        return self._retired.keys()

    def __contains__(self, question_id: object) -> bool:
        return question_id in self._store.questions

    def __len__(self) -> int:
        """Number of stored completions."""
        return self.num_completions

    def __bool__(self) -> bool:
        """True, empty or not: `given or default` must not drop a buffer that is yet to be filled."""
        return True

    def __iter__(self) -> Iterator[tuple[Question, int, Experience]]:
        """The same as [`~ExperienceBuffer.items`]."""
        return self.items()

    def __repr__(self) -> str:
        return (
            f"ExperienceBuffer(questions={self.num_questions}, completions={self.num_completions}, "
            f"tokens={self.num_tokens}, retired={len(self._retired)}, group_size={self.group_size})"
        )

    def _repr_html_(self) -> str:
        from ..html import buffer_html

        return buffer_html(self)

    def question(self, question_id: str) -> Question:
        """
        The stored question of that id.

        Raises:
            KeyError: if the buffer holds no completion of that question.
        """
        return self._stored(question_id).question

    def completions(self, question_id: str) -> tuple[Experience, ...]:
        """
        The stored completions of a question, oldest first; of whole groups, group after group.

        Raises:
            KeyError: if the buffer holds no completion of that question.
        """
        return tuple(self._stored(question_id))

    def groups(self, question_id: str) -> tuple[tuple[Experience, ...], ...]:
        """
        The stored groups of a question, oldest first, each in the order in which it came.

        Raises:
            KeyError: if the buffer holds no group of that question.
            ValueError: if it keeps completions one by one.
        """
        if self._unit != GROUP:
            raise ValueError(
                f"This experience buffer keeps completions one by one, not groups. Make it with unit={GROUP!r}."
            )
        stored = self._stored(question_id)
        return tuple(stored.groups.values()) if isinstance(stored, StoredGroups) else ()

    def reuse(self, experience: Experience) -> Reuse:
        """How a stored completion was used so far; what is known from its generation if nothing was noted of it."""
        return self._store.reuse.get(experience) or Reuse.at_generation(experience)

    def note_reuse(self, question_id: str, experience: Experience, reuse: Reuse) -> bool:
        """
        Replace the record of a stored completion; it leaves with the completion.

        Args:
            question_id (`str`):
                Its question.
            experience ([`Experience`]):
                The completion; one of the same question with the same tokens counts as the same.
            reuse ([`~exgrpo_trl.records.Reuse`]):
                The new record.

        Returns:
            `bool`: whether the completion is stored.

        Raises:
            TypeError: if `reuse` is no record.
        """
        if not isinstance(reuse, Reuse):
            raise TypeError(f"`reuse` must be a Reuse, got {type(reuse).__name__}.")
        found = self._store.find(question_id, experience)
        if found is None:
            return False
        self._store.reuse[found] = reuse
        return True

    def items(self) -> Iterator[tuple[Question, int, Experience]]:
        """Every stored completion with its question and bucket; by bucket, question and age."""
        for bucket, question_ids in self.buckets().items():
            for question_id in question_ids:
                question = self.question(question_id)
                for experience in self.completions(question_id):
                    yield question, bucket, experience

    def oldest(self, question_id: str | None = None) -> tuple[str, Experience]:
        """
        The completion that is next to leave by age, with the id of its question.

        Args:
            question_id (`str`, *optional*):
                Look at the completions of this question alone: the one that was stored first. By default at all: of
                the oldest policy version, the one that was stored last, as that takes constant time.

        Raises:
            KeyError: if there is none.
        """
        if question_id is not None:
            return question_id, next(iter(self._stored(question_id)))
        version = self._store.versions.oldest()
        if version is None:
            raise KeyError("The experience buffer is empty.")
        experience, owner = self._store.versions.latest(version)
        return owner, experience

    def buckets(self) -> Mapping[int, Sequence[str]]:
        """Question ids by latest number of correct completions: non-empty buckets, ascending; read-only live views."""
        buckets = self._store.buckets
        return MappingProxyType({key: BucketView(buckets[key]) for key in sorted(buckets)})

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

        With `unit="group"` all of a group is stored; of a solved one whose question does not retire nothing is, as it
        has no failure to tell its successes from.

        Args:
            question ([`Question`]):
                The question; of a stored one the first example is kept. Images of Pillow in it are kept as
                [`StoredImage`].
            experiences (`Sequence[Experience]`):
                The correct fresh completions of the group. With `unit="group"` all completions of the group in order,
                or none: then a stored question moves to its new bucket, and that is all.
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
            ValueError: if a number is out of range, the group size is not the buffer's, the question id belongs to
                another prompt, an image cannot be stored, or a group that would be stored whole is not.
        """
        if not isinstance(question, Question):
            raise TypeError(f"`question` must be a Question, got {type(question).__name__}.")
        for experience in experiences:
            if not isinstance(experience, Experience):
                raise TypeError(
                    f"`experiences` must be Experience objects, got {type(experience).__name__}; build them with "
                    "Experience.create(...)."
                )
        group_size = checked_size("group_size", group_size, MAX_GROUP_SIZE) or 0
        if group_size != (self._group_size or group_size):
            raise ValueError(
                f"This experience buffer holds groups of {self._group_size}, got `group_size`={group_size}. Keep "
                "`num_generations` as it was, or start with an empty buffer."
            )
        num_correct = checked_count("num_correct", num_correct, group_size)
        bucket = num_correct if bucket is None else checked_count("bucket", bucket, group_size)
        self._check_prompt(question)
        if self._unit == GROUP:
            self._check_limits(group_size, self._capacity, self._max_per_question)
            if num_correct == group_size:
                experiences = ()
            elif num_correct > 0 and question.question_id not in self._retired:
                check_whole(experiences, group_size)
        self._group_size = group_size
        if question.question_id in self._retired:
            return 0
        if num_correct == group_size and self._retire_solved:
            self.retire(question.question_id)
            return 0
        if num_correct == 0:
            return 0
        num_inserted, num_duplicates = self._store.insert(question, experiences, bucket)
        self.num_duplicates += num_duplicates
        self._apply_question_limit(question.question_id)
        self._apply_capacity()
        return num_inserted

    def update(self, question: Question) -> None:
        """
        Replace the stored row of a question, for instance by one with a corrected answer.

        Raises:
            KeyError: if the buffer holds no completion of that question.
            ValueError: if an image of it cannot be stored.
        """
        self._stored(question.question_id)
        self._store.update(question)

    def sample_questions(self, n: int, sampler: SamplingFunction | None = None) -> list[str]:
        """
        Draw distinct stored questions.

        Args:
            n (`int`):
                Number of questions; no more than are stored come back.
            sampler (`Callable`, *optional*):
                Rule of the draw, see [`QuestionSampler`]; by default [`GaussianSampler`] with the paper's settings.

        Returns:
            `list[str]`: question ids.

        Raises:
            ValueError: if `n` is negative, or the sampler returned too many, repeated or unknown ids.
        """
        if n < 0:
            raise ValueError(f"The number of questions to draw must not be negative, got {n}.")
        n = min(n, self.num_questions)
        drawn = list((sampler or GaussianSampler())(self, n, self.rng)) if n else []
        check_drawn(drawn, n, self._store.questions.__contains__, "The question sampler")
        return drawn

    def retire(self, question_id: str) -> None:
        """Remove a question for good, whether stored or not; later groups of it are ignored."""
        self._retired[question_id] = None
        if question_id in self._store.questions:
            self._store.remove_question(question_id)

    def evict(self, question_id: str, experience: Experience) -> bool:
        """
        Remove one stored completion; with `unit="group"` the whole group that holds it.

        Args:
            question_id (`str`):
                Its question.
            experience ([`Experience`]):
                The completion; one of the same question with the same tokens counts as the same.

        Returns:
            `bool`: whether it was stored.
        """
        num_left = self._store.remove(question_id, experience)
        self.num_evicted += num_left
        return num_left > 0

    def evict_older_than(self, policy_version: int) -> int:
        """
        Remove the completions of every policy version below `policy_version`; a whole group with one of them.

        Args:
            policy_version (`int`):
                Oldest version to keep, in optimizer steps.

        Returns:
            `int`: number of completions removed.
        """
        num_before = self.num_evicted
        while self.num_completions and (oldest := self.oldest())[1].policy_version < policy_version:
            ExperienceBuffer.evict(self, *oldest)
        return self.num_evicted - num_before

    def set_limits(self, *, capacity: int | None, max_completions_per_question: int | None) -> None:
        """
        Replace both limits and apply them to what is stored.

        Args:
            capacity (`int` or `None`):
                Most completions kept, `None` for no limit.
            max_completions_per_question (`int` or `None`):
                Most completions kept per question, `None` for no limit.

        Raises:
            ValueError: if a limit is below 1, or could never hold a group that is kept whole.
        """
        checked_capacity = checked_size("capacity", capacity)
        checked_max = checked_size("max_completions_per_question", max_completions_per_question)
        self._check_limits(self._group_size, checked_capacity, checked_max)
        self._capacity, self._max_per_question = checked_capacity, checked_max
        for question_id in self._store.questions:
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
        sizes |= {bucket: len(ids) for bucket, ids in self._store.buckets.items()}
        counts |= {f"bucket_{bucket}": sizes[bucket] for bucket in sorted(sizes)}
        return {name: float(count) for name, count in counts.items()}

    def check_valid(self) -> tuple[bool, str]:
        """Whether all invariants hold, and the reason if not. Walks the whole buffer: for tests."""
        reason = self._violation()
        return not reason, reason

    def _violation(self, *, has_checked_details: bool = False) -> str:
        """The first invariant that does not hold, or nothing. A load has checked details before."""
        found = violations(
            self._store,
            self._retired,
            group_size=self._group_size,
            capacity=self._capacity,
            max_completions_per_question=self._max_per_question,
            has_checked_details=has_checked_details,
        )
        return next(found, "")

    def save(self, path: str | PathLike[str]) -> None:
        """Save to a directory, see [`save_buffer`]."""
        from .files import save_buffer

        save_buffer(self, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """
        Load a saved buffer, which goes on exactly as the saved one would have.

        The files may be a stranger's. They are data: nothing of them is executed, and nothing is written. What they
        decode to is bounded, whatever sizes they declare: by 64 times their size, or by 512 MiB where that is more.
        Images are decoded when they are used.

        Args:
            path (`str` or `os.PathLike`):
                Directory that [`~ExperienceBuffer.save`] wrote, a checkpoint that contains one, or the directory of a
                run: then it is the buffer of its newest complete checkpoint.

        Raises:
            ExperienceBufferError: if it is missing, damaged, incomplete, malformed, asks for more memory, or was
                written by a newer version. The message names the file and what is wrong with it.
        """
        from .files import load_buffer

        return load_buffer(path, cls)

    def to_dataset(self) -> Dataset:
        """One row per stored completion, see [`completions_to_dataset`]; retired questions are not in it."""
        from .as_dataset import completions_to_dataset

        group_size = (self._group_size or 1) if self._unit == GROUP else None
        return completions_to_dataset(self.items(), self.provenance, self._store.reuse, group_size)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        *,
        group_size: int,
        tokenizer: Any = None,
        bucket: int | None = None,
        success_threshold: float | None = None,
        question_id_column: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_eos: bool = True,
        **kwargs: Any,
    ) -> ExperienceBuffer:
        """
        Buffer of the completions of a dataset: one that [`~ExperienceBuffer.to_dataset`] made, or one of your own.

        Of your own, every row has the columns of its question as in the training dataset (`prompt` and whatever the
        reward functions need), `completion` (text, or a list of one message of the assistant) or `completion_ids`,
        `reward`, and `behavior_per_token_logps`; see [`ExGRPOTrainer.score_experience`], which takes rows without the
        last one, too. Rows that cannot be stored are refused; a warning lists them, and `import_report` has them all.

        Args:
            dataset (`datasets.Dataset`):
                One row per completion. Of several rows of a question that [`~ExperienceBuffer.to_dataset`] made, the
                last one decides the bucket; `provenance` may be missing. Whole groups need `unit="group"`; their rows
                must follow each other.
            group_size (`int`):
                Completions per question at training time (K).
            tokenizer (`PreTrainedTokenizerBase`, *optional*):
                Of the model that will be trained. Needed where completions are text. With it, the trainer can tell
                whether prompts and tokens mean the same to it.
            bucket (`int`, *optional*):
                For rows of your own: bucket of questions whose pass rate nothing tells, from 0 to `group_size`. By
                default `group_size // 2`.
            success_threshold (`float`, *optional*):
                For rows of your own: reward from which a completion is a success. By default 1.0.
            question_id_column (`str`, *optional*):
                For rows of your own: column that identifies a question, as in [`ExGRPOConfig`]. By default its prompt.
            chat_template_kwargs (`Mapping`, *optional*):
                For rows of your own: as in [`ExGRPOConfig`].
            add_eos (`bool`, *optional*, defaults to `True`):
                For rows of your own: whether an end token follows a `completion` that has none.
            **kwargs:
                Further arguments of [`ExperienceBuffer`].

        Raises:
            ExperienceBufferError: if a column is missing or holds something else, the provenance of two rows differs,
                a group is not whole, or no row of your own can be stored.
            TypeError: if `dataset` is no dataset.
            ValueError: if an argument is out of range, or for rows of your own while the dataset has none.
        """
        from .from_dataset import fill_from_dataset, fill_from_own_rows

        buffer = cls(group_size=group_size, **kwargs)
        own = {
            "tokenizer": tokenizer,
            "bucket": bucket,
            "success_threshold": success_threshold,
            "question_id_column": question_id_column,
            "chat_template_kwargs": chat_template_kwargs,
            "add_eos": None if add_eos else False,
        }
        if not fill_from_own_rows(buffer, dataset, group_size, own):
            fill_from_dataset(buffer, dataset, group_size)
        buffer.set_limits(capacity=buffer.capacity, max_completions_per_question=buffer.max_completions_per_question)
        if buffer.import_report is not None:
            buffer.import_report = buffer.import_report._replace(num_evicted=buffer.num_evicted)
        return buffer

    @classmethod
    def merge(
        cls, buffers: Sequence[ExperienceBuffer], *, names: Sequence[str] | None = None, **limits: int | None
    ) -> ExperienceBuffer:
        """
        A new buffer of what several buffers hold; they stay as they are.

        The first buffer comes first: its limits, `retire_solved` and generator are taken over, and the first one that
        holds a question decides its row and its bucket. Of a question that several hold, the completions go by policy
        version, and those with the same tokens are there once, with the record of the oldest. A question that retired
        in one of them is retired, also where another one holds completions of it: these are left out. `replay_state`
        is dropped, as it belongs to one run.

        Args:
            buffers (`Sequence[ExperienceBuffer]`):
                The buffers. Their unit, group size and provenance must agree, as far as they tell. Of the chat
                template that is not asked where all completions know the tokens of their prompt.
            names (`Sequence[str]`, *optional*):
                What messages call them.
            **limits:
                `capacity` and `max_completions_per_question`, in the place of those of the first; `None` for no limit.

        Raises:
            ExperienceBufferError: if they do not agree, or a question id belongs to two prompts.
            TypeError: if a limit has another name.
            ValueError: if there is no buffer, or a limit is below 1 or could never hold a group.
        """
        from .merging import merged

        return merged(buffers, names or [f"{index}" for index in range(1, len(buffers) + 1)], limits)

    def set_aside(self, is_chosen: Callable[[Question, int, Experience], bool]) -> ExperienceBuffer:
        """
        Move completions into a new buffer without limits, with their records; they count as evicted.

        With `unit="group"` a whole group leaves if one of its completions is chosen. [`~ExperienceBuffer.merge`] of
        both brings them back.

        Args:
            is_chosen (`Callable[[Question, int, Experience], bool]`):
                Whether a completion leaves, from its question, bucket and itself.

        Returns:
            [`ExperienceBuffer`]: what left.
        """
        from .merging import set_aside

        return set_aside(self, is_chosen)

    def _stored(self, question_id: str) -> StoredQuestion:
        try:
            return self._store.questions[question_id]
        except KeyError:
            raise KeyError(f"The experience buffer holds no completion of question {question_id!r}.") from None

    def _check_prompt(self, question: Question) -> None:
        stored = self._store.questions.get(question.question_id)
        if stored is None or stored.question is question:
            return
        prompts = [asked.example["prompt"] for asked in (stored.question, question)]
        # `plain`, because arrays in a prompt do not compare as a whole; images compare by their pixels.
        one, other = (plain(referenced(prompt)) for prompt in prompts)
        if one != other and repr(one) != repr(other):  # NaN is itself
            raise ValueError(
                f"Question id {question.question_id!r} belongs to two prompts: {prompts[0]!r} and {prompts[1]!r}. "
                "Identify questions by a column with one id per prompt, or by the prompt itself "
                "(`question_id_column=None`)."
            )

    def _check_limits(self, group_size: int | None, capacity: int | None, max_per_question: int | None) -> None:
        if self._unit == GROUP:
            check_limits(group_size, capacity=capacity, max_completions_per_question=max_per_question)

    def _apply_capacity(self) -> None:
        while self._capacity is not None and self.num_completions > self._capacity:
            self._evict_by_rule(None)

    def _apply_question_limit(self, question_id: str) -> None:
        stored = self._store.questions.get(question_id, ())
        while self._max_per_question is not None and len(stored) > self._max_per_question:
            self._evict_by_rule(question_id)

    def _evict_by_rule(self, question_id: str | None) -> None:
        owner, experience = self.eviction(self, question_id)
        # Not `self.evict`, which a subclass may refuse: the loop around would never end.
        if question_id not in (None, owner) or not ExperienceBuffer.evict(self, owner, experience):
            where = "the buffer" if question_id is None else f"question {question_id!r}"
            raise ValueError(
                f"The eviction rule returned a completion of question {owner!r} that {where} does not hold. Return "
                "the id of a stored question and one of its completions."
            )

    def _restore(
        self,
        questions: Iterable[tuple[Question, int, Iterable[Sequence[Experience]]]],
        by_age: Iterable[tuple[Experience, str]],
        retired: Iterable[str],
        reuse: Mapping[Experience, Reuse],
        images: Iterable[StoredImage],
    ) -> None:
        """Fill an empty buffer so that every order is as it was: of bucket, question, policy version, retirement."""
        self._store.restore(questions, by_age, reuse, images)
        self._retired.update(dict.fromkeys(retired))
