"""What the model card says of replay: how it was set, and what the buffer held. TRL writes the rest of the card."""

import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from trl import GRPOConfig

from . import __version__
from .config import ExGRPOConfig
from .replayer import Replayer

_HEADING = "\n## Experience replay\n"
_NEXT_SECTION = "\n## "
_CITATIONS = "\n## Citations\n"  # of TRL's card; without them, the end
# Said even where they are the defaults: they are the method.
_ALWAYS = (
    "replay_fraction",
    "replay_start_pass_rate",
    "question_sampling",
    "completion_selection",
    "replay_weighting",
    "success_threshold",
)
_NOT_OF_THE_MODEL = ("replay_log", "log_replay")


def describe_replay(card: str, replayer: Replayer, num_steps: int) -> None:
    """
    Put what is to be said of replay into a model card, in the place of what an earlier call has put there.

    Args:
        card (`str`):
            Path of the card, Markdown. Where there is none, nothing is written.
        replayer ([`Replayer`]):
            What is told of, on the main process.
        num_steps (`int`):
            Optimizer steps so far.
    """
    path = Path(card)
    if not path.exists():
        return
    before, heading, rest = path.read_text(encoding="utf-8").partition(_HEADING)
    if heading:
        _, next_section, after = rest.partition(_NEXT_SECTION)
        rest = next_section + after
    else:
        before, heading, rest = before.partition(_CITATIONS)
        rest = heading + rest
    text = before.rstrip("\n") + "\n" + _HEADING + "\n" + _section(replayer, num_steps) + rest
    path.write_text(text, encoding="utf-8")


def _section(replayer: Replayer, num_steps: int) -> str:
    package = f"[ExGRPO](https://huggingface.co/papers/2510.02245) (arXiv 2510.02245), `exgrpo-trl` {__version__}"
    if not replayer.args.trains_stored:
        return f"Trained without replay (`replay_fraction=0`), which is plain GRPO, by the trainer of {package}.\n"
    lines = [
        f"Trained with experience replay: {package}.",
        "",
        *_table(("setting", "value"), _settings(replayer)),
        "",
        f"All other settings of replay are the defaults of `exgrpo-trl` {__version__}.",
        "",
        *_table((f"experience buffer after {num_steps} optimizer steps", ""), _held(replayer)),
    ]
    return "\n".join(lines) + "\n"


def _settings(replayer: Replayer) -> Iterable[tuple[str, str]]:
    """What differs from the defaults, and what makes the method; values as Python writes them."""
    own = {field.name for field in fields(ExGRPOConfig)} - {field.name for field in fields(GRPOConfig)}
    followed = replayer.strategies.names()
    yield "reward functions", ", ".join(map(_code, replayer.success_rule.names))
    for field in fields(ExGRPOConfig):
        name, value = field.name, getattr(replayer.args, field.name)
        if name not in own or name in _NOT_OF_THE_MODEL:
            continue
        is_built_in, strategy = followed.get(name, (True, value))
        if name in _ALWAYS or not is_built_in or strategy != field.default:
            yield _code(name), _code(repr(strategy) if is_built_in else strategy)


def _held(replayer: Replayer) -> Iterable[tuple[str, str]]:
    buffer = replayer.buffer
    sizes = buffer.metrics()
    for name, said in (
        ("questions", "stored questions"),
        ("completions", "stored completions"),
        ("tokens", "their tokens"),
    ):
        if name in sizes:  # a buffer of the user may not tell
            yield said, f"{sizes[name]:.0f}"
    if hasattr(buffer, "reuse"):
        yield "their replays so far", f"{sum(buffer.reuse(item).num_replays for _, _, item in buffer.items())}"
    yield "retired questions (solved by a whole group)", f"{len(buffer.retired)}"
    yield "tokens taken from it instead of generated", f"{replayer.metrics.tokens_saved}"


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> list[str]:
    return [f"| {first} | {second} |" for first, second in (head, ("---", "---"), *rows)]


def _code(text: str) -> str:
    """A code span for the cell of a table, whatever the text holds."""
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if "`" in text else ""
    # A pipe would end the cell, also one after a backslash that is escaped itself.
    text = re.sub(r"(\\*)\|", lambda found: found[1] + "\\" * (len(found[1]) % 2) + r"\|", text)
    return f"{fence}{padding}{text}{padding}{fence}"
