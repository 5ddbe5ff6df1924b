"""What the processes of a run tell each other, as bytes: Arrow tables, one column per field and not one per tensor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from .experience import Candidate, Experience, Question, decode_example, encode_example
from .rollouts import Plan, Records
from .tables import EXPERIENCE_SCHEMA, experiences_from_table, experiences_to_arrays

_QUESTIONS = pa.schema([("group", pa.int64()), ("question_id", pa.string()), ("example", pa.large_string())])
_EXPERIENCES = pa.unify_schemas([pa.schema([("row", pa.int64())]), EXPERIENCE_SCHEMA])
_TO_SCORE = pa.unify_schemas(
    [pa.schema([("forward", pa.int64()), ("prompt_ids", pa.large_list(pa.int32()))]), EXPERIENCE_SCHEMA]
)

# Prompt token ids and stored completions to score in one forward.
Prompted = list[tuple[list[int], Experience]]


def encode_records(records: Records) -> bytes:
    """
    Bytes of questions and completions; nothing for nothing.

    Args:
        records ([`Records`]):
            Questions by group and completions by row.
    """
    if not records.questions and not records.experiences:
        return b""
    questions = pa.record_batch(
        [
            pa.array(records.questions.keys(), pa.int64()),
            pa.array([question.question_id for question in records.questions.values()], pa.string()),
            pa.array([encode_example(question.example) for question in records.questions.values()], pa.large_string()),
        ],
        schema=_QUESTIONS,
    )
    rows = pa.array(records.experiences.keys(), pa.int64())
    experiences = pa.record_batch(
        [rows, *experiences_to_arrays(list(records.experiences.values()))], schema=_EXPERIENCES
    )
    return _encode([questions, experiences])


def decode_records(message: bytes) -> Records:
    """
    The inverse of [`encode_records`].

    Args:
        message (`bytes`):
            Encoded records.
    """
    if not message:
        return Records()
    questions, experiences = _decode(message, [_QUESTIONS, _EXPERIENCES])
    columns = (questions.column(name).to_pylist() for name in _QUESTIONS.names)
    return Records(
        {group: Question(name, decode_example(example)) for group, name, example in zip(*columns, strict=True)},
        dict(zip(experiences.column("row").to_pylist(), experiences_from_table(experiences), strict=True)),
    )


def encode_plan(plan: Plan) -> bytes:
    """
    Bytes of what a generation batch replays; nothing for nothing.

    Args:
        plan ([`Plan`]):
            Rows of the whole batch and the share of one process.
    """
    if not plan.rows:
        return b""
    rows = np.array(sorted(plan.rows), dtype=np.int64)
    return len(rows).to_bytes(8, "little") + rows.tobytes() + encode_records(plan.share)


def decode_plan(message: bytes) -> Plan:
    """
    The inverse of [`encode_plan`].

    Args:
        message (`bytes`):
            Encoded plan.
    """
    if not message:
        return Plan()
    end = 8 + 8 * int.from_bytes(message[:8], "little")
    return Plan(frozenset(np.frombuffer(message[8:end], dtype=np.int64).tolist()), decode_records(message[end:]))


def encode_forwards(forwards: Sequence[Prompted]) -> bytes:
    """
    Bytes of completions to score; nothing for nothing.

    Args:
        forwards (`Sequence[Prompted]`):
            Prompts and completions of each forward.
    """
    if not forwards:
        return b""
    pairs = [(number, prompt, experience) for number, pairs in enumerate(forwards) for prompt, experience in pairs]
    numbers, prompts, experiences = zip(*pairs, strict=True)
    columns = [
        pa.array(numbers, pa.int64()),
        pa.array([np.asarray(prompt, dtype=np.int32) for prompt in prompts], pa.large_list(pa.int32())),
        *experiences_to_arrays(list(experiences)),
    ]
    return _encode([pa.record_batch(columns, schema=_TO_SCORE)])


def decode_forwards(message: bytes) -> list[Prompted]:
    """
    The inverse of [`encode_forwards`].

    Args:
        message (`bytes`):
            Encoded completions.
    """
    if not message:
        return []
    (batch,) = _decode(message, [_TO_SCORE])
    numbers, prompts = (batch.column(name).to_pylist() for name in ("forward", "prompt_ids"))
    forwards: list[Prompted] = [[] for _ in range(numbers[-1] + 1)]
    for number, prompt, experience in zip(numbers, prompts, experiences_from_table(batch), strict=True):
        forwards[number].append((prompt, experience))
    return forwards


def encode_scores(candidates: Sequence[Candidate]) -> bytes:
    """
    Bytes of the scores of candidates, without the candidates.

    Args:
        candidates (`Sequence[Candidate]`):
            Scored candidates.
    """
    return np.array([(c.entropy, c.negative_log_likelihood) for c in candidates], dtype=np.float64).tobytes()


def decode_scores(message: bytes) -> list[tuple[float, float]]:
    """
    Entropy and negative log-likelihood of each candidate, nats per token; the inverse of [`encode_scores`].

    Args:
        message (`bytes`):
            Encoded scores.
    """
    return [(entropy, nll) for entropy, nll in np.frombuffer(message, dtype=np.float64).reshape(-1, 2).tolist()]


def _encode(batches: Sequence[pa.RecordBatch]) -> bytes:
    parts: list[bytes] = []
    for batch in batches:
        body = batch.serialize().to_pybytes()
        parts += [len(body).to_bytes(8, "little"), body]
    return b"".join(parts)


def _decode(message: bytes, schemas: Sequence[pa.Schema]) -> list[Any]:
    batches = []
    view = memoryview(message)
    for schema in schemas:
        size = int.from_bytes(view[:8], "little")
        batches.append(pa.ipc.read_record_batch(pa.py_buffer(view[8 : 8 + size]), schema))
        view = view[8 + size :]
    return batches
