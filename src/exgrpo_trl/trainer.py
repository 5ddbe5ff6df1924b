"""[`ExGRPOTrainer`]: TRL's `GRPOTrainer` with experience replay. Calls TRL's methods, never repeats them."""

import copy
import inspect
import os
import textwrap
from typing import Any

import torch
from accelerate.utils import gather
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging
from trl import GRPOTrainer

from .checkpoints import newest_complete_checkpoint
from .compatibility import (
    check_arguments,
    check_batch_size,
    check_processing_class,
    check_vllm,
    check_wrapped,
    num_groups_to_replay,
)
from .config import ExGRPOConfig
from .coordination import Coordinator
from .experience import Candidate, Experience, Question, encode_example
from .generation import fresh_rows_only, generate_fresh, is_unscored, put_stored, sampling_metrics
from .losses import importance_log_ratio, mixed_advantages
from .messages import Prompted
from .processes import Processes
from .protocols import ReplayBuffer
from .provenance import check_buffer, check_settings, resolve_buffer, tokenizer_fingerprint
from .questions import ActiveQuestionSampler, DroppedQuestions, dataset_question_ids, row_question_id
from .replay import Replayer
from .rollouts import PendingBatch, Plan, success_rewards
from .sampling import CompletionSelector, QuestionSampler, get_completion_selector, make_question_sampler
from .scoring import reshard, score_completions

logger = logging.get_logger(__name__)


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
        experience_buffer ([`ExperienceBuffer`], *optional*):
            Buffer to replay from and to collect into, for example one that is filled already. By default an empty one.
        question_sampler (`Callable`, *optional*):
            Draws the questions to replay, see [`~exgrpo_trl.sampling.QuestionSampler`]. By default the one that
            `args.question_sampling` names.
        completion_selector (`Callable`, *optional*):
            Picks the stored completion of a question, see [`~exgrpo_trl.sampling.CompletionSelector`]. By default the
            one that `args.completion_selection` names.

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
        experience_buffer: ReplayBuffer | None = None,
        question_sampler: QuestionSampler | None = None,
        completion_selector: CompletionSelector | None = None,
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
        self.experience_buffer: ReplayBuffer = resolve_buffer(experience_buffer, args)

        super().__init__(model, reward_funcs, args, *positional, **keywords)

        if not self._is_replay_enabled:
            return
        check_processing_class(self.processing_class, args.success_reward, self.reward_func_names)
        if self.use_vllm:
            check_vllm(self.vllm_generation, is_main=self.accelerator.is_main_process)
        self._replayer = Replayer(
            self.experience_buffer,
            args,
            question_sampler
            or make_question_sampler(args.question_sampling, bucket_mean=args.bucket_mean, bucket_std=args.bucket_std),
            completion_selector or get_completion_selector(args.completion_selection),
        )
        self._processes = Processes(self.accelerator)
        num_groups = args.generation_batch_size // args.num_generations
        self._coordinator = Coordinator(
            self._replayer,
            DroppedQuestions(self.train_dataset, args.question_id_column, num_groups),
            self._processes,
            args,
            most=num_groups_to_replay(args),
            tokenize=lambda prompts: self._tokenize_prompts(prompts)[0],
            score=self._score,
        )
        self._plan = Plan()  # what the batch that is being generated replays
        self._stored: dict[int, Experience] = {}  # its stored completions by row of this process
        self._unscored: set[int] = set()  # its rows that vLLM gave no log-probabilities for
        self._scored: tuple[list[list[int]], torch.Tensor] | None = None  # completion ids and rewards of that batch
        self._forwards: list[Any] | None = None  # while that batch is being scored: what each forward returned
        self._loss_inputs: dict[str, Any] | None = None  # of the micro-batch whose loss is being computed
        self._check_dataset()
        with self._processes.together("checking the experience buffer"):
            if self._processes.is_main:
                self._adopt_buffer("given to the trainer")

    # Generation

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._is_replay_enabled or not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._coordinator.collect()
        version = self._replayer.policy_version(self.state.global_step)
        plan = self._coordinator.plan(len(inputs), version)
        replayed = plan.share
        first_row = self._processes.rank * len(inputs)
        groups = [(first_row + row) // self.num_generations for row in range(len(inputs))]
        with self._processes.together("preparing a batch"):
            # Copied, because reward functions may write into the rows that they are given.
            questions = {
                group: self._question(inputs[row])
                for row, group in enumerate(groups)
                if group not in replayed.questions and first_row + row == group * self.num_generations
            }
            inputs = [
                _example_row(replayed.questions[group], row) if group in replayed.questions else row
                for group, row in zip(groups, inputs, strict=True)
            ]
        self._stored = {row - first_row: experience for row, experience in replayed.experiences.items()}
        self._plan, self._unscored, self._forwards = plan, set(), []
        try:
            output = super()._generate_and_score_completions(inputs)
            if plan.rows and "importance_sampling_ratio" in output:
                self._leave_to_replay(output)
            self._observe(output, questions, first_row, version)
            return output
        finally:
            self._stored, self._scored, self._forwards = {}, None, None

    def _generate_single_turn(
        self, prompt_ids: list[Any], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if not self._is_replay_enabled or self._forwards is None:  # plain GRPO, or an evaluation
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)

        def generate(prompt_ids: list[Any], multimodal_fields: dict[str, Any]) -> Any:
            return super(ExGRPOTrainer, self)._generate_single_turn(
                prompt_ids, images, multimodal_fields, *args, **kwargs
            )

        if self.use_vllm:
            # A server generates for all processes, an engine for those that share it.
            rank = self._processes.rank
            first = 0 if self.vllm_mode == "server" else rank - rank % self.vllm_tensor_parallel_size
            with (
                self._processes.together("generating completions"),
                fresh_rows_only(self.vllm_generation, self._plan.rows, first * len(prompt_ids)),
            ):
                completion_ids, logps, *rest = generate(prompt_ids, multimodal_fields)
        else:
            completion_ids, logps, *rest = generate_fresh(generate, prompt_ids, multimodal_fields, self._stored)
        if logps is not None:
            self._unscored = {row for row, of_row in enumerate(logps) if is_unscored(of_row)}
        return *put_stored(completion_ids, logps, self._stored), *rest

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        if not self._is_replay_enabled:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._log_completion_extra("replayed", [row in self._stored for row in range(len(prompts))])
        with self._processes.together("computing rewards"):
            try:
                rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            except Exception:
                if self._processes.count > 1:  # the others wait for this one in TRL's gather
                    gather(torch.zeros(len(prompts), len(self.reward_funcs), device=self.accelerator.device))
                raise
        self._scored = completion_ids_list, rewards
        return rewards

    def _question(self, row: dict[str, Any]) -> Question:
        encode_example(row)  # fails here rather than at the first checkpoint
        return Question(row_question_id(row, self.args.question_id_column), copy.deepcopy(row))

    def _score(self, pairs: Prompted) -> list[Candidate]:
        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> Any:
            return self._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, logits_to_keep, compute_entropy=True
            )[:2]

        self.model.eval()  # dropout would blur the comparison
        candidates = score_completions(
            pairs, forward, pad_token_id=self.processing_class.pad_token_id, device=self.accelerator.device
        )
        self.model.train()
        reshard(self.model)
        return candidates

    def _leave_to_replay(self, output: dict[str, Any]) -> None:
        """Keep TRL's correction for the distance between sampler and policy from stored completions."""
        is_fresh = torch.ones(len(output["completion_ids"]), dtype=torch.bool, device=output["completion_ids"].device)
        is_fresh[list(self._stored)] = False
        metrics = sampling_metrics(
            output,
            is_fresh,
            self.accelerator.gather,
            by_sequence=self.vllm_importance_sampling_mode.startswith("sequence"),
        )
        for name, value in metrics.items():
            self._metrics["train"][name][-1] = value
        output["importance_sampling_ratio"] = output["importance_sampling_ratio"].where(is_fresh.unsqueeze(1), 1.0)

    def _observe(
        self, output: dict[str, Any], questions: dict[int, Question], first_row: int, policy_version: int
    ) -> None:
        """Hand the scored batch to the coordinator, and give every row what its loss will need."""
        assert self._scored is not None
        token_ids, rewards_per_func = self._scored
        decides = self.args.success_reward
        rewards = success_rewards(
            rewards_per_func.double().cpu().numpy(),
            self.reward_weights.double().cpu().numpy(),
            None if decides is None else self.reward_func_names.index(decides),
        )
        has_loss = output["completion_mask"].any(-1).tolist()  # truncated ones may be masked
        batch = PendingBatch(
            questions,
            {
                first_row + row: ids
                for row, ids in enumerate(token_ids)
                if has_loss[row] and row not in self._stored and row not in self._unscored
            },
            rewards.reshape(-1, self.num_generations),
            success_threshold=self.args.success_threshold,
            policy_version=policy_version,
            difficulty=self.args.difficulty,
        )
        self._coordinator.observe(batch)

        behavior_logps = torch.zeros(output["completion_ids"].shape, dtype=torch.float32)
        is_replayed = torch.zeros(len(token_ids), dtype=torch.bool)
        for row, experience in self._stored.items():
            behavior_logps[row, : experience.num_tokens] = torch.tensor(experience.behavior_per_token_logps)
            is_replayed[row] = True
        device = output["completion_ids"].device
        output["behavior_per_token_logps"] = behavior_logps.to(device)
        output["is_replayed"] = is_replayed.to(device)
        output["rollout_rows"] = torch.arange(first_row, first_row + len(token_ids), device=device)
        # Where TRL computed the log-probabilities at generation, the policy may move before a row is trained.
        old_logps = output.get("old_per_token_logps")
        if old_logps is not None:
            unknown = torch.full_like(old_logps, torch.nan)
            entropies = next((forward[1] for forward in self._forwards or [] if forward[0] is old_logps), unknown)
            self._record(output["rollout_rows"], output["completion_mask"].bool(), old_logps, entropies)

    # Loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if "rollout_rows" not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        check_wrapped(model, self.accelerator)
        # A copy, because the same dict comes again when num_iterations > 1.
        self._loss_inputs = dict(inputs)
        try:
            loss = super().compute_loss(model, self._loss_inputs, *args, **kwargs)
            if "rollout_rows" in self._loss_inputs:
                raise RuntimeError(
                    "TRL computed a loss without the forward that replay relies on, so stored completions would train "
                    "as if they were fresh. Please report this with your version of TRL."
                )
            return loss
        finally:
            self._loss_inputs = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._is_replay_enabled:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        forwards = self._forwards if model is self.model else None
        if forwards is not None:
            kwargs["compute_entropy"] = True
        outputs = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if forwards is not None:
            forwards.append(outputs)
        if self._loss_inputs is not None:
            self._on_training_forward(self._loss_inputs, outputs[0], outputs[1])
        return outputs

    def _on_training_forward(
        self, inputs: dict[str, Any], per_token_logps: torch.Tensor, entropies: torch.Tensor
    ) -> None:
        """Record the behaviour policy of fresh rows, and weight the replayed ones, before TRL computes its loss."""
        rows, mask = inputs.pop("rollout_rows"), inputs["completion_mask"].bool()
        self._record(rows, mask, per_token_logps, entropies)  # what was not recorded at generation
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
            loss_type=self.loss_type,
            weighting=self.args.replay_weighting,
            beta=self.args.shaping_beta,
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
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
        self._coordinator.add_log_ratios(log_ratio.detach()[is_replayed][shown].flatten().cpu().numpy())

    def _record(self, rows: torch.Tensor, mask: torch.Tensor, logps: torch.Tensor, entropies: torch.Tensor) -> None:
        """Record what the policy that generated them says of the rows to be stored."""
        numbers = rows.tolist()
        positions = self._coordinator.wanted_rows(numbers)
        if not positions:
            return
        # All of them at once: every transfer waits for the device.
        is_own = mask[positions]
        means = torch.where(is_own, entropies[positions].detach().float(), 0.0).sum(-1) / is_own.sum(-1)
        of_rows = zip(positions, logps[positions].detach().float().cpu().numpy(), is_own.cpu().numpy(), strict=True)
        for (position, row_logps, own), entropy in zip(of_rows, means.tolist(), strict=True):
            self._coordinator.record(numbers[position], row_logps[own], entropy)

    # Dataset

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not self._is_replay_enabled or not self.args.drop_retired_questions:
            return sampler
        return ActiveQuestionSampler(sampler, self._begin_epoch)

    def _begin_epoch(self) -> tuple[int, set[int]]:
        """Number of the epoch that begins or is resumed, and the rows that it leaves out."""
        epoch = int((self.state.epoch or 0.0) + 1e-6)
        return epoch, self._coordinator.begin_epoch(epoch)

    def _check_dataset(self) -> None:
        """Look for trouble while nothing is lost yet: rows that cannot be saved, ids that identify nothing."""
        if isinstance(self.train_dataset, Dataset):
            if len(self.train_dataset):
                encode_example(self.train_dataset[0])
            if self.args.question_id_column is not None:
                dataset_question_ids(self.train_dataset, self.args.question_id_column)
        elif self.args.drop_retired_questions and self.args.retire_solved:
            logger.warning(
                "drop_retired_questions has no effect on an iterable dataset: retired questions leave the buffer, but "
                "still come up in the stream. Set drop_retired_questions=False to silence this."
            )

    # Checkpoints and logs

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if not self._is_replay_enabled:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._newest_complete_checkpoint() or True
        self._coordinator.begin_training()
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        self._coordinator.finish()
        return output

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._is_replay_enabled and self.model.training and "loss" in logs:
            logs.update(self._coordinator.log_metrics())
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._is_replay_enabled:
            # First, so that an older checkpoint is not rotated away before this one can be resumed.
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self._coordinator.save(os.path.join(self._get_output_dir(trial=trial), checkpoint))
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._is_replay_enabled:
            # The main process goes on to write the state of the trainer, which says that a checkpoint is complete.
            self._processes.wait()

    def _newest_complete_checkpoint(self) -> str | None:
        with self._processes.together("looking for a checkpoint"):
            found = newest_complete_checkpoint(self.args.output_dir) if self._processes.is_main else None
        return self._processes.broadcast((found or "").encode() if self._processes.is_main else None).decode() or None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._is_replay_enabled and checkpoint is not None:
            check_batch_size(self._train_batch_size, self.args)
            self._coordinator.load(lambda: self._load_buffer(os.path.join(checkpoint, "experience_buffer")))
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_buffer(self, path: str) -> ReplayBuffer:
        mine = self.experience_buffer
        loaded = type(mine).load(path)
        check_settings(loaded, self.args, ("group_size", "retire_solved"))
        loaded.set_limits(capacity=mine.capacity, max_completions_per_question=mine.max_completions_per_question)
        self.experience_buffer = loaded
        self._adopt_buffer(path)
        return loaded

    def _adopt_buffer(self, source: str) -> None:
        provenance = tokenizer_fingerprint(self.processing_class) | {"temperature": self.temperature}
        check_buffer(
            self.experience_buffer,
            provenance=provenance,
            max_completion_length=self.max_completion_length,
            vocab_size=self.model.config.get_text_config().vocab_size,
            source=source,
        )
        self.experience_buffer.provenance |= provenance


def _example_row(question: Question, like: dict[str, Any]) -> dict[str, Any]:
    """The stored row of a question with the columns of the batch, in a copy that reward functions may write into."""
    missing = sorted(like.keys() - question.example.keys())
    if missing:
        raise ValueError(
            f"The stored row of question {question.question_id!r} lacks the columns {missing} of the training "
            "dataset, which a reward function may need. Import rows with all columns of the dataset."
        )
    return {column: copy.deepcopy(question.example[column]) for column in like}
