"""examples/train_math.py with vLLM, as docs/vllm.md says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here; `make test-vllm` makes an environment that has it")

from example_runs import EXAMPLE, REPLAYING, flags, write_questions

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param("server", marks=pytest.mark.xdist_group("server")),
        pytest.param("colocate", marks=pytest.mark.xdist_group("colocate")),
    ],
)
def test_example(mode, model_folder, tmp_path, request):
    options = REPLAYING | {
        "model_name_or_path": model_folder,
        "dataset_name": write_questions(tmp_path),
        "use_vllm": True,
        "vllm_mode": mode,
        "use_cpu": True,
    }
    if mode == "server":
        options["vllm_server_base_url"] = request.getfixturevalue("server").url
    # Without what the trainers and engines of this process have left for processes of their own.
    left = ("RANK", "WORLD", "LOCAL_", "MASTER_", "ACCELERATE_", "VLLM_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    environment |= {"PYTHONPATH": f"{HERE}:{HERE.parent / 'end_to_end'}", "TERM": "dumb", "COLUMNS": "100"}
    result = subprocess.run(
        [sys.executable, str(HERE / "run_on_cpu.py"), mode, str(EXAMPLE), *flags(options)],
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
