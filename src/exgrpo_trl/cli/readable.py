"""Text that a terminal shows instead of obeying it."""

from __future__ import annotations


def readable(text: str) -> str:
    r"""
    The text with escapes such as `\\x1b` in the place of what is not printable, line breaks aside.

    Stored text may be a stranger's: control characters move the cursor or write elsewhere, marks of direction show
    characters in another order, and lone surrogates cannot be written at all.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character == "\n" else ascii(character)[1:-1] for character in text
    )
