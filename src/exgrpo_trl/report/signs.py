"""Warning signs of a run, each with its value and its threshold: all thresholds stand here."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .run import Run

# Below, a few tokens decide what replay teaches.
LOWEST_EFFECTIVE_SAMPLE_SIZE = 0.1
# Of fresh completions of replayed questions: out of reach, or too easy.
LOWEST_GROUP_PASS_RATE = 0.05
HIGHEST_GROUP_PASS_RATE = 0.95
# Of what was configured.
LOWEST_SHARE_OF_FRACTION = 0.5
# Of TRL's `entropy`.
LOWEST_SHARE_OF_ENTROPY = 0.5
HIGHEST_SHARE_WITHOUT_SIGNAL = 0.8
# Optimizer steps. No more than a hint: how fast a policy moves depends on the learning rate.
HIGHEST_MEAN_AGE = 200
# Log lines, or steps with replays, over which a value is the mean.
RECENT = 20

WARNING, HINT, FINE, UNKNOWN = "warning", "hint", "fine", "unknown"


class Sign(NamedTuple):
    """
    Something to look at.

    Attributes:
        level (`str`):
            `"warning"`, `"hint"`, `"fine"` or `"unknown"`.
        name (`str`):
            What it is about.
        value (`str`):
            Its value in words.
        threshold (`str`):
            When it is none of the fine ones.
        meaning (`str`):
            What it means, and what to do, where it is not fine; where it is unknown, what would tell.
    """

    level: str
    name: str
    value: str
    threshold: str
    meaning: str


def signs_of(run: Run) -> list[Sign]:
    """All signs of a run, warnings first."""
    signs = [
        _effective_sample_size(run),
        _group_pass_rate(run),
        _fraction(run),
        _entropy(run),
        _without_signal(run),
        _age(run),
    ]
    order = (WARNING, HINT, FINE, UNKNOWN)
    return sorted(signs, key=lambda sign: order.index(sign.level))


def _recent(run: Run, metric: str) -> float | None:
    series = run.history.series(metric)
    return series.recent(RECENT) if len(series) else None


def _recent_replays(run: Run, column: str) -> float | None:
    """Mean of a column of the log of replays over the newest steps that replayed."""
    steps, values = run.replay_column("step"), run.replay_column(column)
    newest = np.isin(steps, np.unique(steps)[-RECENT:]) & ~np.isnan(values)
    return float(values[newest].mean()) if newest.any() else None


def _unknown(name: str, threshold: str, metric: str) -> Sign:
    return Sign(UNKNOWN, name, "unknown", threshold, f"{metric} was not logged.")


def _effective_sample_size(run: Run) -> Sign:
    name, threshold = "Effective sample size", f"below {LOWEST_EFFECTIVE_SAMPLE_SIZE:g}"
    value = _recent(run, "replay/effective_sample_size")
    if value is None:
        return _unknown(name, threshold, "replay/effective_sample_size")
    level = WARNING if value < LOWEST_EFFECTIVE_SAMPLE_SIZE else FINE
    meaning = "A few tokens carry most of the weight: stored completions are too far off. Lower max_staleness."
    return Sign(level, name, f"{value:.3g}", threshold, meaning if level == WARNING else "")


def _group_pass_rate(run: Run) -> Sign:
    name = "Pass rate of replayed questions"
    threshold = f"below {LOWEST_GROUP_PASS_RATE:g} or above {HIGHEST_GROUP_PASS_RATE:g}"
    value = _recent(run, "replay/group_pass_rate")
    if value is None:
        return _unknown(name, threshold, "replay/group_pass_rate")
    if value < LOWEST_GROUP_PASS_RATE:
        return Sign(WARNING, name, f"{value:.3g}", threshold, "What is replayed is out of reach of the policy.")
    if value > HIGHEST_GROUP_PASS_RATE:
        return Sign(
            WARNING, name, f"{value:.3g}", threshold, "What is replayed has become too easy to teach anything."
        )
    return Sign(FINE, name, f"{value:.3g}", threshold, "")


def _fraction(run: Run) -> Sign:
    name, threshold = (
        "Share of questions replayed",
        f"below {LOWEST_SHARE_OF_FRACTION:g} of what replay_fraction allows",
    )
    series, allowed = run.history.series("replay/fraction"), run.history.series("replay/fraction_allowed")
    began = np.flatnonzero(series.values > 0)
    if not len(series):
        return _unknown(name, threshold, "replay/fraction")
    if not len(began):
        return Sign(
            HINT, name, "0", threshold, "Nothing was replayed yet: there was no success, or replay has not begun."
        )
    value = float(series.values[began[0] :][-RECENT:].mean())
    if not len(allowed) or not allowed.values.max() > 0:
        return Sign(
            UNKNOWN, name, f"{value:.3g}", threshold, "Compare it with replay_fraction, which no log line tells."
        )
    most = float(allowed.values.max())
    shown = f"{value:.3g} of {most:.3g}"
    if value < LOWEST_SHARE_OF_FRACTION * most:
        return Sign(WARNING, name, shown, threshold, "The buffer holds too few questions, or they rest.")
    return Sign(FINE, name, shown, threshold, "")


def _entropy(run: Run) -> Sign:
    name, threshold = "Entropy of replayed completions", f"below {LOWEST_SHARE_OF_ENTROPY:g} of TRL's entropy"
    ours = _recent(run, "replay/entropy")
    ours = _recent_replays(run, "entropy") if ours is None else ours
    other = _recent(run, "entropy")
    if ours is None or other is None:
        return _unknown(name, threshold, "entropy" if other is None else "replay/entropy")
    shown = f"{ours:.3g} of {other:.3g} nats"
    if ours < LOWEST_SHARE_OF_ENTROPY * other:
        return Sign(WARNING, name, shown, threshold, "Selection narrows to what the model already says.")
    return Sign(FINE, name, shown, threshold, "")


def _without_signal(run: Run) -> Sign:
    name, threshold = "Groups without signal", f"above {HIGHEST_SHARE_WITHOUT_SIGNAL:g}"
    value = _recent(run, "fresh/frac_groups_without_signal")
    if value is None:
        return _unknown(name, threshold, "fresh/frac_groups_without_signal")
    if value > HIGHEST_SHARE_WITHOUT_SIGNAL:
        meaning = "Most groups are all right or all wrong, and teach nothing. Questions of another difficulty would."
        return Sign(WARNING, name, f"{value:.3g}", threshold, meaning)
    return Sign(FINE, name, f"{value:.3g}", threshold, "")


def _age(run: Run) -> Sign:
    name, threshold = "Age of replayed completions", f"above {HIGHEST_MEAN_AGE} steps"
    value = _recent(run, "replay/staleness_mean")
    value = _recent_replays(run, "age") if value is None else value
    if value is None:
        return _unknown(name, threshold, "replay/staleness_mean")
    if value > HIGHEST_MEAN_AGE:
        meaning = "Harmless while the effective sample size is. If it falls, set max_staleness."
        return Sign(HINT, name, f"{value:,.0f} steps", threshold, meaning)
    return Sign(FINE, name, f"{value:,.3g} steps", threshold, "")
