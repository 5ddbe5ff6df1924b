"""Questions of the training dataset as it is now, and which stored completions still belong to them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Image
from transformers.utils import logging

from .buffer import ReplayBuffer
from .examples import canonical_rest, dataset_question_ids, image_digests, row_question_id, with_prompt
from .images import stored
from .pools import PoolWithout
from .prompts import Shown, has_images
from .records import UNKNOWN_PROMPT, Experience, Question, prompt_hash
from .strategies.samplers import QuestionSampler

logger: Any = logging.get_logger(__name__)

# Prompts that are rendered in one call, and rows that are read in one.
_PROMPTS_AT_ONCE = 256
_ROWS_AT_ONCE = 1000
# The same where each may hold images of some megabytes.
_IMAGES_AT_ONCE = 16


class TrainingQuestions:
    """
    The questions of a training dataset: their ids, and their rows as they are now.

    A question is its prompt and whatever its reward depends on: rows with one prompt and different other columns are
    different questions. A row whose prompt is its own is identified by the prompt alone. Of a stream nothing is known
    beforehand, so its rows are identified by their prompt and their images; with environments, by all columns.

    Where environments own the data, rows may be equal in everything and only hold a place: what they ask is
    decided when an environment is reset. Such a row is a question of its own in each group of a batch, and none of
    them retires.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Training dataset.
        question_id_column (`str` or `None`):
            Column that identifies a question. `None` uses prompt and row.
        num_groups_of_environments (`int`, *optional*, defaults to `0`):
            Groups of a generation batch, where environments may own the data.

    Raises:
        ValueError: if the ids of a column are missing, or belong to several prompts.
    """

    def __init__(self, dataset: Any, question_id_column: str | None, num_groups_of_environments: int = 0) -> None:
        self.dataset = dataset
        self.question_id_column = question_id_column
        self.is_stream: bool = not isinstance(dataset, Dataset)
        self._has_environments = num_groups_of_environments > 0
        self._rows_of: dict[str, list[int]] = {}
        self._shared_prompts: set[str] = set()  # ids of prompts that stand for several questions
        self._placeholders: set[str] = set()  # ids of rows that are equal in everything
        self._of_placeholders: set[str] = set()  # ids of the questions that they are
        if self.is_stream:
            return
        ids = dataset_question_ids(dataset, question_id_column)
        if question_id_column is None:
            ids = self._tell_apart(ids)
        for row, question_id in enumerate(ids):
            self._rows_of.setdefault(question_id, []).append(row)
        if num_groups_of_environments and question_id_column is None:
            self._placeholders = {question_id for question_id, rows in self._rows_of.items() if len(rows) > 1}
        for question_id in self._placeholders:
            rows = self._rows_of.pop(question_id)
            of_groups = [_id_of_row(question_id, f"group {group}") for group in range(num_groups_of_environments)]
            self._rows_of.update(dict.fromkeys(of_groups, rows))
            self._of_placeholders.update(of_groups)

    def _tell_apart(self, ids: Sequence[str]) -> list[str]:
        """Ids by row, where several rows have one prompt and differ in something else."""
        times = Counter(ids)
        repeated = [row for row, question_id in enumerate(ids) if times[question_id] > 1]
        of_rows = dict(zip(repeated, map(canonical_rest, _rows(self.dataset, repeated)), strict=True))
        contents: dict[str, set[str]] = {}
        for row in repeated:
            contents.setdefault(ids[row], set()).add(of_rows[row])
        self._shared_prompts = {question_id for question_id, texts in contents.items() if len(texts) > 1}
        told = list(ids)
        for row in repeated:
            if ids[row] in self._shared_prompts:
                told[row] = _id_of_row(ids[row], of_rows[row])
        return told

    @property
    def told(self) -> str | None:
        """What a user should know of the ids."""
        if not self._shared_prompts:
            return None
        return (
            f"{len(self._shared_prompts)} prompts of the training dataset stand for several rows, which differ in "
            "other columns: each such row is a question of its own. Name a column of ids in question_id_column if "
            "they are not."
        )

    def id_of(self, row: Mapping[str, Any], group: int = 0) -> str:
        """Id of the question of a row that the data loader gave for a group of the batch."""
        question_id = row_question_id(row, self.question_id_column)
        if self.is_stream and self.question_id_column is None:
            return self._id_in_stream(question_id, row)
        if question_id in self._shared_prompts:
            question_id = _id_of_row(question_id, canonical_rest(row))
        return _id_of_row(question_id, f"group {group}") if question_id in self._placeholders else question_id

    def _id_in_stream(self, prompt_id: str, row: Mapping[str, Any]) -> str:
        """A text is a question by itself; images, and what an environment makes of a row, belong to it."""
        if self._has_environments or row.get("prompt") is None:
            return _id_of_row(prompt_id, canonical_rest(row))
        digests = image_digests(row)
        return _id_of_row(prompt_id, " ".join(digests)) if digests else prompt_id

    def may_retire(self, question_id: str) -> bool:
        """Whether a question that was solved is done with: not one that asks something else each time."""
        return question_id not in self._of_placeholders

    def ids(self) -> Collection[str]:
        """Ids of all questions of a map-style dataset."""
        return self._rows_of.keys()

    @property
    def may_differ(self) -> bool:
        """Whether a row may be another each time that it is read, as with a random transform."""
        return self.is_stream or (self.dataset is not None and self.dataset.format["type"] == "custom")

    def rows_of(self, question_id: str) -> Sequence[int]:
        """Rows of a question in a map-style dataset."""
        return self._rows_of.get(question_id, ())

    def present(self, question: Question) -> Question | None:
        """A stored question with its row as it is now; `None` if it is gone. Of a stream, the row that was stored."""
        if self.is_stream:
            return question
        rows = self.rows_of(question.question_id)
        if not rows:
            return None
        row = with_prompt(dict(next(_rows(self.dataset, [rows[0]]))))
        return Question(question.question_id, stored(row, None, lambda: self.image_files(question.question_id)))

    def image_files(self, question_id: str) -> list[bytes]:
        """The files that the images of a question were decoded from, as far as the dataset has them."""
        rows = self.rows_of(question_id)
        if self.is_stream or not rows:
            return []
        row = self.dataset.select([rows[0]]).with_format(None)
        for column in ("image", "images"):
            feature = row.features.get(column)
            if isinstance(feature, Image):
                row = row.cast_column(column, Image(decode=False))
            elif isinstance(getattr(feature, "feature", None), Image):
                row = row.cast_column(column, type(feature)(Image(decode=False)))
        values = row.select_columns([name for name in ("image", "images") if name in row.column_names]).to_dict()
        found = [value for of_column in values.values() for value in of_column]
        found = [part for value in found for part in (value if isinstance(value, list) else [value])]
        return [content for value in found if isinstance(value, dict) and (content := _content_of(value))]


class Replayable:
    """
    Which of the stored completions may be replayed: those whose question is in the dataset, and whose prompt still
    renders to the tokens that they were generated for.

    Args:
        questions ([`TrainingQuestions`]):
            Questions of the training dataset.
        tokenize (`Callable`):
            Maps dataset rows to the token ids of their prompts.
    """

    def __init__(
        self, questions: TrainingQuestions, tokenize: Callable[[Sequence[Mapping[str, Any]]], list[list[int]]]
    ) -> None:
        self.questions = questions
        self.tokenize = tokenize
        self._unusable: set[str] = set()
        self._of_other_prompts: set[Experience] = set()

    def examine(self, buffer: ReplayBuffer) -> str | None:
        """Look at a whole buffer, once, and give it the present rows; says what cannot be replayed, and why."""
        completions: dict[str, list[Experience]] = {}
        stored: dict[str, Question] = {}
        for question, _, experience in buffer.items():
            completions.setdefault(question.question_id, []).append(experience)
            stored[question.question_id] = question
        present = {question_id: self.questions.present(question) for question_id, question in stored.items()}
        for now in present.values():
            if now is not None:
                buffer.update(now)
        gone = {question_id for question_id, question in present.items() if question is None}
        now_of = [(q, e) for q in present.values() if q is not None for e in completions[q.question_id]]
        for (_, experience), rendered in zip(now_of, self._prompt_hashes(now_of), strict=True):
            # One that does not know its prompt was checked by its chat template; a rollout function makes prompts.
            if experience.prompt_hash not in (rendered, UNKNOWN_PROMPT) and rendered is not None:
                self._of_other_prompts.add(experience)
        for question_id, of_question in completions.items():
            if self._of_other_prompts.issuperset(of_question):
                self._unusable.add(question_id)
        self._unusable |= gone
        told = []
        if gone:
            told.append(f"{len(gone)} of {len(stored)} questions are not in the training dataset")
        if self._of_other_prompts:
            told.append(
                f"{len(self._of_other_prompts)} completions were generated for a prompt that now renders to other "
                "tokens (another wording, system prompt, chat template or chat_template_kwargs)"
            )
        return f"{' and '.join(told)}: they stay in the experience buffer, but are not replayed." if told else None

    def _prompt_hashes(self, completions: Sequence[tuple[Question, Experience]]) -> list[int | None]:
        """Hash of the prompt of each completion as it renders now, each prompt once; `None` if it is not rendered."""
        shown = [Shown(question.example, experience) for question, experience in completions]
        keys = [
            (question.question_id, of_one.prompt_text)
            for (question, _), of_one in zip(completions, shown, strict=True)
        ]
        first = {key: of_one for key, of_one in zip(keys, shown, strict=True) if of_one.prompt_ids is None}
        hashes: dict[tuple[str, str | None], int | None] = {}
        waiting = list(first.items())
        step = _IMAGES_AT_ONCE if any(has_images(of_one.example) for of_one in first.values()) else _PROMPTS_AT_ONCE
        for start in range(0, len(waiting), step):
            some = waiting[start : start + step]
            rendered = self.tokenize([of_one.row for _, of_one in some])
            hashes |= {
                key: prompt_hash(ids, image_digests(of_one.example))
                for (key, of_one), ids in zip(some, rendered, strict=True)
            }
        return [
            hashes.get(key) if of_one.prompt_ids is None else None for key, of_one in zip(keys, shown, strict=True)
        ]

    def collected(
        self, question: Question, new: Sequence[Experience], stored: Callable[[], Sequence[Experience]]
    ) -> list[Experience]:
        """
        Take note of new completions of a question: there is something to replay.

        Returns the stored ones that answer other images, as those of a random transform: they belong to none any more.
        """
        self._unusable.discard(question.question_id)
        if not new or not has_images(question.example):
            return []
        now = {experience.prompt_hash for experience in new}
        return [e for e in stored() if e.prompt_hash not in now and not has_own_prompt(e)]

    def sampler(
        self, sampler: QuestionSampler, resting: Collection[str] = ()
    ) -> QuestionSampler | Callable[..., Sequence[str]]:
        """The sampler, over what may be replayed; questions that rest may not."""
        left_out = self._unusable.union(resting)
        if not left_out:
            return sampler
        return lambda pool, num_questions, rng: sampler(PoolWithout(pool, left_out), num_questions, rng)

    def is_whole(self, group: Sequence[Experience]) -> bool:
        """Whether all completions of a group may be replayed."""
        return self._of_other_prompts.isdisjoint(group)

    def completions(self, experiences: Sequence[Experience]) -> list[Experience]:
        """Those of a question's completions that may be replayed."""
        if not self._of_other_prompts:
            return list(experiences)
        return [experience for experience in experiences if experience not in self._of_other_prompts]


def _content_of(image: Mapping[str, Any]) -> bytes | None:
    if image["bytes"] is not None:
        return image["bytes"]
    path = image.get("path")
    return Path(path).read_bytes() if path and Path(path).is_file() else None


def has_own_prompt(experience: Experience) -> bool:
    """Whether a completion answers a prompt that an environment or a rollout function made of its question's."""
    details = experience.details
    return details is not None and (details.prompt_text is not None or bool(details.prompt_bytes))


def decodes_images(dataset: Any) -> bool:
    """Whether rows of a map-style dataset hold images, which are decoded when they are read."""
    return isinstance(dataset, Dataset) and "Image(" in str(dataset.features)


def _rows(dataset: Dataset, rows: Sequence[int]) -> Iterator[Mapping[str, Any]]:
    """Rows as the data loader gives them; many at once, where no format or transform makes something else of one."""
    if dataset.format["type"] is not None or len(rows) == 1:
        yield from (dataset.__getitems__([row])[0] for row in rows)
        return
    for batch in dataset.select(rows).iter(batch_size=_IMAGES_AT_ONCE if decodes_images(dataset) else _ROWS_AT_ONCE):
        yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))


def _id_of_row(prompt_id: str, row: str) -> str:
    return hashlib.sha256(f"{prompt_id}\n{row}".encode()).hexdigest()[:32]
