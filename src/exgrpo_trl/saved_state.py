"""Parts of a state that was saved as JSON, checked as they are taken: a checkpoint may be a stranger's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Of counters and steps: more than a run reaches, and what 64 bits hold.
_MAX_INTEGER = 2**63 - 1


def part_of(state: Any, name: str) -> Mapping[str, Any]:
    """A part of a state that has parts of its own. Raises `ValueError` if it is none, as all of these do."""
    value = _value(state, name)
    if not isinstance(value, dict):
        raise _wrong(name, value, "an object")
    return value


def flag_of(state: Any, name: str) -> bool:
    """True or false."""
    value = _value(state, name)
    if type(value) is not bool:
        raise _wrong(name, value, "true or false")
    return value


def count_of(state: Any, name: str) -> int:
    """An integer that is not negative."""
    value = _value(state, name)
    if type(value) is not int or not 0 <= value <= _MAX_INTEGER:
        raise _wrong(name, value, "a number of something")
    return value


def count_or_none_of(state: Any, name: str) -> int | None:
    """An integer that is not negative, or nothing."""
    return None if _value(state, name) is None else count_of(state, name)


def number_of(state: Any, name: str) -> float:
    """A number, NaN included; no infinity."""
    value = _value(state, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise _wrong(name, value, "a number")
    return value


def texts_of(state: Any, name: str) -> list[str]:
    """A list of texts."""
    value = _value(state, name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _wrong(name, value, "a list of texts")
    return value


def lists_of_texts_of(state: Any, name: str) -> list[list[str]]:
    """A list of lists of texts."""
    value = _value(state, name)
    if not isinstance(value, list):
        raise _wrong(name, value, "a list of lists of texts")
    return [texts_of({name: item}, name) for item in value]


def counts_of(state: Any, name: str) -> dict[str, int]:
    """Integers that are not negative, by name."""
    value = part_of(state, name)
    return {key: count_of(value, key) for key in value}


def _value(state: Any, name: str) -> Any:
    if not isinstance(state, Mapping) or name not in state:
        raise ValueError(f"there is no `{name}`")
    return state[name]


def _wrong(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"`{name}` is {ascii(value)[:80]} instead of {wanted}")
