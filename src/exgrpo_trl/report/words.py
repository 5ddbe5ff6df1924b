"""The three sentences at the top of a report: did replay happen, what did it save, is there a warning sign."""

from __future__ import annotations

import numpy as np

from .run import Run
from .savings import Savings
from .signs import FINE, HINT, UNKNOWN, WARNING, Sign


def sentences(run: Run, savings: Savings, signs: list[Sign]) -> list[str]:
    """One of each."""
    return [did_replay_happen(run), what_it_saved(run, savings), warning(signs)]


def did_replay_happen(run: Run) -> str:
    """How many completions were replayed, in how many steps, and which share of a batch they were."""
    fractions = run.history.series("replay/fraction")
    began = np.flatnonzero(fractions.values > 0)
    share = ""
    if len(began):
        share = f"; {fractions.values[began[0] :].mean():.0%} of the questions of a batch on average"
    if run.log is not None and len(run.log):
        steps = np.unique(run.replay_column("step"))
        # Several may begin with the same step.
        batches = np.unique(np.stack([run.replay_column("step"), run.replay_column("batch")]), axis=1).shape[1]
        least = "" if run.is_log_whole else "at least "
        return (
            f"Replay happened: {least}{counted(len(run.log), 'stored completion')} came back in {least}"
            f"{counted(batches, 'batch', 'batches')}, from step {steps[0]:,.0f} to step {steps[-1]:,.0f}{share}."
        )
    if len(began):
        # Averages between two log lines.
        return (
            f"Replay happened: {len(began):,} of {counted(len(fractions), 'log line')} tell of it, from step "
            f"{fractions.steps[began[0]]:,} on{share}. How many completions came back stands in the replay log, "
            "which is not there."
        )
    if len(fractions):
        return f"Replay did not happen: nothing was replayed up to step {fractions.steps[-1]:,}.{_why_not(run)}"
    if run.buffer is not None:
        num_replays = sum(run.buffer.buffer.reuse(experience).num_replays for _, _, experience in run.buffer.buffer)
        if num_replays:
            of_stored = counted(run.buffer.buffer.num_completions, "completion")
            return f"Replay happened: the {of_stored} in the buffer came back {counted(num_replays, 'time')} in all."
    return (
        "Whether replay happened is unknown: there are no log lines of it, no replay log, and nobody counted replays."
    )


def _why_not(run: Run) -> str:
    active, rates = run.history.series("replay/active"), run.history.series("fresh/pass_rate")
    if len(active) and not active.values.any() and len(rates):
        return (
            f" The delayed start has not come: the pass rate reached {rates.values.max():.3g}. Lower "
            "replay_start_pass_rate."
        )
    questions = run.history.series("replay/questions")
    if len(questions) and not questions.values.any():
        return " No question was ever stored: none was solved at times, but not always."
    return ""


def what_it_saved(run: Run, savings: Savings) -> str:
    """Tokens, estimated seconds, and what scoring cost."""
    if savings.tokens is None:
        return "What it saved is unknown: replay/tokens_saved was not logged."
    if not savings.tokens:
        return f"It saved no tokens.{_cost(savings)}"
    share = f" ({savings.share:.1%} of all that TRL counted, prompts included)" if savings.share is not None else ""
    text = f"It saved {counted(int(savings.tokens), 'token')} of generation{share}"
    if savings.seconds is None:
        return f"{text}; seconds cannot be estimated without TRL's step_time and num_tokens.{_cost(savings)}"
    cost = "" if savings.scoring_seconds is None else f", against {seconds(savings.scoring_seconds)} of scoring"
    return f"{text}, an estimated {seconds(savings.seconds)}{cost}."


def _cost(savings: Savings) -> str:
    return "" if savings.scoring_seconds is None else f" Scoring took {seconds(savings.scoring_seconds)}."


def warning(signs: list[Sign]) -> str:
    """The worst of the signs, with its value and threshold."""
    found = [sign for sign in signs if sign.level == WARNING]
    known = [sign for sign in signs if sign.level in (FINE, HINT)]
    if found:
        first = found[0]
        more = f" And {counted(len(found) - 1, 'more warning sign')}, below." if len(found) > 1 else ""
        return (
            f"{counted(len(found), 'warning sign')}: {lower(first.name)} is {first.value} (warns {first.threshold}). "
            f"{first.meaning}{more}"
        )
    if not known:
        return "Whether there is a warning sign is unknown: there are no log lines."
    unknown = sum(sign.level == UNKNOWN for sign in signs)
    nearest = known[0]
    rest = f" {counted(unknown, 'sign')} could not be checked." if unknown else ""
    return (
        f"No warning sign among {counted(len(known), 'checked value')}: {lower(nearest.name)} is {nearest.value}, for "
        f"example (warns {nearest.threshold}).{rest}"
    )


def lower(text: str) -> str:
    """The text as it stands within a sentence."""
    return text[:1].lower() + text[1:]


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number of things."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def seconds(value: float) -> str:
    """A time that a person can imagine."""
    if value < 0.1:
        return f"{value * 1000:.2g} ms"
    if value < 120:
        return f"{value:.3g} seconds"
    if value < 7200:
        return f"{value / 60:.3g} minutes"
    return f"{value / 3600:,.1f} hours"
