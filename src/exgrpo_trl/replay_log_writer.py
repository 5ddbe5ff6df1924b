"""Writes the log of replays while a run trains: bounded, and whole whenever somebody reads it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .buffer.disk import sync
from .records import ExperienceBufferError
from .replay_log import FLUSH_SECONDS, LOG_FOLDER, LOG_SCHEMA, PREVIOUS_FOLDER, number_of, parts_of, read_part

# Split by byte, floats compress better.
_FLOATS = (
    "entropy", "negative_log_likelihood", "competitor_entropies.list.element",
    "competitor_negative_log_likelihoods.list.element", "mean_log_ratio", "drift",
)  # fmt: skip
# A part is written again until it holds as many completions and competitors. Then the next one begins.
PART_SIZE = 4096
MAX_PARTS = 256


def write_part(rows: pa.Table, file: Path) -> None:
    """Write a part of a log."""
    pq.write_table(
        rows,
        file,
        compression="zstd",
        compression_level=3,
        use_dictionary=False,
        column_encoding=dict.fromkeys(_FLOATS, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
    )


class ReplayLog:
    """
    Writes the log of a run, on the main process. Training never fails by it: what goes wrong is said once.

    Rows wait in memory, for at most `FLUSH_SECONDS` of training.

    Args:
        output_dir (`str`):
            Directory of the run.
        is_on (`bool`):
            Whether anything is written.
        warn (`Callable[[str], Any]`):
            Says something to the user.
    """

    def __init__(self, output_dir: str, *, is_on: bool, warn: Callable[[str], Any]) -> None:
        self.folder: Path = Path(output_dir) / LOG_FOLDER
        self.is_on: bool = is_on
        self._warn = warn
        self._flushed_at = time.monotonic()
        self._last: list[Any] | None = None  # what identifies the last row
        self._batch = 0, 0  # the last one: its step, and which of that step
        self._rows: list[Mapping[str, Any]] = []  # not written yet
        self._start_part([], 0)

    def _start_part(self, written: Sequence[pa.Table], number: int) -> None:
        self._part, self._number = list(written), number
        self._size = sum(map(_size_of, self._part))

    def begin(self, global_step: int) -> None:
        """
        Go on with the log of a run that is resumed after that step, or begin a new one; before the first batch.

        What a run wrote after the checkpoint that it is resumed from is dropped. The log of another run in the same
        directory is moved away: the state of the checkpoint, loaded before, tells whether it is another.
        """
        self.flush()
        expected, self._last = self._last if global_step else None, None
        self._start_part([], 0)
        self._batch = 0, 0
        if not self.is_on or not (parts := parts_of(self.folder)):
            return
        with self._forgiving():
            number, kept = 0, None
            try:
                number, kept = _until(parts, global_step) if global_step else (0, None)
            except ExperienceBufferError as error:
                self._warn(str(error))
            if kept is None or _identity(kept.slice(len(kept) - 1).to_pylist()[0]) != expected:
                self._move_away(parts, global_step)
                return
            self._last = expected
            self._start_part([kept], number_of(parts[number]))
            self._write()
            for part in parts[number + 1 :]:
                part.unlink()

    def _move_away(self, parts: Sequence[Path], global_step: int) -> None:
        previous = self.folder.with_name(PREVIOUS_FOLDER)
        previous.mkdir(exist_ok=True)
        for part in parts_of(previous):
            part.unlink()
        for part in parts:
            os.replace(part, previous / part.name)
        what = "of the run that this one is resumed from" if global_step else "of this run"
        self._warn(
            f"{self.folder} held the log of another run. It is in {previous} now, in the place of any that was there; "
            f"the log {what} begins after step {global_step}."
        )

    def add(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """
        Take the replays of a batch, if any.

        Args:
            step (`int`):
                First step that trains the batch.
            rows (`Sequence[Mapping[str, Any]]`):
                Columns of the log but `step` and `batch`.
        """
        self._batch = step, self._batch[1] + 1 if self._batch[0] == step else 0
        if not self.is_on or not rows:
            return
        self._rows += [{"step": step, "batch": self._batch[1], **row} for row in rows]
        self._last = _identity(self._rows[-1])
        if time.monotonic() - self._flushed_at >= FLUSH_SECONDS or len(self._rows) >= PART_SIZE:
            self.flush()

    def flush(self, *, is_durable: bool = False) -> None:
        """Write what waits; `is_durable` lets the disk take it, too."""
        self._flushed_at = time.monotonic()
        if not self.is_on or not self._rows:
            return
        with self._forgiving():
            self._part.append(pa.Table.from_pylist(self._rows, schema=LOG_SCHEMA))
            self._size += _size_of(self._part[-1])
            self._rows = []
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(is_durable)
            if self._size >= PART_SIZE:
                self._start_part([], self._number + 1)
                for part in parts_of(self.folder)[: 1 - MAX_PARTS]:  # the next one counts, too
                    part.unlink()

    def _write(self, is_durable: bool = False) -> None:
        # Under a name that is no part: whoever reads meanwhile sees the part before or after, and none is ever torn.
        temporary = self.folder / ".part.writing"
        write_part(pa.concat_tables(self._part), temporary)
        if is_durable:
            sync(temporary)
        os.replace(temporary, self.folder / f"part-{self._number:05d}.parquet")

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            self.is_on, self._rows, self._part = False, [], []
            self._warn(
                f"The replay log {self.folder} cannot be written ({type(error).__name__}: {error}). The training goes "
                "on without: exgrpo-trl why will not know of the steps from here on. Make room or give another "
                "output_dir to have one, or set replay_log=False."
            )

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold to know its log again; survives JSON."""
        return {"last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, or nothing where there was no log."""
        self._last = state.get("last")


def _size_of(rows: pa.Table) -> int:
    """Completions and competitors in a table."""
    return len(rows) + int(pc.sum(pc.list_value_length(rows.column("competitor_ages"))).as_py() or 0)


def _identity(row: Mapping[str, Any]) -> list[Any]:
    """What tells a row from one of another run; nothing that rounding changes, which differs between machines."""
    return [row[name] for name in ("step", "batch", "row", "question_id", "num_tokens", "age", "num_replays")]


def _until(parts: Sequence[Path], step: int) -> tuple[int, pa.Table | None]:
    """Index of the last part with rows of steps up to that one, and these rows; `None` where there is none."""
    for number in range(len(parts) - 1, -1, -1):
        rows = read_part(parts[number])
        kept = rows.filter(pc.less_equal(rows.column("step"), step))
        if len(kept):
            # A batch that a checkpoint has cut off is generated anew.
            last = pc.min_element_wise(kept.column("last_step"), pa.scalar(step))
            return number, kept.set_column(kept.schema.get_field_index("last_step"), "last_step", last)
    return 0, None
