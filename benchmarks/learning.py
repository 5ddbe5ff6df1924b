"""
Does replay learn more? GRPO and ExGRPO on hidden operations, through the trainers that users have.

    .venv/bin/python benchmarks/learning.py --stage tune        # learning rates, on seeds that are not used again
    .venv/bin/python benchmarks/learning.py --stage compare     # every setting, method and seed
    .venv/bin/python benchmarks/learning.py --stage ablate      # what makes the difference on the bimodal task

Every finished run is a file in `benchmarks/results/learning`, and a run whose file is there is not made again: a stage
that was stopped goes on where it was. `--jobs 2` makes two runs at a time, each with one thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads are slower for models of this size
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import multiprocessing
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hidden_operations import ANSWER_TOKENS, Task, final_result_reward, pass_rates, tokenizer, warm_up
from transformers import LlamaForCausalLM, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer, ExperienceBuffer
from exgrpo_trl.rollouts import Plan, Records

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "learning"
WARM_UPS = Path(os.environ.get("EXGRPO_BENCHMARK_CACHE", HERE.parent / "outputs" / "benchmarks"))

# Skew of the warm-up's prior, and share of the training questions whose reward is always 0.
SETTINGS = {
    "bimodal": (0.8, 0.0),
    "even": (0.4, 0.0),
    "even-0.5": (0.4, 0.5),
    "even-0.9": (0.4, 0.9),
    "even-0.97": (0.4, 0.97),
}
# Where the learning rate of a setting was chosen: the tuned setting that is closer in how many groups teach something.
TUNED_ON = {
    "bimodal": "bimodal",
    "even": "bimodal",
    "even-0.5": "bimodal",
    "even-0.9": "even-0.97",
    "even-0.97": "even-0.97",
}
# Fields of the config by method; GRPO is TRL's own trainer.
METHODS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "shaped": {"replay_weighting": "shaped"},
    "balanced": {"replay_weighting": "balanced"},
    "none": {"replay_weighting": "none"},
    "clipped": {"replay_weighting": "clipped"},
    # Nothing fits into floor(0.01 * 32) = 0 questions, but solved questions are retired all the same.
    "grpo-retirement": {"replay_fraction": 0.01},
    "questions-only": {},
    "balanced-random-completion": {"replay_weighting": "balanced", "completion_selection": "random"},
    "balanced-uniform-questions": {"replay_weighting": "balanced", "question_sampling": "random"},
    "balanced-rho-0.25": {"replay_weighting": "balanced", "replay_fraction": 0.25},
    "balanced-rho-0.75": {"replay_weighting": "balanced", "replay_fraction": 0.75},
}
LEARNING_RATES = (1e-4, 3e-4, 6e-4, 1e-3)
TUNING_SEEDS = (100, 101)
STEPS, EVERY = 300, 25
NUM_TRAIN, NUM_HELD_OUT, NUM_SAMPLES = 4000, 256, 8


class QuestionsOnly(ExGRPOTrainer):
    """Draws questions as ever, but generates all of their completions: what the choice of questions alone brings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        plan = self._coordinator.plan

        def plan_questions(*args: Any) -> Plan:
            return Plan(share=Records(plan(*args).share.questions))

        self._coordinator.plan = plan_questions


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

    @property
    def path(self) -> Path:
        """File of its result."""
        name = f"{self.setting}_{self.method}_lr{self.learning_rate:g}_warm{self.warm_up}_seed{self.seed}"
        return RESULTS / f"{name}{'' if self.steps == STEPS else f'_steps{self.steps}'}.json"


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


def train(run: Run) -> dict[str, Any]:
    """Make a run; returns what its file holds."""
    skew, hopeless = SETTINGS[run.setting]
    task, folder = Task(skew), warm_up_folder((skew, run.warm_up))
    train_questions, held_out = task.questions(NUM_TRAIN, NUM_HELD_OUT, hopeless, run.seed)
    curve = Curve(held_out)
    is_grpo = run.method == "grpo"
    with tempfile.TemporaryDirectory() as output_dir:
        options: dict[str, Any] = {
            "output_dir": output_dir,
            "per_device_train_batch_size": 256,
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
            options |= {"replay_start_pass_rate": None} | METHODS[run.method]
        trainer_class: Any = GRPOTrainer if is_grpo else ExGRPOTrainer
        more: dict[str, Any] = {}
        if run.method == "questions-only":
            trainer_class, more["experience_buffer"] = QuestionsOnly, KeepingBuffer(group_size=8, seed=run.seed)
        trainer = trainer_class(
            model=LlamaForCausalLM.from_pretrained(folder),
            reward_funcs=final_result_reward,
            args=(GRPOConfig if is_grpo else ExGRPOConfig)(**options),
            train_dataset=train_questions,
            processing_class=tokenizer(),
            callbacks=[curve],
            **more,
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":
                trainer.remove_callback(callback)
        trainer.train()
    names = ("entropy", "reward", "frac_reward_zero_std", "completions/mean_length", "fresh/pass_rate")
    names += ("fresh/frac_groups_without_signal", "replay/fraction", "replay/completions", "replay/questions")
    names += ("replay/retired", "replay/tokens_saved", "replay/effective_sample_size", "replay/staleness_mean")
    logs = [
        {"step": line["step"]} | {name: line[name] for name in names if name in line}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    packages = ("trl", "transformers", "torch", "exgrpo-trl")
    return {
        "run": asdict(run),
        "versions": {name: version(name) for name in packages},
        "curve": curve.points,
        "logs": logs,
    }


def finish(run: Run) -> str:
    """Make a run unless it has been made, and keep it; returns a line that says what came of it."""
    if not run.path.exists():
        torch.set_num_threads(1)
        transformers_logging.set_verbosity_error()
        result = train(run)
        run.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = run.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(result) + "\n")
        unfinished.rename(run.path)
    last = json.loads(run.path.read_text())["curve"][-1]
    return f"{run.path.stem}: pass@1 {last['pass_at_1']:.3f}, pass@8 {last['pass_at_8']:.3f}, {last['seconds']:.0f} s"


def tuning_runs() -> list[Run]:
    """Two seeds for each learning rate and method, on the two settings that lie furthest apart."""
    return [
        Run(setting, method, learning_rate, seed)
        for setting in ("bimodal", "even-0.97")
        for learning_rate in LEARNING_RATES
        for method in ("grpo", "shaped", "balanced")
        for seed in TUNING_SEEDS
    ]


def best_learning_rate(setting: str, method: str) -> float:
    """The one of highest mean held-out pass@1 at the end of the tuning runs."""
    means = {}
    for learning_rate in LEARNING_RATES:
        runs = [Run(setting, method, learning_rate, seed) for seed in TUNING_SEEDS]
        missing = [run.path.name for run in runs if not run.path.exists()]
        if missing:
            raise FileNotFoundError(f"Run --stage tune first: {missing} are not there.")
        finals = [json.loads(run.path.read_text())["curve"][-1]["pass_at_1"] for run in runs]
        means[learning_rate] = float(np.mean(finals))
    return max(means, key=lambda learning_rate: means[learning_rate])


def compared_runs() -> list[Run]:
    """GRPO, the paper's weighting and the balanced one in every setting; two warm-ups where tuned, one elsewhere."""
    runs = []
    for setting in SETTINGS:
        tuned = TUNED_ON[setting]
        for warm_up_seed in (0, 1) if tuned == setting else (0,):
            for seed in range(5):
                for method in ("grpo", "shaped", "balanced"):
                    runs.append(Run(setting, method, best_learning_rate(tuned, method), seed, warm_up_seed))
    return runs


def ablated_runs() -> list[Run]:
    """Three seeds of everything else on the bimodal task, with the learning rate of the balanced weighting or GRPO."""
    # For a comparison at equal wall-clock: read where it has taken as long as the others.
    longer = [Run("bimodal", "grpo", best_learning_rate("bimodal", "grpo"), seed, steps=450) for seed in range(3)]
    return longer + [
        Run(
            "bimodal", method, best_learning_rate("bimodal", "grpo" if method.startswith("grpo") else "balanced"), seed
        )
        for method in METHODS
        if method not in ("grpo", "shaped", "balanced")
        for seed in range(3)
    ]


STAGES = {"tune": tuning_runs, "compare": compared_runs, "ablate": ablated_runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=list(STAGES), required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    runs = STAGES[arguments.stage]()
    start = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        pool.map(warm_up_folder, sorted({(SETTINGS[run.setting][0], run.warm_up) for run in runs}), chunksize=1)
        for number, line in enumerate(pool.imap_unordered(finish, runs), 1):
            print(f"[{number}/{len(runs)}, {time.perf_counter() - start:.0f} s] {line}", flush=True)


if __name__ == "__main__":
    main()
