"""What replay cannot do yet, or cannot do with the installed TRL: refused at construction, with the way out."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import trl
from accelerate.utils import DistributedType
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging
from trl import GRPOTrainer

from .config import ExGRPOConfig
from .rollouts.vllm import ENGINES

logger: Any = logging.get_logger(__name__)

# Methods that ExGRPOTrainer wraps, with the parameters it relies on.
HOOKS = {
    "_generate_and_score_completions": ("inputs",),
    "_generate": ("prompts",),
    "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields"),
    "_tool_call_loop": ("prompts", "completion_ids", "completions", "logprobs"),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
    "_tokenize_prompts": ("prompts",),
    "_log_completion_extra": ("column", "values"),
    "training_step": ("model", "inputs"),
    "_compute_loss": ("model", "inputs"),
    "_get_train_sampler": (),
    "_remove_unused_columns": ("dataset", "description"),
    "_save_checkpoint": ("model", "trial"),
    "_save_rng_state": ("output_dir",),
    "train": ("resume_from_checkpoint",),
    "_load_optimizer_and_scheduler": ("checkpoint",),
}
# Those whose parameters are read as well: `*args` would hide what the release takes.
_READ_BY_NAME = ("_generate_single_turn", "_calculate_rewards")
# Methods in which a subclass may change what replay relies on: rows while they are generated, and their loss.
GENERATING = (
    *("_generate_and_score_completions", "_generate", "_generate_single_turn", "_tool_call_loop"),
    "_calculate_rewards",
)
LOSS = ("training_step", "_prepare_inputs", "compute_loss", "_compute_loss", "_get_per_token_logps_and_entropies")
# One copy of the model per process.
_COPIES = tuple(kind for kind in DistributedType if kind.value.startswith("MULTI_"))
_OWNERS = {"environment_factory": "environment", "rollout_func": "rollout function"}
_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")


def check_hooks(trainer_class: type = GRPOTrainer) -> None:
    """Check that TRL's trainer has the methods that replay wraps."""
    for name, expected in HOOKS.items():
        method = getattr(trainer_class, name, None)
        missing = _missing_parameters(name, method) if callable(method) else expected
        if not callable(method) or missing:
            what = f"parameters {missing} of {name}()" if missing and callable(method) else f"{name}()"
            raise RuntimeError(
                f"exgrpo-trl relies on {what} of {trainer_class.__name__}, which trl {trl.__version__} does not have. "
                f"Upgrade exgrpo-trl, or install a TRL release that it supports (see its README).{_patched(method)}"
            )


def _missing_parameters(name: str, method: Callable[..., Any]) -> list[str]:
    """Which of the parameters that replay relies on a method does not take; `*args` and `**kwargs` take any."""
    parameters = inspect.signature(method).parameters
    is_variadic = any(
        parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters.values()
    )
    if is_variadic and name not in _READ_BY_NAME:
        return []
    return [parameter for parameter in HOOKS[name] if parameter not in parameters]


def _patched(method: Any) -> str:
    """Who has replaced a method of TRL, to be added to a message."""
    module = getattr(method, "__module__", None) or "trl"
    if module.split(".")[0] == "trl":
        return ""
    return (
        f" It was replaced by {module}.{method.__qualname__}: if that passes its arguments on, decorate it with "
        "functools.wraps(the method that it calls)."
    )


def signature_with_own(init: Callable[..., None]) -> inspect.Signature:
    """Signature of a trainer's `__init__` with TRL's arguments in the place of `*positional` and `**keywords`."""
    own = inspect.signature(init).parameters
    catch_all = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    of_trl = inspect.signature(GRPOTrainer.__init__).parameters
    before = [own.get(name, parameter) for name, parameter in of_trl.items()]
    after = [parameter for name, parameter in own.items() if name not in of_trl and parameter.kind not in catch_all]
    return inspect.Signature(before + after)


@contextmanager
def wrapped(trainer: Any, name: str, around: Callable[..., Any]) -> Iterator[None]:
    """Within the block, `around(method, ...)` is called in place of a method, that of a subclass included."""
    own = vars(trainer).get(name)
    setattr(trainer, name, functools.partial(around, getattr(trainer, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, own)


@contextmanager
def wrapped_value(trainer: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, an attribute has another value."""
    before = getattr(trainer, name)
    setattr(trainer, name, value)
    try:
        yield
    finally:
        setattr(trainer, name, before)


def overridden(trainer: Any, names: Iterable[str]) -> str:
    """The first of these methods that a subclass of ours overrides, to be named in a message; else TRL."""
    for owner in type(trainer).__mro__:
        if owner.__module__.startswith("exgrpo_trl."):
            break
        for name in names:
            if name in vars(owner):
                return f"{owner.__name__}.{name}"
    return f"trl {trl.__version__}"


@contextmanager
def naming_overrides(trainer: Any, names: Iterable[str]) -> Iterator[None]:
    """Turn a ValueError of the block into an error that names the override which must be the cause."""
    try:
        yield
    except ValueError as error:
        raise RuntimeError(
            f"{overridden(trainer, names)} has changed what replay put into a generation batch: {error}. Leave the "
            "rows of stored completions (trainer.replayer.batch.stored) as they are, return every row with all of its "
            f"columns, and change completions before they are rewarded; or set {trainer.args.off} to train without "
            "replay."
        ) from error


def check_arguments(arguments: Mapping[str, Any], args: ExGRPOConfig) -> None:
    """Refuse what replay does not support, before a model is loaded."""
    check_hooks()
    way_out = f"Remove it, or set {args.off} to train with plain GRPO."
    _check_agents(arguments, args)
    unsuitable = sorted({"n", "best_of", "seed"} & set(args.generation_kwargs or ())) if args.use_vllm else []
    if unsuitable:
        raise ValueError(
            f"generation_kwargs has {', '.join(unsuitable)}, but with replay vLLM is asked for single completions: a "
            "number of its own would not fit, and one seed would make the completions of a question all the same. "
            f"{way_out}"
        )
    if args.use_liger_kernel and hasattr(GRPOTrainer, "compute_liger_loss"):
        raise NotImplementedError(
            f"Replay does not support use_liger_kernel=True on trl {trl.__version__}: its fused loss never shows the "
            f"log-probabilities that a stored completion needs. Set use_liger_kernel=False or upgrade TRL to 1.14 or "
            "later."
        )
    parallelism = getattr(args, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise NotImplementedError(
            f"Replay does not support tensor, context or sequence parallelism ({parallelism}): every process must "
            f"have rows of its own. Use DDP, FSDP or DeepSpeed, or set {args.off}."
        )
    loading = args.accelerator_config
    if args.world_size > 1 and (loading.split_batches or loading.dispatch_batches):
        raise ValueError(
            "Replay on several processes needs every process to load its own batch, but accelerator_config has "
            f"split_batches={loading.split_batches} and dispatch_batches={loading.dispatch_batches}. Leave them out."
        )
    if args.loss_type not in _LOSS_TYPES:
        raise NotImplementedError(
            f"Replay has no definition for loss_type={args.loss_type!r}. Choose one of {', '.join(_LOSS_TYPES)}."
        )
    if args.loss_type == "luspo" and args.importance_sampling_level != "sequence":
        raise ValueError(
            f"loss_type='luspo' weighs whole sequences, but importance_sampling_level="
            f"{args.importance_sampling_level!r}. Set importance_sampling_level='sequence'."
        )


def _check_agents(arguments: Mapping[str, Any], args: ExGRPOConfig) -> None:
    """Refuse tools, environments and rollout functions where TRL or replay does not handle them."""
    own_prompts = [name for name in ("environment_factory", "rollout_func") if arguments.get(name)]
    if args.fill_failed_groups and own_prompts:
        raise NotImplementedError(
            f"fill_failed_groups=True does not work with {own_prompts[0]}: a stored rollout belongs to the prompt "
            f"that the {_OWNERS[own_prompts[0]]} made for it, and not to that of the failed rollout whose place it "
            "would take. Set fill_failed_groups=False."
        )
    of_agents = [name for name in ("tools", "environment_factory") if arguments.get(name)]
    if not of_agents:
        return
    has_own_turns = "num_generations" in inspect.signature(GRPOTrainer._generate_single_turn).parameters
    if args.use_vllm and args.vllm_mode == "server" and not has_own_turns:
        raise NotImplementedError(
            f"trl {trl.__version__} asks a vLLM server for the later turns of {of_agents[0]} as if rows "
            "shared their history, so that rows get the turns of others, in plain GRPO too. Upgrade "
            "TRL to 1.14.1 or later, or set vllm_mode='colocate'."
        )
    if args.use_vllm and args.world_size > 1 and (args.vllm_mode == "server" or args.vllm_tensor_parallel_size > 1):
        raise NotImplementedError(
            f"TRL generates for all processes together on a vLLM server and with tensor parallelism, but with "
            f"{of_agents[0]} the number of turns and rows differs by process. Use one process, or "
            "vllm_mode='colocate' with vllm_tensor_parallel_size=1."
        )


def check_vllm(vllm: Any, is_main: bool) -> None:
    """Check that what TRL generates with has the parts that replay wraps."""
    part = ENGINES.get(getattr(vllm, "mode", ""), "mode")
    has_part = hasattr(getattr(vllm, part, None), "generate") or (part == "vllm_client" and not is_main)
    if not has_part:
        raise RuntimeError(
            f"exgrpo-trl relies on {part} of {type(vllm).__name__}, which trl {trl.__version__} "
            "does not have. Upgrade exgrpo-trl, or install a TRL release that it supports (see its README)."
        )


def check_batch_size(train_batch_size: int, args: ExGRPOConfig) -> None:
    """Refuse to resume with a batch that is not the configured one: transformers below 5 takes the checkpoint's."""
    if train_batch_size != args.train_batch_size:
        raise ValueError(
            f"per_device_train_batch_size={args.train_batch_size}, but this release of transformers resumes with the "
            f"{train_batch_size} of the checkpoint. Keep per_device_train_batch_size={train_batch_size} and change "
            "gradient_accumulation_steps instead, or upgrade transformers to 5 or later."
        )


def check_wrapped(model: Any, accelerator: Any) -> None:
    """Refuse to train each process on its own, which transformers does after an evaluation before the training."""
    if accelerator.distributed_type in _COPIES and not isinstance(model, DistributedDataParallel):
        raise RuntimeError(
            "The processes would train their copies of the model without sharing gradients: after trainer.evaluate(), "
            "transformers does not prepare the model for training any more. Set eval_on_start=True to evaluate at the "
            "start of the training instead of before it."
        )
