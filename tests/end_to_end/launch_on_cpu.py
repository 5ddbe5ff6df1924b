"""
Runs a script as the launcher starts it, but on the CPU, and writes down what was really running.

    accelerate launch --config_file CONFIG launch_on_cpu.py MODE FOLDER SCRIPT ARGUMENTS

After `train()` every process checks that the mode is engaged and writes `FOLDER/engaged-RANK.json`.
"""

import functools
import json
import runpy
import sys
from pathlib import Path

from ranks import assert_engaged, skip_compiled_communication, use_real_backends

mode, folder, script, *arguments = sys.argv[1:]
use_real_backends()
if mode.startswith("zero"):
    skip_compiled_communication()

from exgrpo_trl import ExGRPOTrainer  # noqa: E402

train = ExGRPOTrainer.train


@functools.wraps(train)
def train_and_tell(trainer, *args, **kwargs):
    output = train(trainer, *args, **kwargs)
    world = trainer.accelerator.num_processes
    if mode != "single":
        assert_engaged(trainer, mode, 2)
    replayed = [line["replay/fraction"] for line in trainer.state.log_history if "replay/fraction" in line]
    engaged = {"num_processes": world, "replayed": replayed, "step": trainer.state.global_step}
    (Path(folder) / f"engaged-{trainer.accelerator.process_index}.json").write_text(json.dumps(engaged))
    return output


ExGRPOTrainer.train = train_and_tell
sys.argv = [script, *arguments]
sys.path.insert(0, str(Path(script).parent))
runpy.run_path(script, run_name="__main__")
