"""Invariants of an [`ExperienceBuffer`], for tests and for buffers that come from a disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ..rollout_details import RolloutDetails
from ..values import referenced_digests
from .image_pool import stored_images_in
from .store import Store
from .stored_questions import StoredGroups


def violations(
    store: Store,
    retired: Collection[str],
    *,
    group_size: int | None,
    capacity: int | None,
    max_completions_per_question: int | None,
    has_checked_details: bool = False,
) -> Iterator[str]:
    """
    What is wrong inside a buffer, one sentence each; nothing in a valid one. Walks the whole buffer.

    With `has_checked_details`, what rollouts have beyond tokens was looked into when it was made, as a load does.
    """
    completions = tokens = 0
    for question_id, stored in store.questions.items():
        if question_id != stored.question.question_id:
            yield f"question {stored.question.question_id!r} is stored as {question_id!r}"
        if question_id in retired:
            yield f"question {question_id!r} is stored and retired"
        if question_id not in store.buckets.get(stored.bucket, ()):
            yield f"question {question_id!r} is not in its bucket {stored.bucket}"
        if not all(image in store.images for image in stored_images_in(stored.question.example)):
            yield f"question {question_id!r} has an image that the buffer has not, or has twice"
        if not len(stored):
            yield f"question {question_id!r} has no completion"
        if len(stored) > (max_completions_per_question or len(stored)):
            yield f"question {question_id!r} has {len(stored)} completions"
        if not stored.is_consistent():
            yield f"a completion of question {question_id!r} is stored under other tokens, or twice"
        if isinstance(stored, StoredGroups) and {*map(len, stored.groups.values())} - {group_size}:
            yield f"a group of question {question_id!r} has not {group_size} completions"
        for experience in stored:
            completions += 1
            tokens += experience.num_tokens
            if len(experience.token_bytes) != len(experience.logp_bytes):
                yield f"a completion of question {question_id!r} has more or fewer log-probabilities than tokens"
            if store.versions.owner(experience) != question_id:
                yield f"a completion of question {question_id!r} is not among those of its policy version"
            if experience.details is not None and not has_checked_details:
                yield from _violations_of_details(question_id, experience.num_tokens, experience.details, store)
    if (completions, tokens) != (store.num_completions, store.num_tokens):
        yield f"{store.num_completions} completions with {store.num_tokens} tokens are counted, there are " + (
            f"{completions} with {tokens}"
        )
    if completions > (capacity or completions):
        yield f"{completions} completions exceed the capacity of {capacity}"
    for bucket, ids in store.buckets.items():
        if not ids or not 0 <= bucket <= (group_size or 0):
            yield f"bucket {bucket} of {len(ids)} questions cannot be"
        if not ids.is_consistent():
            yield f"the positions in bucket {bucket} are wrong"
    if sum(map(len, store.buckets.values())) != len(store.questions):
        yield "a bucket holds a question that is not stored in it"
    # All that are stored are there, each once: as many are the same.
    if sum(1 for _ in store.versions) != completions or not store.versions.is_consistent():
        yield "the policy versions hold completions that are not stored"
    if not all(experience in store.versions for experience in store.reuse):
        yield "there is a record of reuse of a completion that is not stored"


def _violations_of_details(question_id: str, num_tokens: int, details: RolloutDetails, store: Store) -> Iterator[str]:
    runs = memoryview(details.run_bytes).cast("i").tolist()  # mostly few: faster than the same with NumPy
    if runs and (min(runs) < 0 or sum(runs) != num_tokens):
        yield f"a completion of question {question_id!r} says who wrote {sum(runs)} of {num_tokens} tokens"
    own = set()
    for image in details.images:
        own.add(image.digest)
        if image not in store.images:
            yield f"a completion of question {question_id!r} has an image that the buffer has not, or has twice"
    for text in (details.messages_text, details.prompt_text, details.fields_text):
        if text is not None and (missing := set(referenced_digests(text)) - own):
            yield f"a completion of question {question_id!r} refers to the images {sorted(missing)}, which it has not"
