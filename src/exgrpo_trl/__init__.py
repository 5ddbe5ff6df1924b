"""Experiential GRPO for TRL: replay a reasoning model's own past successes (arXiv 2510.02245)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .buffer import ExperienceBuffer
    from .config import ExGRPOConfig
    from .experience import Candidate, Experience, ExperienceBufferError, Question
    from .trainer import ExGRPOTrainer

__version__ = "0.1.0"

# Imported when first touched, so that `import exgrpo_trl` stays free of torch and TRL.
_MODULE_OF = {
    "Candidate": "experience",
    "ExGRPOConfig": "config",
    "ExGRPOTrainer": "trainer",
    "Experience": "experience",
    "ExperienceBuffer": "buffer",
    "ExperienceBufferError": "experience",
    "Question": "experience",
}

__all__ = [
    "Candidate",
    "ExGRPOConfig",
    "ExGRPOTrainer",
    "Experience",
    "ExperienceBuffer",
    "ExperienceBufferError",
    "Question",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
