"""Metrics of replayed and fresh rollouts, gathered between two log lines."""

from collections import defaultdict

import numpy as np

_QUANTILES = (0.1, 0.5, 0.9)


class ReplayMetrics:
    """
    Averages scalars and pools importance ratios between two log lines.

    A log line without a new generation repeats the last values, so that every line has the same columns.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)
        self._log_ratios: list[np.ndarray] = []
        self._last: dict[str, float] = {}

    def add(self, **values: float) -> None:
        """Add one observation of each metric; NaN is left out of the average. `__` in a name stands for `/`."""
        for name, value in values.items():
            if not np.isnan(value):
                self._values[name.replace("__", "/")].append(float(value))

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


def importance_ratio_metrics(log_ratios: np.ndarray) -> dict[str, float]:
    """
    Mean, maximum and quantiles of importance ratios, and their effective sample size.

    Args:
        log_ratios (`np.ndarray`):
            Log importance ratios of replayed tokens, shape `(N,)`, nats.

    Returns:
        `dict[str, float]`:
            `replay/importance_ratio_{mean,max,q10,q50,q90}`, and `replay/effective_sample_size`, Kish's
            `(sum w)^2 / (N sum w^2)` in (0, 1]; empty when there is no token.
    """
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
    for quantile, value in zip(_QUANTILES, np.quantile(ratios, _QUANTILES), strict=True):
        metrics[f"replay/importance_ratio_q{round(100 * quantile)}"] = float(value)
    return metrics
