"""Real processes on one machine: gloo, and the DDP, FSDP2 and DeepSpeed code of accelerate, on the CPU."""

import faulthandler
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import time
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

PRELOADED = [
    "torch",
    "torch.distributed",
    "datasets",
    "peft",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "trl.trainer.grpo_trainer",
    "exgrpo_trl.trainer",
    "tiny",
    "frozen",
]

_NATIVE = {"ACCELERATE_TORCH_DEVICE": "cpu", "ACCELERATE_MIXED_PRECISION": "no"}
_FSDP2 = _NATIVE | {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}


def _zero(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
    }


# Environment of the ranks and arguments of the config, by mode. `use_cpu` would turn FSDP2 and ZeRO into DDP silently.
MODES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "ddp": (_NATIVE | {"ACCELERATE_USE_CPU": "true"}, {}),
    "fsdp2": (_FSDP2, {"use_cpu": False, "ddp_backend": "gloo"}),
    "zero2": (_NATIVE, {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": _zero(2)}),
    "zero3": (_NATIVE, {"use_cpu": False, "ddp_backend": "gloo", "deepspeed": _zero(3)}),
}


def skip_unless_trainable(mode: str, lora: bool) -> None:
    """Skip what plain GRPO cannot do on an old transformers release with the torch of these tests."""
    if lora and mode != "ddp" and Version(transformers.__version__) < Version("5"):
        pytest.skip(
            f"transformers {transformers.__version__} cannot train LoRA with {mode} on torch {torch.__version__}"
        )


def use_real_backends() -> None:
    """Let accelerate take its FSDP and DeepSpeed paths on a CPU: it looks for a GPU to choose a backend."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = PartialState._prepare_backend

    def prepare_backend(self: Any, *args: Any, **kwargs: Any) -> Any:
        backend, distributed_type = original(self, *args, **kwargs)
        if distributed_type == DistributedType.NO and int(os.environ.get("LOCAL_RANK", -1)) != -1:
            return "gloo", DistributedType.MULTI_GPU
        return backend, distributed_type

    PartialState._prepare_backend = prepare_backend


def skip_compiled_communication() -> None:
    """DeepSpeed's shared-memory communication is compiled for minutes at the first start; gloo does as well."""
    import deepspeed.comm.torch  # noqa: F401

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # the attribute of that name is torch itself


def assert_engaged(trainer: Any, mode: str, num_processes: int) -> None:
    """A mode that fell back looks like success: check what is really running."""
    from accelerate.utils import DistributedType

    accelerator, wrapped = trainer.accelerator, trainer.model_wrapped
    assert accelerator.num_processes == num_processes, accelerator.num_processes
    if mode == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        assert accelerator.distributed_type in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
        assert isinstance(wrapped, DistributedDataParallel)
    elif mode == "fsdp2":
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        assert accelerator.distributed_type == DistributedType.FSDP
        assert any(isinstance(module, FSDPModule) for module in trainer.model.modules())
        assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    else:
        import deepspeed

        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        assert isinstance(wrapped, deepspeed.DeepSpeedEngine)
        assert wrapped.zero_optimization_stage() == int(mode[-1])
        is_partitioned = [hasattr(parameter, "ds_tensor") for parameter in trainer.model.parameters()]
        assert all(is_partitioned) if mode == "zero3" else not any(is_partitioned)


def whole_parameters(trainer: Any) -> dict[str, Any]:
    """Copies of all trained parameters by name, gathered from all processes."""
    parameters = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "full_tensor"):
            whole = parameter.full_tensor()
        elif hasattr(parameter, "ds_tensor"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                whole = parameter.detach().clone()
        else:
            whole = parameter
        parameters[name.replace("_checkpoint_wrapped_module.", "")] = whole.detach().clone()
    return parameters


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def forked() -> ForkServerContext:
    """
    The context of processes that are forked from a server, which has imported everything and made the tiny model.

    Whoever asks first starts it. Until Python 3.13 it has a path of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        multiprocessing.forkserver.ensure_running()
    return context


def _child(rank: int, world: int, port: int, mode: str, folder: str, function: Any, arguments: tuple) -> None:
    with open(Path(folder) / f"rank{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        faulthandler.enable()
        # What cannot be preloaded is left out silently.
        assert gc.get_freeze_count(), "the server that forked this process has not imported all of PRELOADED"
        environment, options = MODES[mode]
        os.environ.update(
            environment,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world),
            LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        use_real_backends()
        if mode.startswith("zero"):
            skip_compiled_communication()
        try:
            function(mode, dict(options), *arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)


class Ranks:
    """
    Processes that run a function; each process writes its output to `folder/rankN.log`.

    They are [`forked`], so a start takes a moment.
    """

    def __init__(self, function: Any, arguments: tuple, folder: Any, mode: str = "ddp", world: int = 2) -> None:
        context = forked()
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.folder, port = Path(folder), free_port()
        self.processes = [
            context.Process(target=_child, args=(rank, world, port, mode, str(folder), function, arguments))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; kills what is left after `timeout` seconds and fails."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hung = [process.is_alive() for process in self.processes]
        self.kill()
        assert not any(hung), f"processes {hung} hung for {timeout} s\n{self.logs()}"
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """SIGKILL for all that are alive."""
        for process in self.processes:
            if process.is_alive():
                process.kill()
        for process in self.processes:
            process.join()

    def logs(self) -> str:
        """What the processes printed."""
        return "\n".join(path.read_text()[-6000:] for path in sorted(self.folder.glob("rank*.log")))


def run_ranks(
    function: Any, *arguments: Any, folder: Any, mode: str = "ddp", world: int = 2, timeout: float = 120
) -> None:
    """Run `function(mode, options, *arguments)` on real processes, and fail with their output if one fails."""
    ranks = Ranks(function, arguments, folder, mode, world)
    codes = ranks.wait(timeout)
    assert codes == [0] * world, ranks.logs()
