import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exgrpo_trl.buffer.tables import row_groups

SCHEMA = pa.schema([("number", pa.int64())])


@pytest.fixture
def file(tmp_path):
    """Five row groups of two numbers."""
    file = tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"number": range(10)}, schema=SCHEMA), file, row_group_size=2)
    return file


@pytest.fixture
def read(monkeypatch):
    """Numbers of the row groups that were read, in their order."""
    numbers = []
    original = pq.ParquetFile.read_row_group

    def read_row_group(self, number, **kwargs):
        numbers.append(number)
        if number == 3:
            raise OSError("the disk is gone")
        return original(self, number, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    return numbers


def test_row_groups_come_in_their_order(file):
    assert [group.column("number").to_pylist() for group in row_groups(file, SCHEMA)] == [
        [first, first + 1] for first in range(0, 10, 2)
    ]
    pq.write_table(SCHEMA.empty_table(), file)
    assert sum(len(group) for group in row_groups(file, SCHEMA)) == 0


def test_one_row_group_is_read_ahead(file, read):
    num_threads = threading.active_count()
    groups = row_groups(file, SCHEMA)
    for taken in range(2):
        next(groups)
        assert len(read) <= taken + 2, "memory is bounded"
    groups.close()
    assert read == [0, 1, 2]
    assert threading.active_count() == num_threads


def test_what_cannot_be_read_is_raised_where_it_is_used(file, read):
    groups = row_groups(file, SCHEMA)
    assert [next(groups).column("number")[0].as_py() for _ in range(3)] == [0, 2, 4]
    with pytest.raises(OSError, match="the disk is gone"):
        next(groups)
    with pytest.raises(ValueError, match="has the columns"):
        next(row_groups(file, pa.schema([("other", pa.int64())])))
