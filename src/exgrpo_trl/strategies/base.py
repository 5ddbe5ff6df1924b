"""What all strategies share. A plain function is enough for a rule that keeps no state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np

from ..records import Experience, Question, Replay

Kind = TypeVar("Kind", bound="Strategy")
_OPTIONAL = ("observe", "state_dict", "load_state_dict", "metrics", "requires_scores", "requires_success")


class CollectedBatch(Protocol):
    """What a strategy may look at when a batch has been collected; [`Batch`] is one."""

    @property
    def replays(self) -> tuple[Replay, ...]:
        """What was replayed."""

    @property
    def policy_version(self) -> int:
        """Version of the policy that generated the batch, in optimizer steps."""

    @property
    def is_fresh(self) -> np.ndarray:
        """Which rollouts were generated, booleans of shape `(num_groups, group_size)`."""

    @property
    def rewards(self) -> np.ndarray:
        """Success rewards of that shape, NaN where no reward function gave one."""

    @property
    def is_correct(self) -> np.ndarray:
        """Which of them reach the success threshold."""

    @property
    def questions(self) -> dict[int, Question]:
        """On the main process: questions by group, of the groups that changed the buffer."""

    @property
    def experiences(self) -> dict[int, Experience]:
        """On the main process: what was recorded, by row of the batch."""


class Strategy(ABC):
    """
    A rule that the trainer follows: which questions, which completions, what is stored, what leaves, which weight.

    The act is the call; each kind of strategy says with what. The other methods do nothing unless a strategy keeps a
    state. Strategies act and observe on the main process, weightings on all.
    """

    @abstractmethod
    def __call__(self, *args: Any) -> Any:
        """Act."""

    def observe(self, batch: CollectedBatch) -> None:  # noqa: B027 - optional
        """Learn from a generation batch, once for each, after its successes have been collected."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold; must survive JSON."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Restore what `state_dict` returned."""

    def metrics(self) -> dict[str, float]:
        """Numbers for the next log line, which puts `replay/` before their names."""
        return {}


def as_strategy(kind: type[Kind], rule: Callable[..., Any]) -> Kind:
    """A strategy of that kind that follows a rule."""
    if isinstance(rule, kind):
        return rule
    if not callable(rule) or isinstance(rule, type):
        raise TypeError(
            f"A {kind.__name__} must be callable with the arguments of {kind.__name__}.__call__, got {rule!r}. Pass "
            "a function, an object of a class that derives from it (not the class itself), or the name of a built-in "
            "one."
        )
    members = {name: getattr(rule, name) for name in _OPTIONAL if hasattr(rule, name)}
    followed = type(f"{kind.__name__}FromFunction", (kind,), {"__call__": lambda self, *args: rule(*args)})()
    vars(followed).update(members, rule=rule)
    return followed


def make_strategy(
    kinds: Mapping[str, Callable[..., Kind]],
    field: str,
    name: str,
    parameters: Mapping[str, Any],
    named_by: str | None = None,
) -> Kind:
    """The built-in strategy of a name, which a field of the configuration gives or an argument of the trainer."""
    named_by = named_by or field
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{named_by}={name!r} is unknown. Choose one of {', '.join(map(repr, kinds))}.")
    try:
        return kinds[name](**parameters)
    except TypeError as error:
        raise ValueError(f"{named_by}={name!r} does not take {field}_kwargs={dict(parameters)}: {error}.") from error
    except ValueError as error:
        raise ValueError(f"{named_by}={name!r} does not take {field}_kwargs={dict(parameters)}: {error}") from error
