"""TRL's hooks around a generation batch: what is generated, which rollouts come back, and how they are rewarded."""

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from accelerate.utils import gather, send_to_device
from transformers.utils import logging
from trl import GRPOTrainer

from .batch import Batch
from .compatibility import GENERATING, naming_overrides, overridden, wrapped, wrapped_value
from .filling import filling
from .processes import Processes
from .prompts import images_of
from .records import Scores
from .replayer import Replayer
from .rewards import keeping_stored
from .rollouts import Rollouts
from .rollouts.environments import stand_ins, without_images
from .rollouts.functions import call_rollout_function
from .rollouts.multi_turn import EvenTurns, put_stored_rollouts, snapshot
from .rollouts.vllm import correct_fresh_only
from .rows import lacks_images, loss_mask
from .scoring import Prompted, evaluating, on_cpu, reshard, score_completions

T = TypeVar("T")

logger: Any = logging.get_logger(__name__)


def _after(first: Callable[[], None], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Around a method: something else before it."""
    first()
    return method(*args, **kwargs)


class GenerationHooks(GRPOTrainer):
    """
    [`~trl.GRPOTrainer`] whose generation batches hold stored rollouts.

    What a subclass sets up before the first batch is declared here.
    """

    replayer: Replayer
    _processes: Processes
    _rollouts: Rollouts
    _is_replay_enabled: bool

    @property
    def _generated_batch(self) -> Batch | None:
        """The batch that is being generated and scored; none in plain GRPO or in an evaluation."""
        batch = self.replayer.batch
        return batch if batch is not None and batch.is_generating else None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self._is_replay_enabled:
            return super()._generate_and_score_completions(inputs)
        if not self.model.training:
            with wrapped(self, "_calculate_rewards", self._mark_fresh):
                return super()._generate_and_score_completions(inputs)
        batch = self.replayer.next_batch(inputs, self.state.global_step)
        with self._processes.together("preparing a batch"):
            inputs = batch.place(inputs, self.replayer.questions.id_of)
        # Around what TRL calls, so that overrides of a subclass are seen as TRL sees them.
        with (
            batch.generating(),
            self._rolling_out(batch, inputs),
            wrapped(self, "_calculate_rewards", functools.partial(self._take_rewards, batch)),
            wrapped(self, "_get_per_token_logps_and_entropies", functools.partial(self._keep_forward, batch)),
        ):
            output = super()._generate_and_score_completions(inputs)
            with self._processes.together("checking what was generated"), naming_overrides(self, GENERATING):
                batch.check_tokens(output)
            if lacks_images(output):
                logger.warning_once(
                    "TRL trains a batch without its images, because image tokens of a completion do not match them: "
                    "nothing of it is stored, and stored completions with images are left out of its loss. Keep the "
                    "model from writing image tokens (suppress_tokens in generation_kwargs)."
                )
                batch.leave_out_images(output)
            if batch.replays and "importance_sampling_ratio" in output:
                by_sequence = self.vllm_importance_sampling_mode.startswith("sequence")
                metrics = correct_fresh_only(output, batch, self.accelerator.gather, by_sequence=by_sequence)
                for name, value in metrics.items():
                    self._metrics["train"][name][-1] = value
            self.replayer.observe(batch, output)
            output |= batch.columns(output["completion_ids"])
            # Where TRL computed the log-probabilities at generation, the policy may move before a row is trained.
            old_logps = output.get("old_per_token_logps")
            if old_logps is not None:
                entropies = batch.entropies_of(old_logps, loss_mask(output).bool())
                at = {batch.first_row + position: position for position in range(batch.num_rows)}
                batch.record(at, (on_cpu(old_logps), on_cpu(entropies)))
            return output

    def _generate_single_turn(
        self, prompt_ids: list[Any], images: Any, multimodal_fields: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        batch = self._generated_batch
        if batch is None or not batch.is_first_turn:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)

        if len(prompt_ids) != batch.num_rows:
            raise RuntimeError(
                f"{overridden(self, GENERATING)} asks for {len(prompt_ids)} completions of a batch of "
                f"{batch.num_rows} rows, so that stored completions cannot find theirs. Call the method of the "
                f"parent once with all rows, or set {self.args.off} to train without replay."
            )

        def generate(prompt_ids: Any, images: Any, multimodal_fields: Any) -> Any:
            return super(GenerationHooks, self)._generate_single_turn(
                prompt_ids, images, multimodal_fields, *args, **kwargs
            )

        output = self._rollouts(generate, prompt_ids, images, multimodal_fields, batch)
        # Later turns are those of the rows that called a tool; where there are none, there is no later turn.
        batch.is_first_turn = self._rollouts.stand_in is None
        return output

    def _tool_call_loop(self, *args: Any, **kwargs: Any) -> Any:
        if not self._is_replay_enabled:
            return super()._tool_call_loop(*args, **kwargs)
        with self._processes.together("calling tools"), self._even_turns():
            result = super()._tool_call_loop(*args, **kwargs)
        batch = self._generated_batch
        if batch is None:
            return result
        return put_stored_rollouts(
            result, batch, functools.partial(self._text_tokenizer.decode, skip_special_tokens=True)
        )

    @contextmanager
    def _even_turns(self) -> Iterator[None]:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        is_sharded = self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3)
        if self.use_vllm or not is_sharded or self._processes.count == 1:
            yield
            return
        takes_number = "num_generations" in inspect.signature(GRPOTrainer._generate_single_turn).parameters
        prompt = [[self._text_tokenizer.eos_token_id]]
        generate = functools.partial(super()._generate_single_turn, prompt, None, {}, *([1] if takes_number else []))
        turns = EvenTurns(self._processes, generate)
        with turns.until_all_are_done(), wrapped(self, "_generate_single_turn", turns.turn):
            yield

    @contextmanager
    def _rolling_out(self, batch: Batch, inputs: list[dict[str, Any]]) -> Iterator[None]:
        """While a batch is generated: environments and rollout functions are kept from rows of stored rollouts."""
        with ExitStack() as stack:
            if self.args.fill_failed_groups:
                keeps, compute = self._keeps_rewards, self._rewards_of
                stack.enter_context(filling(self, batch, inputs, keeps_rewards=keeps, rewards_of=compute))
            if self._has_environments:
                batch.fresh.prompts = {}
                stack.enter_context(stand_ins(self, batch, inputs))
                # Until prompts are known: a process whose environment fails must not leave the others waiting.
                resetting = stack.enter_context(ExitStack())
                resetting.enter_context(self._processes.together("resetting the environments"))
                stack.enter_context(wrapped(self, "_generate", functools.partial(_after, resetting.close)))
            if self._has_rollout_func:
                stack.enter_context(wrapped(self, "rollout_func", functools.partial(self._call_rollout_func, batch)))
            yield

    def _call_rollout_func(self, batch: Batch, function: Callable[..., Any], prompts: list[Any], trainer: Any) -> Any:
        with self._processes.together("calling the rollout function"):
            return call_rollout_function(
                function,
                prompts,
                trainer,
                batch=batch,
                fresh_only=self.args.rollout_fresh_only,
                stand_in=self._rollouts.stand_in,
                tokenize=lambda rows: self._tokenize_prompts([prompts[row] for row in rows])[0],
            )

    @property
    def _has_environments(self) -> bool:
        factories = getattr(self, "environment_factories", None)  # before TRL 1.8, the environments are made at once
        return bool(factories or (not hasattr(self, "environment_factories") and self.environments))

    @property
    def _has_rollout_func(self) -> bool:
        return self.rollout_func is not None

    @property
    def _text_tokenizer(self) -> Any:
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def _keeps_rewards(self) -> bool:
        """Whether stored completions keep the rewards that they had."""
        return (self.args.replay_rewards or ("stored" if self._has_environments else "recomputed")) == "stored"

    def _take_rewards(self, batch: Batch, calculate: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Around `_calculate_rewards` while a batch is generated: its rewards, and its completions as they came."""
        arguments = self._reward_arguments(*args, **kwargs)
        num_rows = len(arguments["prompts"])
        self._log_completion_extra("replayed", [position in batch.stored for position in range(num_rows)])
        if batch.fresh.prompts is not None:
            self._keep_shown_prompts(batch, arguments)
        return self._rewards_of(batch, calculate, *args, **kwargs)

    def _rewards_of(self, batch: Batch, calculate: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """What `calculate` says that the completions of a batch are worth, taken down by it; on all processes."""
        arguments = self._reward_arguments(*args, **kwargs)
        num_rows = len(arguments["prompts"])
        with self._processes.together("computing rewards"):
            try:
                with wrapped_value(self, "reward_funcs", self._reward_funcs_for(batch)):
                    rewards = calculate(*args, **kwargs)
            except Exception:
                if self._processes.count > 1:  # the others wait for this one in TRL's gather
                    gather(torch.zeros(num_rows, len(self.reward_funcs), device=self.accelerator.device))
                raise
            self.replayer.success_rule.follow(
                self.reward_func_names, self.reward_weights.tolist(), self.args.success_threshold
            )
            with naming_overrides(self, ("_calculate_rewards",)):
                batch.take_rewards(rewards, [list(ids) for ids in arguments["completion_ids_list"]])
            if self._keeps_rewards or self._has_environments:
                batch.fresh.reward_names = list(self.reward_func_names)
        return rewards

    def _reward_funcs_for(self, batch: Batch) -> list[Any]:
        """Reward functions of a batch: those whose rewards stored rows keep are asked about fresh rows."""
        # Those that TRL adds for environments cannot be asked again.
        added = [getattr(f, "__qualname__", "").startswith("GRPOTrainer.__init__.") for f in self.reward_funcs]
        first_kept = 0 if self._keeps_rewards else [*added, True].index(True)
        if not batch.stored:
            return list(self.reward_funcs)
        return [
            *self.reward_funcs[:first_kept],
            *keeping_stored(
                self.reward_funcs[first_kept:], self.reward_func_names[first_kept:], batch.stored, batch.num_rows
            ),
        ]

    def _keep_shown_prompts(self, batch: Batch, arguments: dict[str, Any]) -> None:
        """Prompts as environments showed them are part of the rollouts: they may differ within a group."""
        for position, (row, prompt) in enumerate(zip(arguments["inputs"], arguments["prompts"], strict=True)):
            if position not in batch.stored:
                shown = without_images(prompt, images_of(row))
                batch.fresh.prompts[position] = snapshot(shown)  # type: ignore[index]

    def _mark_fresh(self, calculate: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        """Around `_calculate_rewards` in an evaluation: TRL's table of completions has the same columns as ever."""
        self._log_completion_extra("replayed", [False] * len(self._reward_arguments(*args, **kwargs)["prompts"]))
        return calculate(*args, **kwargs)

    def _reward_arguments(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Arguments of `_calculate_rewards` by name, however TRL passes them."""
        return inspect.signature(GRPOTrainer._calculate_rewards).bind(self, *args, **kwargs).arguments

    def _keep_forward(self, batch: Batch, forward: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        """Around a forward while a batch is generated: log-probabilities of the policy come with their entropies."""
        if model is not self.model:
            return forward(model, *args, **kwargs)
        outputs = forward(model, *args, **kwargs | {"compute_entropy": True})
        batch.forwards.append((outputs[0], outputs[1]))
        return outputs

    def _score(self, prompted: Sequence[Prompted]) -> list[Scores]:
        return self._scored(prompted, score_completions)

    def _scored(self, prompted: Sequence[Prompted], of_rows: Callable[..., list[T]]) -> list[T]:
        """What `of_rows` makes of a forward of the present policy over prompts and completions."""
        prompted = [Prompted(*of_one) for of_one in prompted]  # pairs of prompt and completion will do
        pixels: dict[str, Any] = {}
        if any(of_one.row is not None for of_one in prompted):
            (of_one,) = prompted
            of_one, pixels = self.replayer.prompts.with_pixels(of_one)
            prompted, pixels = [of_one], send_to_device(pixels, self.accelerator.device)

        def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int) -> Any:
            return self._get_per_token_logps_and_entropies(
                self.model, input_ids, attention_mask, logits_to_keep, compute_entropy=True, **pixels
            )[:2]

        with evaluating(self.model):
            scores = of_rows(
                prompted, forward, pad_token_id=self._text_tokenizer.pad_token_id, device=self.accelerator.device
            )
        reshard(self.model)
        return scores
