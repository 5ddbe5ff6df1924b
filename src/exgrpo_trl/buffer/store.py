"""What an experience buffer holds: questions, their completions, and an index of each; constant time throughout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..images import StoredImage
from ..records import Experience, Question, Reuse
from .image_pool import ImagePool
from .indices import Bucket, VersionIndex
from .stored_questions import StoredQuestion


class Store:
    """Questions by id, question ids by bucket, completions by policy version, records of reuse, and counts of them."""

    def __init__(self, kind: type[StoredQuestion]) -> None:
        self._kind = kind
        self.questions: dict[str, StoredQuestion] = {}
        self.buckets: dict[int, Bucket] = {}
        self.versions: VersionIndex = VersionIndex()
        self.images: ImagePool = ImagePool()
        # Of completions that have one: those that were never used cost nothing.
        self.reuse: dict[Experience, Reuse] = {}
        self.num_completions: int = 0
        self.num_tokens: int = 0

    def insert(
        self,
        question: Question,
        experiences: Sequence[Experience],
        bucket: int,
        reuse: Mapping[Experience, Reuse] | None = None,
    ) -> tuple[int, int]:
        """
        Store what is new among the completions of a question and put the question, if stored, into the bucket.

        Returns the numbers of completions that were new and that were not. Images of a new question are encoded.
        `reuse` has the records of those that were used before.
        """
        question_id = question.question_id
        stored = self.questions.get(question_id)
        if stored is None:
            if not experiences:
                return 0, 0
            stored = self.questions[question_id] = self._kind(self.images.question(question), bucket)
            self.buckets.setdefault(bucket, Bucket()).add(question_id)
        own = []
        for experience in stored.new_among(experiences):
            # One object at two places would be one entry of the index.
            unique = replace(experience) if experience in self.versions else self.images.experience(experience)
            own.append(unique)
            self.versions.add(unique, question_id)
            self.num_tokens += unique.num_tokens
            if reuse and experience in reuse:
                self.reuse[unique] = reuse[experience]
        stored.add(own)
        self.num_completions += len(own)
        if stored.bucket != bucket:
            self._leave_bucket(question_id, stored.bucket)
            self.buckets.setdefault(bucket, Bucket()).add(question_id)
            stored.bucket = bucket
        return len(own), len(experiences) - len(own)

    def update(self, question: Question) -> None:
        """Replace the row of a stored question."""
        self.questions[question.question_id].question = self.images.question(question)

    def find(self, question_id: str, experience: Experience) -> Experience | None:
        """This very completion if its question has it, else the oldest of the question with the same tokens."""
        stored = self.questions.get(question_id)
        return None if stored is None else stored.find(experience)

    def remove(self, question_id: str, experience: Experience) -> int:
        """
        Remove a completion that [`~Store.find`] finds, with what belongs to it, and its question with the last one.

        Returns the number of completions that left.
        """
        stored = self.questions.get(question_id)
        found = None if stored is None else stored.find(experience)
        if stored is None or found is None:
            return 0
        leaving = stored.remove(found)
        for left in leaving:
            self._forget(left)
        if not len(stored):
            del self.questions[question_id]
            self._leave_bucket(question_id, stored.bucket)
        return len(leaving)

    def remove_question(self, question_id: str) -> None:
        """Remove a stored question with all its completions."""
        stored = self.questions.pop(question_id)
        self._leave_bucket(question_id, stored.bucket)
        for experience in stored:
            self._forget(experience)

    def restore(
        self,
        questions: Iterable[tuple[Question, int, Iterable[Sequence[Experience]]]],
        by_age: Iterable[tuple[Experience, str]],
        reuse: Mapping[Experience, Reuse],
        images: Iterable[StoredImage],
    ) -> None:
        """
        Fill an empty store so that every order is as it was: of bucket, question and policy version.

        What came in together is together in `questions`. `images` are those of the questions and completions, each
        once.
        """
        self.images.adopt(images)
        for question, bucket, parts in questions:
            stored = self.questions[question.question_id] = self._kind(question, bucket)
            self.buckets.setdefault(bucket, Bucket()).add(question.question_id)
            for experiences in parts:
                stored.add(experiences)
                self.num_completions += len(experiences)
                self.num_tokens += sum(experience.num_tokens for experience in experiences)
        for experience, question_id in by_age:
            self.versions.add(experience, question_id)
        self.reuse.update(reuse)

    def _forget(self, experience: Experience) -> None:
        self.versions.remove(experience)
        self.reuse.pop(experience, None)
        self.num_completions -= 1
        self.num_tokens -= experience.num_tokens

    def _leave_bucket(self, question_id: str, bucket: int) -> None:
        self.buckets[bucket].remove(question_id)
        if not self.buckets[bucket]:
            del self.buckets[bucket]
