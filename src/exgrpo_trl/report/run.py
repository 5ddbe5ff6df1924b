"""All that a report reads of a run: its newest buffer, the log lines, the log of replays, the sizes of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..buffer.locations import BUFFER_FOLDER, TRAINER_STATE_FILE, checkpoints_of, find_buffer, is_complete, resolved
from ..inspection.opened import Opened, opened
from ..inspection.text import Decoder, find_decoder
from ..records import ExperienceBufferError
from ..replay_log import find_replay_log, number_of, parts_of, read_replay_log
from .history import History, Series, newest_history
from .sizes import Sizes, sizes_of

_TRIES = 3
_BUCKET = "replay/bucket_"


@dataclass
class Run:
    """
    What is known of a run.

    Attributes:
        path (`Path`):
            What was asked for.
        buffer ([`Opened`], *optional*):
            The newest buffer; `None` where none was saved yet.
        decoder ([`Decoder`], *optional*):
            What makes text of its tokens.
        text_note (`str`):
            What to say of that.
        history ([`History`]):
            Log lines, perhaps none.
        log (`pyarrow.Table`, *optional*):
            The log of replays, up to the step of the checkpoint that was asked for.
        log_note (`str`):
            Why there is none.
        is_log_whole (`bool`):
            Whether the log has all replays: its oldest rows go when it grows too large.
        sizes (`list[Sizes]`):
            Of its checkpoints.
        notes (`list[str]`):
            What could not be read, and why.
    """

    path: Path
    buffer: Opened | None = None
    decoder: Decoder | None = None
    text_note: str = ""
    history: History = field(default_factory=History)
    log: pa.Table | None = None
    log_note: str = "There is no replay log: the run was trained with replay_log=False, or it was not copied."
    is_log_whole: bool = True
    sizes: list[Sizes] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of its directory."""
        return resolved(self.path).name

    @cached_property
    def replays(self) -> pa.Table:
        """The log of replays, without rows where there is none."""
        return self.log if self.log is not None else pa.table({})

    def replay_column(self, name: str) -> np.ndarray:
        """A column of numbers of the log of replays as floats, NaN for null; empty without a log."""
        if self.log is None:
            return np.zeros(0)
        return np.asarray(pc.cast(self.log.column(name), pa.float64(), safe=False).to_numpy(), dtype=np.float64)

    @property
    def last_step(self) -> int:
        """The newest step that anything is known of."""
        of_checkpoint = max((sizes.step for sizes in self.sizes), default=0)
        of_log = int(self.replay_column("last_step").max(initial=0))
        return max(self.history.step, of_checkpoint, of_log)

    def sizes_series(self, metric: str, count: str) -> Series:
        """A size of the buffer: as it was logged, else as checkpoints have it."""
        logged = self.history.series(metric)
        if len(logged):
            return logged
        steps = [sizes.step for sizes in self.sizes]
        return Series(np.array(steps, np.int64), np.array([sizes.counts[count] for sizes in self.sizes], np.float64))

    def buckets(self) -> tuple[np.ndarray, dict[int, np.ndarray]]:
        """Steps, and questions at these steps by bucket: as logged, else as checkpoints have them."""
        names = [name for name in self.history.names if name.startswith(_BUCKET) and name[len(_BUCKET) :].isdecimal()]
        if names:
            by_bucket = {int(name[len(_BUCKET) :]): self.history.series(name) for name in names}
            steps = np.unique(np.concatenate([series.steps for series in by_bucket.values()]))
            filled = {}
            for bucket, series in sorted(by_bucket.items()):
                filled[bucket] = np.zeros(len(steps))  # a bucket at the end is logged while it is not empty
                filled[bucket][np.searchsorted(steps, series.steps)] = series.values
            return steps, filled
        found = sorted({bucket for sizes in self.sizes for bucket in sizes.buckets})
        of_checkpoints = {bucket: np.array([float(s.buckets.get(bucket, 0)) for s in self.sizes]) for bucket in found}
        return np.array([sizes.step for sizes in self.sizes], np.int64), of_checkpoints


def read_run(path: Path, tokenizer: Path | None = None) -> Run:
    """
    Read what there is.

    Args:
        path (`Path`):
            Directory of a run, of a checkpoint, or of a buffer. Of a checkpoint, nothing later is looked at.
        tokenizer (`Path`, *optional*):
            A `tokenizer.json`, or a directory with one. By default that of the checkpoint.

    Raises:
        ExperienceBufferError: if there is nothing, or it is damaged.
    """
    run = Run(path)
    checkpoint, output_dir = _places(path)
    last = next((step for step, at in checkpoints_of(output_dir).items() if at == checkpoint), None)
    if checkpoint is not None:
        run.history = newest_history([checkpoint / TRAINER_STATE_FILE])
    elif output_dir == resolved(path):
        complete = [folder for folder in checkpoints_of(output_dir).values() if is_complete(folder)]
        run.history = newest_history([folder / TRAINER_STATE_FILE for folder in (output_dir, *complete[-1:])])
    _read_log(run, output_dir, last)
    if checkpoint is not None or output_dir == resolved(path):
        run.sizes, notes = sizes_of(output_dir, last)
        run.notes += notes
    try:
        run.buffer = _opened(path)
    except ExperienceBufferError as error:
        if not run.history.num_lines and run.log is None:
            raise
        if _has_buffer(path):
            raise
        run.notes.append(f"No buffer: {error}")
    if run.buffer is not None:
        run.decoder, run.text_note = find_decoder(run.buffer, tokenizer)
    return run


def _places(path: Path) -> tuple[Path | None, Path]:
    """The checkpoint that was asked for, if it was one, and the directory of its run."""
    at = resolved(path)
    if at.name == BUFFER_FOLDER and (at.parent / TRAINER_STATE_FILE).is_file():
        at = at.parent
    if at in checkpoints_of(at.parent).values():
        return at, at.parent
    return None, at


def _has_buffer(path: Path) -> bool:
    try:
        find_buffer(path)
    except ExperienceBufferError:
        return False
    return True


def _opened(path: Path) -> Opened:
    """The newest buffer; a run that goes on may remove the checkpoint that was found."""
    for _ in range(_TRIES):
        directory = find_buffer(path)
        try:
            return opened(path)
        except (ExperienceBufferError, OSError):
            if directory.exists():
                raise
    return opened(path)


def _read_log(run: Run, output_dir: Path, last: int | None) -> None:
    try:
        folder = find_replay_log(output_dir)
    except ExperienceBufferError:
        return
    try:
        log = read_replay_log(folder)
    except ExperienceBufferError as error:
        run.log_note = str(error)
        return
    run.is_log_whole = all(number_of(part) == 0 for part in parts_of(folder)[:1])
    run.log = log if last is None else log.filter(pc.less_equal(log.column("step"), last))
