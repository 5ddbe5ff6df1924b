"""The experience buffer: what is stored, how it is found, how it is kept. Free of torch and TRL."""

from .buffer import ExperienceBuffer
from .protocol import RemoteBuffer, ReplayBuffer

__all__ = ["ExperienceBuffer", "RemoteBuffer", "ReplayBuffer"]
