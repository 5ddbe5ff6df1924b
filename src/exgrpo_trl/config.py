"""[`ExGRPOConfig`]: TRL's `GRPOConfig` plus the fields of experience replay."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from trl import GRPOConfig

from .strategies import (
    ADMISSION_RULES,
    COMPLETION_SELECTORS,
    EVICTION_RULES,
    QUESTION_SAMPLERS,
    REPLAY_WEIGHTINGS,
    Strategies,
)

REPLAY_REWARDS = ("stored", "recomputed")


@dataclass
class ExGRPOConfig(GRPOConfig):
    r"""
    Configuration class for the [`ExGRPOTrainer`].

    This class includes only the parameters that are specific to experience replay. For the others, please refer to
    the [`~trl.GRPOConfig`] documentation. The defaults are those of the paper, [ExGRPO: Learning to Reason from
    Experience](https://huggingface.co/papers/2510.02245).

    Using [`~transformers.HfArgumentParser`] we can turn this class into
    [argparse](https://docs.python.org/3/library/argparse#module-argparse) arguments that can be specified on the
    command line.

    Parameters:
        > Parameters that control what is replayed

        replay_fraction (`float`, *optional*, defaults to `0.5`):
            Share of the questions of a generation batch that are replayed, rho in the paper, in [0, 1). `0` turns
            replay off: training is then exactly GRPO.
        replay_start_pass_rate (`float` or `None`, *optional*, defaults to `0.35`):
            Replay and collection begin with the batch after the first whose share of correct fresh completions
            exceeded this value (the delayed start of the paper), in [0, 1). `None` begins at once.
        question_sampling (`str`, *optional*, defaults to `"gaussian"`):
            How questions are drawn from the buffer: `"gaussian"` (buckets of medium difficulty first), `"uniform"`
            (every bucket alike) or `"random"` (every question alike).
        question_sampling_kwargs (`dict` or `str`, *optional*):
            Parameters of the question sampler, a dict or its JSON; those that have a field of their own need none.
        bucket_mean (`float`, *optional*, defaults to `0.5`):
            Mean of the Gaussian over buckets, as a share of `num_generations`, in [0, 1].
        bucket_std (`float`, *optional*, defaults to `1.0`):
            Standard deviation of the Gaussian over buckets, in correct completions, above 0.
        completion_selection (`str`, *optional*, defaults to `"lowest_entropy"`):
            Which stored completion of a drawn question is replayed: `"lowest_entropy"`,
            `"lowest_negative_log_likelihood"`, `"highest_entropy"` (all three under the current policy), `"random"`
            or `"most_recent"`.
        completion_selection_kwargs (`dict` or `str`, *optional*):
            Parameters of the completion selector, a dict or its JSON.

        > Parameters that control what counts as a success

        success_threshold (`float`, *optional*, defaults to `1.0`):
            A completion is correct when its success reward is at least this value.
        success_reward (`str` or `None`, *optional*, defaults to `None`):
            Name of the reward function that decides correctness, or `"weighted_sum"`. `None` uses the only one or,
            of several, all that gave an opinion (None is none): each of them has to reach the threshold, so that the
            right form of a wrong answer is no success.
        difficulty (`str`, *optional*, defaults to `"success_rate"`):
            What the bucket of a question measures: `"success_rate"` (correct completions in its latest group) or
            `"reward_std"` (spread of its rewards, for continuous rewards; completions with positive advantage are
            stored).
        difficulty_kwargs (`dict` or `str`, *optional*):
            Parameters of the rule of difficulty, a dict or its JSON.
        question_id_column (`str` or `None`, *optional*, defaults to `None`):
            Dataset column that identifies a question. `None` uses a hash of the prompt and, where several rows share
            it, of their other columns, images included.

        > Parameters that control the loss of replayed completions

        replay_weighting (`str`, *optional*, defaults to `"shaped"`):
            Importance weight of a replayed token: `"shaped"` (the paper), `"balanced"` (the same shape, scaled to pull
            as hard as a fresh token at ratio 1), `"clipped"`, `"truncated"` or `"none"`.
        shaping_beta (`float`, *optional*, defaults to `0.1`):
            Constant beta of `f(w) = w / (w + beta)`, above 0.
        replay_weighting_kwargs (`dict` or `str`, *optional*):
            Parameters of the weighting, a dict or its JSON: `epsilon_low` and `epsilon_high` of `"clipped"`, which by
            default are those of the loss.

        > Parameters that control rollouts of several turns

        replay_rewards (`str` or `None`, *optional*, defaults to `None`):
            Where the rewards of a stored completion come from: `"stored"` (those that it had) or `"recomputed"` (the
            reward functions are asked again). `None` recomputes them where there is no environment: the state that an
            environment had at the end of a rollout is gone when it is replayed. What `get_reward` of an environment
            gave is always kept.
        rollout_fresh_only (`bool`, *optional*, defaults to `False`):
            Whether `rollout_func` is asked for the rows alone that no stored completion takes. By default it is asked
            for all rows, as functions written for whole groups need it, and stored completions are put in their place.

        > Parameters that control the buffer

        buffer_capacity (`int` or `None`, *optional*, defaults to `None`):
            Most completions kept; beyond it `eviction` decides. `None` keeps all.
        max_completions_per_question (`int` or `None`, *optional*, defaults to `None`):
            Most completions kept per question; beyond it `eviction` decides. `None` keeps all.
        eviction (`str`, *optional*, defaults to `"oldest"`):
            Which completion leaves where a limit is exceeded: `"oldest"` (of the oldest policy version or, within a
            question, the one that was stored first).
        eviction_kwargs (`dict` or `str`, *optional*):
            Parameters of the eviction rule, a dict or its JSON.
        max_staleness (`int` or `None`, *optional*, defaults to `None`):
            Age in optimizer steps beyond which a completion is evicted instead of replayed. `None` sets no limit.
        retire_solved (`bool`, *optional*, defaults to `True`):
            Whether a question leaves the buffer for good once all completions of a group were correct.
        drop_retired_questions (`bool`, *optional*, defaults to `True`):
            Whether retired questions also leave the training dataset from the next epoch on. The number of steps per
            epoch stays; the remaining questions come up more often. Has no effect on iterable datasets.
    """

    _VALID_DICT_FIELDS = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "question_sampling_kwargs",
        "completion_selection_kwargs",
        "difficulty_kwargs",
        "eviction_kwargs",
        "replay_weighting_kwargs",
    ]

    replay_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Share of the questions of a generation batch that are replayed, in [0, 1). 0 turns replay off."
        },
    )
    replay_start_pass_rate: float | None = field(
        default=0.35,
        metadata={
            "help": "Replay and collection begin with the batch after the first whose share of correct fresh "
            "completions exceeded this value, in [0, 1). None (null in YAML) begins at once."
        },
    )
    question_sampling: str = field(
        default="gaussian",
        metadata={"help": "How questions are drawn from the buffer.", "choices": list(QUESTION_SAMPLERS)},
    )
    bucket_mean: float = field(
        default=0.5, metadata={"help": "Mean of the Gaussian over buckets, as a share of num_generations."}
    )
    bucket_std: float = field(
        default=1.0, metadata={"help": "Standard deviation of the Gaussian over buckets, in correct completions."}
    )
    question_sampling_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Parameters of the question sampler, a dict or its JSON."},
    )
    completion_selection: str = field(
        default="lowest_entropy",
        metadata={
            "help": "Which stored completion of a drawn question is replayed.",
            "choices": list(COMPLETION_SELECTORS),
        },
    )
    completion_selection_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Parameters of the completion selector, a dict or its JSON."},
    )
    success_threshold: float = field(
        default=1.0,
        metadata={"help": "A completion is correct when its success reward is at least this value."},
    )
    success_reward: str | None = field(
        default=None,
        metadata={
            "help": "Name of the reward function that decides correctness, or 'weighted_sum'. None: each of them "
            "that gives an opinion."
        },
    )
    difficulty: str = field(
        default="success_rate",
        metadata={
            "help": "What the bucket of a question measures: the success rate or, for continuous rewards, the "
            "standard deviation of its rewards.",
            "choices": list(ADMISSION_RULES),
        },
    )
    difficulty_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Parameters of the rule of difficulty, a dict or its JSON."},
    )
    question_id_column: str | None = field(
        default=None,
        metadata={
            "help": "Dataset column that identifies a question. None: a hash of the prompt and, where rows share it, "
            "of their other columns."
        },
    )
    replay_weighting: str = field(
        default="shaped",
        metadata={"help": "Importance weight of a replayed token.", "choices": list(REPLAY_WEIGHTINGS)},
    )
    shaping_beta: float = field(default=0.1, metadata={"help": "Constant beta of f(w) = w / (w + beta), above 0."})
    replay_weighting_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Parameters of the weighting, a dict or its JSON."},
    )
    replay_rewards: str | None = field(
        default=None,
        metadata={
            "help": "Where the rewards of a stored completion come from. None: recomputed where there is no "
            "environment.",
            "choices": list(REPLAY_REWARDS),
        },
    )
    rollout_fresh_only: bool = field(
        default=False,
        metadata={"help": "Whether rollout_func is asked for the rows alone that no stored completion takes."},
    )
    buffer_capacity: int | None = field(
        default=None, metadata={"help": "Most completions kept; the oldest are evicted. None keeps all."}
    )
    max_completions_per_question: int | None = field(
        default=None,
        metadata={"help": "Most completions kept per question; the oldest are evicted. None keeps all."},
    )
    eviction: str = field(
        default="oldest",
        metadata={
            "help": "Which completion leaves where a limit of the buffer is exceeded.",
            "choices": list(EVICTION_RULES),
        },
    )
    eviction_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Parameters of the eviction rule, a dict or its JSON."},
    )
    max_staleness: int | None = field(
        default=None,
        metadata={"help": "Age in optimizer steps beyond which a completion is evicted instead of replayed."},
    )
    retire_solved: bool = field(
        default=True,
        metadata={"help": "Whether a question leaves the buffer once all completions of a group were correct."},
    )
    drop_retired_questions: bool = field(
        default=True,
        metadata={"help": "Whether retired questions leave the training dataset from the next epoch on."},
    )

    def __post_init__(self) -> None:
        _check_range("replay_fraction", self.replay_fraction, 0, 1, high_excluded=True)
        if self.replay_start_pass_rate is not None:
            _check_range("replay_start_pass_rate", self.replay_start_pass_rate, 0, 1, high_excluded=True)
        _check_range("bucket_mean", self.bucket_mean, 0, 1)
        _check_range("bucket_std", self.bucket_std, 0, math.inf, low_excluded=True, high_excluded=True)
        _check_range("shaping_beta", self.shaping_beta, 0, math.inf, low_excluded=True, high_excluded=True)
        _check_range(
            "success_threshold", self.success_threshold, -math.inf, math.inf, low_excluded=True, high_excluded=True
        )
        for name in ("buffer_capacity", "max_completions_per_question"):
            _check_count(name, getattr(self, name), minimum=1)
        _check_count("max_staleness", self.max_staleness, minimum=0)
        if isinstance(self.num_generations, int) and self.num_generations < 2:
            raise ValueError(
                f"num_generations={self.num_generations} leaves no group to compare a completion with. "
                "Set it to at least 2."
            )
        if self.replay_rewards not in (None, *REPLAY_REWARDS):
            raise ValueError(
                f"replay_rewards={self.replay_rewards!r} is unknown. Choose {' or '.join(REPLAY_REWARDS)}, or None."
            )
        super().__post_init__()
        Strategies.choose(self)  # names and parameters are checked where they are used

    @property
    def num_groups(self) -> int:
        """Questions of a generation batch, on all processes together."""
        return self.generation_batch_size // self.num_generations

    @property
    def num_groups_to_replay(self) -> int:
        """Most questions of a generation batch that are replayed, `floor(rho * G)`."""
        # The small addition keeps products such as 0.29 * 100 from falling below their integer.
        return int(self.replay_fraction * self.num_groups + 1e-9)


def _check_range(
    name: str, value: Any, low: float, high: float, *, low_excluded: bool = False, high_excluded: bool = False
) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # Written so that NaN fails.
    if (
        is_number
        and (value > low if low_excluded else value >= low)
        and (value < high if high_excluded else value <= high)
    ):
        return
    interval = f"{'(' if low_excluded else '['}{low}, {high}{')' if high_excluded else ']'}"
    raise ValueError(f"{name}={value!r} is out of range. It must be a number in {interval}.")


def _check_count(name: str, value: Any, *, minimum: int) -> None:
    if value is None or (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum):
        return
    raise ValueError(f"{name}={value!r} is out of range. It must be an integer of at least {minimum}, or None.")
