"""Experiential GRPO for TRL: replay a reasoning model's own past successes (arXiv 2510.02245)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer
    from .config import ExGRPOConfig
    from .examples import question_id_of
    from .images import StoredImage
    from .records import Candidate, Experience, ExperienceBufferError, Question, Reuse
    from .rollout_details import RolloutDetails
    from .strategies import (
        Admission,
        AdmissionRule,
        CompletionSelector,
        EvictionRule,
        GroupSelector,
        ImportanceWeight,
        QuestionSampler,
        ReplayWeighting,
        Strategy,
    )
    from .trainer import ExGRPOTrainer

__version__ = "0.1.0"

# Imported when first touched, so that `import exgrpo_trl` stays free of torch and TRL.
_MODULE_OF = {
    "Admission": "strategies",
    "AdmissionRule": "strategies",
    "Candidate": "records",
    "CompletionSelector": "strategies",
    "EvictionRule": "strategies",
    "ExGRPOConfig": "config",
    "ExGRPOTrainer": "trainer",
    "Experience": "records",
    "ExperienceBuffer": "buffer",
    "ExperienceBufferError": "records",
    "GroupSelector": "strategies",
    "ImportanceWeight": "strategies",
    "Question": "records",
    "QuestionSampler": "strategies",
    "ReplayWeighting": "strategies",
    "Reuse": "records",
    "RolloutDetails": "rollout_details",
    "StoredImage": "images",
    "Strategy": "strategies",
    "question_id_of": "examples",
}

__all__ = [
    "Admission",
    "AdmissionRule",
    "Candidate",
    "CompletionSelector",
    "EvictionRule",
    "ExGRPOConfig",
    "ExGRPOTrainer",
    "Experience",
    "ExperienceBuffer",
    "ExperienceBufferError",
    "GroupSelector",
    "ImportanceWeight",
    "Question",
    "QuestionSampler",
    "ReplayWeighting",
    "Reuse",
    "RolloutDetails",
    "StoredImage",
    "Strategy",
    "__version__",
    "question_id_of",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
