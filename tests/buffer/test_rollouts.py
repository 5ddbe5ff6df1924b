"""Rollouts of several turns and images in a buffer: in memory, in files, in datasets."""

import copy
import gc
import json
import pickle
import random
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rewriting import rewritten, with_column

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question, RolloutDetails, StoredImage
from exgrpo_trl.buffer import detail_columns, metadata, restoring, tables
from exgrpo_trl.images import stored

Image = pytest.importorskip("PIL.Image")
K = 4


def picture(seed=0, size=(8, 6)):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def ask(name, *pictures, **columns):
    content = [{"type": "image", "image": image} for image in pictures] + [{"type": "text", "text": f"ü {name}"}]
    return Question(name, {"prompt": [{"role": "user", "content": content}], "answer": np.float32(1.5), **columns})


def make(*token_ids, version=0, **details):
    count = len(token_ids)
    details = RolloutDetails.create(**details)
    return Experience.create(token_ids, [-0.5] * count, policy_version=version, reward=1.0, details=details)


def shown(*pictures):
    return [{"role": "tool", "content": [{"type": "image", "image": image} for image in pictures]}]


def collect(buffer, question, *experiences, correct=1):
    return buffer.collect(question, experiences, num_correct=correct, group_size=K)


def filled():
    """A buffer with everything that can be in one."""
    buffer = ExperienceBuffer(seed=3)
    shared = picture(1)
    collect(
        buffer,
        ask("a", shared, picture(2), extra=[shared, None]),
        make(
            1, 2, 3, is_model=[1, 0, 1], messages=shown(picture(1), picture(3)), rewards={"correct": 1, "other": None}
        ),
        make(4),
        make(5, 6, messages="text \x00 ü", fields={"score": np.arange(3), "image": picture(4)}),
        correct=2,
    )
    collect(buffer, ask("b"), make(7, 8, is_model=[0, 1], prompt_ids=[1, 2**31 - 1], version=2), make(9))
    collect(buffer, ask("c", shared), make(9, prompt=shown(picture(3))), correct=3)
    nothing = Question("d", {"prompt": None, "environment": "maze", "answer": (1, 2)})
    collect(buffer, nothing, make(3, prompt="shown", rewards={}, version=1))
    buffer.retire("z")
    buffer.provenance = {"temperature": 1.0}
    return buffer


def details_of(experience):
    if experience.details is None:
        return None
    parts = astuple(replace(experience.details, images=()))
    return (*parts, *((image.digest, image.content) for image in experience.details.images))


def state(buffer):
    return [
        (
            question.question_id,
            repr(question.example),
            bucket,
            *(experience.token_bytes, experience.logp_bytes, experience.policy_version, experience.prompt_hash),
            details_of(experience),
        )
        for question, bucket, experience in buffer.items()
    ]


def digests_on_disk(path):
    return pq.read_table(path / "images.parquet").column("digest").to_pylist()


# In memory


def test_an_image_is_in_memory_once():
    buffer = filled()
    assert buffer.check_valid() == (True, "")
    example = buffer.question("a").example
    first, second = (item["image"] for item in example["prompt"][0]["content"][:2])
    assert type(first) is type(second) is StoredImage
    assert example["extra"][0] is first
    assert buffer.question("c").example["prompt"][0]["content"][0]["image"] is first
    own, other = buffer.completions("a")[0].details.images
    assert own is first
    assert buffer.completions("c")[0].details.images == (other,)
    assert first.open().tobytes() == picture(1).tobytes()
    assert buffer.completions("a")[1].details is None


def test_what_holds_no_image_is_stored_as_it_is():
    buffer = ExperienceBuffer()
    question, experience = ask("a"), make(1, 2, is_model=[1, 0])
    collect(buffer, question, experience)
    assert buffer.question("a") is question
    assert buffer.completions("a") == (experience,)


def test_images_leave_with_the_last_that_holds_them():
    buffer = filled()
    num_images = len(buffer._store.images._images)
    assert num_images == 4
    buffer.retire("a")
    gc.collect()
    assert sorted(buffer._store.images._images) == sorted(
        StoredImage.of(image).digest for image in (picture(1), picture(3))
    )
    assert buffer.check_valid() == (True, "")


def test_update_takes_images():
    buffer = filled()
    first = buffer.question("c").example["prompt"][0]["content"][0]["image"]
    buffer.update(ask("a", picture(2), picture(1)))
    content = buffer.question("a").example["prompt"][0]["content"]
    assert content[1]["image"] is first
    assert buffer.check_valid() == (True, "")
    with pytest.raises(KeyError, match="'x'"):
        buffer.update(ask("x"))


def test_prompts_compare_by_their_pixels():
    buffer = filled()
    stored_question = buffer.question("a")
    for again in (ask("a", picture(1), picture(2)), stored_question, Question("a", stored_question.example)):
        assert collect(buffer, again, make(10, len(buffer))) == 1
    assert buffer.question("a") is stored_question
    before = len(buffer)
    for other in (ask("a", picture(2), picture(1)), ask("a", picture(1)), ask("a")):
        with pytest.raises(ValueError, match=r"'a' belongs to two prompts: .*StoredImage\(.* and "):
            collect(buffer, other, make(11))
    assert len(buffer) == before
    assert collect(buffer, Question("d", {"prompt": None}), make(12)) == 1


def test_an_image_that_cannot_be_stored_stores_nothing():
    buffer = ExperienceBuffer()
    with pytest.raises(ValueError, match="Convert it to RGB"):
        collect(buffer, ask("a", Image.new("HSV", (2, 2))), make(1))
    assert len(buffer) == buffer.num_questions == 0
    assert buffer.check_valid() == (True, "")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))])
def test_a_copy_of_a_buffer_is_valid(way):
    for buffer in (filled(), ExperienceBuffer()):
        again = way(buffer)
        assert again.check_valid() == (True, "")
        assert state(again) == state(buffer)
        collect(again, ask("e", picture(1)), make(1))
        assert again.check_valid() == (True, "")


def test_invariants_see_what_is_wrong():
    def broken(question=None, **changes):
        buffer = filled()
        entry = buffer._store.questions["a"]
        if question is not None:
            entry.question = question
        experience = buffer.completions("a")[0]
        # In place, as nothing else may be wrong.
        object.__setattr__(experience, "details", replace(experience.details, **changes))
        return buffer.check_valid()

    images = filled().completions("a")[0].details.images
    twin = StoredImage(images[0].content, images[0].digest)
    assert broken() == (True, "")
    assert "'a' says who wrote 4 of 3 tokens" in broken(run_bytes=np.int32([3, 1]).tobytes())[1]
    assert "who wrote 3 of 3 tokens" in broken(run_bytes=np.int32([4, -1]).tobytes())[1]
    assert "'a' has an image that the buffer has not, or has twice" in broken(images=(twin, images[1]))[1]
    assert "'a' has an image that the buffer has not, or has twice" in broken(ask("a", twin))[1]
    missing = sorted(image.digest for image in images)
    assert f"refers to the images {missing}, which it has not" in broken(images=())[1]


# In files


@pytest.mark.parametrize("small_batches", [False, True])
def test_files_round_trip(tmp_path, monkeypatch, small_batches):
    if small_batches:
        monkeypatch.setattr(tables, "BYTES_PER_BATCH", 100)
    buffer = filled()
    buffer.save(tmp_path / "buffer")
    digests = digests_on_disk(tmp_path / "buffer")
    assert len(digests) == len(set(digests)) == 4
    groups = pq.ParquetFile(tmp_path / "buffer" / "images.parquet").num_row_groups
    assert groups == (4 if small_batches else 1)
    loaded = ExperienceBuffer.load(tmp_path / "buffer")
    assert state(loaded) == state(buffer)
    assert loaded.check_valid() == (True, "")
    first = loaded.question("c").example["prompt"][0]["content"][0]["image"]
    assert loaded.question("a").example["extra"][0] is first is loaded.completions("a")[0].details.images[0]
    assert first.open().tobytes() == picture(1).tobytes()
    assert loaded.completions("a")[2].details.fields["score"].tolist() == [0, 1, 2]
    loaded.save(tmp_path / "again")
    for file in metadata.DATA_FILES:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "buffer" / file).read_bytes()


def test_random_details_round_trip(tmp_path):
    chance = random.Random(0)
    buffer = ExperienceBuffer()
    for number in range(400):
        count = chance.randint(1, 30)
        flags = [chance.random() < 0.5 for _ in range(count)]
        given = {
            "is_model": flags if any(flags) else None,
            "messages": shown(*(picture(chance.randrange(9)) for _ in range(chance.randrange(3)))),
            "prompt": "text",
            "prompt_ids": [chance.randrange(2**31) for _ in range(chance.randrange(4))],
            "fields": {"a": chance.random()},
            "rewards": {"b": chance.choice([None, 1.0])},
        }
        given = {name: value for name, value in given.items() if chance.random() < 0.4}
        tokens = [chance.randrange(2**31) for _ in range(count)]
        collect(
            buffer, ask(f"q{number // 3}", *[picture(number // 3 % 7)] * (number // 3 % 2)), make(*tokens, **given)
        )
    assert sum(experience.details is None for _, _, experience in buffer.items()) > 5
    buffer.save(tmp_path / "buffer")
    loaded = ExperienceBuffer.load(tmp_path / "buffer")
    assert state(loaded) == state(buffer)
    again = ExperienceBuffer.from_dataset(loaded.to_dataset(), group_size=K)
    assert state(again) == state(buffer)
    assert again.check_valid() == (True, "")


def test_files_of_text_stay_as_small_as_they_were(tmp_path):
    buffer = ExperienceBuffer()
    rng = np.random.default_rng(0)
    for number in range(300):
        collect(buffer, ask(f"q{number}"), make(*rng.integers(0, 2**31, 300).tolist()))
    buffer.save(tmp_path / "buffer")
    assert digests_on_disk(tmp_path / "buffer") == []
    file = pq.ParquetFile(tmp_path / "buffer" / "completions.parquet")
    group = file.metadata.row_group(0)
    sizes = {group.column(i).path_in_schema: group.column(i).total_compressed_size for i in range(group.num_columns)}
    assert sum(size for name, size in sizes.items() if name.split(".")[0] in tables.LATER_COLUMNS) < 0.01 * sum(
        sizes.values()
    )


def test_damaged_images_are_refused_for_their_checksum_whatever_reading_them_does(tmp_path):
    path = tmp_path / "buffer"
    filled().save(path)
    file = path / "images.parquet"
    content = file.read_bytes()
    for position in [*random.Random(0).sample(range(len(content)), 40), 0, len(content) - 1]:
        damaged = bytearray(content)
        damaged[position] ^= 255
        file.write_bytes(damaged)
        with pytest.raises(ExperienceBufferError, match=r"checksum of images\.parquet does not match"):
            ExperienceBuffer.load(path)
    file.write_bytes(content[:-9])
    with pytest.raises(ExperienceBufferError, match=rf"images\.parquet has {len(content) - 9} bytes"):
        ExperienceBuffer.load(path)


def test_loading_does_not_import_pandas(tmp_path):
    """It takes 0.2 s, and is not needed."""
    filled().save(tmp_path / "buffer")
    code = (
        "import sys; from exgrpo_trl import ExperienceBuffer as B; B.load(sys.argv[1]); print('pandas' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "buffer")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float64()])
def test_numbers_of_arrow_arrays(kind):
    whole = pa.array([1, None, 3, 4, None, 6, 7, 8, 9, None], kind)
    for array in (whole, whole[1:8], whole[3:3], whole[5:9], pa.array([], kind), pa.nulls(3, kind)):
        valid = detail_columns.valid_in(array)
        assert valid.dtype == bool
        assert valid.tolist() == [value is not None for value in array.to_pylist()]
        assert detail_columns.numbers_of(array)[valid].tolist() == array.drop_null().to_pylist()


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("images.parquet", lambda table: table.slice(1), "the image .* which is not there"),
        ("images.parquet", lambda table: table.slice(0, 0), "the image .* which is not there"),
        ("images.parquet", lambda table: pa.concat_tables([table, table.slice(1)]), "every image is there once"),
        ("images.parquet", with_column("content", lambda values: [None, *values[1:]]), "a digest and content"),
        ("images.parquet", lambda table: table.select(["content"]), "the columns"),
        ("completions.parquet", with_column("images", lambda values: [["x"]] * len(values)), "image x"),
        ("completions.parquet", with_column("images", lambda values: [None] * len(values)), "refers to the images"),
        ("completions.parquet", with_column("run_lengths", lambda values: [[9]] * len(values)), "add up"),
        ("completions.parquet", with_column("run_lengths", lambda values: [[-1, 2]] * len(values)), "add up"),
        ("completions.parquet", with_column("run_lengths", lambda values: [[None]] * len(values)), "never null"),
        ("completions.parquet", with_column("run_lengths", lambda values: [None] * len(values)), "have run lengths"),
        ("completions.parquet", lambda table: table.drop_columns(["fields"]), "has the columns"),
    ],
)
def test_files_that_contradict_themselves(tmp_path, file, change, message):
    path = tmp_path / "buffer"
    filled().save(path)
    rewritten(path, file, lambda table: table)
    assert len(ExperienceBuffer.load(path)) == 7
    rewritten(path, file, change)
    with pytest.raises(ExperienceBufferError, match=message):
        ExperienceBuffer.load(path)


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_files_of_earlier_versions(tmp_path, version):
    buffer = ExperienceBuffer()
    collect(buffer, ask("a"), make(1, 2), make(3))
    path = tmp_path / "buffer"
    buffer.save(path)
    later = [name for name, added_in in restoring._ADDED_IN.items() if added_in > version]
    assert set(restoring._ADDED_IN) == set(tables.LATER_COLUMNS)
    if version < 3:
        (path / "images.parquet").unlink()
    about = json.loads((path / "metadata.json").read_text())
    (path / "metadata.json").write_text(json.dumps(about | {"schema_version": version}))
    rewritten(path, "completions.parquet", lambda table: table.drop_columns(later))
    loaded = ExperienceBuffer.load(path)
    assert state(loaded) == state(buffer)
    loaded.save(path)
    assert (path / "images.parquet").exists()
    assert state(ExperienceBuffer.load(path)) == state(buffer)


def test_a_buffer_that_an_earlier_version_wrote(tmp_path):
    recorded = Path(__file__).parents[1] / "end_to_end" / "recorded" / "checkpoint-6" / "experience_buffer"
    assert not (recorded / "images.parquet").exists()
    loaded = ExperienceBuffer.load(recorded)
    assert len(loaded) > 0
    assert all(experience.details is None for _, _, experience in loaded)
    loaded.save(tmp_path / "buffer")
    assert state(ExperienceBuffer.load(tmp_path / "buffer")) == state(loaded)


# In datasets


@pytest.mark.parametrize("way", ["memory", "disk", "parquet", "filter", "map", "list", "select", "arrow"])
def test_dataset_round_trip(tmp_path, way):
    datasets = pytest.importorskip("datasets")
    buffer = filled()
    dataset = buffer.to_dataset()
    if way == "disk":
        dataset.save_to_disk(tmp_path / "saved")
        dataset = datasets.load_from_disk(tmp_path / "saved")
    elif way == "parquet":
        dataset.to_parquet(tmp_path / "saved.parquet")
        dataset = datasets.Dataset.from_parquet(str(tmp_path / "saved.parquet"), cache_dir=str(tmp_path))
    elif way == "filter":
        dataset = dataset.filter(lambda row: row["reward"] == 1)
    elif way == "map":
        dataset = dataset.map(lambda row: {"reward": row["reward"], "note": "x"})
    elif way == "list":
        dataset = datasets.Dataset.from_list(dataset.remove_columns("messages").to_list())
    elif way == "select":
        dataset = dataset.select_columns(
            [name for name in dataset.column_names if name not in ("messages", "is_model")]
        )
    elif way == "arrow":
        dataset = dataset.with_format("arrow")
    again = ExperienceBuffer.from_dataset(dataset, group_size=K)
    assert again.check_valid() == (True, "")
    if way == "list":  # images are decoded on the way, and encoded by `datasets`: the same pixels in other files
        pixels = [[image.open().tobytes() for image in images_of(each)] for each in (buffer, again)]
        assert pixels[0] == pixels[1]
    else:
        assert state(again) == state(buffer)
    assert again.provenance == buffer.provenance


def images_of(buffer):
    return [image for _, _, e in buffer.items() if e.details is not None for image in e.details.images]


def test_dataset_columns_for_users():
    datasets = pytest.importorskip("datasets")
    dataset = filled().to_dataset()
    assert isinstance(dataset.features["images"].feature, datasets.Image)
    rows = {tuple(row["token_ids"]): row for row in dataset}
    assert len(rows) == 6, "two questions share tokens"
    row = rows[1, 2, 3]
    assert row["is_model"] == [True, False, True]
    assert [image.tobytes() for image in row["images"]] == [picture(seed).tobytes() for seed in (1, 2, 1, 1, 3)], (
        "of the question, then of the completion"
    )
    messages = row["messages"] if hasattr(datasets, "Json") else json.loads(row["messages"])
    content = [{"type": "image", "image": 0}, {"type": "image", "image": 4}]
    assert messages == [{"role": "tool", "content": content}]
    assert rows[4,]["is_model"] == [True]
    assert rows[4,]["messages"] is None
    assert len(rows[4,]["images"]) == 3
    assert rows[4,]["details"]["run_lengths"] is None
    text = rows[5, 6]["messages"]
    assert (text if hasattr(datasets, "Json") else json.loads(text)) == "text \x00 ü"
    assert rows[7, 8]["is_model"] == [False, True]
    assert rows[7, 8]["details"]["prompt_ids"] == [1, 2**31 - 1]
    assert rows[7, 8]["images"] == []
    content = dataset.cast_column("images", [datasets.Image(decode=False)])[0]["images"]
    assert {type(file["bytes"]) for file in content} <= {bytes}


def test_datasets_with_and_without_rollouts_go_together():
    datasets = pytest.importorskip("datasets")
    plain = ExperienceBuffer()
    collect(plain, ask("text"), make(1, 2))
    assert "details" not in plain.to_dataset().column_names
    both = datasets.concatenate_datasets([filled().to_dataset(), plain.to_dataset()])
    again = ExperienceBuffer.from_dataset(both.remove_columns("provenance"), group_size=K)
    assert sorted(state(again), key=str) == sorted(state(filled()) + state(plain), key=str)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "an image for each of"),
        ({"images": None, "image_digests": None}, "which is not there"),
        ({"image_digests": ["x"] * 5}, "image of digest x is not the one that was stored"),
        ({"images": [picture(7)] * 5}, "is not the one that was stored. Leave the columns"),
        ({"details": {"run_lengths": [9]}}, "add up"),
        ({"details": "x"}, "are records"),
        ({"images": [{"bytes": None, "path": "x.png"}] * 5}, "bytes, not paths"),
    ],
)
def test_datasets_that_were_changed_are_refused(change, message):
    datasets = pytest.importorskip("datasets")
    dataset = filled().to_dataset().remove_columns("messages")
    row = next(row for row in dataset if row["token_ids"] == [1, 2, 3])
    with pytest.raises(ValueError, match=message):
        ExperienceBuffer.from_dataset(datasets.Dataset.from_list([row | change]), group_size=K)


def test_a_message_with_any_value_can_be_read():
    datasets = pytest.importorskip("datasets")
    messages = [{"role": "tool", "content": "x", "value": (np.float32(1.5), float("nan"), {1}, np.arange(2), b"a")}]
    buffer = ExperienceBuffer()
    collect(buffer, ask("a"), make(1, messages=stored(messages)))
    dataset = buffer.to_dataset()
    read = dataset[0]["messages"] if hasattr(datasets, "Json") else json.loads(dataset[0]["messages"])
    assert read[0]["value"] == [1.5, "nan", "{1}", [0, 1], "b'a'"]
    assert state(ExperienceBuffer.from_dataset(dataset, group_size=K)) == state(buffer)
