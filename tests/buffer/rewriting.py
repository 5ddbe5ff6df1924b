"""Saved buffers changed on purpose."""

import json

import pyarrow as pa
import pyarrow.parquet as pq

from exgrpo_trl.buffer import hashed_files, metadata

# As buffers are written; other layouts are refused before anyone looks at what is in them.
LAYOUT = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}


def rewritten(path, name, change):
    """A data file changed on purpose, with checksums that match."""
    table = change(pq.read_table(path / name))
    pq.write_table(table, path / name, **LAYOUT)
    seal(path)


def with_column(name, change):
    def changed(table):
        values = pa.array(change(table.column(name).to_pylist()), table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), table.schema.field(name), values)

    return changed


def seal(path):
    """Give the files of a buffer the checksums that they should have."""
    about = json.loads((path / "metadata.json").read_text())
    about["files"] = {
        file: {"bytes": size, "sha256": digest}
        for file, size, digest in hashed_files.digests(path, metadata.data_files(about["schema_version"]))
    }
    (path / "metadata.json").write_text(sealed(json.dumps(about | {"checksum": ""}, indent=2)))


def sealed(text):
    """The text of a metadata file with its own checksum."""
    return text.replace('"checksum": ""', f'"checksum": "{metadata._sha256(text)}"', 1)


def rewrite_metadata(path, change, of_text=lambda text: text):
    """Metadata changed on purpose, as an object or as text, with its own checksum."""
    about = json.loads((path / "metadata.json").read_text())
    change(about)
    (path / "metadata.json").write_text(sealed(of_text(json.dumps(about | {"checksum": ""}, indent=2))))
