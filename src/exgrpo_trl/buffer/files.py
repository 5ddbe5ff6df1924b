"""Save and load an experience buffer: Parquet files and `metadata.json` in a directory, replaced atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..images import StoredImage
from .boundary import reading
from .detail_columns import details_to_arrays
from .disk import rename, sync
from .garbage import without_collection
from .hashed_files import HashedFile
from .image_files import example_to_text, read_images, write_images
from .limits import Budget, json_bytes, row_bytes
from .locations import find_buffer, hidden_names, resolved
from .metadata import (
    COMPLETIONS_FILE,
    DATA_FILES,
    IMAGES_FILE,
    METADATA_FILE,
    QUESTIONS_FILE,
    RESUME_HINT,
    RETIRED_FILE,
    check_file,
    data_files,
    described,
    fail,
    metadata_text,
    read_metadata,
)
from .parquet_layout import layout_of
from .restoring import COMPLETION_SCHEMA, RETIRED_SCHEMA, restored
from .reuse_columns import reuse_to_arrays
from .settings import GROUP
from .tables import (
    QUESTION_SCHEMA,
    bounded,
    bytes_of,
    experiences_to_arrays,
    group_numbers,
)

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer

Buffer = TypeVar("Buffer", bound="ExperienceBuffer")


def save_buffer(buffer: ExperienceBuffer, path: str | os.PathLike[str]) -> None:
    """
    Save a buffer to a directory, with everything that decides what it will draw and evict.

    The files are written and synced under a hidden name beside `path`, which is then renamed: whenever the process
    dies, what was saved before or what is being saved can be loaded. An experience buffer that is already there is
    replaced. Where the file system cannot sync, as many mounted buckets, a save goes on without; where it cannot
    rename directories, they are copied, and a process that dies meanwhile leaves a buffer that is refused as damaged.

    Args:
        buffer ([`ExperienceBuffer`]):
            Buffer to save.
        path (`str` or `os.PathLike`):
            Directory to write; its parents are created.

    Raises:
        ExperienceBufferError: if `path` holds something else than an experience buffer.
        TypeError: if an example, `provenance` or `replay_state` holds what cannot be saved.
    """
    target = resolved(path)
    refuse_foreign(target)
    temporary, replaced = hidden_names(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if replaced.exists() and not target.exists():
        # A save died between its two renames; its old buffer is the only complete one that is sure to be there.
        rename(replaced, target)
    for leftover in (temporary, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        _write_files(buffer, temporary)
        sync(temporary)
        if target.exists():
            rename(target, replaced)
        rename(temporary, target)
        sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


@without_collection()
def load_buffer(path: str | os.PathLike[str], buffer_class: type[Buffer]) -> Buffer:
    """
    Load a buffer that [`save_buffer`] wrote; it goes on exactly as the saved one would have.

    The files may come from a stranger: they are data, of which nothing is executed, and nothing is written. What they
    decode to is bounded before it is decoded, by 64 times their size, or 512 MiB where that is more.

    Args:
        path (`str` or `os.PathLike`):
            Directory of the buffer, of a checkpoint or of a run, see [`find_buffer`].
        buffer_class (`type`):
            Class of the buffer, with the constructor of [`ExperienceBuffer`].

    Raises:
        ExperienceBufferError: if it is missing, damaged, incomplete, malformed, asks for too much memory, or was
            written by a newer version. The message names the file and what is wrong with it.
    """
    return _read_files(find_buffer(path), buffer_class)


def _write_files(buffer: ExperienceBuffer, directory: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        budget, written = _write_data(buffer, directory, executor, "zstd")
        if budget.is_exceeded:
            # What is the same all over compresses so well that it would be taken for an attack.
            _, written = _write_data(buffer, directory, executor, "none")
        # The disk takes them while the last checksums are computed.
        for name in DATA_FILES:
            sync(directory / name)
        text = metadata_text(described(buffer), {name: file.described() for name, file in written.items()})
    (directory / METADATA_FILE).write_text(text, encoding="ascii")
    sync(directory / METADATA_FILE)


def _write_data(
    buffer: ExperienceBuffer, directory: Path, executor: ThreadPoolExecutor, compression: str
) -> tuple[Budget, dict[str, HashedFile]]:
    """Write the data files; returns what a load of them will ask for, and the files, which are closed."""
    with ExitStack() as stack:
        files = {name: stack.enter_context(HashedFile(directory / name, executor)) for name in DATA_FILES}
        num_value_bytes = _write_rows(buffer, files, compression)
    budget = Budget(sum((directory / name).stat().st_size for name in DATA_FILES))
    budget.spent = num_value_bytes
    for name in DATA_FILES:
        num_rows, num_bytes = layout_of(directory / name)
        budget.spent += num_bytes + row_bytes(num_rows, is_id=name == RETIRED_FILE)
    return budget, files


def _write_rows(buffer: ExperienceBuffer, files: Mapping[str, BinaryIO], compression: str) -> int:
    """Write everything but the metadata; returns what the values of the questions take as Python objects."""
    # Bucket by bucket, so that every list of question ids comes back in its order.
    questions = [(question_id, bucket) for bucket, ids in buffer.buckets().items() for question_id in ids]
    images: dict[str, StoredImage] = {}
    texts = (
        (question_id, example_to_text(buffer.question(question_id).example, images), bucket)
        for question_id, bucket in questions
    )
    num_value_bytes = 0
    with _writer(files[QUESTIONS_FILE], QUESTION_SCHEMA, compression) as file:
        for some in bounded(texts, lambda row: len(row[1])):
            num_value_bytes += sum(json_bytes(text) for _, text, _ in some)
            file.write_batch(pa.record_batch(list(zip(*some, strict=True)), schema=QUESTION_SCHEMA))

    ranks = {experience: rank for rank, (experience, _) in enumerate(buffer._store.versions)}
    rows = (
        (row, ranks[experience], experience)
        for row, (question_id, _) in enumerate(questions)
        for experience in buffer.completions(question_id)
    )
    group_size = buffer.group_size if buffer.unit == GROUP else None
    num_written = 0
    # Split by byte, log-probabilities compress better and several times faster.
    encoding = {"behavior_per_token_logps.list.element": "BYTE_STREAM_SPLIT"}
    with _writer(files[COMPLETIONS_FILE], COMPLETION_SCHEMA, compression, column_encoding=encoding) as file:
        for batch in bounded(rows, lambda row: bytes_of(row[2])):
            *keys, experiences = zip(*batch, strict=True)
            details = [experience.details for experience in experiences]
            for of in filter(None, details):
                images.update((image.digest, image) for image in of.images)
            columns = [pa.array(values, pa.int64()) for values in keys]
            columns += experiences_to_arrays(experiences) + details_to_arrays(details)
            columns += reuse_to_arrays([buffer._store.reuse.get(experience) for experience in experiences])
            columns.append(group_numbers(num_written, len(batch), group_size))
            file.write_batch(pa.record_batch(columns, schema=COMPLETION_SCHEMA))
            num_written += len(batch)
    write_images(files[IMAGES_FILE], images.values())

    with _writer(files[RETIRED_FILE], RETIRED_SCHEMA, compression) as file:
        file.write_batch(pa.record_batch([pa.array(list(buffer.retired), pa.string())], schema=RETIRED_SCHEMA))
    return num_value_bytes


def _writer(file: BinaryIO, schema: pa.Schema, compression: str, **kwargs: Any) -> pq.ParquetWriter:
    # `layout_of` refuses any other layout.
    options = {"compression": compression, "use_dictionary": False, "write_statistics": False}
    options |= {"compression_level": 1} if compression == "zstd" else {}
    return pq.ParquetWriter(file, schema, **options, **kwargs)


def _read_files(directory: Path, buffer_class: type[Buffer]) -> Buffer:
    metadata = read_metadata(directory)
    names = data_files(metadata["schema_version"])
    for name in names:
        if not (directory / name).is_file():
            fail(directory, f"has no {name}. {RESUME_HINT}")
    with ThreadPoolExecutor(1) as executor:
        checks = {name: executor.submit(_check_file, directory, name, metadata) for name in names}
        try:
            # They are read meanwhile, as nothing looks into them; what becomes of them is dropped if damage is found.
            budget = _checked_budget(directory, names, metadata["counts"])
            images: dict[str, StoredImage] = {}
            if IMAGES_FILE in checks:
                with reading(directory, IMAGES_FILE):
                    images = read_images(directory / IMAGES_FILE)
            for name, check in checks.items():
                if name != IMAGES_FILE:
                    check.result()
            return restored(directory, metadata, buffer_class, images, budget)
        finally:
            for check in checks.values():
                check.result()  # whatever went wrong, damage is the reason


def _check_file(directory: Path, name: str, metadata: Mapping[str, Any]) -> None:
    with reading(directory, name):
        check_file(directory, name, metadata)


def _checked_budget(directory: Path, names: Sequence[str], counts: Mapping[str, int]) -> Budget:
    """What may be decoded, less what the files declare: they are opened by nobody else before."""
    budget = Budget(sum((directory / name).stat().st_size for name in names))
    for name in names:
        with reading(directory, name):
            layout = layout_of(directory / name, budget.spend)
            budget.spend(row_bytes(layout.num_rows, is_id=name == RETIRED_FILE))
            expected = counts.get(name.removesuffix(".parquet"), layout.num_rows)
            if layout.num_rows != expected:
                raise ValueError(f"it has {layout.num_rows} rows, but {METADATA_FILE} counts {expected}")
    return budget


def refuse_foreign(target: Path) -> None:
    """
    Refuse to take the place of what is no experience buffer.

    Raises:
        ExperienceBufferError: if something else is there.
    """
    if not target.exists():
        return
    foreign = (
        target.name
        if not target.is_dir()
        else next((entry for entry in sorted(os.listdir(target)) if entry not in (*DATA_FILES, METADATA_FILE)), None)
    )
    if foreign is not None:
        fail(target, f"cannot be saved there: {foreign} is not part of one. Choose another path.")
