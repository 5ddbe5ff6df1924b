"""Checksums that are taken while a file is written are those of what is in it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from exgrpo_trl.buffer.hashed_files import HashedFile, digests

FULL = Path("/dev/full")
PARTS = [
    b"",
    b"a",
    b"bc" * 10,
    b"d" * 2**20,
    bytes(range(256)) * 1000,
    *(bytes([number]) * 5000 for number in range(50)),
]


def test_what_is_described_is_what_is_in_the_files(tmp_path):
    with ThreadPoolExecutor(1) as executor:
        files = {name: HashedFile(tmp_path / name, executor) for name in ("some", "all", "none")}
        for number, part in enumerate(PARTS):
            files["all"].write(part)
            if number % 3 == 0:
                files["some"].write(part)
        for file in files.values():
            file.close()
        described = {name: file.described() for name, file in files.items()}
    assert (tmp_path / "all").read_bytes() == b"".join(PARTS)
    found = {name: {"bytes": size, "sha256": digest} for name, size, digest in digests(tmp_path, files)}
    assert described == found


def test_memory_that_is_used_again_counts_as_it_was_written(tmp_path):
    memory = bytearray(b"first")
    with ThreadPoolExecutor(1) as executor:
        blocked = threading.Event()
        executor.submit(blocked.wait)
        with HashedFile(tmp_path / "file", executor) as file:
            file.write(memory)
            memory[:] = b"other"
            file.write(memoryview(memory))
            blocked.set()
        [(_, size, digest)] = digests(tmp_path, ["file"])
        assert file.described() == {"bytes": size, "sha256": digest}
    assert (tmp_path / "file").read_bytes() == b"firstother"


def test_little_waits_for_its_checksum(tmp_path):
    with ThreadPoolExecutor(1) as executor:
        blocked = threading.Event()
        executor.submit(blocked.wait)
        with HashedFile(tmp_path / "file", executor) as file:
            writing = threading.Thread(target=lambda: [file.write(b"a" * 2**16) for _ in range(100)])
            writing.start()
            writing.join(0.2)
            assert writing.is_alive(), "it writes on and on while nothing is hashed"
            blocked.set()
            writing.join(10)
        assert file.described()["bytes"] == 100 * 2**16


@pytest.mark.skipif(not FULL.exists(), reason="needs a full disk")
def test_a_full_disk_is_an_error():
    with ThreadPoolExecutor(1) as executor:
        file = HashedFile(FULL, executor)
        with pytest.raises(OSError, match="No space left"):
            file.write(b"a" * 2**20)
        file.raw.close()
        small = HashedFile(FULL, executor)
        small.write(b"a")
        with pytest.raises(OSError, match="No space left"):
            small.close()
