"""How much memory a buffer from a disk may ask for, whatever its files declare."""

from __future__ import annotations

# Real buffers decode to 4 to 20 times their files. Those of a collapsed policy do to thousands: small ones fit into
# what is free, and large ones are written without compression, which no JSON exceeds 35 times.
FREE_BYTES = 2**29
BYTES_PER_BYTE = 64
# What a JSON value takes as a Python object, about: an empty list, a number with its place.
_BYTES_PER_VALUE = 64
# What a row takes as Python objects besides what is in it: a question or completion with its places in all indices.
_BYTES_PER_ROW = 512
_BYTES_PER_ID = 160


class Budget:
    """
    Bytes that may be decoded from files.

    Args:
        num_file_bytes (`int`):
            Size of all files of the buffer.
    """

    def __init__(self, num_file_bytes: int) -> None:
        self.limit: int = max(FREE_BYTES, BYTES_PER_BYTE * num_file_bytes)
        self.spent: int = 0
        self._num_file_bytes = num_file_bytes

    @property
    def is_exceeded(self) -> bool:
        """Whether more was asked for than is allowed."""
        return self.spent > self.limit

    def check(self, num_bytes: int) -> None:
        """
        Ask for memory that is given back.

        Raises:
            ValueError: if that is too much.
        """
        self.spend(num_bytes)
        self.spent -= num_bytes

    def spend(self, num_bytes: int) -> None:
        """
        Ask for memory, before it is allocated.

        Raises:
            ValueError: if that is too much.
        """
        self.spent += num_bytes
        if self.is_exceeded:
            raise ValueError(
                f"it asks for more than {self.limit / 2**20:,.0f} MiB of memory, where all files together have "
                f"{self._num_file_bytes:,} bytes; at most {BYTES_PER_BYTE} times their size are read, or "
                f"{FREE_BYTES // 2**20} MiB"
            )


def row_bytes(num_rows: int, *, is_id: bool) -> int:
    """What rows take as Python objects, about: questions, completions and images, or ids alone."""
    return num_rows * (_BYTES_PER_ID if is_id else _BYTES_PER_ROW)


def json_bytes(text: str) -> int:
    """Most bytes that the values of a JSON text take as Python objects, about, besides those of the text itself."""
    return _BYTES_PER_VALUE * (text.count(",") + text.count("[") + text.count("{"))
