"""Saved buffers and datasets as a stranger may hand them over: malformed on purpose, with checksums that match."""

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hostile_values import hostile_column, hostile_text, json_literal
from PIL import Image
from rewriting import LAYOUT, sealed

from exgrpo_trl import Experience, ExperienceBuffer, Question, Reuse, RolloutDetails, StoredImage

K = 4
DATA_FILES = ("questions.parquet", "completions.parquet", "retired.parquet", "images.parquet")


@functools.cache
def picture(seed):
    return StoredImage.of(Image.new("L", (1, 1), seed))


def collected(unit, *, details):
    """A small buffer with everything that can be in one."""
    buffer = ExperienceBuffer(seed=3, unit=unit, capacity=500)
    for number in range(6):
        shown = [picture(number % 3)] if details else []
        prompt = [{"role": "user", "content": [f"ü {number}", *shown]}]
        group = [
            Experience.create(
                [number, index, 7],
                [-0.5, -0.25, 0.0],
                policy_version=number // 2,
                reward=float(index),
                entropy=math.nan if index else 0.5,
                prompt_hash=number,
                details=RolloutDetails.create(
                    is_model=[1, 0, 1],
                    messages=[{"role": "tool", "content": shown}],
                    fields={"score": (1, b"2", 1j)},
                    prompt_ids=[1, 2],
                    rewards={"correct": 1.0, "other": None},
                )
                if details and index < 2
                else None,
                is_scored=index == 1,
            )
            for index in range(K)
        ]
        question = Question(f"q{number}", {"prompt": prompt, "answer": {1, 2}, "when": (number, None)})
        buffer.collect(question, group if unit == "group" else group[:2], num_correct=2, group_size=K)
        buffer.note_reuse(f"q{number}", group[0], Reuse(number, 0.5, math.nan, number))
    buffer.retire("done")
    buffer.evict(*buffer.oldest())
    buffer.provenance = {"tokenizer": "ü", "temperature": 0.7, "tools": {"names": ["search"]}}
    buffer.replay_state = {"replayer": {"is_started": True, "seen": [1, None]}}
    return buffer


@functools.cache
def bases():
    """Content of the files of buffers that nobody has touched: by unit and with details or not."""
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for unit in ("completion", "group"):
            for details in (False, True):
                path = Path(folder) / f"{unit}-{details}"
                collected(unit, details=details).save(path)
                found.append({name: (path / name).read_bytes() for name in (*DATA_FILES, "metadata.json")})
    return found


@functools.cache
def base_tables():
    """Datasets of such buffers, as Arrow tables."""
    kinds = [("completion", False), ("completion", True), ("group", True)]
    return [(unit, collected(unit, details=details).to_dataset().data.table) for unit, details in kinds]


def hostile_buffer(chance, path):
    """
    Write a buffer with something wrong in it.

    Args:
        chance (`random.Random`):
            Decides what.
        path (`Path`):
            Directory to write; replaced.

    Returns:
        `str`: what is wrong.
    """
    files = dict(chance.choice(bases()))
    about = json.loads(files.pop("metadata.json"))
    literals = {}
    changes = []
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        change = chance.choice(
            [change_metadata, change_metadata, change_table, change_table, change_text, change_bytes]
        )
        changes.append(change(chance, files, about, literals))
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
        declared = about.get("files")
        if isinstance(declared, dict) and isinstance(declared.get(name), dict):
            declared[name] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    text = json.dumps(about | {"checksum": ""} if isinstance(about, dict) else about, indent=2)
    for placeholder, literal in literals.items():
        text = text.replace(f'"{placeholder}"', literal)
    (path / "metadata.json").write_text(sealed(text), encoding="utf-8")
    if chance.random() < 0.03:
        changes.append(change_folder(chance, path))
    return "; ".join(changes)


def change_metadata(chance, files, about, literals):
    """Put something else in the place of a value, take it away, or add one."""
    owner, keys = about, []
    while isinstance(owner, dict | list) and owner:
        key = chance.choice(sorted(owner) if isinstance(owner, dict) else range(len(owner)))
        keys.append(key)
        if not isinstance(owner[key], dict | list) or not owner[key] or chance.random() < 0.25:
            break
        owner = owner[key]
    if keys and keys[-1] == "checksum":
        return "nothing"
    roll = chance.random()
    if not keys:
        return "nothing"
    if roll < 0.1:
        del owner[keys[-1]]
        return f"metadata without {keys}"
    placeholder = f"placeholder {len(literals)}"
    literals[placeholder] = literal = json_literal(chance)
    if roll < 0.2 and isinstance(owner, dict):
        owner[chance.choice(["../../outside", "/etc/passwd", "\ud800", "seed", "self", "unit", ""])] = placeholder
        return f"metadata with {literal[:40]} beside {keys}"
    if roll < 0.25 and isinstance(owner, dict):
        literals[placeholder] = f'{json.dumps(owner[keys[-1]])}, "{keys[-1]}": {literal}'
    owner[keys[-1]] = placeholder
    return f"metadata {keys}={literal[:40]}"


def read(content):
    return pq.read_table(io.BytesIO(content))


def written(chance, table):
    """A Parquet file; sometimes in a layout that no buffer has."""
    options = dict(LAYOUT)
    if chance.random() < 0.2:
        options |= chance.choice(
            [
                {"compression": "gzip"},
                {"compression": "snappy"},
                {"compression": "none"},
                {"compression": "brotli"},
                {"use_dictionary": True},
                {"data_page_version": "2.0"},
                {"version": "1.0"},
                {"row_group_size": 2},
                {"data_page_size": 8},
                {"write_statistics": True},
                {"write_page_index": True},
                {"store_schema": False},
                {"use_byte_stream_split": ["reward"] if "reward" in table.column_names else False},
            ]
        )
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def change_table(chance, files, about, literals):
    """Change a column, the rows, or the layout of a data file."""
    name = chance.choice(DATA_FILES)
    if name not in files:
        return "nothing"
    try:
        table, what = changed_table(chance, read(files[name]))
        files[name] = written(chance, table)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        return f"nothing ({error})"[:60]
    return f"{name}: {what}"


def changed_table(chance, table):
    """A table with something wrong in it, and what."""
    roll = chance.random()
    if roll < 0.7 and table.num_columns:
        column = chance.choice(table.column_names)
        before = table.column(column)
        field, values = hostile_column(chance, table.schema.field(column), before.to_pylist())
        what = f"{column} ({field.type})={values!s:.60}"
        return table.set_column(table.column_names.index(column), field, values), what
    if roll < 0.78 and table.num_columns:
        column = chance.choice(table.column_names)
        return table.drop_columns([column]), f"no {column}"
    if roll < 0.83:
        return table.append_column(
            chance.choice(["more", "digest", "\x1b[2J"]), pa.nulls(len(table))
        ), "one column more"
    if roll < 0.87:
        return table.select(chance.sample(table.column_names, table.num_columns)), "another order of columns"
    if roll < 0.91:
        return pa.concat_tables([table, table]), "every row twice"
    if roll < 0.95:
        return table.slice(chance.randrange(len(table) + 1)), "fewer rows"
    return table.take(pa.array([chance.randrange(len(table)) for _ in table.column(0)], pa.int64())), "mixed rows"


def change_text(chance, files, about, literals):
    """Change the JSON text of a question or of details."""
    name, columns = chance.choice(
        [
            ("questions.parquet", ["example"]),
            ("completions.parquet", ["messages", "shown_prompt", "fields", "rewards"]),
        ]
    )
    if name not in files:
        return "nothing"
    try:
        table = read(files[name])
        column = chance.choice(columns)
        values = table.column(column).to_pylist()
        at = chance.randrange(len(values))
        values[at] = hostile_text(chance, values[at])
        changed = pa.array(values, table.schema.field(column).type)
        table = table.set_column(table.column_names.index(column), table.schema.field(column), changed)
        files[name] = written(chance, table)
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        return f"nothing ({error})"[:60]
    return f"{name}: {column}={values[at]!r:.60}"


def change_bytes(chance, files, about, literals):
    """Change bytes of a file: anywhere, or in the footer of Parquet, which declares all sizes."""
    name = chance.choice(DATA_FILES)
    content = bytearray(files.get(name, b""))
    if len(content) < 12:
        return "nothing"
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    start = max(footer, 0) if chance.random() < 0.6 else 0
    roll = chance.random()
    if roll < 0.45:
        for _ in range(chance.choice([1, 1, 2, 8])):
            content[chance.randrange(start, len(content))] = chance.randrange(256)
    elif roll < 0.6:
        content = content[: chance.randrange(len(content))]
    elif roll < 0.7:
        content[-8:-4] = chance.choice(INTEGERS_OF_FOUR_BYTES)
    else:  # a number of many digits in the place of one, the length of the footer put right
        at = chance.randrange(start, len(content) - 8)
        more = bytes([0xFF] * chance.randrange(1, 10) + [chance.randrange(128)])
        content[at : at + 1] = more
        if at >= footer:
            length = len(content) - 8 - footer
            content[-8:-4] = (max(length, 0) % 2**32).to_bytes(4, "little")
    files[name] = bytes(content)
    return f"bytes of {name}"


INTEGERS_OF_FOUR_BYTES = [number.to_bytes(4, "little") for number in (0, 1, 2**31 - 1, 2**31, 2**32 - 1)]


def change_folder(chance, path):
    """Something else in the place of a file."""
    file = path / chance.choice([*DATA_FILES, "metadata.json"])
    file.unlink(missing_ok=True)
    what = chance.choice(["no file", "a folder", "a link to nowhere", "a link to itself", "a link outside", "a pipe"])
    if what == "a folder":
        file.mkdir()
    elif what == "a link to nowhere":
        file.symlink_to("../../nowhere")
    elif what == "a link to itself":
        file.symlink_to(file.name)
    elif what == "a link outside":
        file.symlink_to(os.devnull)
    elif what == "a pipe":
        os.mkfifo(file)
    return f"{what} in the place of {file.name}"


def hostile_table(chance):
    """A table of a dataset of stored completions with something wrong in it: unit, table and what."""
    unit, table = chance.choice(base_tables())
    table = table.replace_schema_metadata(None)
    what = []
    for _ in range(chance.choice([1, 1, 2, 3])):
        if chance.random() < 0.3:
            column = chance.choice(["example", "provenance"])
            if column in table.column_names and pa.types.is_string(table.schema.field(column).type):
                values = table.column(column).to_pylist()
                at = chance.randrange(len(values)) if values else None
                if at is not None:
                    values[at] = hostile_text(chance, values[at] or "{}")
                    table = table.set_column(table.column_names.index(column), column, pa.array(values, pa.string()))
                    what.append(f"{column}={values[at]!r:.60}")
        else:
            with contextlib.suppress(pa.ArrowException, ArithmeticError, LookupError, TypeError, ValueError):
                table, change = changed_table(chance, table)
                what.append(change)
    return unit, table, "; ".join(what)
