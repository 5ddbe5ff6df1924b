"""One training run of the learning benchmark: setting, method, learning rate and seed in, a file of curves out."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.learning.hidden_operations import (
    ANSWER_TOKENS,
    Task,
    final_result_reward,
    pass_rates,
    tokenizer,
    warm_up,
)
from benchmarks.report import ROOT, machine
from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer, ExperienceBuffer

# Models after their warm-up.
WARM_UPS = Path(os.environ.get("EXGRPO_BENCHMARK_CACHE", ROOT / "outputs" / "benchmarks"))

# Skew of the warm-up's prior, and share of the training questions whose reward is always 0.
SETTINGS = {
    "bimodal": (0.8, 0.0),
    "even": (0.4, 0.0),
    "even-0.5": (0.4, 0.5),
    "even-0.9": (0.4, 0.9),
    "even-0.97": (0.4, 0.97),
}
# Fields of the config by method; GRPO is TRL's own trainer.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "shaped": {"replay_weighting": "shaped"},
    "balanced": {"replay_weighting": "balanced"},
    "none": {"replay_weighting": "none"},
    "clipped": {"replay_weighting": "clipped"},
    # Not a question in all of the run, but solved questions are retired all the same.
    "grpo-retirement": {"replay_fraction": 1e-6},
    "questions-only": {},
    "balanced-random-completion": {"replay_weighting": "balanced", "completion_selection": "random"},
    "balanced-uniform-questions": {"replay_weighting": "balanced", "question_sampling": "random"},
    "balanced-rho-0.25": {"replay_weighting": "balanced", "replay_fraction": 0.25},
    "balanced-rho-0.75": {"replay_weighting": "balanced", "replay_fraction": 0.75},
    "last-known": {"replay_weighting": "balanced", "candidate_scores": "last_known"},
    "stored-2": {"replay_weighting": "balanced", "candidate_scores": "last_known", "stored_per_group": 2},
    "stored-4": {"replay_weighting": "balanced", "candidate_scores": "last_known", "stored_per_group": 4},
    "groups": {"replay_weighting": "truncated", "replay_unit": "group", "max_replays": 1},
    "groups-unbounded": {"replay_weighting": "balanced", "replay_unit": "group"},
    "filled": {"replay_weighting": "balanced", "replay_fraction": 0.0, "fill_failed_groups": True},
    "replayed-and-filled": {
        "replay_weighting": "balanced",
        "candidate_scores": "last_known",
        "fill_failed_groups": True,
    },
}
SAVING = ("last-known", "stored-2", "stored-4", "groups", "groups-unbounded", "filled", "replayed-and-filled")
# What is kept of TRL's log lines.
LOGGED = (
    "entropy", "reward", "frac_reward_zero_std", "completions/mean_length", "fresh/pass_rate",
    "fresh/frac_groups_without_signal", "replay/fraction", "replay/completions", "replay/questions", "replay/retired",
    "replay/tokens_saved", "replay/candidates_scored", "replay/effective_sample_size", "replay/staleness_mean",
    "replay/groups_filled", "replay/last_known_agreement",
)  # fmt: skip
STEPS, EVERY = 300, 25
EQUAL_TIME_STEPS = 450  # GRPO on bimodal: more than replay has time for
EXTENDED_STEPS = 600  # where the curves still rise after 300
SHORT_STEPS = 125
ROWS = 256  # completions of a step: 32 questions, 8 of each
NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES = 4000, 256, 8


class QuestionsOnly(ExGRPOTrainer):
    """Draws questions as ever, but generates all of their completions: what the choice of questions alone brings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        next_batch = self.replayer.next_batch

        def without_completions(*args: Any) -> Any:
            batch = next_batch(*args)
            batch.stored, batch.stored_rows = {}, frozenset()
            return batch

        self.replayer.next_batch = without_completions


class KeepingBuffer(ExperienceBuffer):
    """Keeps what was drawn, whatever a fresh completion in its place has earned."""

    def evict(self, *args: Any) -> bool:
        return False


@dataclass(frozen=True)
class Run:
    """One training run; what is measured depends on nothing else."""

    setting: str
    method: str
    learning_rate: float
    seed: int
    warm_up: int = 0
    steps: int = STEPS

    def file(self, folder: Path) -> Path:
        """File of its result in a folder."""
        name = f"{self.setting}_{self.method}_lr{self.learning_rate:g}_warm{self.warm_up}_seed{self.seed}"
        return folder / f"{name}{'' if self.steps == STEPS else f'_steps{self.steps}'}.json"


class Curve(TrainerCallback):
    """Measures pass rates on held-out questions, outside the time of the training."""

    def __init__(self, questions: Any) -> None:
        self.questions = questions
        self.points: list[dict[str, float]] = []
        self.seconds_elsewhere = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.start = time.perf_counter()
        self.measure(state, model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.measure(state, model)

    def measure(self, state: Any, model: Any) -> None:
        before = time.perf_counter()
        is_right = pass_rates(model, self.questions, NUM_SAMPLES, seed=state.global_step)
        point = {
            "step": state.global_step,
            "seconds": before - self.start - self.seconds_elsewhere,
            "pass_at_1": float(is_right.mean()),
            "pass_at_8": float(is_right.any(axis=1).mean()),
        }
        self.points.append(point)
        self.seconds_elsewhere += time.perf_counter() - before


def warm_up_folder(skew_and_seed: tuple[float, int]) -> Path:
    """Where the warmed-up model is; makes it unless it is there."""
    torch.set_num_threads(1)
    skew, seed = skew_and_seed
    return warm_up(Task(skew), seed, WARM_UPS / f"hidden-operations-{skew}-{seed}")


def make_trainer(run: Run, output_dir: str, callbacks: Sequence[TrainerCallback], train_questions: Any) -> Any:
    """The trainer of a run."""
    is_grpo = run.method == "grpo"
    options: dict[str, Any] = {
        "output_dir": output_dir,
        "per_device_train_batch_size": ROWS,
        "num_generations": 8,
        "max_completion_length": ANSWER_TOKENS,
        "learning_rate": run.learning_rate,
        "lr_scheduler_type": "constant",
        "max_steps": run.steps,
        "max_grad_norm": 1.0,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "beta": 0.0,
        "seed": run.seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if not is_grpo:
        options |= {"replay_start_pass_rate": None, "log_replay": "all"} | METHODS[run.method]
    trainer_class: Any = GRPOTrainer if is_grpo else ExGRPOTrainer
    more: dict[str, Any] = {}
    if run.method == "questions-only":
        trainer_class, more["experience_buffer"] = QuestionsOnly, KeepingBuffer(group_size=8, seed=run.seed)
    trainer = trainer_class(
        model=LlamaForCausalLM.from_pretrained(warm_up_folder((SETTINGS[run.setting][0], run.warm_up))),
        reward_funcs=final_result_reward,
        args=(GRPOConfig if is_grpo else ExGRPOConfig)(**options),
        train_dataset=train_questions,
        processing_class=tokenizer(),
        callbacks=list(callbacks),
        **more,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def questions_of(run: Run) -> tuple[Any, Any]:
    """Training and held-out questions of a run."""
    skew, hopeless = SETTINGS[run.setting]
    return Task(skew).questions(NUM_TRAIN, NUM_HELD_OUT, hopeless, run.seed)


def train(run: Run) -> dict[str, Any]:
    """Make a run; returns what its file holds."""
    train_questions, held_out = questions_of(run)
    curve = Curve(held_out)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(run, output_dir, [curve], train_questions)
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "run": asdict(run),
        "machine": machine(),
        "curve": [{name: round(value, 5) for name, value in point.items()} for point in curve.points],
        "logs": [{name: float(f"{line[name]:.5g}") for name in ("step", *LOGGED) if name in line} for line in lines],
    }


def finish(run: Run, folder: Path) -> str:
    """Make a run and keep it; returns a line that says what came of it."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    result = train(run)
    folder.mkdir(parents=True, exist_ok=True)
    file = run.file(folder)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(file)
    last = result["curve"][-1]
    return f"{file.stem}: pass@1 {last['pass_at_1']:.3f}, pass@8 {last['pass_at_8']:.3f}, {last['seconds']:.0f} s"
