"""What is logged reaches TensorBoard, wandb and trackio: read back from what a run has written, number by number."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trl
from packaging.version import Version

# trackio wants a newer huggingface_hub than the oldest transformers takes, which reports to wandb where a run names no
# backend. Anywhere else a missing one is a failure.
OPTIONAL = ("wandb", "trackio") if Version("1.1") > Version(trl.__version__) else ()
BACKENDS = ("tensorboard", "wandb", "trackio")


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """What was logged, and what each backend has of it."""
    folder = tmp_path_factory.mktemp("backends")
    (folder / "here").mkdir()
    backends = [name for name in BACKENDS if name not in OPTIONAL or importlib.util.find_spec(name)]
    script = Path(__file__).parent / "log_backends.py"
    command = [sys.executable, script, folder, *backends]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder / "here", timeout=280)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    assert not list((folder / "here").iterdir())
    return json.loads((folder / "read.json").read_text())


def of_replay(line):
    return {name: value for name, value in line.items() if name.startswith(("fresh/", "replay/"))}


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_arrives(read, backend):
    if backend in OPTIONAL and backend not in read:
        pytest.skip(f"{backend} is not installed beside the oldest TRL")
    found, num_numbers = read[backend], 0
    for line in read["logged"]:
        for name, value in of_replay(line).items():
            expected = float(np.float32(value)) if backend == "tensorboard" else value
            assert found[f"train/{name}"][str(line["step"])] == expected, (name, line["step"])
            num_numbers += 1
    names = {f"train/{name}" for line in read["logged"] for name in of_replay(line)}
    assert {name for name in found if name.startswith(("train/fresh/", "train/replay/"))} == names
    assert num_numbers > 100
    assert any(value > 0 for value in found["train/replay/fraction"].values())
