"""Importance ratio and importance weights of a replayed completion: pure functions of tensors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .base import Strategy

# float32 overflows at exp(88.7); a ratio of exp(80) is far beyond anything a weighting distinguishes.
_MAX_ABS_LOG_RATIO = 80.0


class ImportanceWeight(NamedTuple):
    """Weight of a replayed token (or sequence) and the factor of its policy gradient.

    Attributes:
        value (`torch.Tensor`):
            The weight `u` in the objective `u * A`, without gradient.
        gradient (`torch.Tensor`):
            `du / d log pi`: the factor of `A * grad log pi`, without gradient.
    """

    value: torch.Tensor
    gradient: torch.Tensor


WeightingFunction = Callable[[torch.Tensor, torch.Tensor], ImportanceWeight]
"""What a replay weighting is called with, and what it returns."""


class ReplayWeighting(Strategy):
    """
    Weight of a replayed token in the objective. Acts on every process, in the loss.

    | weighting | value | gradient |
    | --- | --- | --- |
    | `"shaped"` (ExGRPO, Eq. 4) | `f(w) = w / (w + beta)` | `beta w / (w + beta)^2` |
    | `"balanced"` | `(1 + beta)^2 / beta * f(w)` | `(1 + beta)^2 w / (w + beta)^2`, 1 at `w = 1` |
    | `"clipped"` (PPO) | `min(w A, clip(w, 1 - epsilon_low, 1 + epsilon_high) A) / A` | `w`, or 0 where clipped |
    | `"truncated"` (V-trace) | `min(w, 1)` | `min(w, 1)` |
    | `"none"` | 1 | 1 |
    """

    @abstractmethod
    def __call__(self, log_ratio: torch.Tensor, advantages: torch.Tensor) -> ImportanceWeight:
        """
        Value and gradient factor of the weight, both with the shape of `log_ratio`. Called without gradient.

        Args:
            log_ratio (`torch.Tensor`):
                Log importance ratio, shape `(B, T)` or, for sequences, `(B, 1)`.
            advantages (`torch.Tensor`):
                Advantages, broadcastable to `log_ratio`.
        """


class Shaped(ReplayWeighting):
    """
    Policy shaping, the paper's weight (Eq. 4): gentle with likely tokens, strong with unlikely ones.

    Args:
        beta (`float`, *optional*, defaults to `0.1`):
            Shaping constant, above 0.
    """

    def __init__(self, beta: float = 0.1) -> None:
        if not 0 < beta < math.inf:
            raise ValueError(f"`beta` must be positive and finite, got {beta}.")
        self.beta = beta

    @property
    def scale(self) -> float:
        """Factor of value and gradient."""
        return 1.0

    def __call__(self, log_ratio: torch.Tensor, advantages: torch.Tensor) -> ImportanceWeight:
        shifted = log_ratio - math.log(self.beta)
        # f (1 - f) with 1 - f = sigmoid(-x), which keeps its digits where f rounds to 1.
        gradient = torch.sigmoid(shifted) * torch.sigmoid(-shifted)
        return ImportanceWeight(self.scale * policy_shaping(log_ratio, self.beta), self.scale * gradient)


class Balanced(Shaped):
    """Policy shaping scaled so that a stored completion pulls as hard as a fresh one where the policy is the same."""

    @property
    def scale(self) -> float:
        """Factor of value and gradient: the gradient is 1 at ratio 1."""
        return (1 + self.beta) ** 2 / self.beta


class Clipped(ReplayWeighting):
    """
    The clipped ratio of PPO, an ablation of the paper.

    Args:
        epsilon_low (`float`, *optional*, defaults to `0.2`):
            Lower clipping range.
        epsilon_high (`float`, *optional*):
            Upper clipping range. By default the lower one.
    """

    def __init__(self, epsilon_low: float = 0.2, epsilon_high: float | None = None) -> None:
        self.epsilon_low = epsilon_low
        self.epsilon_high: float = epsilon_low if epsilon_high is None else epsilon_high

    def __call__(self, log_ratio: torch.Tensor, advantages: torch.Tensor) -> ImportanceWeight:
        ratio = _ratio(log_ratio)
        upper, lower = 1 + self.epsilon_high, 1 - self.epsilon_low
        is_positive = (advantages >= 0).expand_as(ratio)
        value = torch.where(is_positive, ratio.clamp(max=upper), ratio.clamp(min=lower))
        is_clipped = torch.where(is_positive, ratio > upper, ratio < lower)
        return ImportanceWeight(value, ratio.masked_fill(is_clipped, 0.0))


class Truncated(ReplayWeighting):
    """The truncated ratio of IMPALA and V-trace."""

    def __call__(self, log_ratio: torch.Tensor, advantages: torch.Tensor) -> ImportanceWeight:
        ratio = _ratio(log_ratio).clamp(max=1.0)
        return ImportanceWeight(ratio, ratio)


class Unweighted(ReplayWeighting):
    """No importance correction, an ablation of the paper."""

    def __call__(self, log_ratio: torch.Tensor, advantages: torch.Tensor) -> ImportanceWeight:
        return ImportanceWeight(torch.ones_like(log_ratio), torch.ones_like(log_ratio))


REPLAY_WEIGHTINGS: dict[str, type[ReplayWeighting]] = {
    "shaped": Shaped,
    "balanced": Balanced,
    "clipped": Clipped,
    "truncated": Truncated,
    "none": Unweighted,
}
"""Built-in replay weightings by name."""


def importance_log_ratio(
    per_token_logps: torch.Tensor,
    behavior_per_token_logps: torch.Tensor,
    mask: torch.Tensor,
    level: str = "token",
) -> torch.Tensor:
    """
    Log importance ratio of the current policy to the policy that generated the completion, in float32.

    Args:
        per_token_logps (`torch.Tensor`):
            Log-probabilities under the current policy, shape `(B, T)`, nats.
        behavior_per_token_logps (`torch.Tensor`):
            Log-probabilities under the behaviour policy, shape `(B, T)`, nats.
        mask (`torch.Tensor`):
            1 for completion tokens and 0 for padding, shape `(B, T)`.
        level (`str`, *optional*, defaults to `"token"`):
            `"token"` for one ratio per token, `"sequence"` for the length-normalised ratio of GSPO.

    Returns:
        `torch.Tensor`:
            Shape `(B, T)` for `"token"` and `(B, 1)` for `"sequence"`; 0 on padding.

    Raises:
        `ValueError`:
            When `level` is unknown or the shapes differ.
    """
    if per_token_logps.shape != behavior_per_token_logps.shape or per_token_logps.shape != mask.shape:
        raise ValueError(
            f"Shapes differ: per_token_logps {tuple(per_token_logps.shape)}, behavior_per_token_logps "
            f"{tuple(behavior_per_token_logps.shape)}, mask {tuple(mask.shape)}."
        )
    # `where`, not a product: padding may hold infinities.
    log_ratio = torch.where(mask.bool(), per_token_logps.float() - behavior_per_token_logps.float(), 0.0)
    if level == "token":
        return log_ratio
    if level == "sequence":
        return log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    raise ValueError(f"level={level!r} is unknown. Choose 'token' or 'sequence'.")


def policy_shaping(log_ratio: torch.Tensor, beta: float) -> torch.Tensor:
    """
    `f(w) = w / (w + beta)` at `w = exp(log_ratio)`, computed as `sigmoid(log w - log beta)` (ExGRPO, Eq. 4).

    Args:
        log_ratio (`torch.Tensor`):
            Log importance ratio, any shape.
        beta (`float`):
            Shaping constant, above 0.

    Returns:
        `torch.Tensor`:
            Same shape, in (0, 1). Neither overflows nor divides by zero.
    """
    return torch.sigmoid(log_ratio - math.log(beta))


def with_gradient(weight: ImportanceWeight, log_ratio: torch.Tensor) -> torch.Tensor:
    """
    A tensor with the value of `weight.value` whose derivative with respect to `log_ratio` is `weight.gradient`.

    Args:
        weight ([`ImportanceWeight`]):
            Value and gradient factor.
        log_ratio (`torch.Tensor`):
            Log importance ratio with its graph, the shape of the weight.

    Returns:
        `torch.Tensor`:
            Shape of `log_ratio`.
    """
    return weight.value + weight.gradient * (log_ratio - log_ratio.detach())


def mixed_advantages(
    advantages: torch.Tensor,
    log_ratio: torch.Tensor,
    is_replayed: torch.Tensor,
    weighting: WeightingFunction,
    *,
    loss_type: str,
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
) -> torch.Tensor:
    """
    Advantages with which TRL's surrogate at ratio 1 becomes the weighted term of the replayed completions.

    TRL multiplies ratio and advantage after its forward. A replayed row is shown to it with ratio 1 and the advantage
    `u(w) A`, graph included, so that TRL's own normaliser, KL term, entropy bonus and metrics apply.

    Args:
        advantages (`torch.Tensor`):
            Group advantages, shape `(B,)`.
        log_ratio (`torch.Tensor`):
            Log importance ratio with its graph, shape `(B, T)` or `(B, 1)`; only replayed rows are read.
        is_replayed (`torch.Tensor`):
            Which rows hold a stored completion, boolean, shape `(B,)`.
        weighting ([`ReplayWeighting`]):
            Weight of the replayed rows.
        loss_type (`str`):
            TRL's loss type. `"cispo"` and `"vespo"` multiply the advantage with `log pi`, so they take the gradient
            factor itself; `"sapo"` scales ratio 1 by `2 / temperature`, which is undone.
        sapo_temperatures (`tuple[float, float]`, *optional*, defaults to `(1.0, 1.05)`):
            Temperatures of `"sapo"` for positive and for other advantages.

    Returns:
        `torch.Tensor`:
            Shape of `log_ratio`; rows that are not replayed hold their advantage unchanged.
    """
    fresh = advantages.unsqueeze(1).expand_as(log_ratio)
    with torch.no_grad():
        weight = ImportanceWeight(*weighting(log_ratio.detach(), fresh))
    factor = weight.gradient if loss_type in ("cispo", "vespo") else with_gradient(weight, log_ratio)
    if loss_type == "sapo":
        positive, other = sapo_temperatures
        factor = factor * torch.where(fresh > 0, positive, other) / 2
    return torch.where(is_replayed.unsqueeze(1), factor * fresh, fresh)


def show_replayed(
    shown: dict[str, Any],
    inputs: Mapping[str, Any],
    per_token_logps: torch.Tensor,
    weighting: WeightingFunction,
    *,
    loss_type: str,
    level: str,
    sapo_temperatures: tuple[float, float],
) -> torch.Tensor | None:
    """
    Show replayed rows to TRL's loss as if they were on-policy, with advantages that carry their weight.

    Changes `shown`, the inputs that TRL's loss reads after its forward; `inputs` are those of the micro-batch. Returns
    the log importance ratios of the replayed tokens (or sequences), shape `(N,)`, `None` if no row is replayed.
    """
    is_replayed, mask = inputs["is_replayed"], inputs["completion_mask"].bool()
    if "tool_mask" in inputs:  # what tools said is neither weighted nor counted in a ratio
        mask = mask & inputs["tool_mask"].bool()
    if not is_replayed.any():
        return None
    log_ratio = importance_log_ratio(per_token_logps, inputs["behavior_per_token_logps"], mask, level)
    shown["advantages"] = mixed_advantages(
        inputs["advantages"],
        log_ratio,
        is_replayed,
        weighting,
        loss_type=loss_type,
        sapo_temperatures=sapo_temperatures,
    )
    # With its graph: the ratio of a replayed row is 1 and has no gradient of its own.
    old_logps = inputs.get("old_per_token_logps", per_token_logps.detach())
    shown["old_per_token_logps"] = torch.where(is_replayed.unsqueeze(1), per_token_logps, old_logps)
    if "sampling_per_token_logps" in inputs:  # nor is it off-policy to TRL, whatever sampled it
        shown["sampling_per_token_logps"] = torch.where(
            is_replayed.unsqueeze(1), per_token_logps.detach(), inputs["sampling_per_token_logps"]
        )
    is_shown = mask[is_replayed] if level == "token" else slice(None)
    return log_ratio.detach()[is_replayed][is_shown].flatten()


def _ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    return torch.exp(log_ratio.clamp(-_MAX_ABS_LOG_RATIO, _MAX_ABS_LOG_RATIO))
