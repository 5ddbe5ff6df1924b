"""[`ExGRPOTrainer`]: TRL's `GRPOTrainer` with experience replay. Calls TRL's methods, never repeats them."""

import inspect
import os
import textwrap
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather, is_peft_model
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer

from .batch import Batch
from .buffer import RemoteBuffer, ReplayBuffer
from .checkpoints import (
    Location,
    check_buffer,
    check_settings,
    find_checkpoint,
    resolve_buffer,
    tokenizer_fingerprint,
)
from .compatibility import (
    check_arguments,
    check_batch_size,
    check_processing_class,
    check_vllm,
    check_wrapped,
)
from .config import ExGRPOConfig
from .dataset import ActiveQuestionSampler, DroppedQuestions, check_dataset
from .processes import Processes
from .replayer import Replayer
from .rollouts import Rollouts, SingleTurnRollouts, VLLMRollouts
from .rollouts.vllm import correct_fresh_only
from .scoring import Prompted, Scores, evaluating, reshard, score_completions
from .strategies import Strategies
from .strategies.admission import success_rewards
from .strategies.weighting import importance_log_ratio, mixed_advantages


def _signature(init: Callable[..., None]) -> inspect.Signature:
    """Signature of a trainer's `__init__` with TRL's arguments in the place of `*positional` and `**keywords`."""
    own = inspect.signature(init).parameters
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    of_trl = inspect.signature(GRPOTrainer.__init__).parameters
    before = [own.get(name, parameter) for name, parameter in of_trl.items()]
    after = [parameter for name, parameter in own.items() if name not in of_trl and parameter.kind not in catch_all]
    return inspect.Signature(before + after)


def _path_or(buffer: Any, otherwise: str) -> str:
    """What messages call a buffer: its path if it was given by one."""
    return str(buffer) if isinstance(buffer, str | os.PathLike) else otherwise


class ExGRPOTrainer(GRPOTrainer):
    """
    Trainer for Experiential Group Relative Policy Optimization (ExGRPO), from [ExGRPO: Learning to Reason from
    Experience](https://huggingface.co/papers/2510.02245).

    A drop-in replacement for [`~trl.GRPOTrainer`]: a share of the questions of every generation batch is replayed. The
    group of a replayed question holds one stored success, weighted by importance, and `num_generations - 1` fresh
    completions.

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
            As for [`~trl.GRPOTrainer`], whose further arguments are passed on, `peft_config` included. `args` is an
            [`ExGRPOConfig`].
        experience_buffer ([`ExperienceBuffer`], `str` or `PathLike`, *optional*):
            Buffer to replay from and to collect into, for example one that is filled already, or the path of a saved
            one: its directory, a checkpoint, or the directory of a run. By default an empty one.
        question_sampler (`Callable` or `str`, *optional*):
            Draws the questions to replay, see [`QuestionSampler`]; the name of a built-in one will do, here and below.
            By default the one that `args.question_sampling` names.
        completion_selector (`Callable` or `str`, *optional*):
            Picks the stored completion of a question, see [`CompletionSelector`]. By default the one that
            `args.completion_selection` names.
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
            When an argument cannot work with replay (tools, environments, `rollout_func`, vision-language models,
            Liger's loss in TRL below 1.14).
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
        self._is_replay_enabled = args.replay_fraction > 0
        if self._is_replay_enabled:
            check_arguments(bound.arguments, args)
        self._processes = Processes(args.distributed_state)
        with self._processes.together("reading the experience buffer"):
            buffer = resolve_buffer(experience_buffer, args)
        strategies = Strategies.choose(
            args,
            question_sampler=question_sampler,
            completion_selector=completion_selector,
            admission=admission,
            eviction=eviction,
            weighting=weighting,
        )

        super().__init__(model, reward_funcs, args, *positional, **keywords)

        self.replayer = Replayer(
            buffer,
            args,
            strategies,
            self._processes,
            DroppedQuestions(self.train_dataset, args.question_id_column, args.num_groups),
            tokenize=lambda prompts: self._tokenize_prompts(prompts)[0],
            score=self._score,
        )
        if not self._is_replay_enabled:
            return
        check_processing_class(self.processing_class, args.success_reward, self.reward_func_names)
        self._rollouts: Rollouts = SingleTurnRollouts()
        if self.use_vllm:
            check_vllm(self.vllm_generation, is_main=self.accelerator.is_main_process)
            self._rollouts = VLLMRollouts(
                self.vllm_generation, self._processes, getattr(self, "vllm_tensor_parallel_size", 1)
            )
        check_dataset(self.train_dataset, args)
        self._processes.decide(
            "checking the experience buffer",
            lambda: self._check_buffer(buffer, _path_or(experience_buffer, "given to the trainer")),
        )

    # What an IDE or a notebook shows: TRL's arguments, whichever they are in the installed release, and ours.
    __init__.__signature__ = _signature(__init__)  # type: ignore[attr-defined]

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

    # Generation

    @property
    def _generated_batch(self) -> Batch | None:
        """The batch that is being generated and scored; none in plain GRPO or in an evaluation."""
        batch = self.replayer.batch
        return batch if batch is not None and batch.is_generating else None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._is_replay_enabled or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        batch = self.replayer.next_batch(len(inputs), self.state.global_step)
        with self._processes.together("preparing a batch"):
            inputs = batch.place(inputs, self.args.question_id_column)
        with batch.generating():
            output = super()._generate_and_score_completions(inputs)
            if batch.replays and "importance_sampling_ratio" in output:
                by_sequence = self.vllm_importance_sampling_mode.startswith("sequence")
                metrics = correct_fresh_only(output, batch, self.accelerator.gather, by_sequence=by_sequence)
                for name, value in metrics.items():
                    self._metrics["train"][name][-1] = value
            self.replayer.observe(output["completion_mask"])
            output |= batch.columns(output["completion_ids"])
            # Where TRL computed the log-probabilities at generation, the policy may move before a row is trained.
            old_logps = output.get("old_per_token_logps")
            if old_logps is not None:
                mask = output["completion_mask"].bool()
                batch.record(output["rollout_rows"], mask, old_logps, batch.entropies_of(old_logps, mask))
            return output

    def _generate_single_turn(
        self, prompt_ids: list[Any], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        batch = self._generated_batch
        if batch is None:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)

        def generate(prompt_ids: Any, multimodal_fields: Any) -> Any:
            return super(ExGRPOTrainer, self)._generate_single_turn(
                prompt_ids, images, multimodal_fields, *args, **kwargs
            )

        return self._rollouts(generate, prompt_ids, multimodal_fields, batch)

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        if not self._is_replay_enabled:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        batch = self._generated_batch
        stored = {} if batch is None else batch.stored
        self._log_completion_extra("replayed", [position in stored for position in range(len(prompts))])
        with self._processes.together("computing rewards"):
            try:
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            except Exception:
                if self._processes.count > 1:  # the others wait for this one in TRL's gather
                    gather(torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device))
                raise
        if batch is not None:
            decides = self.args.success_reward
            batch.token_ids = completion_ids_list
            batch.take_rewards(
                success_rewards(
                    rewards.double().cpu().numpy(),
                    self.reward_weights.double().cpu().numpy(),
                    None if decides is None else self.reward_func_names.index(decides),
                ),
                self.args.success_threshold,
            )
        return rewards

    def _score(self, prompted: Sequence[Prompted]) -> list[Scores]:
        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> Any:
            return self._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, logits_to_keep, compute_entropy=True
            )[:2]

        with evaluating(self.model):
            scores = score_completions(
                prompted, forward, pad_token_id=self.processing_class.pad_token_id, device=self.accelerator.device
            )
        reshard(self.model)
        return scores

    # Loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "rollout_rows" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        batch = self.replayer.batch
        assert batch is not None, "rows of a batch are trained before the next one is planned"
        check_wrapped(model, self.accelerator)
        # A copy, because the same dict comes again when num_iterations > 1.
        batch.micro_batch = dict(inputs)
        try:
            loss = super().compute_loss(model, batch.micro_batch, *args, **kwargs)
            if "rollout_rows" in batch.micro_batch:
                raise RuntimeError(
                    "TRL computed a loss without the forward that replay relies on, so stored completions would train "
                    "as if they were fresh. Please report this with your version of TRL."
                )
            return loss
        finally:
            batch.micro_batch = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        batch = self.replayer.batch if self._is_replay_enabled else None
        if batch is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        is_of_generation = batch.is_generating and model is self.model
        if is_of_generation:
            kwargs["compute_entropy"] = True
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if is_of_generation:
            batch.forwards.append((outputs[0], outputs[1]))
        if batch.micro_batch is not None:
            self._on_training_forward(batch, batch.micro_batch, outputs[0], outputs[1])
        return outputs

    def _on_training_forward(
        self, batch: Batch, inputs: dict[str, Any], per_token_logps: torch.Tensor, entropies: torch.Tensor
    ) -> None:
        """Record the behaviour policy of fresh rows, and weight the replayed ones, before TRL computes its loss."""
        rows, mask = inputs.pop("rollout_rows"), inputs["completion_mask"].bool()
        batch.record(rows, mask, per_token_logps, entropies)  # what was not recorded at generation
        is_replayed = inputs.pop("is_replayed")
        stored_logps = inputs.pop("behavior_per_token_logps")
        if not is_replayed.any():
            return
        # VESPO's weight is its own, per token; TRL ignores the level there.
        level = "token" if self.loss_type == "vespo" else self.importance_sampling_level
        log_ratio = importance_log_ratio(per_token_logps, stored_logps, mask, level)
        inputs["advantages"] = mixed_advantages(
            inputs["advantages"],
            log_ratio,
            is_replayed,
            self.replayer.strategies.weighting,
            loss_type=self.loss_type,
            sapo_temperatures=(self.args.sapo_temperature_pos, self.args.sapo_temperature_neg),
        )
        # With its graph: the ratio of a replayed row is 1 and has no gradient of its own.
        old_logps = inputs.get("old_per_token_logps", per_token_logps.detach())
        inputs["old_per_token_logps"] = torch.where(is_replayed.unsqueeze(1), per_token_logps, old_logps)
        if "sampling_per_token_logps" in inputs:  # nor is it off-policy to TRL, whatever sampled it
            inputs["sampling_per_token_logps"] = torch.where(
                is_replayed.unsqueeze(1), per_token_logps.detach(), inputs["sampling_per_token_logps"]
            )
        shown = mask[is_replayed] if level == "token" else slice(None)
        self.replayer.add_log_ratios(log_ratio.detach()[is_replayed][shown].flatten().cpu().numpy())

    # Dataset

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not self._is_replay_enabled or not self.args.drop_retired_questions:
            return sampler
        return ActiveQuestionSampler(sampler, self._begin_epoch)

    def _begin_epoch(self) -> tuple[int, set[int]]:
        """Number of the epoch that begins or is resumed, and the rows that it leaves out."""
        epoch = int((self.state.epoch or 0.0) + 1e-6)
        return epoch, self.replayer.begin_epoch(epoch)

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
        self.replayer.begin_training()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self.replayer.finish()
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_replay_enabled and self.model.training and "loss" in logs:
            logs.update(self.replayer.log_metrics())
        super().log(logs, *args, **kwargs)

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_replay_enabled and checkpoint is not None:
            check_batch_size(self._train_batch_size, self.args)
            self.replayer.load(lambda: self._load_buffer(os.path.join(checkpoint, "experience_buffer")))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_buffer(self, path: str) -> ReplayBuffer:
        mine = self.experience_buffer
        loaded = type(mine).load(path)
        check_settings(loaded, self.args, path, ("group_size", "retire_solved"))
        loaded.set_limits(capacity=mine.capacity, max_completions_per_question=mine.max_completions_per_question)
        self._check_buffer(loaded, path)
        return loaded

    def _check_buffer(self, buffer: Any, source: str) -> None:
        """Whether a buffer can be replayed here; it takes note of what its tokens and ids depend on."""
        provenance = tokenizer_fingerprint(self.processing_class) | {
            "temperature": self.temperature,
            "question_id_column": self.args.question_id_column,
        }
        check_buffer(
            buffer,
            provenance=provenance,
            max_completion_length=self.max_completion_length,
            vocab_size=self.model.config.get_text_config().vocab_size,
            source=source,
        )
        buffer.provenance |= provenance
