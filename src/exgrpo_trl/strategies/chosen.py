"""The strategies of a trainer: one of each kind, from its configuration or from the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from ..saved_state import part_of
from .admission import ADMISSION_RULES, AdmissionRule
from .base import CollectedBatch, Strategy, as_strategy, make_strategy
from .eviction import EVICTION_RULES, EvictionRule
from .groups import GROUP_SELECTORS, GroupSelector
from .samplers import QUESTION_SAMPLERS, QuestionSampler
from .selectors import COMPLETION_SELECTORS, CompletionSelector
from .weighting import REPLAY_WEIGHTINGS, ReplayWeighting

if TYPE_CHECKING:
    from ..config import ExGRPOConfig

logger: Any = logging.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Strategies:
    """One strategy of each kind."""

    question_sampler: QuestionSampler
    completion_selector: CompletionSelector
    group_selector: GroupSelector
    admission: AdmissionRule
    eviction: EvictionRule
    weighting: ReplayWeighting

    @classmethod
    def choose(cls, args: ExGRPOConfig, **given: Callable[..., Any] | str | None) -> Strategies:
        """The given strategies, built-in ones by name, and those that the configuration names for the others."""
        return cls(**{name: _chosen(name, given.get(name), args) for name in _KINDS})

    def items(self) -> Iterator[tuple[str, Strategy]]:
        """All of them with their names."""
        yield "question_sampler", self.question_sampler
        yield "completion_selector", self.completion_selector
        yield "group_selector", self.group_selector
        yield "admission", self.admission
        yield "eviction", self.eviction
        yield "weighting", self.weighting

    def names(self) -> dict[str, tuple[bool, str]]:
        """Whether they are built-in, and their name or else that of their class, by field of the configuration."""
        told: dict[str, tuple[bool, str]] = {}
        for argument, strategy in self.items():
            _, built_in, field = _KINDS[argument]
            name = next((name for name, kind in built_in.items() if type(strategy) is kind), None)
            told[field] = (name is not None, name or _name_of(strategy))
        return told

    def observe(self, batch: CollectedBatch) -> None:
        """Show a collected batch to those that act on the main process alone: all but the weighting."""
        for name, strategy in self.items():
            if name != "weighting":
                strategy.observe(batch)

    def metrics(self) -> dict[str, float]:
        """What they report for a log line."""
        return {name: value for _, strategy in self.items() for name, value in strategy.metrics().items()}

    def state_dict(self) -> dict[str, Any]:
        """State of those that have one, with the name of their class; survives JSON."""
        states = {name: (strategy, strategy.state_dict()) for name, strategy in self.items()}
        return {
            name: {"class": _name_of(strategy), "state": state} for name, (strategy, state) in states.items() if state
        }

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; says so where a strategy has been replaced by one of another class."""
        for name, strategy in self.items():
            if states.get(name) is None:
                continue
            saved = part_of(states, name)
            if saved["class"] == _name_of(strategy):
                strategy.load_state_dict(saved["state"])
            else:
                logger.warning(
                    f"The checkpoint holds the state of {name}={saved['class']}, but the trainer has "
                    f"{name}={_name_of(strategy)}, which begins anew. Pass the former to go on with its state."
                )


# By argument of the trainer: the class, the built-in ones, and the field of the configuration that names one of them.
_KINDS: dict[str, tuple[type[Strategy], Mapping[str, Any], str]] = {
    "question_sampler": (QuestionSampler, QUESTION_SAMPLERS, "question_sampling"),
    "completion_selector": (CompletionSelector, COMPLETION_SELECTORS, "completion_selection"),
    "group_selector": (GroupSelector, GROUP_SELECTORS, "group_selection"),
    "admission": (AdmissionRule, ADMISSION_RULES, "difficulty"),
    "eviction": (EvictionRule, EVICTION_RULES, "eviction"),
    "weighting": (ReplayWeighting, REPLAY_WEIGHTINGS, "replay_weighting"),
}

# Fields of the configuration that are parameters of a built-in strategy; further ones come from the kwargs.
_FIELDS: dict[str, dict[str, str]] = {
    "gaussian": {"bucket_mean": "bucket_mean", "bucket_std": "bucket_std"},
    "shaped": {"beta": "shaping_beta"},
    "balanced": {"beta": "shaping_beta"},
    "clipped": {"epsilon_low": "epsilon", "epsilon_high": "epsilon_high"},  # TRL's
}


def _chosen(argument: str, given: Callable[..., Any] | str | None, args: ExGRPOConfig) -> Any:
    """The given strategy, or the built-in one that the argument or else the configuration names."""
    kind, built_in, field = _KINDS[argument]
    if isinstance(given, str):
        return _named(built_in, argument, given, field, args)
    if given is None:
        return _named(built_in, field, getattr(args, field), field, args)
    return as_strategy(kind, given)


def _named(built_in: Mapping[str, Any], named_by: str, name: str, field: str, args: ExGRPOConfig) -> Strategy:
    """The built-in strategy of a name, with the parameters of the configuration; `named_by` is for messages."""
    given = getattr(args, f"{field}_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{field}_kwargs={given!r} must be a dict of parameters, or None.")
    own = _FIELDS.get(name, {}) if isinstance(name, str) else {}
    for parameter, own_field in own.items():
        value, default = getattr(args, own_field), type(args).__dataclass_fields__[own_field].default
        if parameter in given and not own_field.startswith("epsilon") and value not in (default, given[parameter]):
            raise ValueError(
                f"{own_field}={value!r} and {field}_kwargs={dict(given)} set the same parameter to different values. "
                "Set one of them."
            )
    parameters = {parameter: getattr(args, own_field) for parameter, own_field in own.items()} | dict(given)
    return make_strategy(built_in, field, name, parameters, named_by)


def _name_of(strategy: Strategy) -> str:
    rule = getattr(strategy, "rule", strategy)
    return getattr(rule, "__qualname__", type(rule).__qualname__)
