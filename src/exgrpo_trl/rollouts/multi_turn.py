"""Rollouts of several turns: where stored ones go, and what is kept of fresh ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ..batch import Batch
from ..images import opened
from ..processes import Processes

_DONE, _GENERATES, _FAILED = range(3)


def put_stored_rollouts(
    result: Sequence[Any], batch: Batch, decode: Callable[[Sequence[int]], str]
) -> tuple[Any, ...]:
    """
    Put complete stored rollouts into their rows, once tools have been called for the others.

    Args:
        result (`Sequence`):
            What TRL's `_tool_call_loop` returned: masks of what the model wrote, messages, token ids and
            log-probabilities (or None) of each row, two counts and, from TRL 1.4 on, images that tools returned.
        batch ([`Batch`]):
            The batch; takes note of the messages of fresh rows.
        decode (`Callable`):
            Text of token ids, for stored completions that came without messages.

    Returns:
        `tuple`: the same, with the stored rollouts.
    """
    masks, messages, token_ids, logps = (None if part is None else list(part) for part in result[:4])
    assert masks is not None
    assert messages is not None
    assert token_ids is not None
    tool_images = [list(images) for images in result[6]] if len(result) > 6 else None
    batch.fresh.messages = [snapshot(of_row) for of_row in messages]
    for position, experience in batch.stored.items():
        kept = None if experience.details is None else experience.details.messages
        text = decode(experience.token_ids.tolist()) if kept is None else ""
        messages[position] = [{"role": "assistant", "content": text}] if kept is None else opened(kept)
        masks[position] = experience.is_model.astype(int).tolist()
        token_ids[position] = experience.token_ids.tolist()
        if logps is not None:
            logps[position] = experience.behavior_per_token_logps.tolist()
        if tool_images is not None:
            tool_images[position] = images_of_tools(messages[position])
    batch.fresh.told_masks = masks
    rest = result[4:] if tool_images is None else (*result[4:6], tool_images, *result[7:])
    return masks, messages, token_ids, logps, *rest


class EvenTurns:
    """
    As many turns on every process, where one cannot generate without the others because each has a part of the model.

    TRL generates a later turn as long as a row of the process calls a tool, so that processes would wait for each
    other in vain. Here those that are done go on to generate, for nothing, until all are.

    Args:
        processes ([`Processes`]):
            Processes of the run.
        generate_nothing (`Callable`):
            Takes part in a turn of the others.
    """

    def __init__(self, processes: Processes, generate_nothing: Callable[[], Any]) -> None:
        self.processes = processes
        self.generate_nothing = generate_nothing

    def turn(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Generate a later turn, with all processes."""
        if self.processes.highest(_GENERATES) == _FAILED:
            raise RuntimeError("another process failed while it called tools")
        return generate(*args, **kwargs)

    @contextmanager
    def until_all_are_done(self) -> Iterator[None]:
        """Leave the block, in which turns are generated, when the last process does."""
        try:
            yield
        except Exception:
            self.processes.highest(_FAILED)
            raise
        while (state := self.processes.highest(_DONE)) == _GENERATES:
            self.generate_nothing()
        if state == _FAILED:
            raise RuntimeError("another process failed while it called tools")


def images_of_tools(messages: Sequence[Any]) -> list[Any]:
    """Images in what tools said, in order."""
    return [
        part["image"]
        for message in messages
        if message.get("role") == "tool" and isinstance(message.get("content"), list)
        for part in message["content"]
        if isinstance(part, dict) and part.get("type") == "image"
    ]


def snapshot(value: Any) -> Any:
    """A copy of messages as they are now: reward functions may write into them. Leaves are shared."""
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    return [snapshot(item) for item in value] if isinstance(value, list | tuple) else value
