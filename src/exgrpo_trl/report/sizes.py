"""How large the buffers of the checkpoints of a run are, without loading them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ..buffer.locations import BUFFER_FOLDER, checkpoints_of, is_complete
from ..buffer.metadata import QUESTIONS_FILE, read_metadata
from ..buffer.parquet_layout import layout_of
from ..records import ExperienceBufferError

# Of the questions of a buffer: far more than anybody trains on.
_MOST_BYTES = 2**33


class Sizes(NamedTuple):
    """A checkpoint: its counts as in `metadata.json`, and how many questions are in which bucket."""

    step: int
    counts: Mapping[str, int]
    buckets: Mapping[int, int]


def sizes_of(run: Path, last: int | None = None) -> tuple[list[Sizes], list[str]]:
    """
    Sizes of the buffers in the complete checkpoints of a run, by step, and what to say of those that have none.

    Checksums of the data files are not looked at: only the buffer that is loaded is read as a whole.

    Args:
        run (`Path`):
            `output_dir` of the run.
        last (`int`, *optional*):
            The last step to look at.
    """
    found, notes = [], []
    for step, checkpoint in checkpoints_of(run).items():
        folder = checkpoint / BUFFER_FOLDER
        if (last is not None and step > last) or not folder.is_dir() or not is_complete(checkpoint):
            continue
        try:
            metadata = read_metadata(folder)
            found.append(Sizes(step, metadata["counts"], _buckets_of(folder / QUESTIONS_FILE)))
        except (ExperienceBufferError, OSError, ValueError, TypeError, pa.ArrowException) as error:
            if folder.is_dir():  # else it was removed meanwhile
                notes.append(f"{checkpoint.name} is left out of the plots ({type(error).__name__}: {error}).")
    return found, notes


def _buckets_of(file: Path) -> Mapping[int, int]:
    num_bytes = layout_of(file).num_bytes
    if num_bytes > _MOST_BYTES:
        raise ValueError(f"{file} declares {num_bytes:,} bytes")
    with pq.ParquetFile(file) as questions:
        table = questions.read(columns=["bucket"], use_threads=False)
    return Counter(bucket for bucket in table.column("bucket").to_pylist() if bucket is not None)
