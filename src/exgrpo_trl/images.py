"""Images of dataset rows and messages: kept once each, encoded without loss, known by a hash of their pixels."""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import ExperienceBufferError

if TYPE_CHECKING:
    from PIL.Image import Image

# What PNG holds as it is; anything else goes into a TIFF file.
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
# What images are read from. Pillow hands files of some other formats to programs, such as PostScript to Ghostscript.
_FORMATS = (
    *(
        "PNG",
        "TIFF",
        "JPEG",
        "MPO",
        "WEBP",
        "AVIF",
        "GIF",
        "BMP",
        "DIB",
        "JPEG2000",
        "PPM",
        "TGA",
        "ICO",
        "PCX",
        "SGI",
    ),
    "DDS",
)
_PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False, repr=False)
class StoredImage:
    """
    An image as a buffer keeps it. Two are the same image where their digests are equal.

    Args:
        content (`bytes`):
            File that decodes to the image: PNG or TIFF, or what the dataset had.
        digest (`str`):
            Hash of mode, size and pixels, 64 hexadecimal digits.
    """

    content: bytes
    digest: str

    @classmethod
    def of(cls, image: Image) -> StoredImage:
        """
        Encode an image; the pixels come back exactly.

        Raises:
            ValueError: if the image cannot be decoded or encoded without loss.
        """
        return cls.of_digest(image, pixel_digest(image))

    @classmethod
    def of_digest(cls, image: Image, digest: str) -> StoredImage:
        """The same where the digest of the image is known."""
        content = io.BytesIO()
        # Level 1: a third of the time of the default, for a few percent more.
        options = {"format": "PNG", "compress_level": 1} if image.mode in _PNG_MODES else {"format": "TIFF"}
        try:
            image.save(content, **options)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"An image of mode {image.mode!r} and size {image.size} cannot be stored: {error}. Convert it to RGB."
            ) from error
        stored = cls(content.getvalue(), digest)
        if image.mode not in ("L", "RGB", "RGBA") and not stored._shows(digest):
            raise ValueError(
                f"An image of mode {image.mode!r} and size {image.size} cannot be stored without loss. "
                "Convert it to RGB."
            )
        return stored

    def _shows(self, digest: str) -> bool:
        """Whether the pixels come back: Pillow below 13 cannot read the YCbCr that it writes."""
        try:
            return pixel_digest(self.open()) == digest
        except ExperienceBufferError:
            return False

    def open(self) -> Image:
        """
        The image, decoded; a new one with every call.

        Raises:
            ExperienceBufferError: if the content is no image, is of a format that is not read, or has far more pixels
                than Pillow takes for one (`PIL.Image.MAX_IMAGE_PIXELS`).
        """
        from PIL import Image

        try:
            image = Image.open(io.BytesIO(self.content))
            if image.format not in _FORMATS:
                raise ValueError(f"files of the format {image.format} are not read")
            image.load()
        except Exception as error:  # every format of Pillow has its own ways to fail
            raise ExperienceBufferError(
                f"The stored image {self.digest[:80]!r} ({len(self.content):,} bytes) cannot be decoded "
                f"({type(error).__name__}: {str(error)[:200]}). Remove what refers to it from the experience buffer, "
                "or start with an empty one."
            ) from error
        return image

    def __repr__(self) -> str:
        return f"StoredImage({len(self.content)} bytes, digest={self.digest[:12]!r})"


@dataclass(frozen=True, slots=True)
class ImageReference:
    """Stands for an image that is kept elsewhere."""

    digest: str


def is_image(value: Any) -> bool:
    """Whether a value is an image of Pillow."""
    pillow = sys.modules.get("PIL.Image")  # without it there is none
    return pillow is not None and isinstance(value, pillow.Image)


def pixel_digest(image: Image) -> str:
    """
    Hash of an image: mode, size, palette and pixels.

    Raises:
        ValueError: if the image cannot be decoded.
    """
    try:
        pixels = image.tobytes()
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(
            f"An image of size {image.size} cannot be decoded ({type(error).__name__}: {error}). Remove "
            "its row from the dataset."
        ) from error
    digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
    if image.mode in ("P", "PA") and image.palette is not None:
        digest.update(_palette_of(image))
    digest.update(pixels)
    return digest.hexdigest()


def _palette_of(image: Image) -> bytes:
    """256 colours with opacity, four bytes each; files keep the opacity beside the palette, and some fill it up."""
    palette = bytearray(image.getpalette("RGBA") or ())
    palette += b"\0\0\0\xff" * (256 - len(palette) // 4)
    transparency = image.info.get("transparency")
    if image.mode == "P" and isinstance(transparency, int):
        palette[4 * transparency + 3 : 4 * transparency + 4] = b"\0"
    elif image.mode == "P" and isinstance(transparency, bytes):
        known = transparency[:256]
        palette[3 : 4 * len(known) : 4] = known
    return bytes(palette)


def map_images(value: Any, change: Callable[[Any], Any]) -> Any:
    """The value with every image in it (of Pillow, stored, or a reference) changed; shares what holds none."""
    kind = type(value)
    if kind is dict or kind is list or kind is tuple:
        changed: Any = None  # a copy, made for the first image: most rows hold none
        for key, item in value.items() if kind is dict else enumerate(value):
            if type(item) not in _PLAIN and (new := map_images(item, change)) is not item:
                changed = (dict(value) if kind is dict else list(value)) if changed is None else changed
                changed[key] = new
        return value if changed is None else tuple(changed) if kind is tuple else changed
    return change(value) if kind in (StoredImage, ImageReference) or is_image(value) else value


def images_in(value: Any) -> list[Any]:
    """The images in a value, in order: of Pillow, stored, or references."""
    found: list[Any] = []

    def note(image: Any) -> Any:
        found.append(image)
        return image

    map_images(value, note)
    return found


def stored(
    value: Any, known: MutableMapping[str, StoredImage] | None = None, originals: Callable[[], Iterable[bytes]] = tuple
) -> Any:
    """
    The value with its images of Pillow encoded, equal ones as one.

    Args:
        value (`Any`):
            A row, messages, or anything else.
        known (`MutableMapping[str, StoredImage]`, *optional*):
            Images by digest: where they are looked up, and put.
        originals (`Callable`, *optional*):
            Gives the files that images may have been decoded from. A photograph is a tenth as large as such.
    """
    images = {} if known is None else known

    def store(image: Any) -> Any:
        if isinstance(image, ImageReference):
            return image
        if isinstance(image, StoredImage):
            return images.setdefault(image.digest, image)
        digest = pixel_digest(image)
        # To encode an image takes far longer than to look for it.
        found = images.get(digest)
        if found is None:
            found = images.setdefault(digest, _original(digest, originals()) or StoredImage.of_digest(image, digest))
        return found

    return map_images(value, store)


def _original(digest: str, files: Iterable[bytes]) -> StoredImage | None:
    """The file that decodes to the image of that digest."""
    for content in files:
        candidate = StoredImage(content, digest)
        try:
            if pixel_digest(candidate.open()) == digest:
                return candidate
        except (OSError, ValueError, SyntaxError):  # not read by Pillow alone
            continue
    return None


def opened(value: Any) -> Any:
    """The value with its stored images decoded, each anew."""
    return map_images(value, lambda image: image.open() if isinstance(image, StoredImage) else image)


def referenced(value: Any, images: dict[str, StoredImage] | None = None) -> Any:
    """The value with references in the place of its images; stored ones are put into `images` by digest."""

    def reference(image: Any) -> Any:
        if isinstance(image, ImageReference):
            return image
        if not isinstance(image, StoredImage):
            return ImageReference(pixel_digest(image))
        if images is not None:
            images.setdefault(image.digest, image)
        return ImageReference(image.digest)

    return map_images(value, reference)


def resolved(value: Any, images: Mapping[str, StoredImage]) -> Any:
    """
    The value with stored images in the place of references to them.

    Raises:
        KeyError: if one is not there.
    """
    return map_images(value, lambda image: images[image.digest] if isinstance(image, ImageReference) else image)
