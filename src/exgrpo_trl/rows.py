"""What TRL's rows of a batch say of themselves: which tokens are trained, and whether they came back as they were."""

import functools
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from .records import Experience


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


def trained_tokens(rows: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Which tokens are trained, as `loss_mask` says: booleans of shape `(B, T)`, on the CPU."""
    return loss_mask(rows).cpu().numpy() != 0


def checksums(completion_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """
    Numbers that differ where tokens differ or are missing, whatever the padding.

    Args:
        completion_ids (`np.ndarray`):
            Completion ids with padding, shape `(B, T)`.
        lengths (`np.ndarray`):
            Number of tokens of each row, shape `(B,)`.

    Returns:
        `np.ndarray`:
            Integers of shape `(B,)`.
    """
    positions, weights = _weights(completion_ids.shape[1])
    return np.where(positions < lengths[:, None], completion_ids + 1, 0) @ weights


@functools.lru_cache(maxsize=64)
def _weights(num_columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions, and powers of an odd number modulo 2^64."""
    positions = np.arange(num_columns)
    return positions, np.full_like(positions, 6364136223846793005).cumprod()


def check_rows(
    output: Mapping[str, torch.Tensor],
    token_ids: Sequence[Sequence[int]],
    stored: Mapping[int, Experience],
    *,
    told_masks: Sequence[Sequence[int]] | None,
    first_row: int,
    num_rows: int,
) -> np.ndarray:
    """
    Compare what came back with what was put in, token for token.

    Args:
        output (`Mapping[str, torch.Tensor]`):
            Rows of this process as TRL made them: `completion_ids` and, where others than the model wrote tokens,
            `tool_mask`, both of shape `(num_rows, T)`.
        token_ids (`Sequence[Sequence[int]]`):
            Completion token ids by position, as the reward functions saw them.
        stored (`Mapping[int, Experience]`):
            Stored completions by position.
        told_masks (`Sequence[Sequence[int]]` or `None`):
            Which tokens the model wrote, by position, as whoever generated them told.
        first_row (`int`):
            First row of this process.
        num_rows (`int`):
            Rows of this process.

    Returns:
        `np.ndarray`:
            Completion ids with padding, shape `(num_rows, T)`.

    Raises:
        `ValueError`:
            When a stored row holds other tokens than the stored completion, or a row others than were rewarded; when a
            row does not know any more which tokens the model wrote.
    """
    padded = output["completion_ids"].cpu().numpy()
    if len(padded) != num_rows or len(token_ids) != num_rows:
        raise ValueError(f"{len(padded)} rows came back and {len(token_ids)} were rewarded, of {num_rows}")
    lengths = np.array([len(ids) for ids in token_ids])
    for position, experience in stored.items():
        if experience.token_ids.tolist() != list(token_ids[position]):
            raise ValueError(
                f"row {first_row + position} holds other tokens than the stored completion that was put there"
            )
    rewarded = np.fromiter(chain.from_iterable(token_ids), dtype=np.int64, count=int(lengths.sum()))
    is_own = np.arange(padded.shape[1]) < lengths[:, None]
    if lengths.max() > padded.shape[1] or not np.array_equal(padded[is_own], rewarded):
        positions = range(len(token_ids))
        row = next(p for p in positions if not np.array_equal(padded[p, : lengths[p]], token_ids[p]))
        raise ValueError(f"row {first_row + row} holds other tokens than those that were rewarded")
    # TRL's own replay lost the masks, and trained on what tools had said (TRL #6439).
    masks = trained_tokens(output)
    num_trained = (masks & is_own).sum(axis=1).tolist()
    for position in stored if told_masks is None else range(len(token_ids)):
        if not num_trained[position]:
            continue  # truncated, and not trained
        own = stored.get(position)
        if own is not None and own.num_model_tokens == own.num_tokens:
            is_as_told = num_trained[position] == own.num_tokens
        else:
            told = np.asarray(told_masks[position], dtype=bool) if own is None else own.is_model  # type: ignore[index]
            is_as_told = np.array_equal(masks[position, : lengths[position]], told)
        if not is_as_told:
            raise ValueError(f"row {first_row + position} trains on other tokens than those the model wrote")
    return padded
