"""Columns of every kind that TRL trains on: replay shows them to reward functions as they were, and saves them."""

import datetime as dt
from collections import defaultdict
from decimal import Decimal

import numpy as np
import pytest
import torch
import trl
from datasets import Audio, Dataset, Features, Image, IterableDataset, List, Value
from packaging.version import Version
from same_values import same
from tiny import first_letter_reward, make_trainer, tiny_dataset

from exgrpo_trl import ExperienceBuffer, question_id_of
from exgrpo_trl.examples import dataset_question_ids

STREAMS = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.15"), reason="TRL streams datasets since a later release"
)
NUM_ROWS = 16


def late(values):
    """A column that is null in the first rows: what is in row 0 says nothing."""
    return [None] * (NUM_ROWS // 2) + [values(i) for i in range(NUM_ROWS // 2, NUM_ROWS)]


def with_columns(features=None, conversational=False, **columns):
    plain = tiny_dataset(NUM_ROWS, conversational).select_columns("prompt")
    columns = {"prompt": plain["prompt"][:], **columns}
    return Dataset.from_dict(columns, Features(plain.features | features) if features else None)


def times():
    features = {
        "duration": Value("duration[us]"),
        "short_duration": Value("duration[ns]"),
        "clock": Value("time64[us]"),
        "price": Value("decimal128(38, 2)"),
        "stamp": Value("timestamp[us]"),
        "exact_stamp": Value("timestamp[ns]"),
        "zoned_stamp": Value("timestamp[us, tz=Europe/Paris]"),
        "day": Value("date32"),
    }
    stamps = late(lambda i: dt.datetime(2025, 10, 26, i, 30, 1))
    columns = {
        "duration": late(lambda i: dt.timedelta(days=i, microseconds=1)),
        "short_duration": late(lambda i: dt.timedelta(days=-i, microseconds=1)),
        "clock": late(lambda i: dt.time(i, 30, 0, 1)),
        "price": late(lambda i: Decimal(f"{i}.50")),
        "stamp": stamps,
        "exact_stamp": stamps,
        "zoned_stamp": stamps,
        "day": late(lambda i: dt.date(2025, 10, i + 1)),
    }
    return with_columns(features, **columns)


def numbers(conversational=False):
    return with_columns(
        conversational=conversational,
        number=list(range(NUM_ROWS)),
        share=[i / 7 for i in range(NUM_ROWS)],
        flag=[i % 3 == 0 for i in range(NUM_ROWS)],
        lists=[[float(i)] * (i % 3) for i in range(NUM_ROWS)],
        table=[[[i, 2], [3, 4]] for i in range(NUM_ROWS)],
        nested=[{"deep": [{"i": i}], "name": f"n{i}"} for i in range(NUM_ROWS)],
        sometimes=late(lambda i: i),
        name=[f"n{i}" for i in range(NUM_ROWS)],
    )


def odd_values(prompt):
    """What no schema knows."""
    size = len(prompt) % 3
    return {
        "pair": (prompt, np.float16(size / 3)),
        "set": {prompt, size},
        "by_number": {size: [prompt], None: (1, 2)},
        "array": np.arange(size * 2, dtype=np.uint8).reshape(2, size),
        "objects": np.array([[prompt, None]], dtype=object),
        "tensor": torch.full((size, 2), 1 / 3, dtype=torch.bfloat16),
        "pause": dt.timedelta(seconds=size),
    }


def transformed():
    def transform(batch):
        rows = [{"prompt": f"{text} = "} | odd_values(text) for text in batch["text"]]
        return {column: [row[column] for row in rows] for column in rows[0]}

    dataset = Dataset.from_dict({"text": [f"{i} + {i * i}" for i in range(NUM_ROWS)]})
    dataset.set_transform(transform)
    return dataset


def streamed():
    def rows():
        for i in range(64):
            yield {"prompt": f"{i} + {i * i} = "} | odd_values(f"{i}")

    return IterableDataset.from_generator(rows)


DATASETS = {
    "times that are null in the first rows": times,
    "times as numpy": lambda: times().with_format("numpy"),
    "times as pandas": lambda: times().with_format("pandas"),
    "numbers as torch": lambda: numbers().with_format("torch"),
    "conversations as torch": lambda: numbers(conversational=True).with_format("torch"),
    "numbers as numpy": lambda: numbers().with_format("numpy"),
    "numbers as pandas": lambda: numbers().with_format("pandas"),
    "some columns as torch": lambda: numbers().with_format("torch", columns=["number"], output_all_columns=True),
    "only some columns": lambda: numbers().with_format("numpy", columns=["prompt", "table"]),
    "a transform": transformed,
}


def train_and_record(output_dir, dataset, **options):
    """Trainer after a training, and the rows that reward functions saw of fresh and of replayed questions, by id."""
    fresh, replayed = defaultdict(list), defaultdict(list)

    def reward(prompts, completions, **columns):
        own = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")
        is_replayed = {question.question_id for question in trainer.replayer.batch.replayed_questions.values()}
        for i, prompt in enumerate(prompts):
            row = {"prompt": prompt} | {name: values[i] for name, values in columns.items() if name not in own}
            question_id = question_id_of(prompt)
            (replayed if question_id in is_replayed else fresh)[question_id].append(row)
        return first_letter_reward(completions)

    trainer = make_trainer(
        output_dir,
        train_dataset=dataset,
        reward_funcs=reward,
        max_steps=8,
        save_strategy="steps",
        save_steps=8,
        retire_solved=False,
        **options,
    )
    trainer.train()
    return trainer, fresh, replayed


def assert_rows_are_the_same(output_dir, trainer, fresh, replayed):
    assert len(replayed) >= 4
    for question_id, rows in replayed.items():
        expected = fresh[question_id][0]
        for row in (*fresh[question_id], *rows):
            assert list(row) == list(expected)
            assert all(same(row[column], expected[column]) for column in row), (row, expected)
    buffer = ExperienceBuffer.load(output_dir / "checkpoint-8" / "experience_buffer")
    assert buffer.num_questions == trainer.experience_buffer.num_questions >= 4
    for question_ids in buffer.buckets().values():
        for question_id in question_ids:
            example, expected = buffer.question(question_id).example, fresh[question_id][0]
            assert example.keys() == expected.keys()
            assert all(same(example[column], expected[column]) for column in expected), (example, expected)


@pytest.mark.parametrize("name", DATASETS)
def test_replayed_columns_are_those_of_fresh_rows(tmp_path, name):
    dataset = DATASETS[name]()
    trainer, fresh, replayed = train_and_record(tmp_path, dataset)
    assert_rows_are_the_same(tmp_path, trainer, fresh, replayed)
    assert set(fresh) <= set(dataset_question_ids(dataset, None)), "questions are left out by the ids of fresh rows"


@STREAMS
@pytest.mark.parametrize("row_format", [None, "torch"])
def test_streamed_columns(tmp_path, row_format):
    dataset = streamed() if row_format is None else numbers().to_iterable_dataset().with_format(row_format)
    assert_rows_are_the_same(tmp_path, *train_and_record(tmp_path, dataset))


@pytest.mark.parametrize("row_format", [None, "torch", "numpy", "pandas", "custom"])
@pytest.mark.parametrize("question_id_column", [None, "name", "number"])
def test_ids_do_not_depend_on_the_format(row_format, question_id_column):
    unformatted = numbers()
    expected = dataset_question_ids(unformatted, question_id_column)
    assert len(set(expected)) == NUM_ROWS
    if row_format == "custom":
        dataset = unformatted.with_transform(
            lambda batch: {name: np.array(batch[name]) for name in ("prompt", "name", "number")}
        )
    else:
        dataset = unformatted.with_format(row_format)
    assert dataset_question_ids(dataset, question_id_column) == expected


def test_an_id_column_of_tensors(tmp_path):
    trainer, _, _ = train_and_record(tmp_path, numbers().with_format("torch"), question_id_column="number")
    stored = {question_id for ids in trainer.experience_buffer.buckets().values() for question_id in ids}
    assert stored
    assert stored <= {str(i) for i in range(NUM_ROWS)}


def sounds(feature, **columns):
    values = late(lambda i: {"bytes": b"RIFF", "path": None})
    return tiny_dataset(NUM_ROWS).add_column("media", values).cast_column("media", feature)


@pytest.mark.parametrize("row_format", [None, "numpy", "torch", "pandas"])
def test_a_type_that_cannot_be_saved_is_refused(tmp_path, row_format):
    dataset = sounds(Audio()).with_format(row_format)
    with pytest.raises(TypeError, match=r"'media'.*Audio.*Drop.*remove_unused_columns=True.*replay_fraction=0"):
        make_trainer(tmp_path, train_dataset=dataset)


def test_a_type_that_cannot_be_saved_is_found_in_depth(tmp_path):
    feature = {"pages": List({"scan": Audio(), "number": Value("int64")})}
    dataset = with_columns({"media": feature}, media=[{"pages": []}] * NUM_ROWS)
    with pytest.raises(TypeError, match=r"'media'.*Audio"):
        make_trainer(tmp_path, train_dataset=dataset)


def test_media_that_are_not_decoded(tmp_path):
    trainer, fresh, replayed = train_and_record(tmp_path, sounds(Audio(decode=False)))
    assert_rows_are_the_same(tmp_path, trainer, fresh, replayed)


def test_images_as_tensors(tmp_path):
    pil = pytest.importorskip("PIL.Image")
    features = {"picture": Image()}
    dataset = with_columns(features, picture=late(lambda i: pil.new("RGB", (2, 3), (i, 0, 0)))).with_format("torch")
    trainer, fresh, replayed = train_and_record(tmp_path, dataset)
    assert_rows_are_the_same(tmp_path, trainer, fresh, replayed)
    assert any(isinstance(rows[0]["picture"], torch.Tensor) for rows in replayed.values())


def test_columns_that_no_reward_sees_may_hold_anything(tmp_path):
    trainer, fresh, replayed = train_and_record(tmp_path, sounds(Audio()), remove_unused_columns=True)
    assert_rows_are_the_same(tmp_path, trainer, fresh, replayed)
    assert all(row.keys() == {"prompt"} for rows in replayed.values() for row in rows)
    make_trainer(tmp_path, train_dataset=sounds(Audio()).with_format(None, columns=["prompt", "answer"]))
    make_trainer(tmp_path, train_dataset=sounds(Audio()), replay_fraction=0.0)


def test_an_id_column_that_the_data_loader_removes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"question_id_column='uid'.*\['prompt'\].*remove_unused_columns"):
        make_trainer(tmp_path, question_id_column="uid", remove_unused_columns=True)
    dataset = tiny_dataset().with_format("numpy", columns=["prompt", "answer"])
    with pytest.raises(ValueError, match=r"question_id_column='uid' has no value.*\['answer', 'prompt'\]"):
        make_trainer(tmp_path, train_dataset=dataset, question_id_column="uid")


def test_a_transform_to_what_cannot_be_saved_is_refused(tmp_path):
    dataset = tiny_dataset().with_transform(lambda batch: batch | {"judge": [object() for _ in batch["prompt"]]})
    with pytest.raises(TypeError, match=r"'judge'.*object.*replay_fraction=0"):
        make_trainer(tmp_path, train_dataset=dataset)


@STREAMS
def test_a_stream_of_what_cannot_be_saved_is_refused_at_once(tmp_path):
    def rows():
        for i in range(64):
            yield {"prompt": f"{i} = ", "judge": object()}

    trainer = make_trainer(tmp_path, train_dataset=IterableDataset.from_generator(rows), max_steps=4)
    with pytest.raises(TypeError, match=r"'judge'.*object.*replay_fraction=0"):
        trainer.train()
    assert trainer.state.global_step == 0
