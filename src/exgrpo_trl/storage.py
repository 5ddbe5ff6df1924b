"""Save and load an experience buffer: Parquet files and `metadata.json` in a directory, replaced atomically."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .buffer import ExperienceBuffer
from .experience import Experience, ExperienceBufferError, Question, decode_example, encode_example
from .tables import (
    EXPERIENCE_SCHEMA,
    QUESTION_SCHEMA,
    ROWS_PER_BATCH,
    experiences_from_table,
    experiences_to_arrays,
    in_batches,
)

Buffer = TypeVar("Buffer", bound=ExperienceBuffer)

SCHEMA_VERSION = 1
METADATA_FILE = "metadata.json"
QUESTIONS_FILE = "questions.parquet"
COMPLETIONS_FILE = "completions.parquet"
RETIRED_FILE = "retired.parquet"
DATA_FILES = (QUESTIONS_FILE, COMPLETIONS_FILE, RETIRED_FILE)

# `question` is a row number of the questions file. `age_rank` orders the completions of a policy version, which need
# not be the order of the rows: these go by question.
COMPLETION_SCHEMA = pa.unify_schemas(
    [pa.schema([("question", pa.int64()), ("age_rank", pa.int64())]), EXPERIENCE_SCHEMA]
)
RETIRED_SCHEMA = pa.schema([("question_id", pa.string())])

_NO_CHECKSUM = '"checksum": ""'
_RESUME_HINT = "Resume from an earlier checkpoint, or put an empty buffer in its place: ExperienceBuffer().save(PATH)."


def save_buffer(buffer: ExperienceBuffer, path: str | os.PathLike[str]) -> None:
    """
    Save a buffer to a directory, with everything that decides what it will draw and evict.

    The files are written and synced under a hidden name beside `path`, which is then renamed: whenever the process
    dies, what was saved before or what is being saved can be loaded. An experience buffer that is already there is
    replaced.

    Args:
        buffer ([`ExperienceBuffer`]):
            Buffer to save.
        path (`str` or `os.PathLike`):
            Directory to write; its parents are created.

    Raises:
        ExperienceBufferError: if `path` holds something else than an experience buffer.
        TypeError: if an example, `provenance` or `replay_state` holds what cannot be saved.
    """
    target = _resolved(path)
    _refuse_foreign(target)
    temporary, replaced = _hidden_names(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if replaced.exists() and not target.exists():
        # A save died between its two renames; its old buffer is the only complete one that is sure to be there.
        os.rename(replaced, target)
    for leftover in (temporary, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir()
    try:
        _write_files(buffer, temporary)
        _sync(temporary)
        if target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(replaced, ignore_errors=True)


def load_buffer(path: str | os.PathLike[str], buffer_class: type[Buffer] = ExperienceBuffer) -> Buffer:  # type: ignore[assignment]
    """
    Load a buffer that [`save_buffer`] wrote; it goes on exactly as the saved one would have.

    Args:
        path (`str` or `os.PathLike`):
            Directory of the buffer.
        buffer_class (`type`, *optional*, defaults to [`ExperienceBuffer`]):
            Class of the buffer, with the constructor of [`ExperienceBuffer`].

    Raises:
        ExperienceBufferError: if it is missing, damaged, incomplete, or written by a newer version.
    """
    target = _resolved(path)
    replaced = _hidden_names(target)[1]
    source = replaced if replaced.exists() and not target.exists() else target
    try:
        return _read_files(source, buffer_class)
    except ExperienceBufferError:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, pa.ArrowException) as error:
        _fail(source, f"cannot be read ({type(error).__name__}: {error}). {_RESUME_HINT}", error)


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    The checked content of a saved buffer's `metadata.json`.

    Args:
        path (`str` or `os.PathLike`):
            Directory of the buffer.

    Raises:
        ExperienceBufferError: if it is missing, damaged, or written by a newer version.
    """
    directory = Path(path)
    if not directory.is_dir():
        _fail(
            directory,
            "does not exist. Check the path; to go on with an empty one: "
            f"ExperienceBuffer().save({str(directory)!r}).",
        )
    file = directory / METADATA_FILE
    if not file.is_file():
        _fail(directory, f"has no {METADATA_FILE}. {_RESUME_HINT}")
    try:
        text = file.read_bytes().decode("ascii")
        metadata = json.loads(text)
        schema_version, checksum = metadata["schema_version"], metadata["checksum"]
        is_newer = schema_version > SCHEMA_VERSION
        # The checksum covers every byte of the file but its own digits.
        is_intact = _sha256(text.replace(f'"checksum": "{checksum}"', _NO_CHECKSUM, 1)) == checksum
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        _fail(directory, f"has a damaged {METADATA_FILE} ({type(error).__name__}: {error}). {_RESUME_HINT}", error)
    if is_newer:
        _fail(
            directory,
            f"has schema version {schema_version}, this version of exgrpo-trl reads up to {SCHEMA_VERSION}. Upgrade "
            "exgrpo-trl: pip install --upgrade exgrpo-trl.",
        )
    if not is_intact:
        _fail(directory, f"has a damaged {METADATA_FILE}: its checksum does not match. {_RESUME_HINT}")
    return dict(metadata)


def _write_files(buffer: ExperienceBuffer, directory: Path) -> None:
    # Bucket by bucket, so that every list of question ids comes back in its order.
    questions = [(question_id, bucket) for bucket, ids in buffer.buckets().items() for question_id in ids]
    with _writer(directory / QUESTIONS_FILE, QUESTION_SCHEMA) as file:
        for start in range(0, len(questions), ROWS_PER_BATCH):
            ids, buckets = zip(*questions[start : start + ROWS_PER_BATCH], strict=True)
            examples = [encode_example(buffer.question(question_id).example) for question_id in ids]
            file.write_batch(pa.record_batch([ids, examples, buckets], schema=QUESTION_SCHEMA))

    ranks = {experience: rank for rank, (experience, _) in enumerate(buffer._versions)}
    rows = (
        ((row, ranks[experience]), experience)
        for row, (question_id, _) in enumerate(questions)
        for experience in buffer.completions(question_id)
    )
    # Split by byte, log-probabilities compress better and several times faster.
    encoding = {"behavior_per_token_logps.list.element": "BYTE_STREAM_SPLIT"}
    with _writer(directory / COMPLETIONS_FILE, COMPLETION_SCHEMA, column_encoding=encoding) as file:
        for keys, experiences in in_batches(rows):
            columns = [pa.array(values, pa.int64()) for values in zip(*keys, strict=True)]
            file.write_batch(pa.record_batch(columns + experiences_to_arrays(experiences), schema=COMPLETION_SCHEMA))

    with _writer(directory / RETIRED_FILE, RETIRED_SCHEMA) as file:
        file.write_batch(pa.record_batch([pa.array(list(buffer.retired), pa.string())], schema=RETIRED_SCHEMA))

    (directory / METADATA_FILE).write_text(_metadata_text(buffer, directory), encoding="ascii")
    for name in (*DATA_FILES, METADATA_FILE):
        _sync(directory / name)


def _writer(file: Path, schema: pa.Schema, **kwargs: Any) -> pq.ParquetWriter:
    options = {"compression": "zstd", "compression_level": 1, "use_dictionary": False, "write_statistics": False}
    return pq.ParquetWriter(file, schema, **options, **kwargs)


def _metadata_text(buffer: ExperienceBuffer, directory: Path) -> str:
    if not isinstance(buffer.rng.bit_generator, np.random.PCG64):
        raise TypeError(
            f"`rng` of an experience buffer must use PCG64 to be saved, got {type(buffer.rng.bit_generator).__name__}."
        )
    metadata = {
        "checksum": "",
        "schema_version": SCHEMA_VERSION,
        "package_version": _package_version(),
        "files": {name: {"bytes": size, "sha256": digest} for name, size, digest in _digests(directory)},
        "counts": {
            "questions": buffer.num_questions,
            "completions": buffer.num_completions,
            "tokens": buffer.num_tokens,
            "retired": len(buffer.retired),
            "evicted": buffer.num_evicted,
            "duplicates": buffer.num_duplicates,
        },
        "settings": {
            "group_size": buffer.group_size,
            "capacity": buffer.capacity,
            "max_completions_per_question": buffer.max_completions_per_question,
            "retire_solved": buffer.retire_solved,
        },
        "rng": buffer.rng.bit_generator.state,
        "provenance": buffer.provenance,
        "replay_state": buffer.replay_state,
    }
    text = json.dumps(metadata, indent=2)
    return text.replace(_NO_CHECKSUM, f'"checksum": "{_sha256(text)}"', 1)


def _read_files(directory: Path, buffer_class: type[Buffer]) -> Buffer:
    metadata = read_metadata(directory)
    for name in DATA_FILES:
        if not (directory / name).is_file():
            _fail(directory, f"has no {name}. {_RESUME_HINT}")
    for name, size, digest in _digests(directory):
        expected = metadata["files"][name]
        if size != expected["bytes"]:
            _fail(directory, f"is damaged: {name} has {size} bytes instead of {expected['bytes']}. {_RESUME_HINT}")
        if digest != expected["sha256"]:
            _fail(directory, f"is damaged: the checksum of {name} does not match. {_RESUME_HINT}")

    buffer = buffer_class(**metadata["settings"])
    buffer.rng.bit_generator.state = metadata["rng"]
    buffer.provenance, buffer.replay_state = metadata["provenance"], metadata["replay_state"]
    counts = metadata["counts"]
    buffer.num_evicted, buffer.num_duplicates = counts["evicted"], counts["duplicates"]

    questions = [
        (Question(row["question_id"], decode_example(row["example"])), row["bucket"])
        for batch in _row_groups(directory / QUESTIONS_FILE, QUESTION_SCHEMA)
        for row in batch.to_pylist()
    ]
    completions: list[list[Experience]] = [[] for _ in questions]
    by_age: list[tuple[Experience, str] | None] = [None] * counts["completions"]
    for batch in _row_groups(directory / COMPLETIONS_FILE, COMPLETION_SCHEMA):
        rows, ranks = batch.column("question").to_pylist(), batch.column("age_rank").to_pylist()
        for row, rank, experience in zip(rows, ranks, experiences_from_table(batch), strict=True):
            completions[row].append(experience)
            by_age[rank] = (experience, questions[row][0].question_id)
    retired = [
        question_id
        for batch in _row_groups(directory / RETIRED_FILE, RETIRED_SCHEMA)
        for question_id in batch.column("question_id").to_pylist()
    ]
    buffer._restore(
        [(question, bucket, stored) for (question, bucket), stored in zip(questions, completions, strict=True)],
        [owned for owned in by_age if owned is not None],
        retired,
    )
    is_valid, reason = buffer.check_valid()
    if is_valid and any(buffer.metrics()[name] != count for name, count in counts.items()):
        is_valid, reason = False, f"it should have {counts} and has {buffer.metrics()}"
    if not is_valid:
        _fail(directory, f"contradicts itself: {reason}. {_RESUME_HINT}")
    return buffer


def _row_groups(file: Path, schema: pa.Schema) -> Iterator[pa.Table]:
    with pq.ParquetFile(file) as parquet:
        if not parquet.schema_arrow.equals(schema):
            raise ValueError(f"{file.name} has the columns {parquet.schema_arrow.names}, expected {schema.names}")
        for index in range(parquet.num_row_groups):
            yield parquet.read_row_group(index, use_threads=False)


def _digests(directory: Path) -> Iterator[tuple[str, int, str]]:
    """Name, size in bytes and SHA-256 of each data file."""
    for name in DATA_FILES:
        digest, size = hashlib.sha256(), 0
        with open(directory / name, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
                size += len(block)
        yield name, size, digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _package_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("exgrpo-trl")
    except PackageNotFoundError:
        return None


def _resolved(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


def _hidden_names(target: Path) -> tuple[Path, Path]:
    """Where a buffer is written, and where the one that it replaces waits."""
    return target.with_name(f".{target.name}.saving"), target.with_name(f".{target.name}.replaced")


def _refuse_foreign(target: Path) -> None:
    if not target.exists():
        return
    foreign = (
        target.name
        if not target.is_dir()
        else next((entry for entry in sorted(os.listdir(target)) if entry not in (*DATA_FILES, METADATA_FILE)), None)
    )
    if foreign is not None:
        _fail(target, f"cannot be saved there: {foreign} is not part of one. Choose another path.")


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a directory.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fail(path: Path, what: str, cause: BaseException | None = None) -> NoReturn:
    raise ExperienceBufferError(f"The experience buffer at {path} {what}") from cause
