"""What is wrong with a completion of a user, and what a row says of its question."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..records import MAX_LOG_PROBABILITY, MAX_TOKEN_ID, MIN_LOG_PROBABILITY, as_integer, reaches
from .settings import COMPLETION, checked_count

LOGPS = "behavior_per_token_logps"


@dataclass(frozen=True)
class Rules:
    """
    What rows must be to be stored.

    Args:
        group_size (`int`):
            Completions per question at training time (K).
        unit (`str`):
            What the buffer keeps: `"completion"` or `"group"`.
        success_threshold (`float`):
            Reward from which a completion is a success.
        bucket (`int`, *optional*):
            Bucket of questions whose pass rate the rows do not tell. By default the middle one.
        max_completion_length (`int`, *optional*):
            Most tokens of a completion.
        max_length (`int`, *optional*):
            Most tokens of prompt and completion.
        vocab_size (`int`, *optional*):
            Number of tokens that the model knows.

    Raises:
        ValueError: if the bucket is out of range, or the threshold is NaN.
    """

    group_size: int
    unit: str = COMPLETION
    success_threshold: float = 1.0
    bucket: int | None = None
    max_completion_length: int | None = None
    max_length: int | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.bucket is not None:
            checked_count("bucket", self.bucket, self.group_size)
        if math.isnan(self.success_threshold):
            raise ValueError("`success_threshold` must be a number, got NaN.")

    def is_success(self, reward: float) -> bool:
        """Whether a reward counts as a success."""
        return bool(reaches(reward, self.success_threshold))


def reward_of(content: Mapping[str, Any]) -> float:
    """Reward of a row; raises `ValueError` if it is no finite number."""
    reward = content["reward"]
    if not isinstance(reward, int | float) or not math.isfinite(reward):
        raise ValueError(f"its reward is {reward!r}, not a finite number")
    return float(reward)


def bucket_of(content: Mapping[str, Any], rules: Rules) -> int | None:
    """Bucket of the question of a row by the pass rate that the row tells, if it does."""
    num_correct = content.get("num_correct")
    if num_correct is None:
        return None
    size = content.get("group_size")
    size = rules.group_size if size is None else as_integer("group_size", size)
    if size < 1:
        raise ValueError(f"its group_size is {size}")
    return inner_bucket(checked_count("num_correct", num_correct, size) / size, rules.group_size)


def inner_bucket(pass_rate: float, group_size: int) -> int:
    """The bucket of a pass rate of another policy, which says neither never nor always: from 1 to `group_size - 1`."""
    return max(1, min(group_size - 1, round(pass_rate * group_size)))


def group_of(content: Mapping[str, Any]) -> int | None:
    """Number of the group of a row, if it has one."""
    group = content.get("group")
    return None if group is None else as_integer("group", group)


def checked_ids(
    completion: Any, num_prompt_tokens: int, rules: Rules, eos_token_ids: Collection[int]
) -> NDArray[np.int64]:
    """
    Token ids of a completion.

    Raises:
        ValueError: if they are none, or break a rule; the message goes on after the number of the row.
    """
    ids = np.asarray(completion)
    if not ids.size:
        raise ValueError("its completion is empty")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError("its completion_ids are not a list of integers")
    ids = ids.astype(np.int64)
    most = MAX_TOKEN_ID if rules.vocab_size is None else rules.vocab_size - 1
    if ids.min() < 0 or ids.max() > most:
        outside = ids[(ids < 0) | (ids > most)][0]
        raise ValueError(f"its token id {outside} is outside of the vocabulary (0..{most})")
    if len(ends := np.flatnonzero(np.isin(ids[:-1], list(eos_token_ids)))):
        raise ValueError(f"an end token is inside its completion, as token {ends[0] + 1} of {len(ids)}")
    if rules.max_completion_length is not None and len(ids) > rules.max_completion_length:
        raise ValueError(
            f"its completion has {len(ids)} tokens, more than max_completion_length={rules.max_completion_length}"
        )
    total = len(ids) + num_prompt_tokens
    if rules.max_length is not None and total > rules.max_length:
        raise ValueError(f"its prompt and completion have {total} tokens, and the model takes {rules.max_length}")
    return ids


def checked_logps(given: Any, num_tokens: int) -> NDArray[np.float32] | None:
    """Log-probabilities of each token; a single number is that of every one."""
    if given is None:
        return None
    logps = np.asarray(given)
    if logps.dtype.kind not in "fiu":
        raise ValueError(f"its {LOGPS} are not numbers")
    if logps.ndim == 0:
        logps = np.full(num_tokens, logps)
    if logps.shape != (num_tokens,):
        raise ValueError(f"it has {logps.size} log-probabilities for {num_tokens} tokens")
    if not ((logps >= MIN_LOG_PROBABILITY) & (logps <= MAX_LOG_PROBABILITY)).all():
        raise ValueError(f"its {LOGPS} are not finite and at most 0")
    return logps.astype(np.float32)
