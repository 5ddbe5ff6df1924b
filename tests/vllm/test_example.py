"""examples/train_math.py with vLLM, as docs/vllm.md says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "train_math.py"


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("server", marks=pytest.mark.xdist_group("server")),
        pytest.param("colocate", marks=pytest.mark.xdist_group("colocate")),
    ],
)
def test_example(mode, model_folder, tmp_path, request):
    rows = [{"problem": f"what is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model_name_or_path": model_folder,
        "dataset_name": tmp_path / "questions.jsonl",
        "use_vllm": True,
        "vllm_mode": mode,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 4,
        "num_held_out": 8,
        # A random model solves nothing: count everything as a success, so that there is something to replay.
        "success_threshold": 0.0,
        "retire_solved": False,
        "replay_start_pass_rate": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "out",
    }
    if mode == "server":
        options["vllm_server_base_url"] = request.getfixturevalue("server").url
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    # Without what the trainers and engines of this process have left for processes of their own.
    left = ("RANK", "WORLD", "LOCAL_", "MASTER_", "ACCELERATE_", "VLLM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    environment |= {"PYTHONPATH": f"{HERE}:{HERE.parent / 'end_to_end'}", "TERM": "dumb", "COLUMNS": "100"}
    result = subprocess.run(
        [sys.executable, str(HERE / "run_on_cpu.py"), mode, str(EXAMPLE), *flags],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"Questions replayed +│ 1 ", result.stdout), result.stdout
    assert re.search(r"Tokens not generated +│ [1-4] ", result.stdout), result.stdout
    assert (tmp_path / "out" / "model.safetensors").exists()
