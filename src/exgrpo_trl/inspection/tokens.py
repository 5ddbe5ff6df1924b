"""Tokens of a completion as a terminal shows them: coloured by their probability, turns marked."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from ..records import Experience
from .readable import one_line, readable
from .text import Decoder, messages_of

# Lowest probability of a token, and its colour.
_SCALE = ((0.9, "green"), (0.5, "cyan"), (0.1, "yellow"), (0.01, "magenta"), (0.0, "red"))
_OTHERS_STYLE = "dim"
_MODEL, _OTHERS = "model", "tool or environment"


def has_colours(console: Console) -> bool:
    """Whether the console shows colours."""
    return console.is_terminal and console.color_system is not None and not console.no_color


def legend() -> Text:
    """What the colours mean."""
    text = Text("Probability of a token when generated:", style="bold")
    above = None
    for lowest, colour in _SCALE:
        name = f"<{above:g}" if lowest == 0 else f">={lowest:g}"
        text.append(f"  {name}", style=f"not bold {colour}")
        above = lowest
    return text.append("  not the model's", style=f"not bold {_OTHERS_STYLE}")


def pieces_of(experience: Experience, decoder: Decoder | None) -> list[str]:
    """Text of every token, or its id."""
    ids = experience.token_ids.tolist()
    return [f"{token} " for token in ids] if decoder is None else decoder.pieces(ids)


def turns_of(experience: Experience) -> list[tuple[str, int, int]]:
    """Who wrote which tokens: a role, the first token, and the one after the last."""
    runs = []
    for is_model, run in groupby(enumerate(experience.is_model.tolist()), lambda token: token[1]):
        positions = [position for position, _ in run]
        runs.append((is_model, positions[0], positions[-1] + 1))
    roles = _roles_of_others(experience, sum(not is_model for is_model, _, _ in runs))
    return [(_MODEL if is_model else next(roles), start, end) for is_model, start, end in runs]


def shown_tokens(experience: Experience, pieces: Sequence[str]) -> Text:
    """The tokens of a completion; where there are several turns, each begins with a line that says whose it is."""
    text = Text(overflow="fold")
    logps = experience.behavior_per_token_logps.tolist()
    turns = turns_of(experience)
    for role, start, end in turns:
        if len(turns) > 1:
            is_line_open = start > 0 and not text.plain.endswith("\n")
            text.append("\n" * is_line_open + f"-- {one_line(role, 30)}:\n", "bold")
        for piece, logp in zip(pieces[start:end], logps[start:end], strict=True):
            text.append(readable(piece), _style(logp) if role == _MODEL else _OTHERS_STYLE)
    return text


def _roles_of_others(experience: Experience, num_turns: int) -> Iterator[str]:
    messages = [] if experience.details is None else messages_of(experience.details.messages)
    others = [role for role, _ in groupby(role for role, _ in messages) if role != "assistant"]
    return iter(others if len(others) == num_turns and all(others) else [_OTHERS] * num_turns)


def _style(logp: float) -> str:
    return next(colour for lowest, colour in _SCALE if math.exp(min(logp, 0.0)) >= lowest)
