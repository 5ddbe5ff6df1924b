"""`exgrpo-trl export`: the completions of a saved experience buffer as a Parquet or JSONL file, with their text."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..images import images_in, map_images
from ..inspection.opened import Row, opened, rows_of
from ..inspection.output import jsonable, refuse_existing, whole_file
from ..inspection.readable import readable
from ..inspection.text import Decoder, find_decoder, prompt_of
from ..records import ExperienceBufferError
from .arguments import add_output
from .filters import add_filters, facts_of, take_matching

if TYPE_CHECKING:
    from datasets import Dataset

HELP = "the completions of a saved buffer as a Parquet or JSONL file"
_SUFFIXES = (".parquet", ".jsonl")
_ROWS_AT_ONCE = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the command."""
    parser.add_argument("path", type=Path, help="directory of a buffer, of a checkpoint or of a run")
    add_output(parser, f"file to write, of the format that its name ends with: {' or '.join(_SUFFIXES)}")
    add_filters(parser, "completions such as this alone")


def run(arguments: argparse.Namespace) -> None:
    """Write the file, and say what is in it."""
    output, suffix = arguments.output, arguments.output.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ExperienceBufferError(
            f"The name of the file {output} must end in {' or '.join(_SUFFIXES)}, which tells its format."
        )
    if output.is_dir():
        raise ExperienceBufferError(f"{output} is a directory. Name a file, for example {output / 'export.parquet'}.")
    refuse_existing(output, force=arguments.force)
    found = opened(arguments.path)
    decoder, note = find_decoder(found, arguments.tokenizer)
    buffer = found.buffer
    if arguments.filters:
        buffer = take_matching(buffer, arguments.filters, facts_of(found, decoder))
    rows, dataset = list(rows_of(buffer)), buffer.to_dataset()
    with whole_file(output) as file:
        if suffix == ".jsonl":
            _write_jsonl(dataset, rows, decoder, file)
        else:
            _write_parquet(dataset, rows, decoder, file)
    lines = [
        f"Wrote {output}: {len(rows):,} completions of {buffer.num_questions:,} questions of {found.directory}",
        note if decoder is not None else f"Without the text of completions. {note}",
    ]
    sys.stdout.write(readable("".join(f"{line}\n" for line in lines)))


def _write_parquet(dataset: Dataset, rows: Sequence[Row], decoder: Decoder | None, file: Path) -> None:
    """Write what a dataset holds, and text, so that `datasets` knows its images and messages again."""
    import datasets
    import pyarrow as pa

    datasets.disable_progress_bars()
    table = dataset.with_format("arrow")[:]
    features = datasets.Features(dataset.features)
    prompts = [
        prompt if prompt is None or isinstance(prompt, str) else json.dumps(prompt) for prompt in map(_prompt, rows)
    ]
    for name, texts in (("prompt", prompts), ("completion", _completions(rows, decoder))):
        if texts is not None:
            table = table.append_column(name, pa.array(texts, pa.large_string()))
            features[name] = datasets.Value("large_string")
    table = table.replace_schema_metadata(features.arrow_schema.metadata)
    datasets.Dataset(table).to_parquet(file)


def _write_jsonl(dataset: Dataset, rows: Sequence[Row], decoder: Decoder | None, file: Path) -> None:
    """Write an object in every line: what a dataset holds, the bytes of images aside, and text."""
    columns = [name for name in dataset.column_names if name != "images"]
    stored = dataset.select_columns(columns).with_format("arrow")
    with file.open("w", encoding="ascii") as lines:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            values = stored[start : start + _ROWS_AT_ONCE].to_pylist()
            texts = [{"prompt": _prompt(row)} for row in some]
            for text, completion in zip(texts, _completions(some, decoder) or (), strict=decoder is not None):
                text["completion"] = completion
            for text, value in zip(texts, values, strict=True):
                if isinstance(value.get("messages"), str):
                    value["messages"] = json.loads(value["messages"])
                lines.write(json.dumps(jsonable(text | value)) + "\n")


def _completions(rows: Sequence[Row], decoder: Decoder | None) -> list[str] | None:
    """Text of completions; `None` without a tokenizer."""
    return None if decoder is None else decoder.texts(row.experience.token_ids.tolist() for row in rows)


def _prompt(row: Row) -> Any:
    """The prompt, text or messages, with the positions of its images in the column `images`."""
    details = row.experience.details
    images = [*images_in(row.question.example), *(details.images if details is not None else ())]
    positions = {image.digest: position for position, image in reversed(list(enumerate(images)))}
    prompt = prompt_of(row.question.example, row.experience)
    return jsonable(map_images(prompt, lambda image: positions[image.digest]))
