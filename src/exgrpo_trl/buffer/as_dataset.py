"""Stored completions as datasets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from ..images import StoredImage, map_images, pixel_digest
from ..records import Experience, Question, Reuse
from ..rollout_details import check_texts
from ..values import plain
from .detail_columns import DETAIL_SCHEMA, details_from_columns, details_to_arrays, require
from .image_files import example_from_text, example_to_text
from .image_pool import stored_images_in
from .metadata_checks import parsed
from .reuse_columns import REUSE_SCHEMA, reuse_from_table, reuse_to_arrays
from .tables import (
    EXPERIENCE_SCHEMA,
    GROUP_SCHEMA,
    LATER_COLUMNS,
    QUESTION_SCHEMA,
    array_of,
    bounded,
    bytes_of,
    experiences_from_table,
    experiences_to_arrays,
    group_numbers,
    num_tokens_in,
    with_later_columns,
)

if TYPE_CHECKING:
    from datasets import Dataset

DATASET_SCHEMA = pa.unify_schemas([QUESTION_SCHEMA, EXPERIENCE_SCHEMA, REUSE_SCHEMA])
_IMPORTED_SCHEMA = pa.unify_schemas([DATASET_SCHEMA, GROUP_SCHEMA])
# The same JSON in every row. Datasets drop everything but columns on their way through Parquet files.
PROVENANCE = "provenance"
# Of datasets with images or details. `details` alone is exact: `messages` and `is_model` are there to be read.
_ROLLOUT_SCHEMA = pa.schema(
    [
        ("messages", pa.string()),
        ("is_model", pa.list_(pa.bool_())),
        ("images", pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}))),
        ("image_digests", pa.list_(pa.string())),
        ("details", pa.struct(list(DETAIL_SCHEMA))),
    ]
)


class _Row(NamedTuple):
    question_id: str
    example: str
    bucket: int
    images: list[StoredImage]
    experience: Experience

    @property
    def num_bytes(self) -> int:
        return len(self.example) + bytes_of(self.experience) + sum(len(image.content) for image in self.images)


class ImportedRow(NamedTuple):
    """A row of a dataset of stored completions; `reuse` and `group` are `None` where it has none."""

    question: Question
    experience: Experience
    bucket: int
    reuse: Reuse | None
    group: int | None


def completions_to_dataset(
    items: Iterable[tuple[Question, int, Experience]],
    provenance: Mapping[str, Any],
    reuse: Mapping[Experience, Reuse],
    group_size: int | None,
) -> Dataset:
    """
    Dataset of the stored completions, one per row.

    Columns: `question_id`, `example` (JSON, see [`encode_example`]), `bucket`, `token_ids`,
    `behavior_per_token_logps` (nats), `policy_version` (optimizer steps), `reward`, `entropy` (nats, NaN if unknown)
    `prompt_hash` (0 if unknown), `is_scored`, the record of [`Reuse`] as `num_replays` (0 without one),
    `known_entropy`, `known_negative_log_likelihood` and `known_at` (null without one), and `provenance` (JSON, null if
    unknown, the same in every row). Rows go by bucket, question and age. Completions of one group share the number in
    the column `group`, which is there where whole groups are stored.

    Where a question has images, or a completion has [`RolloutDetails`], there are five more:

    - `messages`: messages of the completion, with what tools and the environment said; null if they are not kept.
      An image in them is its position in `images`. Of the feature `datasets.Json`, or JSON text where `datasets` lacks
      it.
    - `is_model`: for each token whether the model wrote it.
    - `images`: those of the question, followed by those of the completion; of the feature `datasets.Image`, each as
      the bytes that are stored. `example` and `details` refer to them.
    - `image_digests`: digest of each, see [`StoredImage`].
    - `details`: what [`RolloutDetails`] holds, null fields where it has nothing: `run_lengths`, `messages`,
      `shown_prompt`, `prompt_ids`, `fields`, `rewards` and `images` (digests), of which `messages`, `shown_prompt`,
      `fields` and `rewards` are JSON. The way back takes this column, not the first two.

    Args:
        items (`Iterable[tuple]`):
            Question, bucket and completion of each row, see [`ExperienceBuffer.items`].
        provenance (`Mapping[str, Any]`):
            What the tokens depend on, see [`ExperienceBuffer`].
        reuse (`Mapping[Experience, Reuse]`):
            Records of those completions that have one.
        group_size (`int` or `None`):
            Completions of every group, which follow each other; `None` where completions are stored one by one.
    """
    from datasets import Dataset

    rows = list(_rows_of(items))
    has_rollouts = any(row.images or row.experience.details is not None for row in rows)
    parts = [(GROUP_SCHEMA, group_size is not None), (_ROLLOUT_SCHEMA, has_rollouts)]
    schema = pa.unify_schemas([DATASET_SCHEMA, *(part for part, is_there in parts if is_there)])
    batches: list[pa.RecordBatch] = []
    num_written = 0
    for batch in bounded(rows, lambda row: row.num_bytes):
        question_ids, examples, buckets, _, experiences = zip(*batch, strict=True)
        columns = [
            pa.array(values, kind)
            for values, kind in zip((question_ids, examples, buckets), QUESTION_SCHEMA.types, strict=True)
        ]
        columns += experiences_to_arrays(experiences) + reuse_to_arrays(
            [reuse.get(experience) for experience in experiences]
        )
        columns += [] if group_size is None else [group_numbers(num_written, len(batch), group_size)]
        columns += _rollout_arrays(batch) if has_rollouts else []
        batches.append(pa.record_batch(columns, schema=schema))
        num_written += len(batch)
    table = pa.Table.from_batches(batches, schema=schema)
    text = pa.scalar(json.dumps(provenance, sort_keys=True) if provenance else None, pa.string())
    table = table.append_column(PROVENANCE, pa.repeat(text, len(table)))
    return Dataset(_with_features(table) if has_rollouts else table)


def check_is_dataset(dataset: Any) -> None:
    """
    Check the kind of an argument.

    Raises:
        TypeError: if it is not a dataset.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}; pick one split of a DatasetDict.")


def completions_from_dataset(dataset: Dataset) -> Iterator[ImportedRow]:
    """
    What is in every row of a dataset; the inverse of [`completions_to_dataset`].

    Args:
        dataset (`datasets.Dataset`):
            Dataset with the columns of [`completions_to_dataset`].

    Raises:
        ValueError: if a column is missing or holds something else.
    """
    needed = [name for name in DATASET_SCHEMA.names if name not in LATER_COLUMNS]
    if missing := [name for name in needed if name not in dataset.column_names]:
        raise ValueError(
            f"The dataset lacks the columns {missing}; it has {dataset.column_names}. ExperienceBuffer.to_dataset() "
            "shows what is expected."
        )
    read = [*_IMPORTED_SCHEMA.names, "images", "image_digests", "details"]
    read = [name for name in read if name in dataset.column_names]
    images: dict[str, StoredImage] = {}
    known_rewards: set[str] = set()
    question = None
    text = ""
    # Images make rows large.
    batch_size = 64 if "images" in read else 1024
    for table in dataset.select_columns(read).with_format("arrow").iter(batch_size=batch_size):
        # Files of Arrow are used as they are: an offset may point anywhere.
        table.validate(full=True)
        try:
            batch = with_later_columns(table, _IMPORTED_SCHEMA).select(_IMPORTED_SCHEMA.names).cast(_IMPORTED_SCHEMA)
            details = _detail_columns(table)
            digests, contents = (_pylist(table, name) for name in ("image_digests", "images"))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ValueError(
                f"The dataset does not hold stored completions: {error}. ExperienceBuffer.to_dataset() shows the "
                "expected types."
            ) from error
        for name in QUESTION_SCHEMA.names:
            require(not batch.column(name).null_count, f"`{name}` is never null")
        for of_row in zip(digests, contents, strict=True):
            _add_images(images, *of_row)
        all_details = details_from_columns(details, num_tokens_in(batch), images)
        for details_of_row in filter(None, all_details):
            check_texts(details_of_row, known_rewards)
        experiences = experiences_from_table(batch, all_details)
        columns = (batch.column(name).to_pylist() for name in (*QUESTION_SCHEMA.names, *GROUP_SCHEMA.names))
        rows = zip(experiences, reuse_from_table(batch), *columns, strict=True)
        for experience, reuse, question_id, example, bucket, group in rows:
            # Rows of a question follow each other, with one text.
            if question is None or question_id != question.question_id or example != text:
                question, text = Question(question_id, example_from_text(example, images)), example
            yield ImportedRow(question, experience, bucket, reuse, group)


def provenance_from_dataset(dataset: Dataset) -> dict[str, Any]:
    """
    What the stored tokens of a dataset depend on, as far as it says so.

    Raises:
        ValueError: if it is not JSON, or completions of different provenance are in the dataset.
    """
    if PROVENANCE not in dataset.column_names:
        return {}
    provenance: dict[str, Any] = {}
    texts = dataset.select_columns([PROVENANCE]).with_format(None).unique(PROVENANCE)
    for text in filter(None, texts):
        try:
            pairs = parsed(text).items()
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The column {PROVENANCE!r} must hold a JSON object, got {str(text)[:200]!r}.") from error
        for name, value in pairs:
            if provenance.setdefault(name, value) != value:
                raise ValueError(
                    f"The dataset mixes completions of different provenance: {name}={provenance[name]!r} and "
                    f"{name}={value!r}. Import those of one alone, for example dataset.filter(lambda row: "
                    f"row[{PROVENANCE!r}] == dataset[0][{PROVENANCE!r}])."
                )
    return provenance


def _rows_of(items: Iterable[tuple[Question, int, Experience]]) -> Iterator[_Row]:
    known: tuple[Question | None, str, list[StoredImage]] = (None, "", [])
    for question, bucket, experience in items:
        if question is not known[0]:
            known = (question, example_to_text(question.example, {}), stored_images_in(question.example))
        _, text, images = known
        if experience.details is not None and experience.details.images:
            images = [*images, *experience.details.images]
        yield _Row(question.question_id, text, bucket, images, experience)


def _rollout_arrays(rows: list[_Row]) -> list[pa.Array]:
    """Columns of `_ROLLOUT_SCHEMA`."""
    offsets = np.cumsum([0, *(row.experience.num_tokens for row in rows)], dtype=np.int32)
    details = pa.StructArray.from_arrays(
        details_to_arrays([row.experience.details for row in rows]), fields=list(DETAIL_SCHEMA)
    )
    kinds = dict(zip(_ROLLOUT_SCHEMA.names, _ROLLOUT_SCHEMA.types, strict=True))
    files = [[{"bytes": image.content, "path": None} for image in row.images] for row in rows]
    return [
        pa.array([_messages_text(row) for row in rows], kinds["messages"]),
        pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(np.concatenate([row.experience.is_model for row in rows]))
        ),
        pa.array(files, kinds["images"]),
        pa.array([[image.digest for image in row.images] for row in rows], kinds["image_digests"]),
        details,
    ]


def _messages_text(row: _Row) -> str | None:
    messages = None if row.experience.details is None else row.experience.details.messages
    if messages is None:
        return None
    positions = {image.digest: position for position, image in reversed(list(enumerate(row.images)))}
    return json.dumps(_readable(map_images(messages, lambda image: positions[image.digest])))


def _readable(value: Any) -> Any:
    """What any reader of JSON takes."""
    value = plain(value)
    if isinstance(value, dict):
        return {str(key): _readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_readable(item) for item in value]
    is_json = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if is_json else str(value)


def _with_features(table: pa.Table) -> pa.Table:
    """The table with what `datasets` must know of its columns."""
    import datasets

    features = datasets.Features.from_arrow_schema(table.schema)
    list_of = datasets.List if hasattr(datasets, "List") else datasets.Sequence
    features["images"] = list_of(datasets.Image())
    if hasattr(datasets, "Json"):
        features["messages"] = datasets.Json()
        position = table.column_names.index("messages")
        chunks = [
            pa.ExtensionArray.from_storage(datasets.Json.pa_type, chunk) for chunk in table.column(position).chunks
        ]
        table = table.set_column(position, "messages", pa.chunked_array(chunks, datasets.Json.pa_type))
    return table.replace_schema_metadata(features.arrow_schema.metadata)


def _detail_columns(table: pa.Table) -> dict[str, pa.Array]:
    """Columns of `DETAIL_SCHEMA` of a dataset that may lack them."""
    found: dict[str, pa.Array] = {}
    if "details" in table.column_names:
        details = array_of(table, "details")
        if pa.types.is_struct(details.type):
            names = [details.type.field(index).name for index in range(details.type.num_fields)]
            found = dict(zip(names, details.flatten(), strict=True))
        else:
            require(details.null_count == len(details), "`details` are records")
    return {
        field.name: found[field.name].cast(field.type) if field.name in found else pa.nulls(len(table), field.type)
        for field in DETAIL_SCHEMA
    }


def _pylist(table: pa.Table, name: str) -> list[Any]:
    return table.column(name).to_pylist() if name in table.column_names else [None] * len(table)


def _add_images(images: dict[str, StoredImage], digests: list[str] | None, files: list[dict[str, Any]] | None) -> None:
    """Put the images of a row into `images` by digest, which must be that of their pixels."""
    digests, files = digests or [], files or []
    require(isinstance(digests, list) and isinstance(files, list), "`images` and `image_digests` are lists")
    require(len(digests) == len(files), "`images` has an image for each of `image_digests`")
    for digest, file in zip(digests, files, strict=True):
        content = file.get("bytes") if isinstance(file, dict) else None
        if not isinstance(content, bytes) or not content or not isinstance(digest, str):
            raise ValueError("Stored completions break a rule: images are bytes, not paths.")
        known = images.get(digest)
        if known is not None and known.content == content:
            continue
        image = StoredImage(content, digest)
        if pixel_digest(image.open()) != digest:
            raise ValueError(
                f"The image of digest {digest} is not the one that was stored. Leave the columns `images` and "
                "`image_digests` as ExperienceBuffer.to_dataset() makes them."
            )
        images.setdefault(digest, image)
