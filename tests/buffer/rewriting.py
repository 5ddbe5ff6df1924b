"""Saved buffers changed on purpose."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from exgrpo_trl.buffer import metadata


def rewritten(path, name, change):
    """A data file changed on purpose, with checksums that match."""
    table = change(pq.read_table(path / name))
    pq.write_table(table, path / name)
    about = json.loads((path / "metadata.json").read_text())
    about["files"] = {
        file: {"bytes": size, "sha256": digest}
        for file, size, digest in metadata.digests(path, metadata.data_files(about["schema_version"]))
    }
    text = json.dumps(about | {"checksum": ""}, indent=2)
    text = text.replace('"checksum": ""', f'"checksum": "{metadata._sha256(text)}"', 1)
    (path / "metadata.json").write_text(text)


def with_column(name, change):
    def changed(table):
        values = pa.array(change(table.column(name).to_pylist()), table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), table.schema.field(name), values)

    return changed
