"""Completions of a user as the tokens that follow those of their prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple


class _Text(NamedTuple):
    """A rendered prompt and what follows it; text prompts are tokenized with special tokens, as TRL does it."""

    prompt: str
    completion: str
    is_chat: bool


class Continuations:
    """
    Tokenizes completions as continuations of their prompts: what a model writes after the tokens of the prompt.

    Text is what the model writes, word for word. Messages are rendered behind the prompt with the chat template, and
    what follows the prompt and its generation prompt is the completion, up to the first end token behind the content.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            The tokenizer.
        template (`Mapping[str, Any]`, *optional*):
            Further arguments of `apply_chat_template`.
        add_eos (`bool`, *optional*, defaults to `True`):
            Whether an end token follows a completion that has none. Truncated completions have none.
        eos_token_ids (`Collection[int]`, *optional*):
            Tokens that end a completion. By default that of the tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: Mapping[str, Any] | None = None,
        add_eos: bool = True,
        eos_token_ids: Collection[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template: dict[str, Any] = dict(template or {})
        self.add_eos = add_eos
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids or own)
        if add_eos and not own:
            raise ValueError("The tokenizer has no end token. Set its `eos_token`, or pass add_eos=False.")

    def prompt_ids(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Token ids of prompts, text or messages, as TRL renders them without tools."""
        return [
            self._ids([prompt], is_chat=False)[0]
            if isinstance(prompt, str)
            else self._ids([self._render(prompt, add_generation_prompt=True)], is_chat=True)[0]
            for prompt in prompts
        ]

    def completion_ids(
        self, prompts: Sequence[Any], prompt_ids: Sequence[Sequence[int]], completions: Sequence[Any]
    ) -> list[list[int] | ValueError]:
        """
        Token ids of completions, or the reason why there are none.

        Args:
            prompts (`Sequence`):
                Text or messages.
            prompt_ids (`Sequence[Sequence[int]]`):
                Their tokens.
            completions (`Sequence`):
                Text or messages of the assistant.
        """
        results: list[list[int] | ValueError] = [ValueError()] * len(prompts)
        texts: dict[int, _Text] = {}
        for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            try:
                texts[number] = self._text(prompt, completion)
            except Exception as error:  # a chat template raises what it likes
                results[number] = (
                    error if type(error) is ValueError else ValueError(f"{type(error).__name__}: {error}")
                )
        for is_chat in (False, True):
            # Tokenizers work on many texts at once.
            numbers = [number for number, text in texts.items() if text.is_chat == is_chat]
            whole = [texts[number].prompt + texts[number].completion for number in numbers]
            for number, ids in zip(numbers, self._ids(whole, is_chat=is_chat), strict=True):
                try:
                    results[number] = self._behind(texts[number], prompt_ids[number], ids)
                except ValueError as error:
                    results[number] = error
        return results

    def _text(self, prompt: Any, completion: Any) -> _Text:
        if completion is None:
            raise ValueError("it has no completion")
        if isinstance(completion, str):
            if not completion:
                raise ValueError("its completion is empty")
            is_chat = not isinstance(prompt, str)
            return _Text(self._render(prompt, add_generation_prompt=True) if is_chat else prompt, completion, is_chat)
        if isinstance(prompt, str):
            raise ValueError("its prompt is text, but its completion is not")
        content = _content_of(completion)
        rendered = self._render(prompt, add_generation_prompt=True)
        # A truncated message is not closed.
        whole = self._render([*prompt, *completion], **({} if self.add_eos else {"continue_final_message": True}))
        if not whole.startswith(rendered):
            raise ValueError(
                "the chat template renders its prompt in another way once an answer follows; give the completion as "
                "text, as the model would write it after the prompt"
            )
        behind = whole[len(rendered) :]
        start = behind.rfind(content.strip())
        if start < 0:
            raise ValueError(
                "the chat template changes its message, as those that leave out reasoning do; give the completion as "
                "text, as the model would write it after the prompt"
            )
        return _Text(rendered, self._until_end(behind, start + len(content.strip())), is_chat=True)

    def _until_end(self, text: str, start: int) -> str:
        """The text up to the first end token from `start` on; all of it if there is none."""
        ends = [self.tokenizer.decode([token]) for token in self.eos_token_ids]
        found = [position + len(end) for end in ends if end and (position := text.find(end, start)) >= 0]
        return text[: min(found)] if found else text

    def _behind(self, text: _Text, prompt_ids: Sequence[int], whole: list[int]) -> list[int]:
        """Tokens of the completion, behind those of the prompt, which are as they are."""
        prompt = list(prompt_ids)
        ids = whole[len(prompt) :]
        if whole[: len(prompt)] != prompt or not ids:
            # Tokens of the whole text would cross the border. A model goes on after the prompt's.
            [ids] = self._ids([text.completion], is_chat=True)
            if self._decoded([*prompt, *ids]) != self._decoded(whole):
                raise ValueError("its tokens behind those of the prompt would be another text; give completion_ids")
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown not in self.eos_token_ids and unknown in ids:
            raise ValueError("its completion has characters that the tokenizer does not know")
        return [*ids, self.tokenizer.eos_token_id] if self.add_eos and ids[-1] not in self.eos_token_ids else ids

    def _ids(self, texts: list[str], *, is_chat: bool) -> list[list[int]]:
        return (
            [list(ids) for ids in self.tokenizer(text=texts, add_special_tokens=not is_chat)["input_ids"]]
            if texts
            else []
        )

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        messages = [dict(message) for message in messages]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.template, **arguments))


def tokenizer_fingerprint(tokenizer: Any) -> dict[str, str]:
    """Hashes of vocabulary and chat template: whether stored token ids and prompts mean the same to a tokenizer."""
    specials = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), sorted(specials.items())])
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "chat_template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest(),
    }


def _content_of(messages: Any) -> str:
    """Text of the one message of an answer."""
    if not isinstance(messages, list) or len(messages) != 1 or not isinstance(messages[0], Mapping):
        raise ValueError("its completion is neither text nor one message of the assistant")
    message = messages[0]
    if message.get("role") != "assistant" or message.get("tool_calls"):
        raise ValueError("its completion has calls of tools or messages that the assistant did not write")
    content = message.get("content")
    if not isinstance(content, str):
        raise ValueError("the content of its completion is not text")
    if not content.strip():
        raise ValueError("its completion is empty")
    return content
