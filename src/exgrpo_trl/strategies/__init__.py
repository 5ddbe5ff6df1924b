"""The rules that the trainer follows, a module for each kind. Free of torch and TRL, the weighting aside."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .admission import ADMISSION_RULES, Admission, AdmissionRule
from .base import Strategy
from .eviction import EVICTION_RULES, EvictionRule
from .groups import GROUP_SELECTORS, GroupSelector
from .samplers import QUESTION_SAMPLERS, QuestionSampler
from .selectors import COMPLETION_SELECTORS, CompletionSelector

if TYPE_CHECKING:
    from .chosen import Strategies
    from .weighting import REPLAY_WEIGHTINGS, ImportanceWeight, ReplayWeighting

# Imported when first touched: a weighting is a function of tensors.
_MODULE_OF = {
    "ImportanceWeight": "weighting",
    "REPLAY_WEIGHTINGS": "weighting",
    "ReplayWeighting": "weighting",
    "Strategies": "chosen",
}

__all__ = [
    "ADMISSION_RULES",
    "COMPLETION_SELECTORS",
    "EVICTION_RULES",
    "GROUP_SELECTORS",
    "QUESTION_SAMPLERS",
    "REPLAY_WEIGHTINGS",
    "Admission",
    "AdmissionRule",
    "CompletionSelector",
    "EvictionRule",
    "GroupSelector",
    "ImportanceWeight",
    "QuestionSampler",
    "ReplayWeighting",
    "Strategies",
    "Strategy",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
