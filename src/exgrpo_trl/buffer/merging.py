"""Several buffers as one, and parts of a buffer as another."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..records import UNKNOWN_PROMPT, Experience, ExperienceBufferError, Question, Reuse
from .settings import GROUP

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer

_LIMITS = ("capacity", "max_completions_per_question")


def merged(
    buffers: Sequence[ExperienceBuffer], names: Sequence[str], limits: Mapping[str, int | None]
) -> ExperienceBuffer:
    """
    A new buffer of what several buffers hold, see [`ExperienceBuffer.merge`].

    Raises:
        ExperienceBufferError: if they do not belong together.
        TypeError: if a limit has another name.
        ValueError: if there is no buffer, or a limit is none.
    """
    if not buffers:
        raise ValueError("There is no experience buffer to merge.")
    if unknown := limits.keys() - {*_LIMITS}:
        raise TypeError(f"{sorted(unknown)} are no limits of an experience buffer; these are {list(_LIMITS)}.")
    first = buffers[0]
    known = [(name, buffer) for name, buffer in zip(names, buffers, strict=True) if not _is_untouched(buffer)]
    _check_setting(known, "unit")
    _check_setting([(name, buffer) for name, buffer in known if buffer.group_size is not None], "group_size")
    provenance = _common_provenance(known)
    group_sizes = [buffer.group_size for buffer in buffers if buffer.group_size is not None]
    result = type(first)(
        group_size=group_sizes[0] if group_sizes else None,
        retire_solved=first.retire_solved,
        unit=(known[0][1] if known else first).unit,
    )
    result.rng.bit_generator.state = first.rng.bit_generator.state
    result.provenance = provenance
    for buffer in buffers:
        for question_id in buffer.retired:
            result.retire(question_id)
    done: set[str] = set()
    for buffer in buffers:
        for bucket, question_ids in buffer.buckets().items():
            for question_id in question_ids:
                if question_id not in done and question_id not in result.retired:
                    _insert(result, question_id, bucket, known)
                done.add(question_id)
    result.set_limits(**{name: limits.get(name, getattr(first, name)) for name in _LIMITS})
    return result


def set_aside(buffer: ExperienceBuffer, is_chosen: Callable[[Question, int, Experience], bool]) -> ExperienceBuffer:
    """Move completions into a buffer of their own, see [`ExperienceBuffer.set_aside`]."""
    aside = type(buffer)(group_size=buffer.group_size, retire_solved=buffer.retire_solved, unit=buffer.unit)
    aside.provenance = dict(buffer.provenance)
    leaving = []
    for bucket, question_ids in buffer.buckets().items():
        for question_id in question_ids:
            question = buffer.question(question_id)
            for part in _parts_of(buffer, question_id):
                if any(is_chosen(question, bucket, experience) for experience in part):
                    leaving.append((question, bucket, part))
    for question, bucket, part in leaving:
        aside._store.insert(question, part, bucket, _records_of(buffer, part))
        buffer.evict(question.question_id, part[0])
    return aside


def is_same_provenance(one: Any, other: Any) -> bool:
    """Whether two values of a provenance are the same; NaN, which files may hold, is itself."""
    return bool(one == other) or json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _insert(
    result: ExperienceBuffer, question_id: str, bucket: int, known: Sequence[tuple[str, ExperienceBuffer]]
) -> None:
    """Store what all buffers have of a question, oldest first, with the row of the first of them."""
    owners = [(name, buffer) for name, buffer in known if question_id in buffer]
    question = owners[0][1].question(question_id)
    parts = [(part, buffer) for _, buffer in owners for part in _parts_of(buffer, question_id)]
    parts.sort(key=lambda part: max(experience.policy_version for experience in part[0]))
    for part, buffer in parts:
        _, num_duplicates = result._store.insert(question, part, bucket, _records_of(buffer, part))
        result.num_duplicates += num_duplicates
    for name, buffer in owners[1:]:
        try:
            result._check_prompt(buffer.question(question_id))
        except ValueError as error:
            raise ExperienceBufferError(
                f"The experience buffers {owners[0][0]} and {name} cannot be merged. {error}"
            ) from error


def _parts_of(buffer: ExperienceBuffer, question_id: str) -> list[Sequence[Experience]]:
    """What comes and goes together, oldest first: single completions, or groups."""
    if buffer.unit == GROUP:
        return list(buffer.groups(question_id))
    return [(experience,) for experience in buffer.completions(question_id)]


def _records_of(buffer: ExperienceBuffer, part: Sequence[Experience]) -> dict[Experience, Reuse]:
    """Records of those completions that have one."""
    reuse = buffer._store.reuse
    return {experience: reuse[experience] for experience in part if experience in reuse}


def _is_untouched(buffer: ExperienceBuffer) -> bool:
    """Whether nothing was ever collected, so that nothing has to agree with it."""
    return not buffer.num_questions and not buffer.retired


def _check_setting(known: Sequence[tuple[str, ExperienceBuffer]], name: str) -> None:
    for source, buffer in known[1:]:
        mine, others = getattr(known[0][1], name), getattr(buffer, name)
        if mine != others:
            raise ExperienceBufferError(
                f"The experience buffers {known[0][0]} and {source} cannot be merged: they have {name}={mine!r} and "
                f"{name}={others!r}. Merge those of one {name} alone."
            )


def _common_provenance(known: Sequence[tuple[str, ExperienceBuffer]]) -> dict[str, Any]:
    """What all say of their tokens, who says nothing aside."""
    is_prompt_known = all(
        experience.prompt_hash != UNKNOWN_PROMPT for _, buffer in known for _, _, experience in buffer.items()
    )
    provenance: dict[str, Any] = {}
    said_by: dict[str, str] = {}
    for source, buffer in known:
        for name, value in buffer.provenance.items():
            said_by.setdefault(name, source)
            if is_same_provenance(provenance.setdefault(name, value), value):
                continue
            if name == "chat_template" and is_prompt_known:
                continue  # the tokens of the prompts count, which a trainer compares one by one
            raise ExperienceBufferError(
                f"The experience buffers {said_by[name]} and {source} cannot be merged: they were collected with "
                f"{name}={provenance[name]!r} and {name}={value!r}, so that their tokens or log-probabilities do not "
                "mean the same. Merge those alone that agree in it."
            )
    return provenance
