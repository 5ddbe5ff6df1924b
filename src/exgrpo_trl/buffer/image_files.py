"""The images of saved buffers: a Parquet file that holds each once, as it is, and rows that refer to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..examples import decode_example, encode_example
from ..images import StoredImage, referenced, resolved
from ..values import may_refer
from .detail_columns import require
from .tables import bounded, row_groups

IMAGE_SCHEMA = pa.schema([("digest", pa.string()), ("content", pa.large_binary())])


def write_images(file: BinaryIO, images: Iterable[StoredImage]) -> None:
    """Write images in row groups of bounded size."""
    # What is compressed already only takes time.
    compression = {"digest": "zstd", "content": "none"}
    with pq.ParquetWriter(
        file, IMAGE_SCHEMA, compression=compression, use_dictionary=False, write_statistics=False
    ) as writer:
        for batch in bounded(images, lambda image: len(image.content)):
            digests = pa.array([image.digest for image in batch], pa.string())
            writer.write_batch(pa.record_batch([digests, _contents(batch)], schema=IMAGE_SCHEMA))


def read_images(file: Path) -> dict[str, StoredImage]:
    """
    The images of a file by digest.

    Raises:
        ValueError: if a digest or content is missing, or a digest is there twice.
    """
    images: dict[str, StoredImage] = {}
    num_rows = 0
    for group in row_groups(file, IMAGE_SCHEMA):
        digests, contents = group.column("digest"), group.column("content")
        require(not digests.null_count and not contents.null_count, "images have a digest and content")
        num_rows += len(group)
        for digest, content in zip(digests.to_pylist(), contents.to_pylist(), strict=True):
            images[digest] = StoredImage(content, digest)
    require(len(images) == num_rows, "every image is there once")
    return images


def _contents(images: list[StoredImage]) -> pa.Array:
    # As `pa.array` makes it, with one copy: that one grows as it goes.
    offsets = np.cumsum([0, *(len(image.content) for image in images)], dtype=np.int64)
    content = b"".join([image.content for image in images])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.large_binary(), len(images), buffers)


def example_to_text(example: Mapping[str, Any], images: dict[str, StoredImage]) -> str:
    """JSON text of a dataset row that refers to its images; they are put into `images` by digest."""
    return encode_example(referenced(dict(example), images))


def example_from_text(text: str, images: Mapping[str, StoredImage]) -> dict[str, Any]:
    """
    Row of a text that [`example_to_text`] gave, with its images.

    Raises:
        ValueError: if the text is not that of a row, or an image is missing.
    """
    example = decode_example(text)
    if not may_refer(text):
        return example
    try:
        row: dict[str, Any] = resolved(example, images)
    except KeyError as error:
        raise ValueError(f"A stored question refers to the image {error}, which is not there.") from error
    return row
