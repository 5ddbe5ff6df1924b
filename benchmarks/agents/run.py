"""One training run of the agents benchmark: method and seed in, a curve of held-out success out."""

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.report import ROOT, machine
from examples.train_agent import DEFAULTS, Arguments, Maze, imitate, make_model, make_tokenizer, mazes
from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer

# Models after their imitation.
IMITATIONS = Path(os.environ.get("EXGRPO_BENCHMARK_CACHE", ROOT / "outputs" / "benchmarks"))

# Fields of the config by method, over those of the example; GRPO is TRL's own trainer.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "shaped": {"replay_weighting": "shaped"},
    "balanced": {"replay_weighting": "balanced"},
}
LOGGED = (
    "entropy", "reward", "frac_reward_zero_std", "completions/mean_length", "tools/call_frequency",
    "fresh/pass_rate", "fresh/frac_groups_without_signal", "replay/fraction", "replay/completions",
    "replay/questions", "replay/retired", "replay/tokens_saved", "replay/effective_sample_size",
)  # fmt: skip
STEPS, EVERY = 200, 20
SHORT_STEPS = 40
NUM_TRAIN, NUM_HELD_OUT = 1000, 400


@dataclass(frozen=True)
class Run:
    """One training run; what is measured depends on nothing else."""

    method: str
    learning_rate: float
    seed: int
    steps: int = STEPS

    def file(self, folder: Path) -> Path:
        """File of its result in a folder."""
        return folder / f"{self.method}_lr{self.learning_rate:g}_seed{self.seed}_steps{self.steps}.json"


class Curve(TrainerCallback):
    """Held-out success over steps, environment steps and seconds; the last two are those of the training alone."""

    def __init__(self) -> None:
        self.points: list[dict[str, float]] = []
        self.elsewhere = (0.0, 0)  # what evaluations took

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = self.paused = self.now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.paused = self.now()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        seconds, environment_steps = (
            paused - start - elsewhere
            for paused, start, elsewhere in zip(self.paused, self.start, self.elsewhere, strict=True)
        )
        self.points.append(
            {
                "step": state.global_step,
                "seconds": round(seconds, 3),
                "environment_steps": environment_steps,
                "success": round(metrics["eval_reward"], 5),
            }
        )
        self.elsewhere = tuple(
            elsewhere + now - paused
            for elsewhere, now, paused in zip(self.elsewhere, self.now(), self.paused, strict=True)
        )

    @staticmethod
    def now() -> tuple[float, int]:
        return time.perf_counter(), Maze.num_steps


def imitation_folder(seed: int) -> Path:
    """Where the model of a seed is that has imitated; makes it unless it is there."""
    folder = IMITATIONS / f"agents-imitation-{seed}"
    if not folder.exists():
        torch.set_num_threads(1)
        transformers_logging.disable_progress_bar()
        arguments, tokenizer = Arguments(), make_tokenizer()
        model = make_model(tokenizer, seed)
        train, _ = mazes(NUM_TRAIN, NUM_HELD_OUT, seed)
        imitate(model, tokenizer, train, strength=arguments.habit, steps=arguments.imitation_steps, seed=seed)
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = tempfile.mkdtemp(dir=folder.parent)
        model.save_pretrained(unfinished)
        os.rename(unfinished, folder)
    return folder


def make_trainer(run: Run, output_dir: str, callbacks: list[TrainerCallback], **changes: Any) -> Any:
    """The trainer of a run; `changes` are fields of its config."""
    is_grpo = run.method == "grpo"
    train_mazes, held_out = mazes(NUM_TRAIN, NUM_HELD_OUT, run.seed)
    known = {field.name for field in fields(GRPOConfig if is_grpo else ExGRPOConfig)}
    options = {name: value for name, value in DEFAULTS.items() if name in known}
    options |= METHODS[run.method] | {
        "output_dir": output_dir,
        "learning_rate": run.learning_rate,
        "max_steps": run.steps,
        "seed": run.seed,
        "eval_strategy": "steps",
        "eval_steps": EVERY,
        "eval_on_start": True,
        "per_device_eval_batch_size": NUM_HELD_OUT,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = (GRPOTrainer if is_grpo else ExGRPOTrainer)(
        model=LlamaForCausalLM.from_pretrained(imitation_folder(run.seed)),
        args=(GRPOConfig if is_grpo else ExGRPOConfig)(**options | changes),
        train_dataset=train_mazes,
        eval_dataset=held_out,
        processing_class=make_tokenizer(),
        environment_factory=Maze,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(run: Run) -> dict[str, Any]:
    """Make a run; returns what its file holds."""
    curve = Curve()
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = make_trainer(run, output_dir, [curve])
        trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "run": asdict(run),
        "machine": machine(),
        "curve": curve.points,
        "logs": [{name: float(f"{line[name]:.5g}") for name in ("step", *LOGGED) if name in line} for line in lines],
    }


def finish(run: Run, folder: Path) -> str:
    """Make a run and keep it; returns a line that says what came of it."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    result = train(run)
    folder.mkdir(parents=True, exist_ok=True)
    file = run.file(folder)
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result) + "\n")
    unfinished.rename(file)
    last = result["curve"][-1]
    return (
        f"{file.stem}: success {last['success']:.3f} after {last['environment_steps']:,} steps in the environment, "
        f"{last['seconds']:.0f} s"
    )
