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


def one_line(text: str, most: int | None = None) -> str:
    r"""The same in a single line, of at most so many characters: a stored line break would look like a row of ours."""
    shown = readable(text if most is None else text[: most + 1]).replace("\n", "\\n")
    return shown if most is None or len(shown) <= most else f"{shown[: most - 3]}..."
