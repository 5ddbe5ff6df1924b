"""What the plots of a report show: numbers, words, and what to say where there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from . import signs
from .history import Series, series_of
from .run import Run
from .savings import Savings

# Bands of the histogram that can be told apart.
_MOST_BANDS = 8
_NO_LINES = "No log line has it: there is no trainer_state.json, as each checkpoint has one, or replay was off."
_LOG_ALL = 'log_replay="all"'


@dataclass(frozen=True)
class Line:
    """A line of a chart, or a band of a stack."""

    name: str
    series: Series


@dataclass(frozen=True)
class Chart:
    """
    A plot.

    Attributes:
        key (`str`):
            Its name in the page.
        title (`str`):
            What it shows.
        about (`str`):
            How to read it.
        unit (`str`):
            Of the vertical axis.
        lines (`list[Line]`):
            What is drawn; nothing is where there are none.
        missing (`str`):
            Why there is nothing, and what would help.
        band (`tuple[Series, Series]`, *optional*):
            From where to where the first line scatters.
        threshold (`float`, *optional*):
            Beyond which there is a warning.
        is_stack (`bool`):
            Whether lines stand on each other.
        is_log (`bool`):
            Whether the vertical axis is logarithmic.
        top (`float`, *optional*):
            End of the vertical axis.
        note (`str`):
            What else to know.
    """

    key: str
    title: str
    about: str
    unit: str
    lines: list[Line]
    missing: str = _NO_LINES
    band: tuple[Series, Series] | None = None
    threshold: float | None = None
    is_stack: bool = False
    is_log: bool = False
    top: float | None = None
    note: str = ""


def charts_of(run: Run, savings: Savings) -> list[Chart]:
    """All charts of a report, in its order."""
    return [
        _pass_rates(run),
        _buffer(run),
        _buckets(run),
        _fraction(run),
        _tokens(savings),
        _seconds(savings),
        _ages(run),
        _ratios(run),
        _effective_sample_size(run),
        _entropies(run),
        _without_signal(run),
    ]


def _lines(*named: tuple[str, Series]) -> list[Line]:
    return [Line(name, series) for name, series in named if len(series)]


def _pass_rates(run: Run) -> Chart:
    return Chart(
        "pass_rate",
        "Pass rate",
        "Fresh completions that succeed: of all questions, and of those that were replayed.",
        "share",
        _lines(
            ("fresh, all questions", run.history.series("fresh/pass_rate")),
            ("fresh, replayed questions", run.history.series("replay/group_pass_rate")),
        ),
        top=1.0,
    )


def _buffer(run: Run) -> Chart:
    is_logged = "replay/questions" in run.history.names
    return Chart(
        "buffer",
        "Buffer and retired set",
        "Questions in the buffer, and those solved by a whole group for good (figure 5 of the paper)."
        + ("" if is_logged else " As the checkpoints have it."),
        "questions",
        _lines(
            ("in the buffer", run.sizes_series("replay/questions", "questions")),
            ("retired", run.sizes_series("replay/retired", "retired")),
        ),
        "There are neither log lines nor checkpoints around this buffer: it is known at one moment only.",
    )


def _buckets(run: Run) -> Chart:
    steps, by_bucket = run.buckets()
    group_size = run.buffer.buffer.group_size if run.buffer is not None else None
    size = group_size or max(by_bucket, default=0)
    lines = [
        Line(f"{_named(band)} of {size}", Series(steps, np.sum([by_bucket[bucket] for bucket in band], axis=0)))
        for band in bands_of(sorted(by_bucket))
    ]
    is_logged = any(name.startswith("replay/bucket_") for name in run.history.names)
    return Chart(
        "buckets",
        "Questions by bucket",
        "How many of its latest group were correct, the hardest at the bottom."
        + ("" if is_logged else " As the checkpoints have it."),
        "questions",
        lines,
        f"Needs a checkpoint with a buffer, or {_LOG_ALL}.",
        is_stack=True,
    )


def bands_of(buckets: list[int]) -> list[list[int]]:
    """Neighbouring buckets together, so that there are few enough to be told apart."""
    if len(buckets) <= _MOST_BANDS:
        return [[bucket] for bucket in buckets]
    ends = np.linspace(0, len(buckets), _MOST_BANDS + 1).round().astype(int).tolist()
    return [buckets[start:end] for start, end in pairwise(ends)]


def _named(band: list[int]) -> str:
    return str(band[0]) if len(band) == 1 else f"{band[0]}-{band[-1]}"


def _fraction(run: Run) -> Chart:
    return Chart(
        "fraction",
        "Share of questions replayed",
        "Of the questions of a batch, and the most that were allowed.",
        "share",
        _lines(
            ("replayed", run.history.series("replay/fraction")),
            ("allowed", run.history.series("replay/fraction_allowed")),
        ),
    )


def _tokens(savings: Savings) -> Chart:
    return Chart(
        "tokens",
        "Tokens saved",
        "Completion tokens taken from the buffer instead of generated, since the start.",
        "tokens",
        _lines(("saved", savings.token_series)),
    )


def _seconds(savings: Savings) -> Chart:
    return Chart(
        "seconds",
        "Seconds saved and spent",
        "Saved is an estimate, spent is the measured time of scoring. Both since the start.",
        "seconds",
        _lines(("saved, estimated", savings.second_series), ("spent on scoring", savings.scoring_series)),
        "Needs log lines with replay/tokens_saved, and TRL's num_tokens and step_time.",
        note="Estimated: the tokens saved, at the tokens that a second of a step dealt with (TRL's num_tokens, "
        "prompts included, and step_time). Only a run without replay tells exactly.",
    )


def _ages(run: Run) -> Chart:
    mean, highest = (run.history.series(f"replay/staleness_{name}") for name in ("mean", "max"))
    if not len(mean):
        mean = _by_step(run, "age", np.mean)
    if not len(highest):
        highest = _by_step(run, "age", np.max)
    return Chart(
        "staleness",
        "Staleness",
        "Age of replayed completions: steps since they were generated.",
        "steps",
        _lines(("mean", mean), ("oldest", highest)),
        "Nothing was replayed, or neither log lines nor a replay log tell of it (replay_log=True).",
    )


def _ratios(run: Run) -> Chart:
    low, middle, high = (run.history.series(f"replay/importance_ratio_q{q}") for q in (10, 50, 90))
    about = "Of replayed tokens: the present policy over the one that generated them. Median, and 80 % of the tokens."
    if not len(middle):
        about = (
            "The present policy over the one that generated a completion, geometric mean over its tokens. Median, and "
        )
        about += "80 % of the completions."
        low, middle, high = (_by_step(run, "mean_log_ratio", partial(_ratio_at, share)) for share in (0.1, 0.5, 0.9))
    return Chart(
        "ratios",
        "Importance ratio",
        about,
        "ratio",
        _lines(("median", middle)),
        f"Needs a replay log (replay_log=True) or {_LOG_ALL}, and a replay.",
        band=(low, high) if len(middle) and len(low) == len(middle) == len(high) else None,
        is_log=bool((middle.values > 0).all()),
    )


def _ratio_at(share: float, log_ratios: np.ndarray) -> float:
    """Quantile of ratios."""
    return float(np.exp(np.clip(np.quantile(log_ratios, share), -700, 700)))


def _effective_sample_size(run: Run) -> Chart:
    return Chart(
        "effective_sample_size",
        "Effective sample size",
        "Of the importance ratios, as a share: 1 where policies agree. The dotted line is where a warning begins.",
        "share",
        _lines(("of replayed tokens", run.history.series("replay/effective_sample_size"))),
        "No log line has it: nothing was replayed, or there is no trainer_state.json.",
        threshold=signs.LOWEST_EFFECTIVE_SAMPLE_SIZE,
        top=1.0,
    )


def _entropies(run: Run) -> Chart:
    ours = run.history.series("replay/entropy")
    ours = ours if len(ours) else _by_step(run, "entropy", np.mean)
    return Chart(
        "entropy",
        "Entropy",
        "Of all tokens trained (TRL's entropy), and of the replayed completions when they were chosen.",
        "nats per token",
        _lines(("all", run.history.series("entropy")), ("replayed", ours)),
    )


def _without_signal(run: Run) -> Chart:
    return Chart(
        "signal",
        "Groups without signal",
        "Groups whose rewards are all the same, so that they teach nothing: by their fresh completions alone, and as "
        "trained (TRL's frac_reward_zero_std, stored completions included).",
        "share of groups",
        _lines(
            ("fresh alone", run.history.series("fresh/frac_groups_without_signal")),
            ("as trained", run.history.series("frac_reward_zero_std")),
        ),
        threshold=signs.HIGHEST_SHARE_WITHOUT_SIGNAL,
        top=1.0,
    )


def _by_step(run: Run, column: str, of_step: Callable[[np.ndarray], Any]) -> Series:
    """What a function says of a column of the log of replays, for each step that replayed."""
    values, steps = run.replay_column(column), run.replay_column("step")
    is_known = np.isfinite(values)
    values, steps = values[is_known], steps[is_known].astype(np.int64)
    order = np.argsort(steps, kind="stable")
    firsts, starts = np.unique(steps[order], return_index=True)
    runs = np.split(values[order], starts[1:]) if len(firsts) else []
    return series_of([(int(step), float(of_step(run_))) for step, run_ in zip(firsts, runs, strict=True)])
