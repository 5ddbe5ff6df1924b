"""examples/train_math.py through `accelerate launch`, once with each of examples/configs/."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from example_runs import EXAMPLE, REPLAYING, flags, write_questions
from ranks import free_port
from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
MISSING = [name for name in ("matplotlib", "math_verify") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the example needs {MISSING}: `make test` installs them")

# Name of the config, mode, processes, further arguments of the example.
NATIVE = {"use_cpu": False, "ddp_backend": "gloo"}
CASES = {
    "single_gpu": ("single", 1, {"use_cpu": True}),
    "ddp": ("ddp", 2, {"use_cpu": True, "use_peft": True, "lora_target_modules": "all-linear"}),
    "fsdp2": ("fsdp2", 2, NATIVE),
    "zero2": ("zero2", 2, NATIVE),
    "zero3": ("zero3", 2, NATIVE),
}


@pytest.mark.parametrize("config", CASES)
def test_the_example_runs_under(tmp_path, config):
    mode, world, more = CASES[config]
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    options = {
        "model_name_or_path": tmp_path / "model",
        "dataset_name": write_questions(tmp_path),
        "dtype": "float32",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parent),
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "ACCELERATE_USE_CPU": str(more["use_cpu"]).lower(),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TERM": "dumb",
    }
    result = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch"),
            *("--config_file", str(ROOT / "examples" / "configs" / f"{config}.yaml")),
            *("--num_processes", str(world), "--mixed_precision", "no", "--main_process_port", str(free_port())),
            str(Path(__file__).parent / "launch_on_cpu.py"),
            *(mode, str(tmp_path), str(EXAMPLE)),
            *flags(REPLAYING | options | more),
        ],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    engaged = [json.loads((tmp_path / f"engaged-{rank}.json").read_text()) for rank in range(world)]
    assert all(told["num_processes"] == world and told["step"] == 3 for told in engaged)
    assert engaged[0]["replayed"][-1] == 0.5
    assert result.stdout.count("Held-out pass rate after") == 1, "one table, of the main process"
    assert (tmp_path / "out" / "checkpoint-3" / "experience_buffer" / "metadata.json").exists()
    assert (tmp_path / "out" / "train_math.png").exists()
    saved = "adapter_model.safetensors" if "use_peft" in more else "model.safetensors"
    assert (tmp_path / "out" / saved).stat().st_size > 1000
