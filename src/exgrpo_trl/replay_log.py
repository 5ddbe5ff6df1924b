"""The log of replays beside a run: which stored completions which step replayed, and why. Parquet files, bounded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from .buffer.locations import checkpoints_of, resolved
from .buffer.parquet_layout import layout_of
from .records import ExperienceBufferError

LOG_FOLDER = "replay_log"
# Where the log of an earlier run in the same directory goes.
PREVIOUS_FOLDER = "replay_log.previous"

# A row for every stored completion of a batch that was trained. Nats; NaN and null where something is not known.
LOG_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),  # first step that trains the batch, as TRL's log lines count: the first one is 1
        ("last_step", pa.int64()),  # the last one: another with `num_iterations` or `steps_per_generation`
        ("batch", pa.int64()),  # which of the batches that begin with that step, from 0
        ("policy_version", pa.int64()),  # of the policy that generated the batch
        ("row", pa.int64()),
        ("group_size", pa.int64()),
        ("question_id", pa.string()),
        ("bucket", pa.int64()),  # of the question when it was drawn
        ("num_tokens", pa.int64()),
        ("reward", pa.float64()),  # as it was stored
        ("age", pa.int64()),  # optimizer steps since it was generated
        ("num_replays", pa.int64()),  # before this one
        ("is_fill", pa.bool_()),  # whether it took the place of a failure (`fill_failed_groups`)
        # What it was chosen by, and the policy version that this dates from; null where it was not scored.
        ("entropy", pa.float32()),
        ("negative_log_likelihood", pa.float32()),
        ("scored_at", pa.int64()),
        # What it was chosen from besides: empty where there was no choice.
        ("competitor_ages", pa.list_(pa.int64())),
        ("competitor_entropies", pa.list_(pa.float32())),
        ("competitor_negative_log_likelihoods", pa.list_(pa.float32())),
        # Of its first training forward, over the tokens that the model wrote; null where none had trained it.
        ("mean_log_ratio", pa.float32()),
        ("drift", pa.float32()),  # mean absolute log ratio
        ("evicted", pa.string()),  # why it left the buffer after this replay; null where it did not
    ]
)
_NEVER_NULL = (
    "step", "last_step", "batch", "policy_version", "row", "group_size", "question_id", "num_tokens", "age", "is_fill",
    "competitor_ages", "competitor_entropies", "competitor_negative_log_likelihoods",
)  # fmt: skip
FLUSH_SECONDS = 10.0
_PART = re.compile(r"part-(\d{5,})\.parquet")
_TRIES = 5
# In memory: far more than a part has.
_MOST_BYTES_OF_A_PART = 2**28


def read_replay_log(path: str | os.PathLike[str]) -> pa.Table:
    """
    The log of replays of a run, oldest first; also while the run goes on.

    Args:
        path (`str` or `os.PathLike`):
            Directory of the run, of a checkpoint in it, or of the log itself.

    Returns:
        `pyarrow.Table`:
            A row for every replayed completion, columns as in `LOG_SCHEMA`.

    Raises:
        ExperienceBufferError: if there is no log, or a file of it is damaged.
    """
    for _ in range(_TRIES):
        try:
            tables = [read_part(part) for part in parts_of(find_replay_log(path))]
        except FileNotFoundError:
            continue  # the oldest part was removed meanwhile
        if tables:
            return pa.concat_tables(tables)
    _fail(Path(path), "changes faster than it can be read. Try again.")


def find_replay_log(path: str | os.PathLike[str]) -> Path:
    """
    Directory of the log of a run, of the run of a checkpoint, or the path itself.

    Raises:
        ExperienceBufferError: if there is none.
    """
    path = Path(path)
    if not path.exists():
        _fail(path, "cannot be found: the path does not exist. Give the output_dir of a run, or a checkpoint in it.")
    if not path.is_dir():
        _fail(path, "cannot be found: the path is a file. Give the output_dir of a run, or a checkpoint in it.")
    looked_at = [path / LOG_FOLDER]
    run = resolved(path).parent
    if resolved(path) in checkpoints_of(run).values():
        looked_at.append(run / LOG_FOLDER)
    for folder in (path, *looked_at):
        if parts_of(folder):
            return folder
    _fail(
        path,
        f"cannot be found: {' and '.join(map(str, looked_at))} {'has' if len(looked_at) == 1 else 'have'} no parts. "
        "This is no run, or it was trained with replay_log=False, or nothing was replayed yet. Give the output_dir of "
        f"a run with replay_log=True; a run that goes on writes every {FLUSH_SECONDS:g} seconds.",
    )


def parts_of(folder: Path) -> list[Path]:
    """Parts of a log, oldest first."""
    return sorted((path for path in folder.glob("part-*") if _PART.fullmatch(path.name)), key=number_of)


def number_of(part: Path) -> int:
    """Number of a part, by its name."""
    return int(part.stem.removeprefix("part-"))


def read_part(part: Path) -> pa.Table:
    """
    Rows of a part.

    Raises:
        ExperienceBufferError: if it is damaged.
        FileNotFoundError: if it is gone.
    """
    try:
        num_bytes = layout_of(part).num_bytes
        if num_bytes > _MOST_BYTES_OF_A_PART:
            raise ValueError(f"it declares {num_bytes:,} bytes")
        with pq.ParquetFile(part) as file:
            if not file.schema_arrow.equals(LOG_SCHEMA):
                raise ValueError(f"it has the columns {file.schema_arrow.names}, expected {LOG_SCHEMA.names}")
            table = file.read(use_threads=False)
        table.validate(full=True)
        nulls = [name for name in _NEVER_NULL if table.column(name).null_count]
        if nulls:
            raise ValueError(f"null in {nulls[0]}")
        return table
    except FileNotFoundError:
        raise
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise ExperienceBufferError(
            f"The replay log cannot be read: {part} is damaged, or of another version of exgrpo-trl "
            f"({type(error).__name__}: {error}). Move this file away to read the others."
        ) from error


def _fail(path: Path, what: str) -> NoReturn:
    raise ExperienceBufferError(f"The replay log of {path} {what}")
