"""Records that the replay buffer stores: questions, completions and candidates for replay."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import operator
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_TOKEN_ID = 2**31 - 1
MAX_POLICY_VERSION = 2**63 - 1
# A log-probability is at most 0; float32 and bfloat16 soft-maxes overshoot by a little.
MAX_LOG_PROBABILITY = 1e-4
MIN_LOG_PROBABILITY = float(np.finfo(np.float32).min)

_LOW_HALF = 0 if sys.byteorder == "little" else 1  # of the two int32 that make an int64
_TYPE_KEY = "__exgrpo_type__"


class ExperienceBufferError(ValueError):
    """A saved experience buffer cannot be read, or a path cannot take one."""


def question_id_of(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """
    Identifier of a question that depends on its prompt only.

    Equal prompts have equal ids in every process and every run; the order of the keys inside a message does not
    matter.

    Args:
        prompt (`str` or `list[dict]`):
            Plain or conversational prompt.

    Returns:
        `str`: 32 hexadecimal digits.

    Raises:
        TypeError: if the prompt is neither text nor a list of messages, or holds a value that JSON cannot carry.
    """
    if not isinstance(prompt, str | list | tuple):
        raise TypeError(
            f"A prompt must be a string or a list of messages, got {type(prompt).__name__}. "
            "Set `question_id_column` if questions are identified by another column."
        )
    plain = prompt if isinstance(prompt, str) else [dict(message) for message in prompt]
    canonical = json.dumps(_to_json(plain, "prompt"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def encode_example(example: Mapping[str, Any]) -> str:
    """
    JSON text of a dataset row; [`decode_example`] gives the row back exactly.

    Args:
        example (`Mapping[str, Any]`):
            Row of `str`, `int`, `float` (NaN and infinities too), `bool`, `None`, `list`, `dict`, `datetime`, `date`
            and `bytes` values, nested to any depth.

    Raises:
        TypeError: if a column holds any other type.
    """
    if not all(type(column) is str for column in example):
        raise TypeError(f"The columns of an example must be strings, got {list(example)}.")
    return json.dumps(_to_json_dict({column: _to_json(value, column) for column, value in example.items()}))


def decode_example(text: str) -> dict[str, Any]:
    """
    Row that [`encode_example`] turned into `text`.

    Args:
        text (`str`):
            Output of [`encode_example`].

    Raises:
        ValueError: if `text` is not the JSON of a row.
    """
    example = json.loads(text, object_hook=_from_json_dict)
    if not isinstance(example, dict):
        raise ValueError(f"An encoded example must be a JSON object, got {text[:80]!r}.")
    return example


def _to_json(value: Any, column: str) -> Any:
    # Exact types on purpose: a NumPy scalar, an enum or a tuple would come back as something else.
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if kind is list:
        return [_to_json(item, column) for item in value]
    if kind is dict and all(type(key) is str for key in value):
        return _to_json_dict({key: _to_json(item, column) for key, item in value.items()})
    if kind in (datetime, date):
        return {_TYPE_KEY: kind.__name__, "value": value.isoformat()}
    if kind is bytes:
        return {_TYPE_KEY: "bytes", "value": base64.b64encode(value).decode()}
    what = "dict with keys that are not strings" if kind is dict else f"{kind.__module__}.{kind.__qualname__}"
    raise TypeError(
        f"Column {column!r} holds a value of type {what}, which an experience buffer cannot save. Drop the column "
        "from the dataset or convert it to plain Python values (str, int, float, bool, None, list, dict, datetime, "
        "date, bytes)."
    )


def _to_json_dict(value: dict[str, Any]) -> dict[str, Any]:
    # A dict that happens to use our own key goes as a list of pairs, so that it is never taken for a tagged value.
    return {_TYPE_KEY: "dict", "value": [[*pair] for pair in value.items()]} if _TYPE_KEY in value else value


def _from_json_dict(value: dict[str, Any]) -> Any:
    if _TYPE_KEY not in value:
        return value
    kind, content = value[_TYPE_KEY], value["value"]
    if kind == "datetime":
        return datetime.fromisoformat(content)
    if kind == "date":
        return date.fromisoformat(content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "dict":
        return dict(content)
    raise ValueError(f"An encoded example holds the unknown type {kind!r}.")


@dataclass(frozen=True, slots=True)
class Question:
    """
    A question of the training dataset.

    Args:
        question_id (`str`):
            Identifier, one per prompt.
        example (`dict[str, Any]`):
            The whole dataset row: `"prompt"` and every column that the reward functions need.

    Raises:
        TypeError: if the id is not a string or the example is not a dict.
        ValueError: if the id is empty or the example has no prompt.
    """

    question_id: str
    example: dict[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.question_id, str):
            raise TypeError(f"`question_id` must be a string, got {self.question_id!r}; convert it with `str(...)`.")
        if not self.question_id:
            raise ValueError("`question_id` must not be empty.")
        if not isinstance(self.example, dict):
            raise TypeError(
                f"`example` must be a dict, got {type(self.example).__name__}; convert it with `dict(...)`."
            )
        if "prompt" not in self.example:
            raise ValueError(
                f"The example of question {self.question_id!r} has no 'prompt' column, only {sorted(self.example)}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Experience:
    """
    A stored completion: its tokens and what the policy that generated it thought of them.

    Build it with [`Experience.create`], which validates. Two experiences are equal only if they are the same object;
    tokens and log-probabilities are kept as bytes (4 bytes per token each), the arrays are views of them.

    Args:
        token_bytes (`bytes`):
            Token ids, native int32.
        logp_bytes (`bytes`):
            Log-probabilities of the tokens under the behaviour policy, native float32.
        policy_version (`int`):
            Global optimizer step at which the completion was generated.
        reward (`float`):
            Reward at generation time.
        entropy (`float`):
            Mean token entropy under the behaviour policy in nats, NaN if unknown.
    """

    token_bytes: bytes = field(repr=False)
    logp_bytes: bytes = field(repr=False)
    policy_version: int
    reward: float
    entropy: float

    @classmethod
    def create(
        cls,
        token_ids: ArrayLike,
        behavior_per_token_logps: ArrayLike,
        *,
        policy_version: int,
        reward: float,
        entropy: float = math.nan,
    ) -> Experience:
        """
        Validated experience.

        Args:
            token_ids (array of shape `(num_tokens,)`):
                Completion token ids, without prompt and padding.
            behavior_per_token_logps (array of shape `(num_tokens,)`):
                Log-probability in nats of each token under the policy that generated it, at the sampling temperature.
            policy_version (`int`):
                Global optimizer step at which the completion was generated.
            reward (`float`):
                Reward at generation time.
            entropy (`float`, *optional*, defaults to NaN):
                Mean token entropy under the behaviour policy in nats.

        Raises:
            TypeError: if the ids are not integers or a number is not a number.
            ValueError: if shapes differ, nothing was generated, or a value is out of range.
        """
        ids = np.asarray(token_ids)
        logps = np.asarray(behavior_per_token_logps)
        if ids.ndim != 1 or ids.shape != logps.shape:
            raise ValueError(
                "`token_ids` and `behavior_per_token_logps` must be one-dimensional and equally long, got shapes "
                f"{ids.shape} and {logps.shape}."
            )
        if ids.size == 0:
            raise ValueError("An experience needs at least one token, got an empty completion.")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"`token_ids` must be integers, got dtype {ids.dtype}.")
        if logps.dtype.kind not in "fiu":
            raise TypeError(f"`behavior_per_token_logps` must be numbers, got dtype {logps.dtype}.")
        # Read as unsigned, a negative id is a huge one: one pass checks both ends of the range. `argmax` and `argmin`
        # are faster than `max` and `min`, and find NaN first.
        wide = np.ascontiguousarray(ids, dtype=np.int64)
        unsigned = wide.view(np.uint64)
        if unsigned[unsigned.argmax()] > MAX_TOKEN_ID:
            raise ValueError(
                f"`token_ids` must lie in 0..{MAX_TOKEN_ID}, got {ids.min()}..{ids.max()}; remove padding."
            )
        lowest, highest = float(logps[logps.argmin()]), float(logps[logps.argmax()])
        # NaN fails both comparisons.
        if not (lowest >= MIN_LOG_PROBABILITY and highest <= MAX_LOG_PROBABILITY):
            raise ValueError(
                f"`behavior_per_token_logps` must be finite and at most 0, got values from {lowest} to {highest}; "
                "they are log-probabilities in nats of the generated tokens."
            )
        return cls(
            # Their low halves. An int32 array in between would leave a hole in the heap: 200 bytes per completion.
            wide.view(np.int32)[_LOW_HALF::2].tobytes(),
            logps.astype(np.float32, copy=False).tobytes(),
            _checked_policy_version(policy_version),
            _checked_float("reward", reward, allow_nan=False),
            _checked_float("entropy", entropy, allow_nan=True),
        )

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, read-only, shape `(num_tokens,)`."""
        return np.frombuffer(self.token_bytes, dtype=np.int32)

    @property
    def behavior_per_token_logps(self) -> NDArray[np.float32]:
        """Log-probabilities in nats under the behaviour policy, read-only, shape `(num_tokens,)`."""
        return np.frombuffer(self.logp_bytes, dtype=np.float32)

    @property
    def num_tokens(self) -> int:
        """Number of tokens."""
        return len(self.token_bytes) // 4

    def __len__(self) -> int:
        return self.num_tokens


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A stored completion that may be replayed, as a completion selector sees it (paper section 3.2).

    Args:
        experience (`Experience`):
            The stored completion.
        entropy (`float` or `None`):
            Mean token entropy in nats under the current policy; `None` when the candidate was not scored.
        negative_log_likelihood (`float` or `None`):
            Mean negative log-likelihood in nats per token under the current policy; `None` when not scored.
    """

    experience: Experience
    entropy: float | None = None
    negative_log_likelihood: float | None = None


def _checked_policy_version(policy_version: int) -> int:
    try:
        version = operator.index(policy_version)
    except TypeError:
        raise TypeError(f"`policy_version` must be an integer, got {policy_version!r}.") from None
    if not 0 <= version <= MAX_POLICY_VERSION:
        raise ValueError(f"`policy_version` must not be negative, got {version}; it is the global optimizer step.")
    return version


def _checked_float(name: str, value: float, *, allow_nan: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number, got {value!r}.") from None
    if math.isinf(number) or (math.isnan(number) and not allow_nan):
        raise ValueError(f"`{name}` must be finite{' or NaN' if allow_nan else ''}, got {number}.")
    return number
