"""What an experience buffer holds: questions, their completions, and an index of each; constant time throughout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from ..images import StoredImage
from ..records import Experience, Question, Reuse
from .image_pool import ImagePool
from .indices import Bucket, VersionIndex


@dataclass(slots=True)
class StoredQuestion:
    """A question with its bucket and its completions."""

    question: Question
    bucket: int
    # By token ids, oldest first: the key finds duplicates.
    completions: dict[bytes, Experience] = field(default_factory=dict)


class Store:
    """Questions by id, question ids by bucket, completions by policy version, records of reuse, and counts of them."""

    def __init__(self) -> None:
        self.questions: dict[str, StoredQuestion] = {}
        self.buckets: dict[int, Bucket] = {}
        self.versions = VersionIndex()
        self.images = ImagePool()
        # Of completions that have one: those that were never used cost nothing.
        self.reuse: dict[Experience, Reuse] = {}
        self.num_completions = 0
        self.num_tokens = 0

    def insert(
        self,
        question: Question,
        experiences: Iterable[Experience],
        bucket: int,
        reuse: Mapping[Experience, Reuse] = MappingProxyType({}),
    ) -> tuple[int, int]:
        """
        Store what is new among the completions of a question and put the question, if stored, into the bucket.

        Returns the numbers of completions that were new and that were not. Images of a new question are encoded.
        `reuse` has the records of those that were used before.
        """
        question_id = question.question_id
        stored = self.questions.get(question_id)
        num_new = num_duplicates = 0
        for experience in experiences:
            if stored is None:
                stored = self.questions[question_id] = StoredQuestion(self.images.question(question), bucket)
                self.buckets.setdefault(bucket, Bucket()).add(question_id)
            if experience.token_bytes in stored.completions:
                num_duplicates += 1
                continue
            # One object under two questions would be one entry of the index.
            unique = replace(experience) if experience in self.versions else self.images.experience(experience)
            stored.completions[unique.token_bytes] = unique
            self.versions.add(unique, question_id)
            self.num_completions += 1
            self.num_tokens += unique.num_tokens
            if experience in reuse:
                self.reuse[unique] = reuse[experience]
            num_new += 1
        if stored is not None and stored.bucket != bucket:
            self._leave_bucket(question_id, stored.bucket)
            self.buckets.setdefault(bucket, Bucket()).add(question_id)
            stored.bucket = bucket
        return num_new, num_duplicates

    def update(self, question: Question) -> None:
        """Replace the row of a stored question."""
        self.questions[question.question_id].question = self.images.question(question)

    def find(self, question_id: str, experience: Experience) -> Experience | None:
        """The stored completion of a question with the same tokens."""
        stored = self.questions.get(question_id)
        return stored.completions.get(experience.token_bytes) if stored else None

    def remove(self, question_id: str, experience: Experience) -> None:
        """Remove a stored completion, and its question with the last one."""
        stored = self.questions[question_id]
        self.versions.remove(experience)
        self.reuse.pop(experience, None)
        del stored.completions[experience.token_bytes]
        self.num_completions -= 1
        self.num_tokens -= experience.num_tokens
        if not stored.completions:
            del self.questions[question_id]
            self._leave_bucket(question_id, stored.bucket)

    def restore(
        self,
        questions: Iterable[tuple[Question, int, Sequence[Experience]]],
        by_age: Iterable[tuple[Experience, str]],
        reuse: Mapping[Experience, Reuse],
        images: Iterable[StoredImage],
    ) -> None:
        """
        Fill an empty store so that every order is as it was: of bucket, question and policy version.

        `images` are those of the questions and completions, each once.
        """
        self.images.adopt(images)
        for question, bucket, experiences in questions:
            stored = self.questions[question.question_id] = StoredQuestion(question, bucket)
            stored.completions.update((experience.token_bytes, experience) for experience in experiences)
            self.buckets.setdefault(bucket, Bucket()).add(question.question_id)
            self.num_completions += len(experiences)
            self.num_tokens += sum(experience.num_tokens for experience in experiences)
        for experience, question_id in by_age:
            self.versions.add(experience, question_id)
        self.reuse.update(reuse)

    def _leave_bucket(self, question_id: str, bucket: int) -> None:
        self.buckets[bucket].remove(question_id)
        if not self.buckets[bucket]:
            del self.buckets[bucket]
