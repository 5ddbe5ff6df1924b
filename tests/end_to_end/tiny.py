"""Tiny real models, tokenizers and datasets, made on the spot."""

import functools
import tempfile
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 +-*/=:?.\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE, extra: str = "") -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS, *extra])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def save_tiny_model(folder: Any, seed: int = 0, **changes: Any) -> None:
    """Save a random two-layer model for `tiny_tokenizer`; `changes` are fields of its config."""
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # far from uniform, so that log-probabilities and entropies differ
    }
    LlamaForCausalLM(LlamaConfig(**config | changes)).save_pretrained(folder)


@functools.cache
def _tiny_model_folder(seed: int) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    save_tiny_model(folder.name, seed)
    return folder


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A random two-layer model of about 20,000 parameters, loaded from disk: TRL loads the reference model again."""
    return LlamaForCausalLM.from_pretrained(_tiny_model_folder(seed).name)


def tiny_dataset(num_rows: int = 16, conversational: bool = False) -> Dataset:
    """Questions that differ in their prompt, with two further columns."""
    prompts: list[Any] = [f"{i} + {i * i} = " for i in range(num_rows)]
    if conversational:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return Dataset.from_dict(
        {"prompt": prompts, "answer": [i + i * i for i in range(num_rows)], "uid": [f"q{i}" for i in range(num_rows)]}
    )


def tiny_arguments(output_dir: Any, **overrides: Any) -> dict[str, Any]:
    """Arguments of a config for 4 questions of 4 completions a step on one CPU core."""
    return {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
    } | overrides


def first_letter_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 for completions that begin with a letter from a to t: about two in five of a random model's."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(text[:1].isalpha() and text[:1] <= "t") for text in texts]


def make_trainer(output_dir: Any, trainer_class: Any = None, **options: Any) -> Any:
    """
    A trainer on tiny parts. Options that are not arguments of the trainer are fields of its config.

    Replay starts at once unless `replay_start_pass_rate` says otherwise, and all metrics are logged, unless
    `log_replay` does.
    """
    from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer

    trainer_class = trainer_class or ExGRPOTrainer
    arguments: dict[str, Any] = {
        "model": None,
        "processing_class": None,
        "reward_funcs": first_letter_reward,
        "train_dataset": None,
        "eval_dataset": None,
        "peft_config": None,
        "callbacks": None,
    }
    if issubclass(trainer_class, ExGRPOTrainer):
        own = (
            "experience_buffer",
            "question_sampler",
            "completion_selector",
            "group_selector",
            "admission",
            "eviction",
            "weighting",
        )
        # The name of an eviction rule is a field of the config, anything else an argument.
        arguments |= {name: None for name in own if name != "eviction" or not isinstance(options.get(name), str)}
        config_class: Any = ExGRPOConfig
        options.setdefault("replay_start_pass_rate", None)
        options.setdefault("log_replay", "all")
    else:
        from trl import GRPOConfig as config_class
    for name in (*arguments, "tools", "rollout_func", "environment_factory"):
        if name in options:
            arguments[name] = options.pop(name)
    for name, make in (("model", tiny_model), ("processing_class", tiny_tokenizer), ("train_dataset", tiny_dataset)):
        if arguments[name] is None:
            arguments[name] = make()
    return trainer_class(args=config_class(**tiny_arguments(output_dir, **options)), **arguments)


def lora_config() -> Any:
    """LoRA on all linear layers of the tiny model, with weights that are not zero at the start."""
    from peft import LoraConfig

    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )


def parameters_of(trainer: Any) -> dict[str, torch.Tensor]:
    """Detached copies of all parameters by name."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def completion_logps(model: Any, prompt: Any, completion: Any, **pixels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probabilities and entropies of a completion, one row alone, without padding: the plain definition.

    Args:
        model: Model, in the precision in which to compute.
        prompt: Prompt token ids, shape `(P,)`.
        completion: Completion token ids, shape `(T,)`.
        pixels: What the forward needs of the images in the prompt.

    Returns:
        Two tensors of shape `(T,)`, nats, with their graph.
    """
    prompt, completion = torch.as_tensor(prompt).long(), torch.as_tensor(completion).long()
    logits = model(input_ids=torch.cat([prompt, completion])[None], **pixels).logits[0, len(prompt) - 1 : -1]
    log_probs = torch.log_softmax(logits, dim=-1)
    return log_probs.gather(1, completion[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)
