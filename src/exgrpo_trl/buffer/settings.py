"""Settings of a buffer: which can be, and which go together."""

from __future__ import annotations

from ..records import as_integer

COMPLETION, GROUP = "completion", "group"
# Buckets are counted one by one up to it, so it cannot be whatever a file says.
MAX_GROUP_SIZE = 2**16


def checked_unit(unit: str) -> str:
    """
    The unit that a buffer keeps.

    Raises:
        ValueError: if it is none.
    """
    if unit != COMPLETION and unit != GROUP:  # whatever it is: files say it, too
        raise ValueError(f"`unit` must be {COMPLETION!r} or {GROUP!r}, got {unit!r}.")
    return unit


def check_limits(group_size: int | None, **limits: int | None) -> None:
    """
    Check that a group fits into the limits of a buffer, once its size is known.

    Raises:
        ValueError: if it does not.
    """
    for name, limit in limits.items():
        if group_size is not None and limit is not None and limit < group_size:
            raise ValueError(
                f"`{name}`={limit} can never hold a group of {group_size} completions, which unit={GROUP!r} "
                f"keeps whole. Set it to at least {group_size}, or to None for no limit."
            )


def checked_size(name: str, value: int | None, most: int = 2**63 - 1) -> int | None:
    """A size as a plain integer; `None` for no limit."""
    if value is None:
        return None
    size = as_integer(name, value, " or None")
    if size < 1:
        raise ValueError(f"`{name}` must be at least 1, got {size}; use None for no limit.")
    if size > most:
        raise ValueError(f"`{name}` must be at most {most}, got {size}.")
    return size


def checked_count(name: str, value: int, group_size: int) -> int:
    """A number of completions of a group as a plain integer."""
    count = as_integer(name, value)
    if not 0 <= count <= group_size:
        raise ValueError(f"`{name}` must lie in 0..{group_size}, got {count}.")
    return count
