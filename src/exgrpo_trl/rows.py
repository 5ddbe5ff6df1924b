"""What TRL's rows of a batch say of themselves: which tokens are trained, and a checksum of them."""

import functools
from collections.abc import Mapping
from typing import Any

import torch


def lacks_images(output: Mapping[str, Any]) -> bool:
    """Whether TRL has dropped all images of a batch, because those of a row do not match its image tokens."""
    return "num_images" in output and output["num_images"] is None


def loss_mask(rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """
    Which tokens are trained: those of the completion that the model wrote, not what tools or an environment said.

    Args:
        rows (`Mapping[str, torch.Tensor]`):
            Rows as TRL made them: `completion_mask` and, where others wrote tokens, `tool_mask`, shape `(B, T)`.

    Returns:
        `torch.Tensor`:
            Ones and zeros of shape `(B, T)`.
    """
    mask = rows["completion_mask"]
    return mask * rows["tool_mask"] if "tool_mask" in rows else mask


def checksum(completion_ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """
    Numbers that differ where tokens differ, whatever the padding.

    Args:
        completion_ids (`torch.Tensor`):
            Completion ids with padding, shape `(B, T)`.
        lengths (`torch.Tensor`):
            Number of tokens of each row, shape `(B,)`.

    Returns:
        `torch.Tensor`:
            Integers of shape `(B,)`; -1 where there are fewer columns than tokens.
    """
    positions, weights = _weights(completion_ids.size(1), completion_ids.device)
    is_own = positions < lengths.unsqueeze(1)
    sums = ((completion_ids + 1) * weights * is_own).sum(1)
    return torch.where(lengths <= completion_ids.size(1), sums, -1)


@functools.lru_cache(maxsize=64)
def _weights(num_columns: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions, and powers of an odd number modulo 2^64."""
    positions = torch.arange(num_columns, device=device)
    return positions, torch.full_like(positions, 6364136223846793005).cumprod(0)
