"""Importance weights: golden numbers, limits, and gradients against autograd of the definition."""

import math

import pytest
import torch

from exgrpo_trl.strategies.base import make_strategy
from exgrpo_trl.strategies.weighting import (
    REPLAY_WEIGHTINGS,
    importance_log_ratio,
    mixed_advantages,
    policy_shaping,
    with_gradient,
)


def importance_weight(log_ratio, advantages, weighting, **parameters):
    """Weight of a built-in weighting."""
    return make_strategy(REPLAY_WEIGHTINGS, "replay_weighting", weighting, parameters)(log_ratio, advantages)


# w, f(w) = w / (w + 0.1), f'(w) w = 0.1 w / (w + 0.1)^2, computed by hand.
GOLDEN = [
    (0.1, 0.5, 0.25),
    (1.0, 1 / 1.1, 0.1 / 1.21),
    (0.9, 0.9, 0.09),
    (9.9, 0.99, 0.0099),
]


@pytest.mark.parametrize(("w", "shaped", "factor"), GOLDEN)
def test_shaping(w, shaped, factor):
    log_w = torch.tensor([[math.log(w)]])
    weight = importance_weight(log_w, torch.ones(1, 1), "shaped")
    assert policy_shaping(log_w, 0.1).item() == pytest.approx(shaped, rel=1e-6)
    assert weight.value.item() == pytest.approx(shaped, rel=1e-6)
    assert weight.gradient.item() == pytest.approx(factor, rel=1e-6)
    balanced = importance_weight(log_w, torch.ones(1, 1), "balanced")
    assert balanced.value.item() == pytest.approx(12.1 * shaped, rel=1e-6)
    assert balanced.gradient.item() == pytest.approx(12.1 * factor, rel=1e-6)


def test_extreme_ratios():
    log_w = torch.tensor([[-40.0, 40.0, -1000.0, 1000.0]])
    value, gradient = importance_weight(log_w, torch.ones(1, 1), "shaped")
    # f(e^-40) = e^-40 / 0.1 and f'(w) w = e^-40 / 0.1; at e^40: 1 and 0.1 e^-40.
    torch.testing.assert_close(value[0, :2], torch.tensor([4.2483543e-17, 1.0]), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(gradient[0, :2], torch.tensor([4.2483543e-17, 4.2483543e-19]), rtol=1e-5, atol=0.0)
    for weighting in REPLAY_WEIGHTINGS:
        for advantage in (1.0, -1.0):
            weight = importance_weight(log_w, torch.tensor([[advantage]]), weighting)
            assert weight.value.isfinite().all()
            assert weight.gradient.isfinite().all()
            assert (weight.gradient >= 0).all()


def test_balanced_pulls_as_hard_as_a_fresh_token_at_ratio_one():
    for beta in (0.01, 0.1, 1.0, 5.0):
        weight = importance_weight(torch.zeros(1, 1), torch.ones(1, 1), "balanced", beta=beta)
        assert weight.gradient.item() == pytest.approx(1.0, rel=1e-5)


def test_clipped_is_ppo():
    log_w = torch.log(torch.tensor([[0.5, 0.9, 1.0, 1.1, 2.0]]))
    value, gradient = importance_weight(log_w, torch.tensor([[1.0]]), "clipped", epsilon_low=0.2, epsilon_high=0.3)
    torch.testing.assert_close(value, torch.tensor([[0.5, 0.9, 1.0, 1.1, 1.3]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.5, 0.9, 1.0, 1.1, 0.0]]))
    value, gradient = importance_weight(log_w, torch.tensor([[-1.0]]), "clipped", epsilon_low=0.2, epsilon_high=0.3)
    torch.testing.assert_close(value, torch.tensor([[0.8, 0.9, 1.0, 1.1, 2.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.9, 1.0, 1.1, 2.0]]))


def test_truncated_and_none():
    log_w = torch.log(torch.tensor([[0.5, 1.0, 2.0]]))
    torch.testing.assert_close(
        importance_weight(log_w, torch.ones(1, 1), "truncated").gradient, torch.tensor([[0.5, 1, 1]])
    )
    torch.testing.assert_close(importance_weight(log_w, torch.ones(1, 1), "none").gradient, torch.ones(1, 3))


@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("weighting", ["shaped", "balanced", "clipped"])
def test_gradient_is_the_derivative_of_the_value(weighting, advantage):
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(1, 200, generator=generator, dtype=torch.float64).requires_grad_()
    w = log_w.exp()
    definition = {
        "shaped": w / (w + 0.1) * advantage,
        "balanced": 12.1 * w / (w + 0.1) * advantage,
        "clipped": torch.min(w * advantage, w.clamp(0.8, 1.2) * advantage),
    }[weighting]
    (expected,) = torch.autograd.grad(definition.sum(), log_w)
    weight = importance_weight(log_w.detach(), torch.tensor([[advantage]]).double(), weighting)
    torch.testing.assert_close(weight.value * advantage, definition.detach())
    torch.testing.assert_close(weight.gradient * advantage, expected)
    term = with_gradient(weight, log_w) * advantage
    torch.testing.assert_close(term.detach(), definition.detach())
    (actual,) = torch.autograd.grad(term.sum(), log_w)
    torch.testing.assert_close(actual, expected)


def test_log_ratio():
    logps = torch.tensor([[-1.0, -2.0, float("-inf")]])
    stored = torch.tensor([[-1.5, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    assert importance_log_ratio(logps, stored, mask).tolist() == [[0.5, -1.0, 0.0]]
    assert importance_log_ratio(logps, stored, mask, "sequence").tolist() == [[-0.25]]
    assert importance_log_ratio(logps.bfloat16(), stored, mask).dtype == torch.float32
    empty = importance_log_ratio(logps, stored, torch.zeros_like(mask), "sequence")
    assert empty.tolist() == [[0.0]]


def test_bad_input():
    with pytest.raises(ValueError, match=r"replay_weighting='best'.*shaped"):
        importance_weight(torch.zeros(1, 1), torch.ones(1, 1), "best")
    with pytest.raises(ValueError, match=r"level='word'"):
        importance_log_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "word")
    with pytest.raises(ValueError, match=r"Shapes differ.*\(1, 2\).*\(1, 1\)"):
        importance_log_ratio(torch.zeros(1, 2), torch.zeros(1, 1), torch.ones(1, 2))


def test_fresh_rows_keep_their_advantage():
    log_ratio = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    advantages = torch.tensor([1.0, -2.0, 3.0])
    is_replayed = torch.tensor([False, True, False])
    mixed = mixed_advantages(advantages, log_ratio, is_replayed, REPLAY_WEIGHTINGS["shaped"](), loss_type="grpo")
    assert (mixed[0] == 1).all()
    assert (mixed[2] == 3).all()
    torch.testing.assert_close(mixed[1], -2 * policy_shaping(log_ratio[1], 0.1))
