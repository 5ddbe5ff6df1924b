"""Text of stored completions and prompts, without transformers: with the `tokenizer.json` of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..buffer.locations import BUFFER_FOLDER
from ..images import ImageReference, StoredImage
from ..records import Experience, ExperienceBufferError
from .opened import Opened

TOKENIZER_FILE = "tokenizer.json"
# Tokens that may be parts of one character: a window of more holds characters that cannot be decoded.
_MOST_PARTS = 8


class Decoder:
    """
    Text of token ids.

    Args:
        file (`Path`):
            A `tokenizer.json`.

    Raises:
        ExperienceBufferError: if it cannot be read.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        with self._trusting_nobody():
            from tokenizers import Tokenizer

            self._tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def texts(self, all_ids: Iterable[Sequence[int]]) -> list[str]:
        """Completions as reward functions saw them, without special tokens."""
        with self._trusting_nobody():
            return self._tokenizer.decode_batch([list(ids) for ids in all_ids], skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """
        Text that every token adds, special ones included; together they are the whole text.

        The text of a character that takes several tokens is with the last of them.
        """
        pieces = []
        # Tokens are decoded together with the last ones that made text: what a token is depends on what precedes it.
        context = shown = 0
        for end in range(1, len(ids) + 1):
            before, now = self._whole(ids[context:shown]), self._whole(ids[context:end])
            is_part = now.endswith("\ufffd") and end - shown < _MOST_PARTS and end < len(ids)
            if is_part or len(now) < len(before):
                pieces.append("")
                continue
            pieces.append(now[len(before) :])
            context, shown = shown, end
        return pieces

    def _whole(self, ids: Sequence[int]) -> str:
        with self._trusting_nobody():
            return self._tokenizer.decode(list(ids), skip_special_tokens=False) if len(ids) else ""

    @contextmanager
    def _trusting_nobody(self) -> Iterator[None]:
        """Turn whatever the file of a stranger makes the library do into an error."""
        try:
            yield
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # what Rust panics with is no Exception
            raise ExperienceBufferError(
                f"The tokenizer {self.file} cannot be used ({type(error).__name__}: {str(error)[:200]}). Name another "
                "one with --tokenizer."
            ) from error


def find_decoder(opened: Opened, given: Path | None) -> tuple[Decoder | None, str]:
    """
    What decodes the completions of a buffer, and what to say of it.

    Args:
        opened ([`Opened`]):
            The buffer.
        given (`Path`, *optional*):
            A `tokenizer.json`, or a directory with one. By default that of the checkpoint around the buffer.

    Raises:
        ExperienceBufferError: if the given one is missing, cannot be read, or lacks stored tokens.
    """
    if given is not None:
        file = given / TOKENIZER_FILE if given.is_dir() else given
        if not file.is_file():
            raise ExperienceBufferError(
                f"There is no tokenizer at {file}. --tokenizer takes a {TOKENIZER_FILE}, or a directory with one."
            )
        decoder = Decoder(file)
        if reason := _misfit(decoder, opened):
            raise ExperienceBufferError(f"{reason} Name the tokenizer that it was collected with.")
        return decoder, f"Text by {file}."
    file = opened.directory.parent / TOKENIZER_FILE
    # Beside a buffer of another name there may be anybody's tokenizer.
    if BUFFER_FOLDER not in opened.directory.name or not file.is_file():
        return None, f"Token ids, as no {file} belongs to the buffer. Name its tokenizer with --tokenizer."
    try:
        decoder = Decoder(file)
    except ExperienceBufferError as error:
        return None, f"Token ids. {error}"
    reason = _misfit(decoder, opened)
    return (None, f"Token ids. {reason}") if reason else (decoder, f"Text by {file}.")


def _misfit(decoder: Decoder, opened: Opened) -> str:
    highest = max((int(experience.token_ids.max()) for _, _, experience in opened.buffer.items()), default=0)
    if highest < decoder.num_tokens:
        return ""
    return (
        f"The tokenizer {decoder.file} has {decoder.num_tokens} tokens, but the experience buffer at "
        f"{opened.directory} holds token id {highest}."
    )


def messages_of(prompt: Any) -> list[tuple[str, str]]:
    """Roles and texts of a prompt or of the messages of a completion; a role is empty where there is none."""
    if not isinstance(prompt, list | tuple):
        return [("", content_text(prompt))]
    return [_message(message) for message in prompt]


def plain_text(prompt: Any) -> str:
    """All text of a prompt."""
    return "\n".join(text for _, text in messages_of(prompt))


def prompt_of(row_example: dict[str, Any], experience: Experience | None = None) -> Any:
    """The prompt that a completion answers: that of its row, or what an environment made of it."""
    shown = None if experience is None or experience.details is None else experience.details.prompt
    return row_example.get("prompt") if shown is None else shown


def content_text(content: Any) -> str:
    """Text of the content of a message, images named."""
    if content is None:
        return ""
    if isinstance(content, StoredImage | ImageReference):
        return f"<image {content.digest[:8]}>"
    if isinstance(content, list | tuple):
        return "".join(map(content_text, content))
    if isinstance(content, dict):
        if content.get("type") == "text":
            return content_text(content.get("text"))
        if content.get("type") == "image":
            image = content.get("image")
            return content_text(image) if isinstance(image, StoredImage | ImageReference) else "<image>"
    return str(content)


def _message(message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        return "", content_text(message)
    text = content_text(message.get("content"))
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list | tuple) else ():
        function = call.get("function", call) if isinstance(call, dict) else call
        text += f"{' ' if text else ''}<call {function}>"
    return str(message.get("role") or ""), text
