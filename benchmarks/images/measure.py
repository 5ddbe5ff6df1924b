"""A buffer of rollouts with images: seconds to record, save and load, beside pyarrow alone."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from exgrpo_trl import Experience, ExperienceBuffer, Question, RolloutDetails, StoredImage
from exgrpo_trl.buffer.files import load_buffer
from exgrpo_trl.buffer.hashed_files import digests
from exgrpo_trl.buffer.metadata import DATA_FILES

GROUP_SIZE = 8
PER_QUESTION = 4
TOKENS = 400
SIZE = (96, 96)  # noise, which no file makes smaller: 28 kB, as a photograph of 400 x 300
IN_TURN = 5
LONG_TOKENS = 4000
TURNS = 8


def seconds(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def picture(rng: np.random.Generator) -> Image.Image:
    """An image that no other equals."""
    return Image.fromarray(rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8))


def turns(num_tokens: int, num_turns: int) -> np.ndarray:
    """Who wrote which token, shape `(num_tokens,)`: the model four fifths of each turn."""
    length = num_tokens // num_turns
    return np.arange(num_tokens) % length < 0.8 * length


def filled(num_rollouts: int) -> ExperienceBuffer:
    """A buffer of rollouts: every question has an image, and so has every rollout."""
    rng = np.random.default_rng(0)
    buffer = ExperienceBuffer(group_size=GROUP_SIZE)
    is_model = turns(TOKENS, 4)
    for number in range(num_rollouts // PER_QUESTION):
        shown = StoredImage.of(picture(rng))
        content = [{"type": "image", "image": shown}, {"type": "text", "text": f"What is in picture {number}?"}]
        question = Question(f"q{number}", {"prompt": [{"role": "user", "content": content}], "answer": str(number)})
        experiences = []
        for _ in range(PER_QUESTION):
            answer = [
                {"type": "image", "image": picture(rng)},
                {"type": "text", "text": "the part that you asked for"},
            ]
            messages = [{"role": "assistant", "content": "zoom in"}, {"role": "tool", "content": answer}] * 2
            details = RolloutDetails.create(is_model=is_model, messages=messages, rewards={"correct": 1.0})
            tokens, logps = rng.integers(0, 150_000, TOKENS), -rng.random(TOKENS)
            experiences.append(Experience.create(tokens, logps, policy_version=number, reward=1.0, details=details))
        buffer.collect(question, experiences, num_correct=PER_QUESTION, group_size=GROUP_SIZE)
    return buffer


def saved(num_rollouts: int, folder: str) -> dict[str, Any]:
    """
    Seconds to save, and that pyarrow alone takes to write the same columns, in turn.

    Call it in a process of its own. The buffer stays in the folder.
    """
    buffer = filled(num_rollouts)
    path, other = Path(folder, "buffer"), Path(folder, "other.parquet")
    buffer.save(path)  # the first one asks the system for memory
    groups = {file: read_alone(file) for file in sorted(path.glob("*.parquet"))}
    times: dict[str, Any] = {"save_seconds": [], "parquet_write_seconds": []}
    for _ in range(IN_TURN):
        times["parquet_write_seconds"].append(
            seconds(lambda: [write_alone(other, file.name, of_file) for file, of_file in groups.items()])
        )
        times["save_seconds"].append(seconds(lambda: buffer.save(path)))
    return {
        "rollouts": num_rollouts,
        "bytes_on_disk": sum(file.stat().st_size for file in path.iterdir()),
        "long_rollout_milliseconds": recorded(200),
        **times,
    }


def seconds_to_load(folder: str) -> float:
    """Seconds to load the buffer of a folder. Call it in a process of its own, as a resume is one."""
    return seconds(lambda: load_buffer(Path(folder, "buffer"), ExperienceBuffer))


def seconds_to_read(folder: str) -> float:
    """Seconds that pyarrow alone takes for the same columns, images as `bytes`. Call it in a process of its own."""
    files = list(Path(folder, "buffer").glob("*.parquet"))
    return seconds(lambda: [read_with_bytes(file) for file in files])


def seconds_to_read_tables(folder: str) -> float:
    """Seconds that pyarrow alone takes for tables, of which nothing is taken out. Call it in a process of its own."""
    files = list(Path(folder, "buffer").glob("*.parquet"))
    return seconds(lambda: [read_alone(file) for file in files])


def seconds_of_checksums(folder: str) -> float:
    """Seconds of the checksums alone, of files that are read for them, as a load does."""
    return seconds(lambda: list(digests(Path(folder, "buffer"), DATA_FILES)))


def read_alone(file: Path) -> list[pa.Table]:
    """The row groups of a file."""
    with pq.ParquetFile(file) as parquet:
        return [parquet.read_row_group(index, use_threads=False) for index in range(parquet.num_row_groups)]


def read_with_bytes(file: Path) -> list[Any]:
    """The row groups of a file, of images what opens and keeps them one by one: a `bytes` object of each."""
    if file.name != "images.parquet":
        return read_alone(file)
    with pq.ParquetFile(file) as parquet:
        groups = (parquet.read_row_group(index, use_threads=False) for index in range(parquet.num_row_groups))
        return [group.column("content").to_pylist() for group in groups]


def write_alone(file: Path, name: str, groups: list[pa.Table]) -> None:
    """Write row groups as a buffer's file of that name has them, and wait for the disk as a save does."""
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}
    if name == "images.parquet":
        options["compression"] = {"digest": "zstd", "content": "none"}
    if name == "completions.parquet":
        options["column_encoding"] = {"behavior_per_token_logps.list.element": "BYTE_STREAM_SPLIT"}
    if groups:
        with pq.ParquetWriter(file, groups[0].schema, **options) as writer:
            for group in groups:
                writer.write_table(group)
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        file.unlink()


def recorded(repetitions: int) -> list[float]:
    """Milliseconds to record a long rollout of several turns, to store it and to read it back, of each repetition."""
    logps = np.full(LONG_TOKENS, -0.5)
    every_tokens = iter(np.random.default_rng(0).integers(0, 150_000, (repetitions, LONG_TOKENS)))
    buffer = ExperienceBuffer(group_size=GROUP_SIZE)
    question = Question("q", {"prompt": [{"role": "user", "content": "x"}]})
    is_model = turns(LONG_TOKENS, TURNS)
    messages = [{"role": role, "content": "x" * 1500} for _ in range(TURNS) for role in ("assistant", "tool")]

    def once() -> None:
        tokens = next(every_tokens)
        details = RolloutDetails.create(is_model=is_model, messages=messages, rewards={"correct": 1.0, "format": 0.5})
        recorded = Experience.create(tokens, logps, policy_version=0, reward=1.0, details=details)
        buffer.collect(question, [recorded], num_correct=1, group_size=GROUP_SIZE)
        experience = buffer.completions(question.question_id)[-1]
        assert experience.token_ids.size == experience.behavior_per_token_logps.size == experience.is_model.size
        assert experience.details is not None
        assert len(experience.details.messages) == 2 * TURNS
        assert experience.details.rewards

    return [1e3 * seconds(once) for _ in range(repetitions)]
