"""
Train a model on math questions with experience replay.

    accelerate launch examples/train_math.py

trains SmolLM2-135M-Instruct on two-digit sums; it needs neither a GPU nor a hub. With a model and a dataset of yours:

    accelerate launch examples/train_math.py \
        --model_name_or_path Qwen/Qwen2.5-Math-1.5B \
        --dataset_name trl-lib/DeepMath-103K \
        --output_dir outputs/qwen-math \
        --use_peft --learning_rate 1e-5 \
        --per_device_train_batch_size 8 --gradient_accumulation_steps 8 --max_completion_length 2048

Every field of `ExGRPOConfig` and of TRL's `ModelConfig` is a flag; `--config file.yaml` reads them from a file.
Several GPUs: `accelerate launch --config_file examples/configs/fsdp2.yaml examples/train_math.py ...`, see README.md.
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config
from trl.rewards import accuracy_reward

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer

QUESTION_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("solution", "answer", "final_answer")
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

# Chosen by measurement so that the run fits into ten minutes on two CPU cores, and learns. Any flag overrides them.
EMBEDDED_DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/train_math",
    "max_steps": 30,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "num_generations": 8,
    "num_generations_eval": 1,
    "max_completion_length": 5,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "replay_start_pass_rate": 0.0,
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_target_modules": ["all-linear"],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "log_replay": "all",  # for the number of stored completions
    "num_train": 512,
    "num_held_out": 128,
}
# What the built-in run takes of `Arguments` and `ModelConfig`.
EMBEDDED_FLAGS = ("num_", "use_peft", "use_rslora", "use_dora", "lora_")


@dataclass
class Arguments:
    """What is trained on, besides the fields of `ExGRPOConfig` and `ModelConfig`."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset on the hub, a folder, or a .json, .jsonl or .parquet file. None: two-digit sums."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to train on."})
    num_train: int | None = field(default=None, metadata={"help": "Most questions to train on. None: all."})
    num_held_out: int = field(default=256, metadata={"help": "Questions held out to measure the pass rate."})


def parse_arguments() -> tuple[Arguments, ExGRPOConfig, ModelConfig]:
    """Flags and YAML over the embedded defaults, or over TRL's own where a model or a dataset is given."""
    # --help is left to the second parser, which knows all flags and the defaults that apply.
    first = TrlParser((Arguments, ModelConfig), add_help=False)
    chosen, model, _ = first.parse_args_and_config(return_remaining_strings=True)
    if (chosen.dataset_name is None) != (model.model_name_or_path is None):
        raise SystemExit("Give both --model_name_or_path and --dataset_name, or neither for the embedded default.")
    parser = TrlParser((Arguments, ExGRPOConfig, ModelConfig))
    if chosen.dataset_name is None:
        defaults = vars(Arguments()) | vars(ModelConfig())
        given = [f"--{name}" for name, value in (vars(chosen) | vars(model)).items() if value != defaults[name]]
        if ignored := [flag for flag in given if not flag[2:].startswith(EMBEDDED_FLAGS)]:
            raise SystemExit(
                f"The run on the embedded model and questions would ignore {', '.join(ignored)}. Leave that out, or "
                "give --model_name_or_path and --dataset_name."
            )
        parser.set_defaults(**EMBEDDED_DEFAULTS)
        for action in parser._actions:  # so that no flag is required
            action.required = action.required and action.dest not in EMBEDDED_DEFAULTS
    return parser.parse_args_and_config()


def load_questions(arguments: Arguments, seed: int) -> tuple[Dataset, Dataset]:
    """Conversational prompts and LaTeX solutions, split into training and held-out questions."""
    name = str(arguments.dataset_name)
    saved = [Path(name) / file for file in ("state.json", "dataset_dict.json")]
    if any(file.exists() for file in saved):  # a folder that save_to_disk wrote
        dataset = load_from_disk(name)
        dataset = dataset[arguments.dataset_split] if isinstance(dataset, DatasetDict) else dataset
    elif Path(name).suffix in (".json", ".jsonl", ".parquet"):
        file_format = Path(name).suffix[1:].replace("jsonl", "json")
        dataset = load_dataset(file_format, data_files=name, split=arguments.dataset_split)
    else:
        dataset = load_dataset(name, split=arguments.dataset_split)
    question = next((column for column in QUESTION_COLUMNS if column in dataset.column_names), None)
    answer = next((column for column in ANSWER_COLUMNS if column in dataset.column_names), None)
    if question is None or answer is None:
        raise SystemExit(
            f"The dataset {name} has the columns {dataset.column_names}. It needs one of {QUESTION_COLUMNS} for the "
            f"question and one of {ANSWER_COLUMNS} for the answer."
        )

    def to_row(row: dict[str, Any]) -> dict[str, Any]:
        prompt, solution = row[question], str(row[answer])
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": f"{prompt}\n{INSTRUCTION}"}]
        # math-verify reads LaTeX between dollar signs or in a box.
        return {
            "prompt": prompt,
            "solution": solution if "$" in solution or "\\boxed" in solution else f"${solution}$",
        }

    if arguments.num_held_out >= len(dataset):
        raise SystemExit(
            f"--num_held_out {arguments.num_held_out} leaves nothing to train on: {name} has {len(dataset)} questions."
        )
    dataset = dataset.map(to_row, remove_columns=[c for c in dataset.column_names if c not in ("prompt", "solution")])
    parts = dataset.train_test_split(test_size=arguments.num_held_out, seed=seed)
    train = parts["train"]
    return train.select(range(min(arguments.num_train or len(train), len(train)))), parts["test"]


class Progress(ProgressCallback):
    """A progress bar with one short line per log instead of every metric; where there is no terminal, only lines."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.disable = not sys.stderr.isatty()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs or "loss" not in logs:
            return
        shown = [f"step {state.global_step}", f"fresh pass rate {logs.get('fresh/pass_rate', logs['reward']):.2f}"]
        if "replay/questions" in logs:
            shown.append(f"replayed {logs['replay/fraction']:.0%} of the questions")
            held = "completions" if "replay/completions" in logs else "questions"  # of a short log line
            shown.append(f"buffer {logs[f'replay/{held}']:.0f} {held}")
        if self.training_bar.disable:
            done = 20 * state.global_step // state.max_steps
            shown.insert(0, f"[{'#' * done}{'.' * (20 - done)}]")
        self.training_bar.write(" | ".join(shown))


class SeedAtStart(TrainerCallback):
    """Evaluates with the seed of the evaluation at the end; another one on each process, whose samples must differ."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        set_seed(args.seed, device_specific=True)


def train_and_evaluate(trainer: ExGRPOTrainer) -> tuple[float, float]:
    """
    Train and save the model.

    Returns the share of held-out questions solved at the training temperature before and after, with the same seed.
    """
    # Not trainer.evaluate(): FSDP and DeepSpeed need the optimizer to prepare a model, and DDP would train without it.
    trainer.args.eval_on_start = True
    trainer.add_callback(SeedAtStart)
    resume = trainer.args.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=True if resume in ("True", "true") else resume)
    trainer.save_model()  # before the evaluation, which may fail
    set_seed(trainer.args.seed, device_specific=True)
    trainer.evaluate()
    # What `evaluate` returns holds no rewards in older releases of TRL; the log does.
    rates = [float(line["eval_reward"]) for line in trainer.state.log_history if "eval_reward" in line]
    return rates[0], rates[-1]


def plot(history: list[dict[str, Any]], before: float, after: float, path: Path) -> None:
    """Pass rates, buffer size and tokens saved over the steps of a run."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in history if "loss" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")

    def draw(axis: Any, metric: str, label: str, color: str) -> None:
        points = [(line["step"], line[metric]) for line in lines if metric in line]
        axis.plot(*zip(*points, strict=True) if points else ([], []), color=color, label=label)

    is_replayed = any("fresh/pass_rate" in line for line in lines)
    draw(left, "fresh/pass_rate" if is_replayed else "reward", "training, fresh completions", "tab:blue")
    last_step = max((line["step"] for line in history), default=0)
    left.plot([0, last_step], [before, after], "o--", color="tab:orange", label="held-out, before and after")
    left.set(xlabel="step", ylabel="pass rate", ylim=(0, 1), title="Pass rate")
    left.legend()
    held = "completions" if any("replay/completions" in line for line in lines) else "questions"
    draw(right, f"replay/{held}", f"{held} in the buffer", "tab:green")
    draw(right, "replay/tokens_saved", "tokens not generated", "tab:red")
    right.set(xlabel="step", title="Replay")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    arguments, config, model_config = parse_arguments()
    if arguments.dataset_name is None:
        import embedded

        torch.set_num_threads(1)  # accelerate asks for all cores, which is many times slower where one is busy
        with config.main_process_first(desc="converting the model"):
            model: Any = embedded.load_model_folder()
        tokenizer = embedded.load_tokenizer(model)
        train, held_out = embedded.load_datasets(arguments.num_train, arguments.num_held_out, config.seed)
        reward = embedded.sum_reward
        init = {"dtype": "float32"}
    else:
        model = model_config.model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(model, revision=model_config.model_revision)
        with config.main_process_first(desc="loading the questions"):
            train, held_out = load_questions(arguments, config.seed)
        reward = accuracy_reward
        init = {
            "revision": model_config.model_revision,
            "attn_implementation": model_config.attn_implementation,
            "dtype": model_config.dtype,
        }
        if quantization := get_quantization_config(model_config):
            init["quantization_config"] = quantization
    config.model_init_kwargs = init | (config.model_init_kwargs or {})

    trainer = ExGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress)

    before, after = train_and_evaluate(trainer)
    if trainer.accelerator.is_main_process:
        picture = Path(config.output_dir) / "train_math.png"
        history = trainer.state.log_history
        last = next((line for line in reversed(history) if "replay/tokens_saved" in line), {})
        table = Table(title="ExGRPO on held-out questions", show_header=False)
        table.add_row("Held-out pass rate before", f"{before:.3f}")
        table.add_row("Held-out pass rate after", f"{after:.3f}")
        plot(history, before, after, picture)
        if last:
            buffer = trainer.experience_buffer
            groups_per_step = config.generation_batch_size / config.num_generations / config.num_iterations
            lines = [line for line in history if "replay/fraction" in line]
            steps = np.diff([0, *(line["step"] for line in lines)])
            replayed = groups_per_step * np.dot(steps, [line["replay/fraction"] for line in lines])
            table.add_row("Questions replayed", f"{replayed:.0f}")
            table.add_row("Tokens not generated", f"{last['replay/tokens_saved']:.0f}")
            table.add_row("In the buffer", f"{buffer.num_completions} completions of {buffer.num_questions} questions")
            table.add_row("Retired questions", f"{len(buffer.retired)}")
        table.add_row("Plot", str(picture))
        table.add_row("Model", os.fspath(config.output_dir))
        Console().print(table)
        checkpoint = Path(config.output_dir) / f"checkpoint-{trainer.state.global_step}"
        if (checkpoint / "experience_buffer").exists():
            Console().print(f"Look at the buffer: exgrpo-trl show {checkpoint}", soft_wrap=True, highlight=False)
    # A process that ends with its group open may abort, and the launcher would then kill the one that plots.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
