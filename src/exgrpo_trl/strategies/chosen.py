"""The strategies of a trainer: one of each kind, from its configuration or from the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from .admission import ADMISSION_RULES, AdmissionRule
from .base import CollectedBatch, Strategy, as_strategy, make_strategy
from .eviction import EVICTION_RULES, EvictionRule
from .samplers import QUESTION_SAMPLERS, QuestionSampler
from .selectors import COMPLETION_SELECTORS, CompletionSelector
from .weighting import REPLAY_WEIGHTINGS, ReplayWeighting

if TYPE_CHECKING:
    from ..config import ExGRPOConfig

logger = logging.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Strategies:
    """One strategy of each kind."""

    question_sampler: QuestionSampler
    completion_selector: CompletionSelector
    admission: AdmissionRule
    eviction: EvictionRule
    weighting: ReplayWeighting

    @classmethod
    def choose(
        cls,
        args: ExGRPOConfig,
        *,
        question_sampler: Callable[..., Any] | None = None,
        completion_selector: Callable[..., Any] | None = None,
        admission: Callable[..., Any] | None = None,
        eviction: Callable[..., Any] | None = None,
        weighting: Callable[..., Any] | None = None,
    ) -> Strategies:
        """The given strategies, and those that the configuration names for the others."""

        chosen: tuple[tuple[type[Strategy], Callable[..., Any]], ...] = (
            (QuestionSampler, question_sampler or _named(QUESTION_SAMPLERS, "question_sampling", args)),
            (CompletionSelector, completion_selector or _named(COMPLETION_SELECTORS, "completion_selection", args)),
            (AdmissionRule, admission or _named(ADMISSION_RULES, "difficulty", args)),
            (EvictionRule, eviction or _named(EVICTION_RULES, "eviction", args)),
            (ReplayWeighting, weighting or _named(REPLAY_WEIGHTINGS, "replay_weighting", args)),
        )
        return cls(*(as_strategy(kind, rule) for kind, rule in chosen))  # type: ignore[arg-type]

    def items(self) -> Iterator[tuple[str, Strategy]]:
        """All of them with their names."""
        yield "question_sampler", self.question_sampler
        yield "completion_selector", self.completion_selector
        yield "admission", self.admission
        yield "eviction", self.eviction
        yield "weighting", self.weighting

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
            saved = states.get(name)
            if saved is None:
                continue
            if saved["class"] == _name_of(strategy):
                strategy.load_state_dict(saved["state"])
            else:
                logger.warning(
                    f"The checkpoint holds the state of {name}={saved['class']}, but the trainer has "
                    f"{name}={_name_of(strategy)}, which begins anew. Pass the former to go on with its state."
                )


# Fields of the configuration that are parameters of a built-in strategy; further ones come from the kwargs.
_FIELDS: dict[str, dict[str, str]] = {
    "gaussian": {"bucket_mean": "bucket_mean", "bucket_std": "bucket_std"},
    "shaped": {"beta": "shaping_beta"},
    "balanced": {"beta": "shaping_beta"},
    "clipped": {"epsilon_low": "epsilon", "epsilon_high": "epsilon_high"},  # TRL's
}


def _named(kinds: Mapping[str, Any], field: str, args: ExGRPOConfig) -> Strategy:
    """The built-in strategy that a field of the configuration names."""
    name, given = getattr(args, field), getattr(args, f"{field}_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"{field}_kwargs={given!r} must be a dict of parameters, or None.")
    own = _FIELDS.get(name, {})
    for parameter, own_field in own.items():
        value, default = getattr(args, own_field), type(args).__dataclass_fields__[own_field].default
        if parameter in given and not own_field.startswith("epsilon") and value not in (default, given[parameter]):
            raise ValueError(
                f"{own_field}={value!r} and {field}_kwargs={dict(given)} set the same parameter to different values. "
                "Set one of them."
            )
    return make_strategy(
        kinds, field, name, {**{p: getattr(args, own_field) for p, own_field in own.items()}, **given}
    )


def _name_of(strategy: Strategy) -> str:
    rule = getattr(strategy, "rule", strategy)
    return getattr(rule, "__qualname__", type(rule).__qualname__)
