"""What is logged, by its real name: every name of a metric stands here, and nowhere else."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from .batch import Batch

# Values that are kept between two log lines: a run that never logs does not grow. Up to here, what is logged is the
# mean, maximum and quantile that NumPy finds in all of them together.
MAX_VALUES = 1024
MAX_LOG_RATIOS = 65_536

_QUANTILES = (0.1, 0.5, 0.9)
_QUANTILE_NAMES = (
    "replay/importance_ratio_q10",
    "replay/importance_ratio_q50",
    "replay/importance_ratio_q90",
)
_LOG_RATIO_RANGE = (-700, 700)  # where the ratio itself is a float
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)  # its fractional part, in units of 2 ** -64
# Names of the buffer's own metrics, but for the buckets.
_OF_BUFFER = {
    "questions": "replay/questions",
    "completions": "replay/completions",
    "tokens": "replay/tokens",
    "retired": "replay/retired",
    "evicted": "replay/evicted",
    "duplicates": "replay/duplicates",
}
_BUCKET = "bucket_"
_OF_PROCESSES = {"gathering": "replay/gathering_seconds", "broadcasting": "replay/broadcasting_seconds"}

# What tells whether replay works: the line of `log_replay="short"`.
SHORT_LINE = frozenset(
    {
        "fresh/pass_rate",
        "fresh/frac_groups_without_signal",
        "replay/fraction",
        "replay/group_pass_rate",
        "replay/effective_sample_size",
        "replay/staleness_mean",
        "replay/questions",
        "replay/retired",
        "replay/tokens_saved",
        "replay/scoring_seconds",
    }
)


class _Average:
    """Mean and maximum of values, in constant space."""

    def __init__(self) -> None:
        self._values: list[float] = []
        self._sum, self._count, self._max = 0.0, 0, -np.inf  # of values that are no longer kept

    def add(self, value: float) -> None:
        """Add a value."""
        if len(self._values) >= MAX_VALUES:
            self._sum += float(np.sum(self._values))
            self._count += len(self._values)
            self._max = self.max()
            self._values.clear()
        self._values.append(value)

    def add_to_last(self, value: float) -> None:
        """Add to the value that was added last."""
        self._values[-1] += value

    def mean(self) -> float:
        """Mean of all values."""
        if not self._count:
            return float(np.mean(self._values))
        return (self._sum + float(np.sum(self._values))) / (self._count + len(self._values))

    def max(self) -> float:
        """Maximum of all values."""
        return float(np.max(self._values, initial=self._max))


class RatioSums:
    """
    Sums of importance ratios and of their squares: they neither overflow nor vanish, and merge exactly alike.

    Kept relative to the largest ratio.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self.largest: np.float64 = np.float64(-1e9)  # finite, so that a ratio of 0 is one
        self.first: np.float64 = np.float64(0)
        self.second: np.float64 = np.float64(0)

    def add(self, log_ratios: np.ndarray) -> None:
        """Add log ratios of shape `(N,)`."""
        exact = log_ratios.astype(np.float64)
        other = RatioSums()
        other.count, other.largest = len(exact), exact.max(initial=other.largest)
        scaled = np.exp(exact - other.largest)
        other.first, other.second = scaled.sum(), (scaled**2).sum()
        self.merge(other)

    def merge(self, other: "RatioSums") -> None:
        """Add what another process has."""
        largest = np.maximum(self.largest, other.largest)
        mine, others = np.exp(self.largest - largest), np.exp(other.largest - largest)
        self.count += other.count
        self.first = self.first * mine + other.first * others
        self.second = self.second * mine**2 + other.second * others**2
        self.largest = largest

    @property
    def effective_sample_size(self) -> float | None:
        """As a share of the ratios, `None` without any."""
        return float(self.first**2 / (self.count * self.second)) if self.count else None


def merged(of_processes: Iterable[RatioSums]) -> RatioSums:
    """What all processes have, in their order."""
    together = RatioSums()
    for sums in of_processes:
        together.merge(sums)
    return together


class LogRatios:
    """
    Log importance ratios of replayed tokens, nats, in constant space.

    Their mean, maximum and effective sample size are exact. So are quantiles up to `MAX_LOG_RATIOS`; beyond, they are
    those of an even sample of about as many, which is a function of the order of the values alone.
    """

    def __init__(self) -> None:
        self.count: int = 0
        self._raw, self._clipped = RatioSums(), RatioSums()
        self._sample = np.zeros(0, dtype=np.float32)
        # Multiples of the golden ratio are spread evenly, whatever period the values have. Only the lowest stay.
        self._ranks = np.zeros(0, dtype=np.uint32)
        self._num_ranks = 2**32
        self._waiting: list[np.ndarray] = []  # for many to be added at once
        self._num_waiting = 0

    def add(self, log_ratios: np.ndarray) -> None:
        """Add log ratios of shape `(N,)`, kept in float32."""
        self._waiting.append(log_ratios.astype(np.float32))
        self._num_waiting += len(log_ratios)
        if self._num_waiting >= MAX_LOG_RATIOS // 4:
            self._settle()

    def _settle(self) -> None:
        if not self._waiting:
            return
        values = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        numbers = np.arange(self.count, self.count + len(values), dtype=np.uint64)
        self.count += len(values)
        self._raw.add(values)
        self._clipped.add(np.clip(values.astype(np.float64), *_LOG_RATIO_RANGE))
        self._keep(values, (numbers * _GOLDEN_RATIO >> np.uint64(32)).astype(np.uint32))

    def merge(self, other: "LogRatios") -> None:
        """Add what another process has."""
        self._settle()
        other._settle()
        self.count += other.count
        self._raw.merge(other._raw)
        self._clipped.merge(other._clipped)
        self._thin(min(self._num_ranks, other._num_ranks))
        self._keep(other._sample, other._ranks)

    def _keep(self, values: np.ndarray, ranks: np.ndarray) -> None:
        stays = ranks < self._num_ranks
        self._sample = np.concatenate([self._sample, values[stays]])
        self._ranks = np.concatenate([self._ranks, ranks[stays]])
        while len(self._sample) > MAX_LOG_RATIOS:
            self._thin(self._num_ranks // 2)

    def _thin(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        stays = self._ranks < num_ranks
        self._sample, self._ranks = self._sample[stays], self._ranks[stays]

    def metrics(self) -> dict[str, float]:
        """Mean, maximum and quantiles of the ratios, and their effective sample size; nothing without a ratio."""
        self._settle()
        metrics = importance_ratio_metrics(self._sample.astype(np.float64))
        if len(self._sample) == self.count:
            return metrics
        largest = np.exp(self._clipped.largest)
        return metrics | {
            "replay/importance_ratio_mean": float(largest * (self._clipped.first / self.count)),
            "replay/importance_ratio_max": float(largest),
            "replay/effective_sample_size": float(self._raw.first**2 / (self.count * self._raw.second)),
        }


class ReplayMetrics:
    """
    Averages scalars and pools importance ratios between two log lines.

    A log line without a new generation repeats the last values, so that every line has the same columns.
    """

    def __init__(self) -> None:
        self.tokens_saved: int = 0  # of the whole run
        self._values: dict[str, _Average] = defaultdict(_Average)
        self._log_ratios = LogRatios()
        self._last: dict[str, float] = {}
        self._seconds_before: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Add one observation of each metric; NaN is left out of the average."""
        for name, value in values.items():
            if not math.isnan(value):
                self._values[name].add(float(value))

    def add_selection(self, *, selection_seconds: float, scoring_seconds: float, candidates_scored: int) -> None:
        """Add what choosing the replays of a batch has cost."""
        self.add(
            {
                "replay/candidates_scored": candidates_scored,
                "replay/selection_seconds": selection_seconds,
                "replay/scoring_seconds": scoring_seconds,
            }
        )

    def add_to_selection(self, *, selection_seconds: float, scoring_seconds: float, candidates_scored: int) -> None:
        """Add what choosing more for the same batch has cost."""
        self._values["replay/candidates_scored"].add_to_last(candidates_scored)
        self._values["replay/selection_seconds"].add_to_last(selection_seconds)
        self._values["replay/scoring_seconds"].add_to_last(scoring_seconds)

    def add_batch(self, batch: Batch) -> None:
        """Add a generation batch whose rewards are known: fresh and replayed rollouts apart."""
        is_fresh, replays, planned = batch.is_fresh, batch.replays, batch.planned
        fresh = batch.generated_rewards
        groups = list(dict.fromkeys(batch.group_of(replay) for replay in planned))
        if not batch.is_generated_whole:
            self.tokens_saved += sum(replay.experience.num_model_tokens for replay in planned)
        self.add(
            {
                "fresh/pass_rate": batch.fresh_pass_rate,
                "fresh/reward": _nanmean(fresh),
                "fresh/reward_std": _mean(_stds(fresh)),
                "fresh/frac_groups_without_signal": _mean(_has_no_signal(fresh[batch.is_generated.any(axis=1)])),
                "replay/active": float(batch.plan.is_started),
                "replay/fraction": len(groups) / batch.num_groups,
            }
        )
        if batch.fills_groups:
            self.add({"replay/groups_filled": len(batch.replaced)})
        if not replays:
            return
        staleness = [batch.policy_version - replay.experience.policy_version for replay in replays]
        entropies = np.array([replay.entropy for replay in replays if replay.entropy is not None])
        self.add(
            {
                "replay/reward": _nanmean(batch.rewards[~is_fresh]),
                "replay/group_pass_rate": _mean(batch.is_correct[groups][is_fresh[groups]]),
                "replay/staleness_mean": sum(staleness) / len(staleness),
                "replay/staleness_max": max(staleness),
                "replay/entropy": _mean(entropies),
            }
        )

    def add_agreements(self, agreements: Sequence[bool]) -> None:
        """Add for each choice by present scores whether the last known ones would have led to the same."""
        if agreements:
            self.add({"replay/last_known_agreement": float(np.mean(agreements))})

    def add_collection(self, evicted: Mapping[str, int]) -> None:
        """Add how many replayed completions of a batch have left the buffer, by reason."""
        self.add({f"replay/evicted_{reason}": count for reason, count in evicted.items()})

    def add_fraction_allowed(self, fraction: float) -> None:
        """Add the largest share of questions that may be replayed now."""
        self.add({"replay/fraction_allowed": fraction})

    def add_process_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add the time that processes have spent on messages since the last call, from what they spent in all."""
        for direction, name in _OF_PROCESSES.items():
            self.add({name: seconds[direction] - self._seconds_before.get(direction, 0.0)})
            self._seconds_before[direction] = seconds[direction]

    def add_log_ratios(self, of_processes: Iterable[LogRatios]) -> None:
        """Add the log importance ratios of replayed tokens of all processes."""
        for log_ratios in of_processes:
            self._log_ratios.merge(log_ratios)

    def flush(self) -> dict[str, float]:
        """Averages (maxima for names in `_max`) since the last call, the last known value where nothing is new."""
        metrics = {
            name: values.max() if name.endswith("_max") else values.mean() for name, values in self._values.items()
        }
        metrics |= self._log_ratios.metrics()
        self._values.clear()
        self._log_ratios = LogRatios()
        self._last |= metrics
        return dict(self._last)

    def line(
        self, of_buffer: Mapping[str, float], of_strategies: Mapping[str, float], *, is_short: bool = False
    ) -> dict[str, float]:
        """
        What a log line says of replay: everything since the last line, and the present sizes.

        A short one has `SHORT_LINE` alone, and what strategies and buffers of the user report.
        """
        sizes = {_OF_BUFFER.get(name, f"replay/{name}"): value for name, value in of_buffer.items()}
        reported = {f"replay/{name}": float(value) for name, value in of_strategies.items()}
        line = self.flush() | sizes | reported | {"replay/tokens_saved": float(self.tokens_saved)}
        if not is_short:
            return line
        # No built-in strategy reports a metric.
        own = {f"replay/{name}" for name in of_buffer if name not in _OF_BUFFER and not name.startswith(_BUCKET)}
        kept = SHORT_LINE | own | reported.keys()
        return {name: value for name, value in line.items() if name in kept}


def importance_ratio_metrics(log_ratios: np.ndarray) -> dict[str, float]:
    """Mean, maximum and quantiles of importance ratios, and their effective sample size."""
    if not len(log_ratios):
        return {}
    largest = log_ratios.max()
    scaled = np.exp(log_ratios - largest)
    ratios = np.exp(np.clip(log_ratios, *_LOG_RATIO_RANGE))
    metrics = {
        "replay/importance_ratio_mean": float(ratios.mean()),
        "replay/importance_ratio_max": float(ratios.max()),
        "replay/effective_sample_size": float(scaled.sum() ** 2 / (len(scaled) * (scaled**2).sum())),
    }
    return metrics | dict(zip(_QUANTILE_NAMES, np.quantile(ratios, _QUANTILES).tolist(), strict=True))


def _nanmean(values: np.ndarray) -> float:
    return _mean(values[~np.isnan(values)])


def _stds(values: np.ndarray) -> np.ndarray:
    """Standard deviation of each row that has a number, NaN left out; what `np.nanstd` gives, without its detours."""
    is_known = ~np.isnan(values)
    num_known = is_known.sum(axis=1)
    divisors = np.maximum(num_known, 1)
    means = np.where(is_known, values, 0.0).sum(axis=1) / divisors
    deviations = np.where(is_known, values - means[:, None], 0.0)
    return np.asarray(np.sqrt((deviations * deviations).sum(axis=1) / divisors)[num_known > 0])


def _mean(values: np.ndarray) -> float:
    # What `np.mean` gives, without its detours.
    return float(np.add.reduce(values, dtype=np.float64)) / values.size if values.size else math.nan


def _has_no_signal(fresh: np.ndarray) -> np.ndarray:
    """Which groups have fresh rewards of one value only, or none; `(num_groups, num_generations)`, NaN elsewhere."""
    return ~(np.fmin.reduce(fresh, axis=1) < np.fmax.reduce(fresh, axis=1))
