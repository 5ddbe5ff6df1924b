"""examples/train_vision.py as a user runs it: pictures, a warm-up on the spot and replay, without a hub."""

import re

from example_runs import EXAMPLE, flags
from scripts import run_script
from transformers import AutoModelForImageTextToText, AutoProcessor

# A model that is hardly warmed up solves nothing: all counts as a success, so that there is something to replay.
TINY = {
    "warm_up_steps": 2,
    "num_train": 8,
    "num_held_out": 8,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "success_threshold": 0.0,
    "retire_solved": False,
    "max_steps": 4,
    "logging_steps": 1,
    "output_dir": "out",
}


def run(options, cwd):
    return run_script(EXAMPLE.with_name("train_vision.py"), *flags(options), cwd=cwd)


def shown(label, text):
    """The number that the table of the report has for a label."""
    return float(re.search(rf"{label} +│ (\d+(?:\.\d+)?)", text)[1])


def test_pictures_are_replayed(tmp_path):
    result = run(TINY, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    # Eight pictures make two batches without anything to replay at first; of the later ones half are replayed.
    assert "step 4 | fresh pass rate 1.00 | replayed 50% of the questions" in result.stdout
    assert shown("Pictures replayed", result.stdout) >= 2
    assert shown("In the buffer", result.stdout) > 0
    assert 0 <= shown("Held-out accuracy before", result.stdout) <= 1
    assert 0 <= shown("Held-out accuracy after", result.stdout) <= 1


def test_without_replay_it_is_plain_grpo(tmp_path):
    result = run(TINY | {"replay_fraction": 0, "max_steps": 2}, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "step 2 | fresh pass rate" in result.stdout
    assert "Pictures replayed" not in result.stdout
    assert 0 <= shown("Held-out accuracy after", result.stdout) <= 1
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "out").config.model_type == "llava"
    assert AutoProcessor.from_pretrained(tmp_path / "out").image_token == "<image>"
