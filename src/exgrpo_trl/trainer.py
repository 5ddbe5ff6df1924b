"""[`ExGRPOTrainer`]: TRL's `GRPOTrainer` with experience replay. Calls TRL's methods, never repeats them."""

import inspect
import os
import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import is_in_notebook, logging
from trl import GRPOTrainer

from .batch import COLUMNS, IDENTITY
from .buffer import RemoteBuffer, ReplayBuffer
from .buffer.continuations import tokenizer_fingerprint
from .buffer.report import ExperienceReport
from .checkpoints import (
    Location,
    check_buffer,
    check_rollouts,
    check_settings,
    find_checkpoint,
    resolve_buffer,
    rollout_fingerprint,
)
from .compatibility import (
    GENERATING,
    LOSS,
    check_arguments,
    check_batch_size,
    check_vllm,
    check_wrapped,
    naming_overrides,
    overridden,
    signature_with_own,
    wrapped,
)
from .config import ExGRPOConfig
from .dataset import ActiveQuestionSampler, DroppedQuestions, check_dataset, undecodable_row
from .generation import GenerationHooks
from .model_card import describe_replay
from .own_experience import score_experience
from .processes import Processes
from .prompts import Prompts
from .questions import TrainingQuestions, decodes_images
from .records import ExperienceBufferError
from .replayer import Replayer, TrainedRows
from .rollouts import Rollouts, SingleTurnRollouts, VLLMRollouts
from .scoring import on_cpu
from .strategies import Strategies
from .strategies.weighting import show_replayed
from .success import SuccessRule


def _path_or(buffer: Any, otherwise: str) -> str:
    """What messages call a buffer: its path if it was given by one."""
    return str(buffer) if isinstance(buffer, str | os.PathLike) else otherwise


logger: Any = logging.get_logger(__name__)


class ExGRPOTrainer(GenerationHooks):
    """
    Trainer for Experiential Group Relative Policy Optimization (ExGRPO), from [ExGRPO: Learning to Reason from
    Experience](https://huggingface.co/papers/2510.02245).

    A drop-in replacement for [`~trl.GRPOTrainer`]: a share of the questions of every generation batch is replayed. The
    group of a replayed question holds one stored success, weighted by importance, and `num_generations - 1` fresh
    completions. Rollouts of tools, environments and rollout functions are replayed whole, without a call or a reset;
    completions about images are replayed, too.

    Example:

    ```python
    from datasets import load_dataset
    from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer
    from trl.rewards import accuracy_reward

    trainer = ExGRPOTrainer(
        model="Qwen/Qwen2.5-Math-1.5B",
        reward_funcs=accuracy_reward,
        args=ExGRPOConfig(output_dir="exgrpo", gradient_accumulation_steps=8),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```

    Args:
        model, reward_funcs, args, ...:
            As for [`~trl.GRPOTrainer`], whose further arguments are passed on: `peft_config`, `tools`,
            `environment_factory`, `rollout_func` and all others. `args` is an [`ExGRPOConfig`].
        experience_buffer ([`ExperienceBuffer`], `str` or `PathLike`, *optional*):
            Buffer to replay from and to collect into, for example one that is filled already, or the path of a saved
            one: its directory, a checkpoint, or the directory of a run. By default an empty one.
        question_sampler (`Callable` or `str`, *optional*):
            Draws the questions to replay, see [`QuestionSampler`]; the name of a built-in one will do, here and below.
            By default the one that `args.question_sampling` names.
        completion_selector (`Callable` or `str`, *optional*):
            Picks the stored completion of a question, see [`CompletionSelector`]. By default the one that
            `args.completion_selection` names.
        group_selector (`Callable` or `str`, *optional*):
            Picks the stored group of a question where whole groups are replayed, see [`GroupSelector`]. By default the
            one that `args.group_selection` names.
        admission (`Callable` or `str`, *optional*):
            Decides what is stored, in which bucket, and what retires, see [`AdmissionRule`]. By default the one that
            `args.difficulty` names.
        eviction (`Callable` or `str`, *optional*):
            Decides what leaves where a limit of the buffer is exceeded, see [`EvictionRule`]. By default the one that
            `args.eviction` names.
        weighting (`Callable` or `str`, *optional*):
            Weighs replayed tokens in the loss, see [`ReplayWeighting`]. By default the one that
            `args.replay_weighting` names.

    Attributes:
        replayer ([`Replayer`]):
            Plans and collects generation batches; `replayer.batch` is the present one.

    Raises:
        `NotImplementedError`:
            When something cannot work with replay (tensor, context and sequence parallelism, unknown loss types,
            environments or rollout functions with `fill_failed_groups`, and tools or environments on several processes
            with a vLLM server or vLLM's tensor parallelism) or with the installed TRL (Liger's loss below 1.14; tools
            or environments with a vLLM server below 1.14.1).
        `TypeError`:
            When the dataset has a column that cannot be stored, `args` is no [`ExGRPOConfig`], or something else than
            a buffer or a strategy is given as one.
        `ValueError`:
            When the configuration, the question ids or the buffer do not fit together.
    """

    _tag_names = ["trl", "exgrpo"]
    _name = "ExGRPO"
    _paper = {
        "title": "ExGRPO: Learning to Reason from Experience",
        "id": "2510.02245",
        "citation": textwrap.dedent("""\
            @article{zhan2025exgrpo,
                title        = {{ExGRPO: Learning to Reason from Experience}},
                author       = {Runzhe Zhan and others},
                year         = 2025,
                eprint       = {arXiv:2510.02245},
            }"""),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: ExGRPOConfig | None = None,
        *positional: Any,
        experience_buffer: ReplayBuffer | Location | None = None,
        question_sampler: Callable[..., Any] | str | None = None,
        completion_selector: Callable[..., Any] | str | None = None,
        group_selector: Callable[..., Any] | str | None = None,
        admission: Callable[..., Any] | str | None = None,
        eviction: Callable[..., Any] | str | None = None,
        weighting: Callable[..., Any] | str | None = None,
        **keywords: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = ExGRPOConfig(f"{name.split('/')[-1]}-ExGRPO")
        if not isinstance(args, ExGRPOConfig):
            raise TypeError(
                f"args is a {type(args).__name__}. Use an ExGRPOConfig, which takes its fields and those of replay."
            )
        bound = inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *positional, **keywords)
        self._is_replay_enabled = args.trains_stored
        if self._is_replay_enabled:
            check_arguments(bound.arguments, args)
        self._processes = Processes(args.distributed_state)
        with self._processes.together("reading the experience buffer"):
            buffer = resolve_buffer(experience_buffer, args)
        strategies = Strategies.choose(
            args,
            question_sampler=question_sampler,
            completion_selector=completion_selector,
            group_selector=group_selector,
            admission=admission,
            eviction=eviction,
            weighting=weighting,
        )

        super().__init__(model, reward_funcs, args, *positional, **keywords)

        questions = self._training_questions()
        self.replayer: Replayer = Replayer(
            buffer,
            args,
            strategies,
            self._processes,
            DroppedQuestions(questions, args.num_groups),
            questions,
            SuccessRule(
                self.reward_func_names,
                self.reward_weights.tolist(),
                args.success_threshold,
                args.success_reward if self._is_replay_enabled else None,
            ),
            prompts=Prompts(self),
            score=self._score,
        )
        if not self._is_replay_enabled:
            return
        if is_in_notebook():
            from .notebook import show_replay

            show_replay(self.callback_handler)
        # Nobody must read tool calls out of a stored rollout, so that tools go first.
        stand_in = [self._text_tokenizer.eos_token_id] if self.tools else None
        self._rollouts: Rollouts = SingleTurnRollouts(stand_in)
        if self.use_vllm:
            check_vllm(self.vllm_generation, is_main=self.accelerator.is_main_process)
            self._rollouts = VLLMRollouts(
                self.vllm_generation,
                self._processes,
                getattr(self, "vllm_tensor_parallel_size", 1),
                stand_in,
            )
        self._processes.decide(
            "checking the experience buffer",
            lambda: self._check_buffer(buffer, _path_or(experience_buffer, "given to the trainer")),
        )

    def _training_questions(self) -> TrainingQuestions:
        """Questions of the dataset as the data loader will see it."""
        if not self._is_replay_enabled:  # ids are not needed, and nothing about them may be an error
            return TrainingQuestions(None, None)
        dataset = self._questions_of = self.train_dataset
        if isinstance(dataset, Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        num_groups = self.args.num_groups if self._has_environments else 0
        questions = TrainingQuestions(dataset, self.args.question_id_column, num_groups)
        check_dataset(dataset, self.args)
        if questions.told and self._processes.is_main:
            logger.warning(questions.told)
        return questions

    def _follow_dataset(self) -> None:
        if self.train_dataset is not self._questions_of:  # assigned since, for another phase of a curriculum
            self.replayer.bind(self._training_questions())

    # What an IDE or a notebook shows: TRL's arguments, whichever they are in the installed release, and ours.
    __init__.__signature__ = signature_with_own(__init__)  # type: ignore[attr-defined]

    @property
    def experience_buffer(self) -> ReplayBuffer:
        """The experience buffer, on the main process; a [`RemoteBuffer`] on the others."""
        return self.replayer.buffer

    @experience_buffer.setter
    def experience_buffer(self, buffer: ReplayBuffer | Location) -> None:
        # The main process alone reads a path, so that it may be the only one to fail.
        is_path = isinstance(buffer, str | os.PathLike)
        with self._processes.together("reading the experience buffer") if is_path else nullcontext():
            mine = resolve_buffer(buffer, self.args)
            if self._is_replay_enabled and not isinstance(mine, RemoteBuffer):
                self._check_buffer(mine, _path_or(buffer, "assigned to the trainer"))
        self.replayer.buffer = mine

    def score_experience(
        self,
        dataset: Any,
        *,
        bucket: int | None = None,
        success_threshold: float | None = None,
        add_eos: bool = True,
    ) -> ExperienceReport:
        """
        Put completions from elsewhere into the experience buffer: of an earlier run, as in
        [RLEP](https://huggingface.co/papers/2507.07451), or of a stronger model, as in
        [LUFFY](https://huggingface.co/papers/2504.14945).

        Those without log-probabilities are scored once by the policy as it is now, at the temperature of the
        configuration, in batches of `per_device_train_batch_size`, evenly over the processes. They are marked
        ([`Experience`]`.is_scored`), and their importance ratio is the one to that policy: it is 1 until the first
        update. All processes call this, before the training; with FSDP or DeepSpeed in `on_train_begin` of a callback.

        A question that the buffer holds keeps its bucket. Of any other, columns `num_correct` and `group_size` tell
        the bucket, else the share of successes among its rows if there are failures, else `bucket`; from 1 to
        `num_generations - 1`.

        Args:
            dataset (`datasets.Dataset`):
                A completion in every row:

                - `prompt`: as in the training dataset, with further columns where these tell questions apart; with
                  `question_id_column`, that column is enough.
                - `completion`: text, as the model writes it after the prompt, or a list of one message of the
                  assistant. Or `completion_ids`: its token ids, taken as they are.
                - `reward`: what decides whether it is a success, see `success_reward`.
                - `behavior_per_token_logps` (optional): log-probabilities in nats of its tokens under the policy that
                  generated them, at the sampling temperature; a single number stands for that of every token.
                - `num_correct` (optional): successes of its question among `group_size` (by default
                  `num_generations`) attempts.
                - `group`: where `replay_unit="group"`, a number that the rows of a group share, failures included.
            bucket (`int`, *optional*):
                Bucket of questions of which nothing tells the pass rate. By default `num_generations // 2`.
            success_threshold (`float`, *optional*):
                Reward from which a completion is a success. By default that of the configuration.
            add_eos (`bool`, *optional*, defaults to `True`):
                Whether an end token follows a `completion` that has none. Pass `False` for truncated ones.

        Returns:
            [`ExperienceReport`]: number of rows stored, and those that were refused, each with the reason.

        Raises:
            `ExperienceBufferError`:
                When the dataset lacks a column. A row that cannot be stored is no error, but part of the report.
            `NotImplementedError`:
                When the trainer has environments, a rollout function or an image processor, or a model that is not
                prepared for FSDP or DeepSpeed yet.
            `TypeError`:
                When it is no dataset.
            `ValueError`:
                When replay is switched off, or an argument is out of range.
        """
        return score_experience(self, dataset, bucket=bucket, success_threshold=success_threshold, add_eos=add_eos)

    # Loss

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._is_replay_enabled:
            return super().training_step(model, inputs, *args, **kwargs)
        before = self.replayer.num_losses
        loss = super().training_step(model, inputs, *args, **kwargs)
        if self.replayer.num_losses == before:
            self.replayer.stop(
                f"{overridden(self, (*LOSS, *GENERATING))} computes a loss without GRPOTrainer._compute_loss, or of "
                f"rows without the columns {list(COLUMNS)}, so stored completions would train without their "
                "importance weight, and fresh ones could not be stored. Call the method of the parent with all "
                f"columns, or set {self.args.off} to train without replay."
            )
        return loss

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if not self._is_replay_enabled or not self.model.training or IDENTITY not in inputs:
            return super()._compute_loss(model, inputs)  # the last is noticed where the step ends
        check_wrapped(model, self.accelerator)
        with naming_overrides(self, (*GENERATING, *LOSS)):
            batches = self.replayer.trained_rows(inputs)
        # A copy, because the same dict comes again when num_iterations > 1.
        shown = {name: value for name, value in inputs.items() if name not in COLUMNS}
        is_seen = False

        def around(forward: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal is_seen
            outputs = forward(model, *args, **kwargs | {"compute_entropy": True})
            is_seen = True
            self._on_training_forward(batches, inputs, shown, outputs[0], outputs[1])
            return outputs

        with wrapped(self, "_get_per_token_logps_and_entropies", around):
            loss = super()._compute_loss(model, shown)
        if not is_seen:
            raise RuntimeError(
                "TRL computed a loss without the forward that replay relies on, so stored completions would train "
                "as if they were fresh. Please report this with your version of TRL."
            )
        self.replayer.num_losses += 1
        return loss

    def _on_training_forward(
        self,
        batches: list[TrainedRows],
        inputs: dict[str, Any],
        shown: dict[str, Any],
        per_token_logps: torch.Tensor,
        entropies: torch.Tensor,
    ) -> None:
        """Record the behaviour policy of fresh rows, and weight the replayed ones, before TRL computes its loss."""
        forward = on_cpu(per_token_logps), on_cpu(entropies)  # once: a transfer waits for the device
        for batch, at in batches:
            batch.record(at, forward)  # what was not recorded at generation
            batch.score_replayed(at, inputs, forward, self.state.global_step)
        log_ratios = show_replayed(
            shown,
            inputs,
            per_token_logps,
            self.replayer.strategies.weighting,
            loss_type=self.loss_type,
            # VESPO's weight is its own, per token; TRL ignores the level there.
            level="token" if self.loss_type == "vespo" else self.importance_sampling_level,
            sapo_temperatures=(self.args.sapo_temperature_pos, self.args.sapo_temperature_neg),
        )
        if log_ratios is not None:
            self.replayer.add_log_ratios(log_ratios.cpu().numpy())

    # Dataset

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_replay_enabled or not decodes_images(self.train_dataset):
            return super().get_batch_samples(*args, **kwargs)
        with self._processes.together("loading a batch"):
            try:
                return super().get_batch_samples(*args, **kwargs)
            except Exception as error:
                found = undecodable_row(self.train_dataset)
                if found is None:
                    raise
                row, reason = found
                raise ValueError(
                    f"An image in row {row} of the training dataset cannot be decoded ({type(reason).__name__}: "
                    f"{reason}). Replace it, or leave the row out: "
                    f"dataset.select(row for row in range(len(dataset)) if row != {row})."
                ) from error

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not self._is_replay_enabled or sampler is None or not self.args.drop_retired_questions:
            return sampler
        return ActiveQuestionSampler(
            sampler,
            self._begin_epoch,
            len(self.replayer.questions.dataset),
            self.args.generation_batch_size,
            self.args.seed,
        )

    def _begin_epoch(self) -> tuple[int, set[int], set[int]]:
        """Number of the epoch that begins or is resumed, the rows that it leaves out, and those that must come up."""
        epoch = int((self.state.epoch or 0.0) + 1e-6)
        return epoch, *self.replayer.begin_epoch(epoch)

    # Checkpoints and logs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not self._is_replay_enabled:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint:
            resume_from_checkpoint = self._processes.decide(
                "looking for a checkpoint",
                lambda: find_checkpoint(
                    resume_from_checkpoint, self.args.output_dir, trains_adapter=is_peft_model(self.model)
                ),
            )
        self._follow_dataset()
        self.replayer.begin_training()
        try:
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            self.replayer.finish()
        finally:  # an error is what one wants to know the replays before it of
            self.replayer.log.flush()
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_replay_enabled and self.model.training and "loss" in logs:
            logs.update(self.replayer.log_metrics())
        super().log(logs, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            describe_replay(os.path.join(self.args.output_dir, "README.md"), self.replayer, self.state.global_step)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._is_replay_enabled:
            # First, so that an older checkpoint is not rotated away before this one can be resumed.
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.replayer.save(os.path.join(self._get_output_dir(trial=trial), checkpoint))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._is_replay_enabled:
            # The main process goes on to write the state of the trainer, which says that a checkpoint is complete.
            self._processes.wait()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        missing: list[str] = []

        def note(warn: Callable[[Any], None], load_result: Any) -> None:
            missing.extend(load_result.missing_keys)
            warn(load_result)

        with wrapped(self, "_issue_warnings_after_load", note):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if not self._is_replay_enabled or not missing or is_peft_model(self.model):
            return
        # transformers saves some models (LLaVA, Qwen2-VL) under other names than it resumes them from, and goes on
        # with the weights of the start. Loaded as a model, the checkpoint gets the right names.
        saved = type(self.model).from_pretrained(resume_from_checkpoint).state_dict()
        self.model.load_state_dict(saved)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_replay_enabled and checkpoint is not None:
            check_batch_size(self._train_batch_size, self.args)
            path = os.path.join(checkpoint, "experience_buffer")
            self.replayer.load(lambda: self._load_buffer(path), path)
            self._buffered_inputs = None  # rows of a batch that a run before has left
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_buffer(self, path: str) -> ReplayBuffer:
        if not os.path.exists(path):
            raise ExperienceBufferError(
                f"The checkpoint has no {path}: it was written without replay, or the folder was not copied. Copy it, "
                f"or begin with an empty experience buffer there: ExperienceBuffer().save({path!r})"
            )
        mine = self.experience_buffer
        loaded = type(mine).load(path)
        check_settings(loaded, self.args, path, ("group_size", "retire_solved"))
        loaded.set_limits(capacity=mine.capacity, max_completions_per_question=mine.max_completions_per_question)
        self._check_buffer(loaded, path)
        return loaded

    def _check_buffer(self, buffer: Any, source: str) -> None:
        """Whether a buffer can be replayed here; it takes note of what its tokens and ids depend on."""
        provenance = tokenizer_fingerprint(self._text_tokenizer) | {
            "temperature": self.temperature,
            "question_id_column": self.args.question_id_column,
        }
        provenance |= rollout_fingerprint(self)
        check_buffer(
            buffer,
            provenance=provenance,
            max_completion_length=self.max_completion_length,
            vocab_size=self.model.config.get_text_config().vocab_size,
            source=source,
        )
        check_rollouts(
            buffer,
            knows_turns=bool(self.tools) or self._has_rollout_func,
            reward_names=self.reward_func_names if self._keeps_rewards else [],
            source=source,
        )
        buffer.provenance |= provenance
