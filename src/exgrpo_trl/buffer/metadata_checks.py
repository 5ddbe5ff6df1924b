"""What the metadata of a saved buffer may say: every value that is used is checked before it is."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from ..values import MAX_DEPTH, is_too_deep
from .settings import MAX_GROUP_SIZE, checked_unit

_MAX_COUNT = 2**63 - 1
# Longer ones have no float, and every number of ours has one.
_MAX_DIGITS = 300
_COUNTS = ("questions", "completions", "tokens", "retired", "evicted", "duplicates")
_SIZES = {"group_size": MAX_GROUP_SIZE, "capacity": _MAX_COUNT, "max_completions_per_question": _MAX_COUNT}


def parsed(text: str) -> dict[str, Any]:
    """
    The JSON object of a text.

    Raises:
        ValueError: if it is none, a key is there twice, a number is huge, or something is nested too deeply.
    """
    if is_too_deep(text):
        raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
    found = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    if not isinstance(found, dict):
        raise ValueError(f"it holds {_shown(found)} instead of an object")
    return found


def check_metadata(metadata: Mapping[str, Any], data_files: Iterable[str]) -> None:
    """
    Check the metadata of a schema version that can be read.

    Args:
        metadata (`Mapping[str, Any]`):
            The content of the file.
        data_files (`Iterable[str]`):
            Names of the other files of that version.

    Raises:
        ValueError: if a value is missing or is not what it should be.
    """
    version = _value(metadata, "package_version", "the metadata")
    if not isinstance(version, str | None):
        raise ValueError(f"`package_version` is {_shown(version)} instead of text")
    files = _object(metadata, "files")
    if unknown := sorted(files.keys() - set(data_files)):
        raise ValueError(f"`files` names {_shown(unknown)}, which is no file of a buffer")
    for name in data_files:
        file = _object(files, name, "`files`")
        _integer_in(file, "bytes", 0, _MAX_COUNT, f"`files` of {name}")
        if not isinstance(_value(file, "sha256", f"`files` of {name}"), str):
            raise ValueError(f"`sha256` of {name} is {_shown(file['sha256'])} instead of text")
    counts = _object(metadata, "counts")
    for name in _COUNTS:
        _integer_in(counts, name, 0, _MAX_COUNT, "`counts`")
    if unknown := sorted(counts.keys() - set(_COUNTS)):
        raise ValueError(f"`counts` has {_shown(unknown)}, which is not counted")
    _check_settings(_object(metadata, "settings"))
    check_rng(_object(metadata, "rng"))
    for name in ("provenance", "replay_state"):
        _object(metadata, name)


def _check_settings(settings: Mapping[str, Any]) -> None:
    for name, most in _SIZES.items():
        if _value(settings, name, "`settings`") is not None:
            _integer_in(settings, name, 1, most, "`settings`")
    if type(_value(settings, "retire_solved", "`settings`")) is not bool:
        raise ValueError(f"`retire_solved` is {_shown(settings['retire_solved'])} instead of true or false")
    if "unit" in settings:
        checked_unit(settings["unit"])
    # They are arguments of a constructor, which may take others that are nobody else's business.
    if unknown := sorted(settings.keys() - {*_SIZES, "retire_solved", "unit"}):
        raise ValueError(f"`settings` has {_shown(unknown)}, which is no setting of a buffer")


def check_rng(rng: Mapping[str, Any]) -> None:
    """
    Check the state of a random generator.

    Raises:
        ValueError: if it is not that of a PCG64.
    """
    if _value(rng, "bit_generator", "`rng`") != "PCG64":
        raise ValueError(f"`rng` is of {_shown(rng['bit_generator'])} instead of PCG64")
    inner = _object(rng, "state", "`rng`")
    for owner, name, bits in (
        (inner, "state", 128),
        (inner, "inc", 128),
        (rng, "has_uint32", 1),
        (rng, "uinteger", 32),
    ):
        _integer_in(owner, name, 0, 2**bits - 1, "`rng`")
    if inner["inc"] % 2 == 0:
        raise ValueError("`inc` of `rng` is even, which the state of no PCG64 is")


def _value(owner: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in owner:
        raise ValueError(f"{where} has no `{name}`")
    return owner[name]


def _object(owner: Mapping[str, Any], name: str, where: str = "the metadata") -> dict[str, Any]:
    value = _value(owner, name, where)
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` is {_shown(value)} instead of an object")
    return value


def _integer_in(owner: Mapping[str, Any], name: str, least: int, most: int, where: str) -> None:
    value = _value(owner, name, where)
    if type(value) is not int or not least <= value <= most:  # neither a truth value nor 1.0
        raise ValueError(f"`{name}` in {where} is {_shown(value)} instead of an integer in {least}..{most}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is in an object twice")
    return found


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
