"""Save and load an experience buffer: Parquet files and `metadata.json` in a directory, replaced atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..images import StoredImage
from ..records import Experience, ExperienceBufferError, Question, Reuse
from .detail_columns import DETAIL_SCHEMA, details_from_columns, details_to_arrays, require
from .disk import rename, sync
from .garbage import without_collection
from .groups import whole_groups
from .image_files import example_from_text, example_to_text, read_images, write_images
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
from .reuse_columns import REUSE_SCHEMA, reuse_from_table, reuse_to_arrays
from .settings import GROUP
from .tables import (
    EXPERIENCE_SCHEMA,
    GROUP_SCHEMA,
    QUESTION_SCHEMA,
    array_of,
    bounded,
    bytes_of,
    experiences_from_table,
    experiences_to_arrays,
    group_numbers,
    num_tokens_in,
    row_groups,
    with_later_columns,
)

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer

Buffer = TypeVar("Buffer", bound="ExperienceBuffer")

# `question` is a row number of the questions file. `age_rank` orders the completions of a policy version, which need
# not be the order of the rows: these go by question.
COMPLETION_SCHEMA = pa.unify_schemas(
    [
        pa.schema([("question", pa.int64()), ("age_rank", pa.int64())]),
        EXPERIENCE_SCHEMA,
        DETAIL_SCHEMA,
        REUSE_SCHEMA,
        GROUP_SCHEMA,
    ]
)
# Schema version that wrote a column first, where that is not the first one.
_ADDED_IN = {
    "prompt_hash": 2,
    **dict.fromkeys(DETAIL_SCHEMA.names, 3),
    **dict.fromkeys((*REUSE_SCHEMA.names, *GROUP_SCHEMA.names), 4),
}
RETIRED_SCHEMA = pa.schema([("question_id", pa.string())])


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
    _refuse_foreign(target)
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

    Args:
        path (`str` or `os.PathLike`):
            Directory of the buffer, of a checkpoint or of a run, see [`find_buffer`].
        buffer_class (`type`):
            Class of the buffer, with the constructor of [`ExperienceBuffer`].

    Raises:
        ExperienceBufferError: if it is missing, damaged, incomplete, or written by a newer version.
    """
    source = find_buffer(path)
    try:
        return _read_files(source, buffer_class)
    except ExperienceBufferError:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, pa.ArrowException) as error:
        fail(source, f"cannot be read ({type(error).__name__}: {error}). {RESUME_HINT}", error)


def _write_files(buffer: ExperienceBuffer, directory: Path) -> None:
    # Bucket by bucket, so that every list of question ids comes back in its order.
    questions = [(question_id, bucket) for bucket, ids in buffer.buckets().items() for question_id in ids]
    images: dict[str, StoredImage] = {}
    texts = (
        (question_id, example_to_text(buffer.question(question_id).example, images), bucket)
        for question_id, bucket in questions
    )
    with _writer(directory / QUESTIONS_FILE, QUESTION_SCHEMA) as file:
        for some in bounded(texts, lambda row: len(row[1])):
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
    with _writer(directory / COMPLETIONS_FILE, COMPLETION_SCHEMA, column_encoding=encoding) as file:
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
    write_images(directory / IMAGES_FILE, images.values())

    with _writer(directory / RETIRED_FILE, RETIRED_SCHEMA) as file:
        file.write_batch(pa.record_batch([pa.array(list(buffer.retired), pa.string())], schema=RETIRED_SCHEMA))

    with ThreadPoolExecutor(1) as executor:
        # The disk takes them while their checksums are computed.
        synced = executor.submit(_sync_data, directory)
        text = metadata_text(described(buffer), directory)
        synced.result()
    (directory / METADATA_FILE).write_text(text, encoding="ascii")
    sync(directory / METADATA_FILE)


def _sync_data(directory: Path) -> None:
    for name in DATA_FILES:
        sync(directory / name)


def _writer(file: Path, schema: pa.Schema, **kwargs: Any) -> pq.ParquetWriter:
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    return pq.ParquetWriter(file, schema, **options, **kwargs)


def _read_files(directory: Path, buffer_class: type[Buffer]) -> Buffer:
    metadata = read_metadata(directory)
    version = metadata["schema_version"]
    for name in data_files(version):
        if not (directory / name).is_file():
            fail(directory, f"has no {name}. {RESUME_HINT}")
    with ThreadPoolExecutor(1) as executor:
        checks = {name: executor.submit(check_file, directory, name, metadata) for name in data_files(version)}
        try:
            # They are read meanwhile, as nothing looks into them; what becomes of them is dropped if damage is found.
            images = read_images(directory / IMAGES_FILE) if IMAGES_FILE in checks else {}
            for name, check in checks.items():
                if name != IMAGES_FILE:
                    check.result()
            return _restored(directory, metadata, buffer_class, images)
        finally:
            for check in checks.values():
                check.result()  # whatever went wrong, damage is the reason


def _restored(
    directory: Path, metadata: dict[str, Any], buffer_class: type[Buffer], images: dict[str, StoredImage]
) -> Buffer:
    version = metadata["schema_version"]
    buffer = buffer_class(**metadata["settings"])
    buffer.rng.bit_generator.state = metadata["rng"]
    buffer.provenance, buffer.replay_state = metadata["provenance"], metadata["replay_state"]
    counts = metadata["counts"]
    buffer.num_evicted, buffer.num_duplicates = counts["evicted"], counts["duplicates"]

    questions = [
        (Question(row["question_id"], example_from_text(row["example"], images)), row["bucket"])
        for batch in row_groups(directory / QUESTIONS_FILE, QUESTION_SCHEMA)
        for row in batch.to_pylist()
    ]
    completions: list[list[Experience]] = [[] for _ in questions]
    by_age: list[tuple[Experience, str] | None] = [None] * counts["completions"]
    group_of_row: list[list[int | None]] = [[] for _ in questions]
    reuse: dict[Experience, Reuse] = {}
    written = pa.schema([field for field in COMPLETION_SCHEMA if _ADDED_IN.get(field.name, 1) <= version])
    for batch in row_groups(directory / COMPLETIONS_FILE, written):
        table = with_later_columns(batch, COMPLETION_SCHEMA)
        details = details_from_columns(
            {name: array_of(table, name) for name in DETAIL_SCHEMA.names}, num_tokens_in(table), images
        )
        rows, ranks = table.column("question").to_pylist(), table.column("age_rank").to_pylist()
        experiences = experiences_from_table(table, details)
        records = zip(experiences, reuse_from_table(table), strict=True)
        reuse.update((experience, record) for experience, record in records if record is not None)
        for row, rank, experience in zip(rows, ranks, experiences, strict=True):
            completions[row].append(experience)
            by_age[rank] = (experience, questions[row][0].question_id)
        if buffer.unit == GROUP:
            for row, number in zip(rows, table.column("group").to_pylist(), strict=True):
                group_of_row[row].append(number)
        else:
            require(table.column("group").null_count == len(table), "single completions are in no group")
    retired = [
        question_id
        for batch in row_groups(directory / RETIRED_FILE, RETIRED_SCHEMA)
        for question_id in batch.column("question_id").to_pylist()
    ]
    parts = [
        (question, bucket, _groups_of(question, stored, numbers, buffer.group_size or 0) if numbers else [stored])
        for (question, bucket), stored, numbers in zip(questions, completions, group_of_row, strict=True)
    ]
    buffer._restore(
        parts,
        [owned for owned in by_age if owned is not None],
        retired,
        reuse,
        images.values(),
    )
    is_valid, reason = buffer.check_valid()
    if is_valid and any(buffer.metrics()[name] != count for name, count in counts.items()):
        is_valid, reason = False, f"it should have {counts} and has {buffer.metrics()}"
    if not is_valid:
        fail(directory, f"contradicts itself: {reason}. {RESUME_HINT}")
    return buffer


def _groups_of(
    question: Question, experiences: Sequence[Experience], numbers: Sequence[int | None], group_size: int
) -> list[list[Experience]]:
    rows = zip(experiences, numbers, strict=True)
    groups = whole_groups(rows, lambda row: (question.question_id, row[1]), group_size)
    return [[experience for experience, _ in group] for group in groups]


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    foreign = (
        target.name
        if not target.is_dir()
        else next((entry for entry in sorted(os.listdir(target)) if entry not in (*DATA_FILES, METADATA_FILE)), None)
    )
    if foreign is not None:
        fail(target, f"cannot be saved there: {foreign} is not part of one. Choose another path.")
