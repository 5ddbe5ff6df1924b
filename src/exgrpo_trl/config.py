"""[`ExGRPOConfig`]: TRL's `GRPOConfig` plus the fields of experience replay."""

import math
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from trl import GRPOConfig

from .buffer.settings import COMPLETION, GROUP
from .strategies import (
    ADMISSION_RULES,
    COMPLETION_SELECTORS,
    EVICTION_RULES,
    GROUP_SELECTORS,
    QUESTION_SAMPLERS,
    REPLAY_WEIGHTINGS,
    Strategies,
)

REPLAY_REWARDS = ("stored", "recomputed")
CANDIDATE_SCORES = ("current", "last_known")
REPLAY_UNITS = (COMPLETION, GROUP)
LOG_LINES = ("short", "all")


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
            Share of the questions of generation batches that are replayed, rho in the paper, in [0, 1). What is left
            of a question is carried over: with one question in a batch and `0.5`, every second batch is replayed. `0`
            turns replay off: training is then exactly GRPO, unless `fill_failed_groups`.
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
        candidate_scores (`str`, *optional*, defaults to `"current"`):
            Which entropy and likelihood a completion selector sees: `"current"` (a forward of the current policy over
            the candidates, the paper) or `"last_known"` (those of the last forward that trained the completion, else
            those at its generation: no forward of its own).
        stored_per_group (`int`, *optional*, defaults to `1`):
            Most stored completions in the group of a replayed question, at least 1: fewer where fewer are stored, and
            `num_generations - 1` at most. None of them is generated. A question retires only by a group in which at
            least `num_generations - 1` completions are fresh.
        replay_unit (`str`, *optional*, defaults to `"completion"`):
            What is stored and replayed: `"completion"` (single successes, the paper) or `"group"` (whole groups of
            questions that were solved sometimes, failures included; nothing is generated for a replayed question).
        group_selection (`str`, *optional*, defaults to `"most_recent"`):
            Which stored group of a drawn question is replayed, with `replay_unit="group"`: `"most_recent"`,
            `"largest_spread"` (of rewards) or `"random"`.
        group_selection_kwargs (`dict` or `str`, *optional*):
            Parameters of the group selector, a dict or its JSON.
        replay_whole_batches (`bool`, *optional*, defaults to `False`):
            Whether a generation batch may consist of replayed groups alone, with `replay_unit="group"`. By default at
            least one question of every process is fresh.
        fill_failed_groups (`bool`, *optional*, defaults to `False`):
            Whether a stored success takes the place of one failure, drawn at random, where every fresh completion of a
            question failed (AR3PO, 2509.25808). It saves nothing, and gives a signal where there was none. Works with
            `replay_fraction=0`, too; refused with `environment_factory` and `rollout_func`.

        > Parameters that bound replay

        max_replays (`int` or `None`, *optional*, defaults to `None`):
            Replays after which a stored completion, or group, is evicted, at least 1. `None` sets no limit.
        replay_cooldown (`int`, *optional*, defaults to `0`):
            Optimizer steps that a replayed question sits out before it may be drawn again.
        max_drift (`float` or `None`, *optional*, defaults to `None`):
            Mean absolute log importance ratio per token, in nats, above which a stored completion is evicted instead
            of replayed, above 0. Measured where candidates are scored, else by the first forward that trains the
            completion. `None` sets no limit.
        min_effective_sample_size (`float` or `None`, *optional*, defaults to `None`):
            Effective sample size, as a share of the replayed tokens, below which the next batches replay half as many
            questions, down to one; while it is reached, twice as many, up to `replay_fraction`. In (0, 1]. `None`
            leaves their number alone.

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

        > Parameters that control what is written down

        replay_log (`bool`, *optional*, defaults to `True`):
            Whether the main process writes down which stored completions were replayed, and why, in
            `output_dir/replay_log`: a few dozen bytes for each of them, at most about 40 MB in all. `exgrpo-trl why`
            reads it, also while the training goes on.
        log_replay (`str`, *optional*, defaults to `"short"`):
            Which metrics of replay a log line has: `"short"` (the ten that tell whether replay works) or `"all"`. What
            a strategy or a buffer of your own reports is logged with either. Training does not depend on it.
    """

    _VALID_DICT_FIELDS = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "question_sampling_kwargs",
        "completion_selection_kwargs",
        "group_selection_kwargs",
        "difficulty_kwargs",
        "eviction_kwargs",
        "replay_weighting_kwargs",
    ]

    replay_fraction: float = field(
        default=0.5,
        metadata={
            "help": "Share of the questions of generation batches that are replayed, in [0, 1). 0 turns replay off, "
            "unless fill_failed_groups."
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
    candidate_scores: str = field(
        default="current",
        metadata={
            "help": "Which entropy and likelihood a completion selector sees: those of a forward of the current "
            "policy, or those of the last training forward.",
            "choices": list(CANDIDATE_SCORES),
        },
    )
    stored_per_group: int = field(
        default=1,
        metadata={"help": "Most stored completions in the group of a replayed question; num_generations - 1 at most."},
    )
    replay_unit: str = field(
        default="completion",
        metadata={
            "help": "What is stored and replayed: single successes, or whole groups, failures included.",
            "choices": list(REPLAY_UNITS),
        },
    )
    group_selection: str = field(
        default="most_recent",
        metadata={
            "help": "Which stored group of a drawn question is replayed.",
            "choices": list(GROUP_SELECTORS),
        },
    )
    group_selection_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Parameters of the group selector, a dict or its JSON."},
    )
    replay_whole_batches: bool = field(
        default=False,
        metadata={"help": "Whether a generation batch may consist of replayed groups alone."},
    )
    fill_failed_groups: bool = field(
        default=False,
        metadata={
            "help": "Whether a stored success takes the place of one failure where every fresh completion failed."
        },
    )
    max_replays: int | None = field(
        default=None,
        metadata={"help": "Replays after which a stored completion is evicted. None sets no limit."},
    )
    replay_cooldown: int = field(
        default=0,
        metadata={"help": "Optimizer steps that a replayed question sits out before it may be drawn again."},
    )
    max_drift: float | None = field(
        default=None,
        metadata={
            "help": "Mean absolute log importance ratio per token, in nats, above which a stored completion is "
            "evicted instead of replayed. None sets no limit."
        },
    )
    min_effective_sample_size: float | None = field(
        default=None,
        metadata={
            "help": "Share of the replayed tokens, as effective sample size, below which the next batches replay "
            "half as many questions. None leaves their number alone."
        },
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
    replay_log: bool = field(
        default=True,
        metadata={
            "help": "Whether it is written down in output_dir/replay_log which stored completions were replayed, and "
            "why, for the command exgrpo-trl why."
        },
    )
    log_replay: str = field(
        default="short",
        metadata={
            "help": "Which metrics of replay a log line has: the ten that tell whether replay works, or all.",
            "choices": list(LOG_LINES),
        },
    )

    def __post_init__(self) -> None:
        if self.replay_fraction == 1 and not isinstance(self.replay_fraction, bool):
            raise ValueError(
                f"replay_fraction={self.replay_fraction!r} is out of range: it leaves no fresh question in a batch, "
                "so that nothing new is ever learned or stored. It must be a number in [0, 1)."
            )
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
        self._check_reuse()
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
        if self.replays_groups:
            self._check_groups()

    def _check_reuse(self) -> None:
        for name, choices in (
            ("candidate_scores", CANDIDATE_SCORES),
            ("replay_unit", REPLAY_UNITS),
            ("log_replay", LOG_LINES),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown. Choose {' or '.join(choices)}.")
        for name, minimum in (("stored_per_group", 1), ("replay_cooldown", 0)):
            if getattr(self, name) is None:
                raise ValueError(f"{name}=None is out of range. It must be an integer of at least {minimum}.")
            _check_count(name, getattr(self, name), minimum=minimum)
        _check_count("max_replays", self.max_replays, minimum=1)
        if self.max_drift is not None:
            _check_range("max_drift", self.max_drift, 0, math.inf, low_excluded=True, high_excluded=True)
        if self.min_effective_sample_size is not None:
            _check_range("min_effective_sample_size", self.min_effective_sample_size, 0, 1, low_excluded=True)

    def _check_groups(self) -> None:
        if self.stored_per_group != 1:
            raise ValueError(
                f"replay_unit='group' brings back whole groups, so stored_per_group={self.stored_per_group} has no "
                "meaning. Leave it out, or set replay_unit='completion'."
            )
        if self.fill_failed_groups:
            raise ValueError(
                "replay_unit='group' stores failures, too, and does not tell them from successes, of which "
                "fill_failed_groups=True needs one. Set replay_unit='completion', or fill_failed_groups=False."
            )
        if self.replay_fraction and not self.num_groups_to_replay:
            per_process = self.num_groups / self.world_size
            raise ValueError(
                f"replay_unit='group' with {per_process:g} question(s) for each process leaves no fresh question "
                "beside a replayed one. Use larger batches (at least two questions for each process), or set "
                "replay_whole_batches=True to let whole batches be replayed."
            )

    @property
    def num_groups(self) -> int:
        """Questions of a generation batch, on all processes together."""
        return self.generation_batch_size // self.num_generations

    @property
    def replays_groups(self) -> bool:
        """Whether whole groups are stored and replayed."""
        return self.replay_unit == GROUP

    @property
    def num_groups_to_replay(self) -> int:
        """Most questions of a generation batch that are replayed: `rho * G`, rounded up."""
        # The small subtraction keeps products such as 0.07 * 100 from rising above their integer.
        most = math.ceil(self.replay_fraction * self.num_groups - 1e-9)
        if not self.replays_groups or self.replay_whole_batches:
            return most
        # Of a question that several processes share, there is one in the whole batch.
        num_alike = self.world_size if self.num_groups % self.world_size == 0 else 1
        return min(most, self.num_groups - num_alike)

    @property
    def off(self) -> str:
        """What to set for plain GRPO, in the words of messages."""
        return "replay_fraction=0" + (" and fill_failed_groups=False" if self.fill_failed_groups else "")

    @property
    def trains_stored(self) -> bool:
        """Whether stored completions are trained at all; otherwise this is plain GRPO."""
        return self.replay_fraction > 0 or self.fill_failed_groups


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
