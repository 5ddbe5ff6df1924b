"""How replayed completions have fared: what is noted of them, and which are done with. On the main process."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .batch import Batch
from .buffer import ReplayBuffer
from .config import ExGRPOConfig
from .records import Replay, Reuse

# Why a completion leaves after it was replayed.
REASONS = ("incorrect", "drifted", "used_up")


def settle(buffer: ReplayBuffer, args: ExGRPOConfig, batch: Batch) -> dict[int, str]:
    """
    Note the replays of a batch that was trained, and evict those that are done with.

    Args:
        buffer ([`ReplayBuffer`]):
            Experience buffer.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        batch ([`Batch`]):
            The batch, with what all processes know of it.

    Returns:
        `dict[int, str]`:
            Why completions have left, by row: one of `REASONS`.
    """
    evicted: dict[int, str] = {}
    for of_one in batch.replayed_items():
        reuses = [_note(buffer, batch, replay) for replay in of_one]
        reason = _reason_to_evict(args, batch, of_one, reuses)
        if reason is not None and buffer.evict(of_one[0].question.question_id, of_one[0].experience):
            evicted.update((replay.row, reason) for replay in of_one)
    return evicted


def _note(buffer: ReplayBuffer, batch: Batch, replay: Replay) -> Reuse | None:
    if not hasattr(buffer, "note_reuse"):  # a buffer of the user, which nothing needs it of
        return None
    reuse = buffer.reuse(replay.experience)
    if replay.row in batch.scores:
        scores, version = batch.scores[replay.row]
        # A policy that rules a token out gives infinite scores.
        entropy, likelihood = (value if math.isfinite(value) else math.nan for value in scores[:2])
        reuse = Reuse(reuse.num_replays + 1, entropy, likelihood, version)
    else:
        reuse = replace(reuse, num_replays=reuse.num_replays + 1)
    buffer.note_reuse(replay.question.question_id, replay.experience, reuse)
    return reuse


def _reason_to_evict(
    args: ExGRPOConfig, batch: Batch, of_one: Sequence[Replay], reuses: Sequence[Reuse | None]
) -> str | None:
    """Why a completion, or the completions of a group, should leave; `None` if they may stay."""
    rows = [replay.row for replay in of_one]
    is_worth, rewards = (of_all.flat[rows].tolist() for of_all in (batch.admission.is_worth_storing, batch.rewards))
    is_done = all(is_worth) or not any(is_worth) if args.replays_groups else not all(is_worth)
    if is_done and not any(map(math.isnan, rewards)):
        return "incorrect"
    if args.max_drift is not None:
        # NaN where a row was not trained: then nothing is known.
        drifts = [np.nan if (scores := batch.scores.get(row)) is None else scores[0].drift for row in rows]
        num_tokens = [replay.experience.num_model_tokens for replay in of_one]
        if np.average(np.array(drifts, dtype=float), weights=num_tokens) > args.max_drift:
            return "drifted"
    most = args.max_replays
    is_used_up = most is not None and any(reuse is not None and reuse.num_replays >= most for reuse in reuses)
    return "used_up" if is_used_up else None
