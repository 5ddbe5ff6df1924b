"""Environments of a batch: real ones for its fresh rows, stand-ins for those that stored rollouts take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ..batch import Batch
from ..images import is_image


class StoredRollout:
    """Takes the place of the environment of a stored rollout, whose state is gone: nothing is reset or stepped."""

    def reset(self, **row: Any) -> None:
        """Observes nothing: the prompt of a stored rollout holds what its environment showed."""


@contextmanager
def stand_ins(trainer: Any, batch: Batch, inputs: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """
    Within the block, the trainer resets and steps environments of fresh rows only.

    Args:
        trainer ([`~trl.GRPOTrainer`]):
            Trainer with environments: a pool per name of an environment from TRL 1.8 on, one per row before.
        batch ([`Batch`]):
            The batch.
        inputs (`Sequence[Mapping[str, Any]]`):
            Rows of this process.
    """
    attribute = "_environment_pool" if hasattr(trainer, "_environment_pool") else "environments"
    real = getattr(trainer, attribute)
    with ExitStack() as stack:
        if attribute == "environments":
            handed: Any = [StoredRollout() if row in batch.stored else real[row] for row in range(len(real))]
            fresh = {row: handed[row] for row in range(min(len(inputs), len(handed))) if row not in batch.stored}
        else:
            handed, fresh = _handed(trainer, batch, inputs)
        for row, environment in fresh.items():
            stack.enter_context(_naming_row(environment, batch.first_row + row))
        setattr(trainer, attribute, handed)
        try:
            yield
        finally:
            setattr(trainer, attribute, real)


def _handed(
    trainer: Any, batch: Batch, inputs: Sequence[Mapping[str, Any]]
) -> tuple[dict[Any, list[Any]], dict[int, Any]]:
    """Instances of each environment in the order of its rows, and those of fresh rows by position."""
    pool, factories = trainer._environment_pool, trainer.environment_factories
    handed: dict[Any, list[Any]] = {name: [] for name in pool}
    num_taken: dict[Any, int] = defaultdict(int)
    fresh: dict[int, Any] = {}
    for position, name in enumerate(names_of(trainer, inputs)):
        if name not in pool:  # TRL says so
            continue
        if position in batch.stored:
            handed[name].append(StoredRollout())
            continue
        if num_taken[name] == len(pool[name]):
            pool[name].append(factories[name]())
        fresh[position] = pool[name][num_taken[name]]
        handed[name].append(fresh[position])
        num_taken[name] += 1
    return handed, fresh


def names_of(trainer: Any, inputs: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Name of the environment of each row, as TRL resolves it; `None` for the only one."""
    is_multiple = getattr(trainer, "_multi_environment", False)
    return [row.get("environment") if is_multiple else None for row in inputs]


@contextmanager
def _naming_row(environment: Any, row: int) -> Iterator[None]:
    """A failure of `reset` names the row, as far as the environment can be wrapped."""
    reset = environment.reset

    def naming(*args: Any, **kwargs: Any) -> Any:
        try:
            return reset(*args, **kwargs)
        except Exception as error:
            raise RuntimeError(
                f"{type(environment).__name__}.reset failed in row {row} of the generation batch, with the columns "
                f"{sorted(kwargs)}: {type(error).__name__}: {error}. Let reset take the columns of the dataset "
                "(**kwargs) and handle each of its rows, or remove the row."
            ) from error

    # An environment without a dict of its own, or with checked attributes, fails without the row.
    with suppress(AttributeError, TypeError, ValueError):
        environment.reset = naming
    try:
        yield
    finally:
        if getattr(environment, "__dict__", {}).get("reset") is naming:
            del environment.reset


def without_images(prompt: Any, images: Sequence[Any]) -> Any:
    """A prompt with open places for the images of its row, which TRL fills in again."""
    if not isinstance(prompt, list) or not images:
        return prompt

    left = list(images)  # an environment may show an image of the row once more

    def place(part: Any) -> Any:
        image = part.get("image") if isinstance(part, dict) else None
        found = next((number for number, of_row in enumerate(left) if is_image(image) and of_row is image), None)
        if found is None:
            return part
        del left[found]
        return {key: value for key, value in part.items() if key != "image"}

    return [
        message | {"content": [place(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in prompt
    ]
