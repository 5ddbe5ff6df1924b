"""Stored completions as datasets."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

def completions_to_dataset(
    items: Iterable[tuple[Question, int, Experience]], provenance: Mapping[str, Any]
) -> Dataset:
    """
    Dataset of the stored completions, one per row.

    Columns: `question_id`, `example` (JSON, see [`encode_example`]), `bucket`, `token_ids`,
    `behavior_per_token_logps` (nats), `policy_version` (optimizer steps), `reward`, `entropy` (nats, NaN if unknown)
    `prompt_hash` (0 if unknown) and `provenance` (JSON, null if unknown, the same in every row). Rows go by bucket,
    question and age.

    Args:
        items (`Iterable[tuple]`):
            Question, bucket and completion of each row, see [`ExperienceBuffer.items`].
        provenance (`Mapping[str, Any]`):
            What the tokens depend on, see [`ExperienceBuffer`].
    """
    from datasets import Dataset

    rows = (
        ((question.question_id, encode_example(question.example), bucket), experience)
        for question, bucket, experience in items
    )
    batches = []
    for keys, experiences in in_batches(rows):
        columns = [
            pa.array(values, kind) for values, kind in zip(zip(*keys, strict=True), QUESTION_SCHEMA.types, strict=True)
        ]
        batches.append(pa.record_batch(columns + experiences_to_arrays(experiences), schema=DATASET_SCHEMA))
    table = pa.Table.from_batches(batches, schema=DATASET_SCHEMA)
    text = pa.scalar(json.dumps(provenance, sort_keys=True) if provenance else None, pa.string())
    return Dataset(table.append_column(PROVENANCE, pa.repeat(text, len(table))))


def completions_from_dataset(dataset: Dataset) -> Iterator[tuple[Question, Experience, int]]:
    """
    Question, completion and bucket of every row of a dataset; the inverse of [`completions_to_dataset`].

    Args:
        dataset (`datasets.Dataset`):
            Dataset with the columns of [`completions_to_dataset`].

    Raises:
        TypeError: if it is not a dataset.
        ValueError: if a column is missing or holds something else.
    """
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a datasets.Dataset, got {type(dataset).__name__}; pick one split of a DatasetDict.")
    needed = [name for name in DATASET_SCHEMA.names if name not in LATER_COLUMNS]
    if missing := [name for name in needed if name not in dataset.column_names]:
        raise ValueError(
            f"The dataset lacks the columns {missing}; it has {dataset.column_names}. ExperienceBuffer.to_dataset() "
            "shows what is expected."
        )
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        try:
            batch = with_later_columns(table).select(DATASET_SCHEMA.names).cast(DATASET_SCHEMA)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ValueError(
                f"The dataset does not hold stored completions: {error}. ExperienceBuffer.to_dataset() shows the "
                "expected types."
            ) from error
        for name in QUESTION_SCHEMA.names:
            _require(not batch.column(name).null_count, f"`{name}` is never null")
        for experience, question_id, example, bucket in zip(
            experiences_from_table(batch),
            *(batch.column(name).to_pylist() for name in QUESTION_SCHEMA.names),
            strict=True,
        ):
            yield Question(question_id, decode_example(example)), experience, bucket


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
            found = json.loads(text)
            pairs = found.items()
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"The column {PROVENANCE!r} must hold a JSON object, got {text!r}.") from error
        for name, value in pairs:
            if provenance.setdefault(name, value) != value:
                raise ValueError(
                    f"The dataset mixes completions of different provenance: {name}={provenance[name]!r} and "
                    f"{name}={value!r}. Import those of one alone, for example dataset.filter(lambda row: "
                    f"row[{PROVENANCE!r}] == dataset[0][{PROVENANCE!r}])."
                )
    return provenance


