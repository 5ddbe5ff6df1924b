"""What the log of replays says of a batch: a row for every stored completion in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .batch import Batch
from .config import ExGRPOConfig
from .records import Replay, Reuse


def log_rows(batch: Batch, args: ExGRPOConfig, evicted: Mapping[int, str]) -> list[dict[str, Any]]:
    """
    Rows of the log of replays, as [`ReplayLog.add`] takes them.

    Args:
        batch ([`Batch`]):
            A batch that was trained, with what all processes know of it; on the main process.
        args ([`ExGRPOConfig`]):
            Configuration of the trainer.
        evicted (`Mapping[int, str]`):
            Why stored completions have left the buffer after this replay, by row.
    """
    # A batch is generated once for so many backward passes, of which an optimizer step takes several.
    passes = (args.steps_per_generation or 1) * args.num_iterations
    num_steps = max(1, -(-passes // args.gradient_accumulation_steps))
    shared = {
        "last_step": batch.global_step + num_steps,
        "policy_version": batch.policy_version,
        "group_size": batch.group_size,
    }
    return [shared | _row(batch, args, replay) | {"evicted": evicted.get(replay.row)} for replay in batch.replays]


def _row(batch: Batch, args: ExGRPOConfig, replay: Replay) -> dict[str, Any]:
    experience, choice = replay.experience, batch.choices.get(replay.row)
    row: dict[str, Any] = {
        "row": replay.row,
        "question_id": replay.question.question_id,
        "num_tokens": experience.num_tokens,
        "reward": experience.reward,
        "age": batch.policy_version - experience.policy_version,
        "is_fill": replay.row in batch.replaced,
        "bucket": None,
        "num_replays": None,
        "entropy": None,
        "negative_log_likelihood": None,
        "scored_at": None,
        "mean_log_ratio": None,
        "drift": None,
    }
    competitors = choice.competitors if choice is not None else ()
    if choice is not None:
        row |= {"bucket": choice.bucket}
        if choice.reuse is not None:
            row |= {"num_replays": choice.reuse.num_replays}
        if competitors and choice.chosen.entropy is not None:
            is_known = args.candidate_scores == "last_known" and choice.reuse is not None
            row |= {
                "entropy": choice.chosen.entropy,
                "negative_log_likelihood": choice.chosen.negative_log_likelihood,
                "scored_at": choice.reuse.scored_at if is_known else batch.policy_version,  # type: ignore[union-attr]
            }
    if replay.row in batch.scores:
        scores, _ = batch.scores[replay.row]
        before = Reuse.at_generation(experience).negative_log_likelihood
        row |= {"mean_log_ratio": before - scores.negative_log_likelihood, "drift": scores.drift}
    return row | {
        "competitor_ages": [batch.policy_version - other.experience.policy_version for other in competitors],
        "competitor_entropies": [other.entropy for other in competitors],
        "competitor_negative_log_likelihoods": [other.negative_log_likelihood for other in competitors],
    }
