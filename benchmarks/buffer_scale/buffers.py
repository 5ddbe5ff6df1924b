"""Three replay buffers behind one face: the package's, lists in a dictionary, and torchrl's."""

import pickle
import shutil
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from exgrpo_trl import Experience, ExperienceBuffer, Question

GROUP_SIZE = 8


@dataclass(frozen=True)
class Group:
    """The successes of a group: what a buffer is given.

    Attributes:
        name: Of the question.
        tokens: Token ids of each, `(num_tokens,)`.
        logps: Log-probabilities of each, `(num_tokens,)`.
        num_correct: Correct completions of the group.
        version: Of the policy.
    """

    name: str
    tokens: list[np.ndarray]
    logps: list[np.ndarray]
    num_correct: int
    version: int


class Buffer(Protocol):
    """What is measured."""

    def insert(self, group: Group) -> None:
        """Take the successes of a group."""

    def draw(self, num_questions: int) -> list[Any]:
        """Stored completions of questions of medium difficulty first."""

    def evict_older_than(self, version: int) -> int:
        """Drop the completions of older policies; returns how many there were."""

    def save(self, path: Path) -> None:
        """Save everything."""

    def load(self, path: Path) -> Any:
        """What `save` has saved."""


class OurBuffer:
    """`exgrpo_trl.ExperienceBuffer`, validation of what comes in included."""

    def __init__(self, capacity: int) -> None:
        self.buffer = ExperienceBuffer(group_size=GROUP_SIZE)

    def insert(self, group: Group) -> None:
        experiences = [
            Experience.create(tokens, logps, policy_version=group.version, reward=1.0, entropy=float(logps[0]))
            for tokens, logps in zip(group.tokens, group.logps, strict=True)
        ]
        question = Question(group.name, {"prompt": group.name})
        self.buffer.collect(question, experiences, num_correct=group.num_correct, group_size=GROUP_SIZE)

    def draw(self, num_questions: int) -> list[Any]:
        return [self.buffer.completions(name) for name in self.buffer.sample_questions(num_questions)]

    def evict_older_than(self, version: int) -> int:
        return self.buffer.evict_older_than(version)

    def save(self, path: Path) -> None:
        self.buffer.save(path)

    def load(self, path: Path) -> Any:
        return ExperienceBuffer.load(path)


class ListBuffer:
    """As the paper describes it, without an index: lists of completions by question, filtered whenever something is
    asked of them."""

    def __init__(self, capacity: int) -> None:
        self.completions: dict[str, list[dict[str, Any]]] = {}
        self.num_correct: dict[str, int] = {}
        self.rng = np.random.default_rng(0)

    def insert(self, group: Group) -> None:
        stored = self.completions.setdefault(group.name, [])
        for tokens, logps in zip(group.tokens, group.logps, strict=True):
            if not any(np.array_equal(tokens, other["tokens"]) for other in stored):
                stored.append(
                    {
                        "tokens": tokens.astype(np.int32),
                        "logps": logps.astype(np.float32),
                        "version": group.version,
                        "reward": 1.0,
                        "entropy": float(logps[0]),
                    }
                )
        self.num_correct[group.name] = group.num_correct

    def draw(self, num_questions: int) -> list[Any]:
        buckets = defaultdict(list)
        for name, num_correct in self.num_correct.items():
            buckets[num_correct].append(name)
        weights = np.array([np.exp(-((num_correct - GROUP_SIZE / 2) ** 2) / 2) for num_correct in buckets])
        counts = self.rng.multinomial(num_questions, weights / weights.sum())
        return [
            self.completions[names[i]]
            for names, count in zip(buckets.values(), counts, strict=True)
            for i in self.rng.choice(len(names), min(count, len(names)), replace=False)
        ]

    def evict_older_than(self, version: int) -> int:
        before = sum(map(len, self.completions.values()))
        kept = {name: [e for e in stored if e["version"] >= version] for name, stored in self.completions.items()}
        self.completions = {name: stored for name, stored in kept.items() if stored}
        self.num_correct = {name: self.num_correct[name] for name in self.completions}
        return before - sum(map(len, self.completions.values()))

    def save(self, path: Path) -> None:
        with open(path, "wb") as file:
            pickle.dump((self.completions, self.num_correct), file, protocol=5)

    def load(self, path: Path) -> Any:
        with open(path, "rb") as file:
            return pickle.load(file)


class TorchRLBuffer:
    """
    torchrl's replay buffer with its sampler of groups. Draws distinct questions, all of them alike.

    It does not weigh questions by difficulty, retire them or refuse duplicates, and it evicts in the order of
    insertion when its storage is full, not by policy version. Completions are padded to the longest one.
    """

    def __init__(self, capacity: int, longest: int = 750) -> None:
        from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        from torchrl.data.replay_buffers.samplers import PromptGroupSampler

        self.longest = longest
        self.capacity = capacity
        self.numbers: dict[str, int] = {}
        self.buffer = TensorDictReplayBuffer(
            storage=LazyTensorStorage(capacity),
            sampler=PromptGroupSampler(samples_per_group=1, group_key="question"),
            batch_size=64,
        )

    def insert(self, group: Group) -> None:
        import torch
        from tensordict import TensorDict

        count = len(group.tokens)
        tokens = np.zeros((count, self.longest), dtype=np.int32)
        logps = np.zeros((count, self.longest), dtype=np.float32)
        for row, (of_row, logps_of_row) in enumerate(zip(group.tokens, group.logps, strict=True)):
            tokens[row, : len(of_row)] = of_row
            logps[row, : len(of_row)] = logps_of_row
        number = self.numbers.setdefault(group.name, len(self.numbers))
        self.buffer.extend(
            TensorDict(
                {
                    "question": torch.full((count,), number),
                    "tokens": torch.from_numpy(tokens),
                    "logps": torch.from_numpy(logps),
                    "num_tokens": torch.tensor([len(of_row) for of_row in group.tokens]),
                    "num_correct": torch.full((count,), group.num_correct),
                    "version": torch.full((count,), group.version),
                },
                batch_size=[count],
            )
        )

    def draw(self, num_questions: int) -> list[Any]:
        return [self.buffer.sample(num_questions)]

    def evict_older_than(self, version: int) -> int:
        raise NotImplementedError("A storage of torchrl evicts by order of insertion, when it is full.")

    def save(self, path: Path) -> None:
        self.buffer.dumps(path)

    def load(self, path: Path) -> Any:
        other = TorchRLBuffer(self.capacity, self.longest)
        other.buffer.loads(path)
        return other


BUFFERS: dict[str, Any] = {"exgrpo-trl": OurBuffer, "dictionary of lists": ListBuffer, "torchrl": TorchRLBuffer}


def groups(num_completions: int, per_question: int, first: int = 0, *, mean_length: int = 500) -> Iterable[Group]:
    """
    Random successes.

    Args:
        num_completions: How many completions.
        per_question: Completions of a question, all of one group.
        first: Number of the first question; it also decides the random numbers.
        mean_length: Lengths are uniform from half of it to one and a half of it.

    Yields:
        The groups; a policy version for every 128 questions.
    """
    rng = np.random.default_rng([first, 1])
    for number in range(first, first + num_completions // per_question):
        lengths = rng.integers(mean_length // 2, mean_length + mean_length // 2 + 1, size=per_question)
        yield Group(
            f"question {number}",
            [rng.integers(0, 150_000, size=length) for length in lengths.tolist()],
            [-rng.random(length, dtype=np.float32) for length in lengths.tolist()],
            int(rng.integers(1, GROUP_SIZE)),
            number // 128,
        )


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return (
        sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        if path.is_dir()
        else path.stat().st_size
    )


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()
