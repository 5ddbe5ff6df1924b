"""What is logged, by its real name: every name of a metric stands here, and nowhere else."""

from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from .batch import Batch

_QUANTILES = (0.1, 0.5, 0.9)
_QUANTILE_NAMES = (
    "replay/importance_ratio_q10",
    "replay/importance_ratio_q50",
    "replay/importance_ratio_q90",
)
# Names of the buffer's own metrics, but for the buckets.
_OF_BUFFER = {
    "questions": "replay/questions",
    "completions": "replay/completions",
    "tokens": "replay/tokens",
    "retired": "replay/retired",
    "evicted": "replay/evicted",
    "duplicates": "replay/duplicates",
}
_OF_PROCESSES = {"gathering": "replay/gathering_seconds", "broadcasting": "replay/broadcasting_seconds"}


class ReplayMetrics:
    """
    Averages scalars and pools importance ratios between two log lines.

    A log line without a new generation repeats the last values, so that every line has the same columns.
    """

    def __init__(self) -> None:
        self.tokens_saved = 0  # of the whole run
        self._values: dict[str, list[float]] = defaultdict(list)
        self._log_ratios: list[np.ndarray] = []
        self._last: dict[str, float] = {}
        self._seconds_before: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add one observation of each metric; NaN is left out of the average."""
        for name, value in values.items():
            if not np.isnan(value):
                self._values[name].append(float(value))

    def add_selection(self, *, selection_seconds: float, scoring_seconds: float, candidates_scored: int) -> None:
        """Add what choosing the replays of a batch has cost."""
        self.add(
            {
                "replay/candidates_scored": candidates_scored,
                "replay/selection_seconds": selection_seconds,
                "replay/scoring_seconds": scoring_seconds,
            }
        )

    def add_batch(self, batch: Batch) -> None:
        """Add a generation batch whose rewards are known: fresh and replayed rollouts apart."""
        is_fresh, replays = batch.is_fresh, batch.replays
        fresh = np.where(is_fresh, batch.rewards, np.nan)
        self.tokens_saved += sum(replay.experience.num_tokens for replay in replays)
        self.add(
            {
                "fresh/pass_rate": float(batch.is_correct[is_fresh].mean()),
                "fresh/reward": _nanmean(fresh),
                "fresh/reward_std": _nanmean(np.nanstd(fresh[~np.isnan(fresh).all(axis=1)], axis=1)),
                "fresh/frac_groups_without_signal": float(np.mean(_has_no_signal(fresh))),
                "replay/active": float(batch.plan.is_started),
                "replay/fraction": len(replays) / batch.num_groups,
            }
        )
        if not replays:
            return
        groups = [batch.group_of(replay) for replay in replays]
        staleness = [batch.policy_version - replay.experience.policy_version for replay in replays]
        entropies = [replay.entropy for replay in replays if replay.entropy is not None]
        self.add(
            {
                "replay/reward": _nanmean(batch.rewards[~is_fresh]),
                "replay/group_pass_rate": float(batch.is_correct[groups][is_fresh[groups]].mean()),
                "replay/staleness_mean": float(np.mean(staleness)),
                "replay/staleness_max": max(staleness),
                "replay/entropy": float(np.mean(entropies)) if entropies else np.nan,
            }
        )

    def add_collection(self, *, evicted_incorrect: int) -> None:
        """Add how many replayed completions of a batch have left the buffer because they no longer count."""
        self.add({"replay/evicted_incorrect": evicted_incorrect})

    def add_process_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add the time that processes have spent on messages since the last call, from what they spent in all."""
        for direction, name in _OF_PROCESSES.items():
            self.add({name: seconds[direction] - self._seconds_before.get(direction, 0.0)})
            self._seconds_before[direction] = seconds[direction]

    def add_log_ratios(self, log_ratios: np.ndarray) -> None:
        """Add the log importance ratios of replayed tokens, shape `(N,)`, nats."""
        self._log_ratios.append(log_ratios.astype(np.float64))

    def flush(self) -> dict[str, float]:
        """Averages (maxima for names in `_max`) since the last call, the last known value where nothing is new."""
        metrics = {
            name: float(np.max(values) if name.endswith("_max") else np.mean(values))
            for name, values in self._values.items()
        }
        if self._log_ratios:
            metrics |= importance_ratio_metrics(np.concatenate(self._log_ratios))
        self._values.clear()
        self._log_ratios.clear()
        self._last |= metrics
        return dict(self._last)

    def line(self, of_buffer: Mapping[str, float], of_strategies: Mapping[str, float]) -> dict[str, float]:
        """What a log line says of replay: everything since the last line, and the present sizes."""
        sizes = {_OF_BUFFER.get(name, f"replay/{name}"): value for name, value in of_buffer.items()}
        reported = {f"replay/{name}": float(value) for name, value in of_strategies.items()}
        return self.flush() | sizes | reported | {"replay/tokens_saved": float(self.tokens_saved)}


def importance_ratio_metrics(log_ratios: np.ndarray) -> dict[str, float]:
    """Mean, maximum and quantiles of importance ratios, and their effective sample size."""
    if not len(log_ratios):
        return {}
    largest = log_ratios.max()
    scaled = np.exp(log_ratios - largest)
    ratios = np.exp(np.clip(log_ratios, -700, 700))
    metrics = {
        "replay/importance_ratio_mean": float(ratios.mean()),
        "replay/importance_ratio_max": float(ratios.max()),
        "replay/effective_sample_size": float(scaled.sum() ** 2 / (len(scaled) * (scaled**2).sum())),
    }
    return metrics | dict(zip(_QUANTILE_NAMES, np.quantile(ratios, _QUANTILES).tolist(), strict=True))


def _nanmean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _has_no_signal(fresh: np.ndarray) -> np.ndarray:
    """Which groups have fresh rewards of one value only, or none; `(num_groups, num_generations)`, NaN elsewhere."""
    return ~(np.fmin.reduce(fresh, axis=1) < np.fmax.reduce(fresh, axis=1))
