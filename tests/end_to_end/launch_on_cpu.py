"""
Runs a script as the launcher starts it, but on the CPU, and writes down what was really running.

    accelerate launch --config_file CONFIG launch_on_cpu.py MODE FOLDER SCRIPT ARGUMENTS

After `train()` every process checks that the mode is engaged and writes `FOLDER/engaged-RANK.json`. With DDP it checks
at the end that no thread of Gloo is left, which may abort it while Python ends; FSDP2 and DeepSpeed keep theirs.
"""

import functools
import gc
import importlib
import importlib.util
import json
import runpy
import sys
from pathlib import Path

from ranks import assert_engaged, skip_compiled_communication, use_real_backends

mode, folder, script, *arguments = sys.argv[1:]
use_real_backends()
if mode.startswith("zero"):
    skip_compiled_communication()
if mode == "ddp":
    # Both have `group=WORLD` as default arguments. Imported when there is a group, they hold it to the end of Python.
    for name in ("torch.distributed.nn.functional", "deepspeed.comm.torch"):
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)

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

gc.collect()  # the trainer, which holds the group
if mode == "ddp":
    left = [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]
    assert not left, "something holds the process group"
