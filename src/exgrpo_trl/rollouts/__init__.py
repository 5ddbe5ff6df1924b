"""Who generates the fresh rows of a batch, and where its stored completions go."""

from .base import Rollouts
from .single_turn import SingleTurnRollouts
from .vllm import VLLMRollouts

__all__ = ["Rollouts", "SingleTurnRollouts", "VLLMRollouts"]
