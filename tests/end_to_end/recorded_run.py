"""
Runs whose every number was written down: a change that should not change behaviour must give them again.

    python tests/end_to_end/recorded_run.py compare             # to the digit, on the machine of the record
    python tests/end_to_end/recorded_run.py compare --record FILE
    python tests/end_to_end/recorded_run.py write --record FILE

Two kinds of run, each on one process and on two (DDP). In `sampled` ones the model generates; in `scripted` ones fresh
completions depend on prompt, repetition and step alone, so that another machine's rounding cannot lead to other
completions: the tests compare these, and the continuation of a checkpoint, with a tolerance.
"""

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
from ranks import assert_engaged, run_ranks
from tiny import CHARACTERS, make_trainer, tiny_dataset
from trl import GRPOTrainer

FOLDER = Path(__file__).resolve().parent / "recorded"
LOG = FOLDER / "log.json"
CHECKPOINT = FOLDER / "checkpoint-6"  # of a scripted run, written by the code before `Batch` and `Replayer`
CONTINUATION = FOLDER / "continuation.json"  # how that run went on
KINDS = ("sampled", "scripted")
STEPS = 20


@contextmanager
def scripted_completions() -> Iterator[None]:
    """Let TRL generate what a script says: no model, no sampling, nothing that rounding could change."""
    original = GRPOTrainer._generate_single_turn

    @functools.wraps(original)
    def generate(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        _, *rest = original(self, prompt_ids, *args, **kwargs)
        repetitions: Counter[tuple[int, ...]] = Counter()
        completions = []
        for prompt in prompt_ids:
            repetitions[tuple(prompt)] += 1
            rng = np.random.default_rng([self.state.global_step, repetitions[tuple(prompt)], *prompt])
            completions.append([*rng.integers(3, 3 + len(CHARACTERS), rng.integers(1, 8)).tolist(), 1])
        return completions, *rest

    GRPOTrainer._generate_single_turn = generate
    try:
        yield
    finally:
        GRPOTrainer._generate_single_turn = original


def recorded_trainer(kind: str, output_dir: Any, **options: Any) -> Any:
    """A trainer that replays, retires, evicts and starts late."""
    options = {
        "max_steps": STEPS,
        "train_dataset": tiny_dataset(24),
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 16,
        "replay_start_pass_rate": 0.2,
        "buffer_capacity": 24,
        "max_completions_per_question": 3,
        "max_staleness": 12,
    } | options
    if kind == "scripted":
        options |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    return make_trainer(output_dir, **options)


# Metrics that there were none of when the runs were recorded.
LATER = {
    "replay/evicted_drifted", "replay/evicted_used_up", "replay/fraction_allowed", "replay/groups_filled",
    "replay/last_known_agreement",
}  # fmt: skip


def log_lines(trainer: Any) -> list[dict[str, float]]:
    """Loss, gradient norm and all metrics of replay that were recorded, without timings."""
    return [
        {
            name: value
            for name, value in line.items()
            if name in ("loss", "grad_norm", "step") or name.startswith(("fresh/", "replay/"))
            if not name.endswith("_seconds") and name not in LATER
        }
        for line in trainer.state.log_history
        if "loss" in line
    ]


def run(kind: str, folder: Any, **options: Any) -> list[dict[str, float]]:
    """Log lines of a run."""
    trainer = recorded_trainer(kind, folder, **options)
    if kind == "scripted":
        with scripted_completions():
            trainer.train()
    else:
        trainer.train()
    if options.get("per_device_train_batch_size"):
        assert_engaged(trainer, "ddp", 2)
    return log_lines(trainer)


def run_rank(mode: str, mode_options: dict[str, Any], kind: str, folder: str) -> None:
    """What each of two processes does; the main one writes its log lines."""
    lines = run(kind, folder, per_device_train_batch_size=8, **mode_options)
    if os.environ["RANK"] == "0":
        Path(folder, "lines.json").write_text(json.dumps(lines))


def log_of(kind: str, world: int) -> list[dict[str, float]]:
    """Log lines of a run on one process, or on two."""
    with tempfile.TemporaryDirectory() as folder:
        if world == 1:
            return run(kind, folder)
        run_ranks(run_rank, kind, folder, folder=folder, world=world)
        return json.loads(Path(folder, "lines.json").read_text())


def continuation(checkpoint: Any) -> dict[str, Any]:
    """Log lines of a scripted run after a checkpoint, and what its buffer holds at the end."""
    with tempfile.TemporaryDirectory() as folder, scripted_completions():
        # A copy: a run writes into the folder of its checkpoint.
        copied = shutil.copytree(checkpoint, Path(folder) / Path(checkpoint).name)
        trainer = recorded_trainer("scripted", Path(folder) / "out")
        trainer.train(resume_from_checkpoint=str(copied))
        return {"lines": [line for line in log_lines(trainer) if line["step"] > 6]} | end_of(trainer)


def end_of(trainer: Any) -> dict[str, Any]:
    """What a buffer holds, but for numbers that depend on rounding."""
    buffer = trainer.experience_buffer
    return {
        "buckets": {str(bucket): list(questions) for bucket, questions in buffer.buckets().items()},
        "completions": {
            question_id: [[e.token_ids.tolist(), e.policy_version, e.reward] for e in buffer.completions(question_id)]
            for questions in buffer.buckets().values()
            for question_id in questions
        },
        "retired": list(buffer.retired),
        "rng": buffer.rng.bit_generator.state,
    }


def write_checkpoint() -> None:
    """Make the checkpoint, and record how the run went on without an interruption."""
    with tempfile.TemporaryDirectory() as folder, scripted_completions():
        trainer = recorded_trainer("scripted", folder, save_strategy="steps", save_steps=6)
        trainer.train()
        shutil.copytree(Path(folder) / CHECKPOINT.name, CHECKPOINT)
        (CHECKPOINT / "training_args.bin").unlink()  # pickled, and not read by a resume
        record = {"lines": [line for line in log_lines(trainer) if line["step"] > 6]} | end_of(trainer)
    CONTINUATION.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["compare", "write", "write_checkpoint"])
    parser.add_argument("--record", type=Path, default=LOG)
    arguments = parser.parse_args()
    if arguments.action == "write_checkpoint":
        write_checkpoint()
        return
    logs = {f"{kind}, {world}": log_of(kind, world) for kind in KINDS for world in (1, 2)}
    if arguments.action == "write":
        arguments.record.write_text(json.dumps({"torch": torch.__version__, "logs": logs}, indent=1) + "\n")
        return
    recorded = json.loads(arguments.record.read_text())["logs"]
    for name, lines in logs.items():
        differing = [
            (mine.get("step"), key, mine.get(key), other.get(key))
            for mine, other in zip(lines, recorded[name], strict=True)
            for key in sorted(mine.keys() | other.keys())
            if mine.get(key) != other.get(key)
        ]
        numbers = sum(len(line) for line in lines)
        print(f"{name} process(es): {len(lines)} steps, {numbers} numbers, {len(differing)} differ {differing[:3]}")
        assert not differing


if __name__ == "__main__":
    main()
