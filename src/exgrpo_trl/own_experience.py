"""Completions from elsewhere: read and stored by the main process, scored by all under the present policy."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers.utils import logging

from .buffer.as_dataset import check_is_dataset
from .buffer.bringing import Item, choose, num_evicted, report_on, store
from .buffer.continuations import Continuations
from .buffer.own_checks import Rules
from .buffer.own_rows import OWN_COLUMNS, OwnRow, read_own_rows
from .buffer.report import ExperienceReport, RefusedRow
from .examples import question_id_of, question_of_row, with_prompt
from .questions import TrainingQuestions
from .records import UNKNOWN_PROMPT, Experience, Question, Reuse, prompt_hash
from .rollout_details import RolloutDetails
from .scoring import Prompted, TokenScores, score_candidates, score_tokens

logger: Any = logging.get_logger(__name__)

# Batches of every process between two movements of the progress bar.
_BATCHES_AT_ONCE = 8


def score_experience(
    trainer: Any, dataset: Any, *, bucket: int | None, success_threshold: float | None, add_eos: bool
) -> ExperienceReport:
    """
    Put completions of a dataset into the experience buffer of a trainer; all processes call this.

    Args:
        trainer ([`ExGRPOTrainer`]):
            The trainer.
        dataset (`datasets.Dataset`):
            Their dataset, see [`ExGRPOTrainer.score_experience`], which documents the rest.
        bucket (`int` or `None`):
            Bucket of questions of which nothing tells the pass rate.
        success_threshold (`float` or `None`):
            Reward from which a completion is a success.
        add_eos (`bool`):
            Whether an end token follows a completion that has none.
    """
    _check_trainer(trainer)
    check_is_dataset(dataset)
    trainer._follow_dataset()
    args, replayer, processes = trainer.args, trainer.replayer, trainer._processes
    text_config = trainer.model.config.get_text_config()
    rules = Rules(
        group_size=args.num_generations,
        unit=args.replay_unit,
        success_threshold=args.success_threshold if success_threshold is None else success_threshold,
        bucket=bucket,
        max_completion_length=trainer.max_completion_length,
        max_length=getattr(text_config, "max_position_embeddings", None),
        vocab_size=text_config.vocab_size,
    )
    continuations = Continuations(
        trainer._text_tokenizer,
        template={
            "tools": trainer.tools or None,
            "chat_template": trainer.chat_template,
            **trainer.chat_template_kwargs,
        },
        add_eos=add_eos,
        eos_token_ids=getattr(trainer, "eos_token_ids", None),
    )
    items: list[Item] = []
    refused: list[RefusedRow] = []
    buckets: dict[str, int] = {}
    waiting: list[OwnRow] = []

    def read() -> int:
        rows, unreadable = read_own_rows(
            dataset,
            rules,
            functools.partial(_question_of, replayer.questions, {}),
            lambda questions: replayer.prompts.token_ids([question.example for question in questions]),
            continuations,
        )
        chosen, others, of_questions = choose(rows, replayer.buffer, rules)
        items.extend(chosen)
        refused.extend([*unreadable, *others])
        buckets.update(of_questions)
        # What was last known of a completion is asked for even if its own log-probabilities are there.
        waiting.extend(
            row for item in items for row in item if row.logps is None or args.candidate_scores == "last_known"
        )
        # The longest first: if memory is short, it is at once.
        waiting.sort(key=lambda row: -len(row.prompt_ids or ()) - len(row.token_ids))
        return len(waiting)

    num_waiting = processes.decide("reading the experience", read)
    scores: dict[int, TokenScores] = {}  # by row, on the main process
    batch_size = args.per_device_train_batch_size
    step = _BATCHES_AT_ONCE * batch_size * processes.count
    is_quiet = args.disable_tqdm or not processes.is_main
    with logging.tqdm(total=num_waiting, desc="Scoring experience", disable=is_quiet) as bar:
        for start in range(0, num_waiting, step):
            prompted = processes.decide(
                "sending out the experience",
                functools.partial(_prompted, waiting, start, start + step),
            )
            with trainer.accelerator.autocast():  # as in the training forward, before the model is prepared for it
                score = functools.partial(trainer._scored, of_rows=score_tokens)
                scored = score_candidates(prompted, score, processes, batch_size)
            scores |= {waiting[start + number].row: of_one for number, of_one in scored.items()}
            bar.update(len(prompted))

    def keep() -> ExperienceReport:
        buffer, evicted_before = replayer.buffer, num_evicted(replayer.buffer)
        items[:], impossible = _possible(items, scores)
        refused.extend(impossible)
        version = replayer.present_version(trainer.state.global_step, is_training=trainer.is_in_train)
        reward_name = trainer.reward_func_names[0] if trainer._keeps_rewards else None
        made = {row.row: _experience(row, scores.get(row.row), version, reward_name) for item in items for row in item}
        store(buffer, items, buckets, rules, lambda row: made[row.row])
        for item in items:
            experiences = [made[row.row] for row in item]
            replayer.replayable.collected(item[0].question, experiences, lambda: ())
            for row, experience in zip(item, experiences, strict=True):
                if row.logps is not None and row.row in scores:
                    _note(buffer, row, experience, scores[row.row], version)
        return report_on(
            items,
            refused,
            num_scored=sum(experience.is_scored for experience in made.values()),
            num_evicted=num_evicted(buffer) - evicted_before,
        )

    report = processes.decide("storing the experience", keep)
    if processes.is_main:
        logger.log(logging.WARNING if report.refused or report.num_evicted else logging.INFO, str(report))
    return report


def _prompted(rows: Sequence[OwnRow], start: int, end: int) -> list[Prompted]:
    return [Prompted(row.prompt_ids or (), row.token_ids) for row in rows[start:end]]


def _check_trainer(trainer: Any) -> None:
    if not trainer._is_replay_enabled:
        raise ValueError("Replay is switched off (replay_fraction=0), so experience would never be replayed.")
    lacks = {
        "environments": trainer._has_environments,
        "a rollout_func": trainer._has_rollout_func,
        "an image processor": getattr(trainer.processing_class, "image_processor", None) is not None,
    }
    if any(lacks.values()):
        raise NotImplementedError(
            f"score_experience takes answers to prompts of text, and this trainer has {_listed(lacks)}. Fill a buffer "
            "with ExperienceBuffer.collect, and pass it as experience_buffer."
        )
    is_sharded = {"FSDP": trainer.is_fsdp_enabled, "DeepSpeed": trainer.is_deepspeed_enabled}
    if any(is_sharded.values()) and not trainer.is_in_train:
        raise NotImplementedError(
            f"Before the training, {_listed(is_sharded)} has not prepared the model, so that it cannot score. "
            "Call score_experience in on_train_begin of a TrainerCallback, if state.global_step == 0."
        )
    if trainer._keeps_rewards and len(trainer.reward_func_names) > 1:
        raise ValueError(
            "Stored completions keep the rewards of every function (replay_rewards='stored'), and a row has a single "
            f"one, where this trainer has {trainer.reward_func_names}. Set replay_rewards='recomputed'."
        )


def _listed(flags: Mapping[str, bool]) -> str:
    return " and ".join(name for name, is_true in flags.items() if is_true)


def _question_of(questions: TrainingQuestions, known: dict[str, Question], content: Mapping[str, Any]) -> Question:
    """The question that a row answers, with its row of the training dataset as it is now."""
    dataset = questions.dataset
    # Of a stream or a transform nobody knows the columns.
    columns = None if questions.may_differ else set(dataset.column_names)
    row = {name: v for name, v in content.items() if (name in columns if columns else name not in OWN_COLUMNS)}
    question_id = questions.id_of(row)
    if questions.is_stream:
        return known.setdefault(question_id, question_of_row(row, question_id))
    if question_id not in known:
        question = questions.present(Question(question_id, with_prompt(row)))
        if question is None:
            raise ValueError(
                "its question is not in the training dataset; a question is found by its prompt and, where several "
                "rows share a prompt, by all columns, or by question_id_column"
            )
        known[question_id] = question
    question = known[question_id]
    own, asked = content.get("prompt"), question.example["prompt"]
    if own is not None and asked is not None and question_id_of(own) != question_id_of(asked):
        raise ValueError(f"its prompt is not that of question {question_id!r} in the training dataset")
    return question


def _possible(items: list[Item], scores: Mapping[int, TokenScores]) -> tuple[list[Item], list[RefusedRow]]:
    """Those of which every token can be replayed, and the rows of the others."""

    def is_possible(row: OwnRow) -> bool:
        return row.logps is not None or bool(np.isfinite(scores[row.row].logps).all())

    reason = "the present policy gives one of its tokens, or one of its group, no probability"
    possible = [item for item in items if all(map(is_possible, item))]
    kept = {row.row for item in possible for row in item}
    return possible, [RefusedRow(row.row, reason) for item in items for row in item if row.row not in kept]


def _experience(row: OwnRow, scores: TokenScores | None, version: int, reward_name: str | None) -> Experience:
    is_scored = row.logps is None
    if row.logps is not None:
        logps, entropy = row.logps, math.nan
    else:
        assert scores is not None, "what has no log-probabilities was scored"
        logps, entropy = scores
    return Experience.create(
        row.token_ids,
        logps,
        policy_version=version,
        reward=row.reward,
        entropy=entropy,
        prompt_hash=UNKNOWN_PROMPT if row.prompt_ids is None else prompt_hash(row.prompt_ids),
        details=None if reward_name is None else RolloutDetails.create(rewards={reward_name: row.reward}),
        is_scored=is_scored,
    )


def _note(buffer: Any, row: OwnRow, experience: Experience, scores: TokenScores, version: int) -> None:
    """What the present policy thinks of a completion whose log-probabilities are those of another."""
    likelihood = -float(scores.logps.mean(dtype=np.float64))
    entropy, likelihood = (v if math.isfinite(v) else math.nan for v in (scores.entropy, likelihood))
    buffer.note_reuse(row.question.question_id, experience, Reuse(0, entropy, likelihood, version))
