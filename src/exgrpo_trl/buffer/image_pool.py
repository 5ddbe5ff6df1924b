"""The images of a buffer in memory: each one once, however many questions and completions share it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from ..images import StoredImage, images_in, stored
from ..records import Experience, Question


class ImagePool:
    """Images by digest, as long as something refers to them."""

    def __init__(self) -> None:
        self._images: WeakValueDictionary[str, StoredImage] = WeakValueDictionary()

    def __contains__(self, image: StoredImage) -> bool:
        """Whether it is this very object that the pool has under its digest."""
        return self._images.get(image.digest) is image

    def adopt(self, images: Iterable[StoredImage]) -> None:
        """Take in images of which no two are equal."""
        self._images.update((image.digest, image) for image in images)

    def question(self, question: Question) -> Question:
        """
        The question with the images of the pool in the place of its own; the same object if it has none.

        Raises:
            ValueError: if an image cannot be stored.
        """
        example = stored(question.example, self._images)
        return question if example is question.example else Question(question.question_id, example)

    def experience(self, experience: Experience) -> Experience:
        """The completion with the images of the pool; the same object where it has no others."""
        if experience.details is None or not experience.details.images:
            return experience
        images = tuple([self._images.setdefault(image.digest, image) for image in experience.details.images])
        if images == experience.details.images:  # images are equal only if they are the same object
            return experience
        return replace(experience, details=replace(experience.details, images=images))

    # Weak references cannot be copied.
    def __getstate__(self) -> list[StoredImage]:
        return list(self._images.values())

    def __setstate__(self, images: list[StoredImage]) -> None:
        self._images = WeakValueDictionary((image.digest, image) for image in images)


def stored_images_in(value: Any) -> list[StoredImage]:
    """The stored images in a dataset row, in order."""
    return [image for image in images_in(value) if isinstance(image, StoredImage)]
