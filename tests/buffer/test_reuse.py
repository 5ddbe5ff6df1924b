"""Records of how stored completions were used: in memory, in files, in datasets."""

import gc
import math
import tracemalloc

import pyarrow as pa
import pytest
from rewriting import rewritten, with_column

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question, RolloutDetails
from exgrpo_trl.records import Reuse

K = 4
COLUMNS = ["num_replays", "known_entropy", "known_negative_log_likelihood", "known_at"]


def make(*token_ids, version=0, logps=None, **kwargs):
    logps = [-0.5] * len(token_ids) if logps is None else logps
    return Experience.create(token_ids, logps, policy_version=version, reward=1.0, **kwargs)


def collect(buffer, name, *experiences, correct=1):
    return buffer.collect(Question(name, {"prompt": name}), experiences, num_correct=correct, group_size=K)


def filled():
    """Four completions, of which two have a record."""
    buffer = ExperienceBuffer()
    collect(buffer, "a", make(1, version=3, entropy=0.25), make(2, 3))
    collect(buffer, "b", make(1, version=4), make(5))
    buffer.note_reuse("a", make(1), Reuse(2, 0.5, 1.5, 7))
    buffer.note_reuse("b", buffer.completions("b")[0], Reuse(1, math.nan, math.nan, 9))
    return buffer


def records(buffer):
    return [
        (question.question_id, experience.token_bytes, repr(buffer.reuse(experience)))
        for question, _, experience in buffer.items()
    ]


def test_without_a_record_generation_is_what_is_known():
    buffer = ExperienceBuffer()
    details = RolloutDetails.create(is_model=[1, 0, 0, 1])
    collect(
        buffer,
        "a",
        make(1, 2, version=3, logps=[-0.5, -1.5], entropy=0.25),
        make(1, 2, 3, 4, version=4, logps=[-1, -9, -9, -2], details=details),
    )
    plain, of_turns = buffer.completions("a")
    assert buffer.reuse(plain) == Reuse(0, 0.25, 1.0, 3)
    assert repr(buffer.reuse(of_turns)) == repr(Reuse(0, math.nan, 1.5, 4))
    assert buffer._store.reuse == {}


def test_a_record_is_of_one_completion():
    buffer = filled()
    of_a, other = buffer.completions("a")
    assert buffer.reuse(of_a) == Reuse(2, 0.5, 1.5, 7)
    assert buffer.reuse(other).num_replays == 0
    assert buffer.reuse(buffer.completions("b")[0]).num_replays == 1, "the same tokens, of another question"
    assert buffer.note_reuse("a", of_a, Reuse(3)) is True
    assert buffer.reuse(of_a).num_replays == 3
    assert buffer.note_reuse("a", make(9), Reuse(3)) is False
    assert buffer.note_reuse("x", of_a, Reuse(3)) is False
    with pytest.raises(TypeError, match="`reuse` must be a Reuse, got dict"):
        buffer.note_reuse("a", of_a, {"num_replays": 3})
    assert buffer.check_valid() == (True, "")


def test_a_record_leaves_with_its_completion():
    for leave in (
        lambda buffer: buffer.evict("a", make(1)),
        lambda buffer: buffer.retire("a"),
        lambda buffer: collect(buffer, "a", correct=K),
        lambda buffer: buffer.evict_older_than(4),
        lambda buffer: buffer.set_limits(capacity=None, max_completions_per_question=1),
        lambda buffer: buffer.set_limits(capacity=1, max_completions_per_question=None),
    ):
        buffer = filled()
        (before,) = [experience for experience in buffer._store.reuse if experience.policy_version == 3]
        leave(buffer)
        assert before not in buffer._store.reuse
        assert buffer.check_valid() == (True, "")
        collect(buffer, "a", make(1))
        assert all(buffer.reuse(experience).num_replays == 0 for experience in buffer._store.versions._owners[0])


def test_completions_without_a_record_pay_nothing():
    experiences = [make(number) for number in range(1000)]

    def growth(buffer):
        gc.collect()
        tracemalloc.start()
        buffer.collect(Question("a", {"prompt": "a"}), experiences, num_correct=1, group_size=K)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    fresh, used = ExperienceBuffer(), filled()
    assert abs(growth(used) - growth(fresh)) < 20_000
    assert len(used._store.reuse) == 2


def test_files_keep_records(tmp_path):
    buffer = filled()
    buffer.save(tmp_path / "buffer")
    loaded = ExperienceBuffer.load(tmp_path / "buffer")
    assert records(loaded) == records(buffer)
    assert len(loaded._store.reuse) == 2


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("num_replays", [-1, 0, 1, 0], "`num_replays` must not be negative, got -1"),
        ("num_replays", [2, 1, 1, 0], "known of a completion since its generation has a `known_at`"),
        ("known_entropy", [math.inf, None, 1.0, None], "`entropy` must be finite or NaN, got inf"),
        ("known_entropy", [1.0, None, None, 1.0], "`known_at`"),
        ("known_negative_log_likelihood", [-math.inf, None, 1.0, None], "`negative_log_likelihood` must be finite"),
        ("known_negative_log_likelihood", [1.0, 1.0, None, None], "`known_at`"),
        ("known_at", [-7, None, 9, None], "`scored_at` must not be negative, got -7"),
        ("known_at", [None] * 4, "`known_at`"),
    ],
)
def test_records_that_cannot_be_are_refused(tmp_path, column, values, message):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "buffer"
    filled().save(path)
    rewritten(path, "completions.parquet", with_column(column, lambda _: values))
    with pytest.raises(ExperienceBufferError, match=message):
        ExperienceBuffer.load(path)
    rows = [row | {column: value} for row, value in zip(filled().to_dataset().to_list(), values, strict=True)]
    with pytest.raises(ValueError, match=message):
        ExperienceBuffer.from_dataset(datasets.Dataset.from_list(rows), group_size=K)


def test_datasets_keep_records():
    datasets = pytest.importorskip("datasets")
    buffer = filled()
    dataset = buffer.to_dataset()
    columns = {name: dataset[name][:] for name in COLUMNS}
    assert str(columns) == str(
        {
            "num_replays": [2, 0, 1, 0],
            "known_entropy": [0.5, None, math.nan, None],
            "known_negative_log_likelihood": [1.5, None, math.nan, None],
            "known_at": [7, None, 9, None],
        }
    )
    for source in (
        dataset,
        datasets.Dataset.from_list(dataset.to_list()),
        dataset.with_format("numpy"),
        datasets.Dataset.from_pandas(dataset.to_pandas()),
        dataset.map(lambda row: {"known_entropy": math.nan if row["known_entropy"] is None else row["known_entropy"]}),
    ):
        again = ExperienceBuffer.from_dataset(source, group_size=K)
        assert records(again) == records(buffer)
        assert again.check_valid() == (True, "")
    assert str(ExperienceBuffer.from_dataset(dataset, group_size=K).to_dataset().to_list()) == str(dataset.to_list())


def test_datasets_without_records():
    datasets = pytest.importorskip("datasets")
    dataset = filled().to_dataset()
    earlier = dataset.remove_columns(COLUMNS)
    assert ExperienceBuffer.from_dataset(earlier, group_size=K)._store.reuse == {}
    both = datasets.concatenate_datasets([earlier, dataset])
    assert both["num_replays"][:4] == [None] * 4
    again = ExperienceBuffer.from_dataset(both, group_size=K)
    assert (len(again), again.num_duplicates, again._store.reuse) == (4, 4, {}), "what came first is kept"


def test_the_schema_of_the_columns_is_that_of_the_files():
    dataset = filled().to_dataset()
    assert [dataset.features[name].dtype for name in COLUMNS] == ["int64", "float64", "float64", "int64"]
    assert pa.types.is_int64(dataset.data.schema.field("known_at").type)
