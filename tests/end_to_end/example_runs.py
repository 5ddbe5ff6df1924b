"""What the tests run examples/train_math.py on."""

import json
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_math.py"

TINY = {
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "num_generations": 4,
    "max_completion_length": 4,
    "num_held_out": 8,
    "logging_steps": 1,
    "report_to": "none",
    "output_dir": "out",
}
# A random model solves nothing: count everything as a success, so that there is something to replay in the third step.
REPLAYING = TINY | {
    "max_steps": 3,
    "success_threshold": 0.0,
    "retire_solved": False,
    "replay_start_pass_rate": 0.0,
}


def write_questions(folder: Path) -> Path:
    """A file of 24 questions with their answers."""
    rows = [{"problem": f"what is {i} + {i}?", "answer": str(2 * i)} for i in range(24)]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags(options: dict[str, Any]) -> list[str]:
    """The arguments of the command line."""
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]
