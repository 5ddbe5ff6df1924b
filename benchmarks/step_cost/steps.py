"""Trainers whose steps can be compared: same model, batch and lengths; seconds by phase; steps taken in turn."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import greenlet
import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.learning.hidden_operations import tokenizer as character_tokenizer
from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer, Experience, ExperienceBuffer, Question, question_id_of

GROUP_SIZE = 8
PHASES = ("generation", "scoring", "reward", "loss", "optimizer", "collection", "selection", "rest")


@dataclass(frozen=True)
class Size:
    """A model with a batch.

    Attributes:
        model: `"tiny"` or `"SmolLM2-135M"`.
        num_questions: Questions in a batch, 8 completions each.
        length: Tokens of every completion.
    """

    model: str
    num_questions: int
    length: int


@dataclass(frozen=True)
class Method:
    """What to train with.

    Attributes:
        replay_fraction: Share of the questions that are replayed; `None` is TRL's own trainer.
        candidates: Stored completions of every question.
        way: `"current"` (the paper), `"last_known"`, or `"group"`: whole groups.
        per_group: Stored completions in the group of a replayed question.
        replay_log: Whether it is written down what was replayed.
    """

    replay_fraction: float | None = None
    candidates: int = 1
    way: str = "current"
    per_group: int = 1
    replay_log: bool = True

    def __str__(self) -> str:
        if self.replay_fraction is None:
            return "GRPO"
        if self.way == "group":
            return f"ExGRPO {self.replay_fraction:g}, whole groups"
        ways = [] if self.way == "current" else ["last known scores"]
        ways += [f"{self.per_group} in a group"] if self.per_group > 1 else []
        ways += [] if self.replay_log else ["no log of replays"]
        return ", ".join([f"ExGRPO {self.replay_fraction:g}", f"{self.candidates} stored", *ways])

    def num_replayed(self, size: Size) -> int:
        """Questions of a batch that are replayed."""
        return int((self.replay_fraction or 0.0) * size.num_questions)

    def num_saved(self, size: Size) -> int:
        """Completions of a batch that are not generated."""
        return self.num_replayed(size) * (GROUP_SIZE if self.way == "group" else self.per_group)

    @property
    def config(self) -> dict[str, Any]:
        """Fields of the config."""
        if self.way == "group":
            return {"replay_unit": "group", "replay_log": self.replay_log}
        return {
            "candidate_scores": self.way,
            "stored_per_group": self.per_group,
            "replay_log": self.replay_log,
        }


@dataclass
class Stopwatch:
    """Seconds by phase, without those of the phases within."""

    seconds: dict[str, float] = field(default_factory=dict)
    _running: list[list[Any]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        self._running.append([time.perf_counter(), 0.0])
        try:
            yield
        finally:
            start, within = self._running.pop()
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - within
            if self._running:
                self._running[-1][1] += elapsed

    def watch(self, owner: Any, method: str, name: str) -> None:
        """Count the time of a method as a phase."""
        called = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return called(*args, **kwargs)

        setattr(owner, method, timed)


class StepTimes(TrainerCallback):
    """
    Seconds of every step by phase, from the beginning of one step to the beginning of the next.

    Args:
        pause: Called before each step, outside its time: lets the others take theirs.
    """

    def __init__(self, pause: Callable[[], Any] = lambda: None) -> None:
        self.pause = pause
        self.steps: list[dict[str, float]] = []
        self.stopwatch = Stopwatch()

    def begin(self) -> None:
        self.stopwatch.seconds = {}
        self.start = time.perf_counter()

    def finish(self) -> None:
        total, by_phase = time.perf_counter() - self.start, self.stopwatch.seconds
        self.steps.append(by_phase | {"rest": total - sum(by_phase.values()), "total": total})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.finish()
        self.pause()
        self.begin()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_phase = self.stopwatch.phase("optimizer")
        self.optimizer_phase.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer_phase.__exit__(None, None, None)


def parity_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for completions with an even sum of ids: half of all, whatever the model."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def load_parts(size: Size) -> tuple[Any, Any, Dataset]:
    """Model, tokenizer and 64 questions of a size."""
    if size.model == "tiny":
        encode = character_tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(encode), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, pad_token_id=encode.pad_token_id, bos_token_id=None,
            eos_token_id=encode.eos_token_id,
        )  # fmt: skip
        return LlamaForCausalLM(config), encode, Dataset.from_dict({"prompt": [f"AB{i:03d}=" * 4 for i in range(64)]})
    from examples.embedded import load_datasets, load_model_folder, load_tokenizer

    folder = load_model_folder()
    questions, _ = load_datasets(64, 1)
    return AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(folder), questions


def filled_buffer(questions: Dataset, size: Size, method: Method, vocab_size: int) -> ExperienceBuffer:
    """Random completions for every question, none of them better known to the policy than any other."""
    rng = np.random.default_rng(0)
    is_whole = method.way == "group"
    num_stored = GROUP_SIZE if is_whole else method.candidates
    buffer = ExperienceBuffer(
        group_size=GROUP_SIZE, retire_solved=False, max_completions_per_question=num_stored, seed=0,
        unit="group" if is_whole else "completion",
    )  # fmt: skip
    for row in questions:
        ids = rng.integers(2, vocab_size - 1, size=(num_stored, size.length))
        ids[:, 0] += ids.sum(axis=1) % 2  # an even sum counts as correct
        if is_whole:
            ids[::2, 0] += np.where(ids[::2, 0] > 2, -1, 1)  # every second one does not
        stored = [
            Experience.create(
                row_ids, np.full(size.length, -2.0), policy_version=0, reward=float(row_ids.sum() % 2 == 0)
            )
            for row_ids in ids
        ]
        question = Question(question_id_of(row["prompt"]), row)
        buffer.collect(question, stored, num_correct=GROUP_SIZE // 2, group_size=GROUP_SIZE)
    return buffer


def make_trainer(size: Size, method: Method, steps: int, output_dir: Path | str, **options: Any) -> Any:
    """A trainer; `options` are fields of its config."""
    model, encode, questions = load_parts(size)
    is_grpo = method.replay_fraction is None
    config: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": size.num_questions * GROUP_SIZE,
        "num_generations": GROUP_SIZE,
        "max_completion_length": size.length,
        "generation_kwargs": {"min_new_tokens": size.length},
        "learning_rate": 1e-6,
        "max_steps": steps,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | options
    more: dict[str, Any] = {}
    if not is_grpo:
        config |= {
            "replay_fraction": method.replay_fraction,
            "replay_start_pass_rate": None,
            "retire_solved": False,
            "max_completions_per_question": GROUP_SIZE if method.way == "group" else method.candidates,
        } | method.config
        if method.replay_fraction:
            more["experience_buffer"] = filled_buffer(questions, size, method, len(encode))
    trainer = (GRPOTrainer if is_grpo else ExGRPOTrainer)(
        model=model,
        reward_funcs=parity_reward,
        args=(GRPOConfig if is_grpo else ExGRPOConfig)(**config),
        train_dataset=questions,
        processing_class=encode,
        **more,
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ == "PrinterCallback":
            trainer.remove_callback(callback)
    return trainer


def watch_phases(trainer: Any, watch: Callable[[Any, str, str], None]) -> None:
    """Call `watch(owner, method, phase)` for every method that makes up a phase of a step."""
    watch(trainer, "_generate", "generation")
    watch(trainer, "_calculate_rewards", "reward")
    watch(trainer, "compute_loss", "loss")
    watch(trainer.accelerator, "backward", "loss")
    replayer = getattr(trainer, "replayer", None)
    if replayer is not None:
        next_batch = replayer.next_batch

        def watched_batch(*args: Any) -> Any:
            batch = next_batch(*args)
            for method in ("place", "take_rewards", "check_tokens", "columns", "record", "score_replayed"):
                watch(batch, method, "collection")
            return batch

        replayer.next_batch = watched_batch
        watch(replayer, "next_batch", "selection")
        watch(replayer, "score", "scoring")
        for method in ("collect", "observe", "trained_rows", "add_log_ratios"):
            watch(replayer, method, "collection")


def take_turns(
    train: Callable[[Any, Callable[[], Any]], list[Any]], methods: Sequence[Any], num_steps: int
) -> dict[Any, list[Any]]:
    """
    Train with every method, one step of each in turn, all in one thread. Every turn begins with another one.

    With a thread for each trainer, every one of them has OpenMP threads of its own. Together they are more than there
    are cores, so that OpenMP no longer spins between two operations but sleeps, and generation, which consists of
    small operations, takes twice as long as in a training by itself.

    Args:
        train: Trains with a method and calls the other argument before each step; returns what was measured.
        methods: What to train with.
        num_steps: Steps of each.

    Returns:
        What was measured, by method.
    """
    turns = greenlet.getcurrent()
    trainings = {method: greenlet.greenlet(train) for method in methods}
    measured = {}
    try:
        for method, training in trainings.items():
            training.switch(method, turns.switch)  # to its first step
        for turn in range(num_steps):
            # Nobody is always the one to follow the same other.
            for i in range(len(methods)):
                method = methods[(turn + i) % len(methods)]
                measured[method] = trainings[method].switch()
        return {method: measured[method] for method in methods}
    finally:
        for training in trainings.values():
            if not training.dead:
                training.throw()


def steps_in_turn(
    size: Size, methods: Sequence[Method], steps: int, warm_up: int, output_dir: Path | str
) -> dict[str, list[dict[str, float]]]:
    """
    Seconds by phase of every step that counts, by method; steps are taken in turn, see [`take_turns`].

    Args:
        size: What to train.
        methods: What to train it with.
        steps: Steps of each that count.
        warm_up: Steps of each before these.
        output_dir: Where trainers may write.
    """

    def train(method: Method, pause: Callable[[], Any]) -> list[dict[str, float]]:
        trainer = make_trainer(size, method, warm_up + steps, Path(output_dir) / str(method))  # with a log of its own
        times = StepTimes(pause)
        watch_phases(trainer, times.stopwatch.watch)
        trainer.add_callback(times)
        trainer.train()
        replayed = [line.get("replay/fraction", 0.0) for line in trainer.state.log_history if "loss" in line]
        expected = method.num_replayed(size) / size.num_questions
        assert all(abs(fraction - expected) < 1e-9 for fraction in replayed), (method, replayed)
        return times.steps[warm_up:]

    return {str(method): measured for method, measured in take_turns(train, methods, warm_up + steps).items()}
