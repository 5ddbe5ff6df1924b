"""Records that the replay buffer stores and the trainer replays: questions, completions, candidates, replays."""

from __future__ import annotations

import hashlib
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ExperienceBufferError as ExperienceBufferError  # where it is documented
from .rollout_details import RolloutDetails, is_model_of

MAX_TOKEN_ID = 2**31 - 1
MAX_POLICY_VERSION = 2**63 - 1
MAX_NUM_REPLAYS = 2**63 - 1
UNKNOWN_PROMPT = 0
# A log-probability is at most 0; float32 and bfloat16 soft-maxes overshoot by a little.
MAX_LOG_PROBABILITY = 1e-4
MIN_LOG_PROBABILITY = float(np.finfo(np.float32).min)
_TOKENS_SHOWN = 6

_set = object.__setattr__  # a field of a frozen record that is only being made
_LOW_HALF = 0 if sys.byteorder == "little" else 1  # of the two int32 that make an int64


@dataclass(frozen=True, slots=True)
class Question:
    """
    A question of the training dataset.

    Args:
        question_id (`str`):
            Identifier, one per prompt.
        example (`dict[str, Any]`):
            The whole dataset row: `"prompt"` and every column that the reward functions need. `"prompt"` is `None` in
            rows without one. Images are of Pillow or, in a buffer, [`StoredImage`].

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

    def _repr_html_(self) -> str:
        from .html import question_html

        return question_html(self)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
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
        prompt_hash (`int`, *optional*, defaults to `0`):
            Hash of the tokens of the prompt that it answers, 64 bits, signed; 0 if unknown. Where the prompt of its
            question renders to other tokens, a completion is not replayed.
        details ([`RolloutDetails`], *optional*):
            What a rollout of several turns, of an environment or of a rollout function has beyond tokens.
        is_scored (`bool`, *optional*, defaults to `False`):
            Whether the policy of the log-probabilities did not generate it, but scored what came from elsewhere, see
            [`ExGRPOTrainer.score_experience`].
    """

    token_bytes: bytes
    logp_bytes: bytes
    policy_version: int
    reward: float
    entropy: float
    prompt_hash: int = UNKNOWN_PROMPT
    details: RolloutDetails | None = None
    is_scored: bool = False

    @classmethod
    def create(
        cls,
        token_ids: ArrayLike,
        behavior_per_token_logps: ArrayLike,
        *,
        policy_version: int,
        reward: float,
        entropy: float = math.nan,
        prompt_hash: int = UNKNOWN_PROMPT,
        details: RolloutDetails | None = None,
        is_scored: bool = False,
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
            prompt_hash (`int`, *optional*, defaults to `0`):
                Hash of the tokens of the prompt, see [`~exgrpo_trl.records.prompt_hash`]; 0 if unknown.
            details ([`RolloutDetails`], *optional*):
                What it has beyond tokens. Log-probabilities of tokens that the model did not write are kept as 0.
            is_scored (`bool`, *optional*, defaults to `False`):
                Whether the policy of the log-probabilities scored it without having generated it.

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
        if details is not None and details.run_bytes:
            if details.run_lengths.sum() != ids.size:
                raise ValueError(
                    f"`details` tells who wrote {details.run_lengths.sum()} tokens, of a completion of {ids.size}."
                )
            logps = np.where(is_model_of(details.run_lengths, ids.size), logps, 0.0)
        return cls(
            # Their low halves. An int32 array in between would leave a hole in the heap: 200 bytes per completion.
            wide.view(np.int32)[_LOW_HALF::2].tobytes(),
            logps.astype(np.float32, copy=False).tobytes(),
            _checked_policy_version(policy_version),
            _checked_float("reward", reward, allow_nan=False),
            _checked_float("entropy", entropy, allow_nan=True),
            _checked_hash(prompt_hash),
            details,
            bool(is_scored),
        )

    @classmethod
    def of_rows(
        cls,
        token_ids: NDArray[np.integer[Any]],
        behavior_per_token_logps: NDArray[np.float32],
        lengths: Sequence[int],
        *,
        policy_version: int,
        rewards: NDArray[np.floating[Any]],
        entropies: NDArray[np.floating[Any]],
        prompt_hashes: Sequence[int],
        details: Sequence[RolloutDetails | None],
    ) -> list[Experience]:
        """
        Experiences of several rows, validated together: what [`Experience.create`] makes of each.

        Args:
            token_ids, behavior_per_token_logps (array of shape `(N, T)`):
                Padded rows; padding may be anything.
            lengths (`Sequence[int]`):
                Number of tokens of each row.
            policy_version (`int`):
                Global optimizer step at which they were generated.
            rewards, entropies (array of shape `(N,)`):
                One of each for every row.
            prompt_hashes, details (`Sequence`):
                Likewise.

        Raises:
            ValueError: if a value of a row is out of range.
        """
        is_padding = np.arange(token_ids.shape[1]) >= np.asarray(lengths)[:, None]
        ids = np.where(is_padding, 0, token_ids)
        logps = np.where(is_padding, np.float32(0), behavior_per_token_logps)
        # NaN is the minimum and the maximum of what holds one, and fails both comparisons.
        is_right = (
            min(lengths) > 0
            and 0 <= ids.min() <= ids.max() <= MAX_TOKEN_ID
            and MIN_LOG_PROBABILITY <= logps.min() <= logps.max() <= MAX_LOG_PROBABILITY
            and np.isfinite(rewards).all()
            and not np.isinf(entropies).any()
        )
        rest = list(zip(rewards.tolist(), entropies.tolist(), prompt_hashes, details, strict=True))
        if not is_right or any(of_row is not None and of_row.run_bytes for of_row in details):
            return [
                cls.create(
                    ids[:length],
                    logps[:length],
                    policy_version=policy_version,
                    reward=reward,
                    entropy=entropy,
                    prompt_hash=prompt_hash,
                    details=of_row,
                )
                for ids, logps, length, (reward, entropy, prompt_hash, of_row) in zip(
                    ids.astype(np.int32), logps, lengths, rest, strict=True
                )
            ]
        version = _checked_policy_version(policy_version)
        id_bytes, logp_bytes = ids.astype(np.int32).tobytes(), logps.astype(np.float32, copy=False).tobytes()
        begins = range(0, len(id_bytes), 4 * ids.shape[1])
        return [
            cls(id_bytes[begin : begin + 4 * length], logp_bytes[begin : begin + 4 * length], version, *of_row)
            for begin, length, of_row in zip(begins, lengths, rest, strict=True)
        ]

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

    @property
    def is_model(self) -> NDArray[np.bool_]:
        """Which tokens the model wrote, rather than a tool or an environment; shape `(num_tokens,)`."""
        runs = np.zeros(0, dtype=np.int32) if self.details is None else self.details.run_lengths
        return is_model_of(runs, self.num_tokens)

    @property
    def num_model_tokens(self) -> int:
        """Number of tokens that the model wrote."""
        if self.details is None or not self.details.run_bytes:
            return self.num_tokens
        return int(self.details.run_lengths[::2].sum())

    def __len__(self) -> int:
        return self.num_tokens

    def __repr__(self) -> str:
        shown = [str(token_id) for token_id in self.token_ids[:_TOKENS_SHOWN].tolist()]
        shown += ["..."] if self.num_tokens > _TOKENS_SHOWN else []
        return (
            f"Experience(num_tokens={self.num_tokens}, policy_version={self.policy_version}, "
            f"reward={self.reward:.6g}, entropy={self.entropy:.4g}, token_ids=[{', '.join(shown)}])"
        )

    def _repr_html_(self) -> str:
        from .html import experience_html

        return experience_html(self)


@dataclass(frozen=True, slots=True)
class Reuse:
    """
    How a stored completion was used so far, and what the policy thought of it last.

    Args:
        num_replays (`int`, *optional*, defaults to `0`):
            How often it was replayed.
        entropy (`float`, *optional*, defaults to NaN):
            Last known mean token entropy in nats, NaN if unknown.
        negative_log_likelihood (`float`, *optional*, defaults to NaN):
            Last known mean negative log-likelihood in nats per token that the model wrote, NaN if unknown.
        scored_at (`int`, *optional*, defaults to `0`):
            Policy version (optimizer step) that both date from.

    Raises:
        TypeError: if a number is not a number.
        ValueError: if a number is out of range.
    """

    num_replays: int = 0
    entropy: float = math.nan
    negative_log_likelihood: float = math.nan
    scored_at: int = 0

    def __post_init__(self) -> None:
        num_replays = as_integer("num_replays", self.num_replays)
        if not 0 <= num_replays <= MAX_NUM_REPLAYS:
            raise ValueError(f"`num_replays` must not be negative, got {num_replays}; it counts replays.")
        # Plain numbers, whichever came: they are saved, and compared.
        for name, value in (
            ("num_replays", num_replays),
            ("entropy", _checked_float("entropy", self.entropy, allow_nan=True)),
            (
                "negative_log_likelihood",
                _checked_float("negative_log_likelihood", self.negative_log_likelihood, allow_nan=True),
            ),
            ("scored_at", _checked_policy_version(self.scored_at, "scored_at")),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def at_generation(cls, experience: Experience) -> Reuse:
        """What is known of a completion that was not replayed: what its own policy thought of it."""
        logps, num_model_tokens = experience.behavior_per_token_logps, experience.num_model_tokens
        if num_model_tokens < logps.size:
            logps = logps[experience.is_model]
        likelihood = float(np.add.reduce(logps, dtype=np.float64)) / num_model_tokens if num_model_tokens else math.nan
        known = object.__new__(cls)  # from a checked record, and often: not checked again
        _set(known, "num_replays", 0)
        _set(known, "entropy", experience.entropy)
        _set(known, "negative_log_likelihood", -likelihood)
        _set(known, "scored_at", experience.policy_version)
        return known


class Scores(NamedTuple):
    """What a forward of a policy says of a stored completion; means over the tokens that the model wrote, nats.

    Attributes:
        entropy (`float`):
            Mean token entropy.
        negative_log_likelihood (`float`):
            Mean negative log-likelihood.
        drift (`float` or `None`):
            Mean absolute log importance ratio to the policy that generated it; `None` if it was not asked for.
    """

    entropy: float
    negative_log_likelihood: float
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class Candidate:
    """
    A stored completion that may be replayed, as a completion selector sees it (paper section 3.2).

    Args:
        experience (`Experience`):
            The stored completion.
        entropy (`float` or `None`):
            Mean token entropy in nats under the current policy, or the last known one with
            `candidate_scores="last_known"`; `None` when the candidate was not scored.
        negative_log_likelihood (`float` or `None`):
            Mean negative log-likelihood in nats per token, likewise; `None` when not scored.
    """

    experience: Experience
    entropy: float | None = None
    negative_log_likelihood: float | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """
    A stored completion in a generation batch.

    Args:
        question (`Question`):
            The replayed question. The group of it may hold several stored completions.
        experience (`Experience`):
            The stored completion.
        row (`int`):
            Row of the generation batch that the stored completion takes.
        entropy (`float` or `None`):
            Mean token entropy of the completion under the current policy, nats; `None` when not scored.
    """

    question: Question
    experience: Experience
    row: int
    entropy: float | None = None


def prompt_hash(token_ids: ArrayLike, image_digests: Iterable[str] = ()) -> int:
    """A number that differs where tokens or images of two prompts differ; never that of an unknown prompt."""
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int64).tobytes(), digest_size=8)
    for of_image in image_digests:
        digest.update(of_image.encode())
    return int.from_bytes(digest.digest(), "little", signed=True) or 1


def reaches(rewards: ArrayLike, threshold: float) -> NDArray[np.bool_]:
    """
    Which rewards are at least the threshold; NaN is not.

    TRL keeps rewards in float32, where 0.9 is a little less than 0.9: a relative difference of 1e-6 is no difference.
    """
    return np.asarray(np.asarray(rewards) >= threshold - 1e-6 * max(1.0, abs(threshold)))


def as_integer(name: str, value: Any, alternative: str = "") -> int:
    """An argument of that name as a plain integer; a float is none, a NumPy integer is one."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"`{name}` must be an integer{alternative}, got {value!r}.") from None


def _checked_policy_version(policy_version: int, name: str = "policy_version") -> int:
    version = as_integer(name, policy_version)
    if not 0 <= version <= MAX_POLICY_VERSION:
        raise ValueError(f"`{name}` must not be negative, got {version}; it is the global optimizer step.")
    return version


def _checked_hash(prompt_hash: int) -> int:
    number = as_integer("prompt_hash", prompt_hash)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"`prompt_hash` must have 64 bits, got {number}.")
    return number


def _checked_float(name: str, value: float, *, allow_nan: bool) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"`{name}` must be a number, got {value!r}.") from None
    if math.isinf(number) or (math.isnan(number) and not allow_nan):
        raise ValueError(f"`{name}` must be finite{' or NaN' if allow_nan else ''}, got {number}.")
    return number
