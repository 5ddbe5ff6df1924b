"""Real vLLM on a CPU: a server in a process of its own, and engines within the trainer."""

import functools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ranks import free_port
from tiny import save_tiny_model, tiny_tokenizer

# Without these, vLLM looks for a network address, pins its threads and reserves gigabytes.
ENVIRONMENT = {
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_LOOPBACK_IP": "127.0.0.1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}
MAX_LENGTH = 128


def save_vllm_model(folder: Any) -> None:
    """Save a tiny model and its tokenizer; heads of 32, the least that vLLM computes on a CPU."""
    save_tiny_model(folder, hidden_size=64, initializer_range=0.15)
    tiny_tokenizer().save_pretrained(folder)


class Server:
    """
    A vLLM server on loopback, with what it counts itself.

    Args:
        model: Folder of the model.
        log: File for its output.
        max_length: Tokens of prompt and completion at most.
    """

    def __init__(self, model: Any, log: Path, max_length: int = MAX_LENGTH) -> None:
        self.port = free_port()
        self.url, self.log = f"http://127.0.0.1:{self.port}", log
        command = [
            *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"),
            *("--max-model-len", str(max_length), "--max-num-seqs", "32"),
            *("--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"),
            *("--worker-extension-cls", "reload_on_cpu.ReloadOnCPU"),
        ]
        environment = os.environ | ENVIRONMENT
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parent)}
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout: float = 240) -> None:
        """Return once it answers."""
        end = time.monotonic() + timeout
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5)
                return
            except OSError:
                assert self.process.poll() is None, f"the server ended\n{self.log.read_text()[-8000:]}"
                assert time.monotonic() < end, f"no server after {timeout} s\n{self.log.read_text()[-8000:]}"
                time.sleep(0.5)

    def counts(self) -> dict[str, int]:
        """Since the start: HTTP requests for completions, sequences finished, tokens of prompts and of completions."""
        text = urllib.request.urlopen(f"{self.url}/metrics", timeout=30).read().decode()

        def total(name: str, *labels: str) -> int:
            lines = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
            return round(sum(float(value) for found, value in lines if all(label in found for label in labels)))

        return {
            "http": total("http_requests_total", 'handler="/v1/completions"'),
            "sequences": total("vllm:request_success_total"),
            "prompt_tokens": total("vllm:prompt_tokens_total"),
            "generated_tokens": total("vllm:generation_tokens_total"),
        }

    def stop(self) -> None:
        """End it with all of its workers."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def use_file_transport() -> Any:
    """
    Let TRL's client send weights through a file and `/collective_rpc`; NCCL needs GPUs. The rest stays TRL's.

    Releases of TRL below 1.11 talk to a server of their own; there, the client speaks to vLLM's server instead.

    Returns:
        The class of the client; `asked` lists the number of prompts and of completions for each, by request.
    """
    import trl.generation.vllm_generation as module
    from safetensors.torch import save_file
    from trl.generation.vllm_client import VLLMClient

    has_own_server = not hasattr(VLLMClient, "_post")

    class FileClient(VLLMClient):
        asked: list[tuple[int, int]] = []

        def init_communicator(self, *args: Any, **kwargs: Any) -> None:
            self.folder = tempfile.TemporaryDirectory(prefix="weights")
            self.parameters: dict[str, torch.Tensor] = {}

        def post(self, path: str, **body: Any) -> Any:
            response = self.session.post(f"{self.base_url}/{path}", json=body)
            assert response.status_code == 200, f"{path}: {response.status_code} {response.text}"
            return response.json() if response.content else None

        def update_named_param(self, name: str, weights: torch.Tensor) -> None:
            self.parameters[name] = weights.detach().cpu().contiguous().clone()

        def update_named_params(self, metadata: Any, named_params: Any) -> None:
            for name, parameter in named_params:
                self.update_named_param(name, parameter)
            announced = [(name, f"torch.{dtype}", tuple(shape)) for name, dtype, shape in metadata]
            assert [(name, str(p.dtype), tuple(p.shape)) for name, p in self.parameters.items()] == announced

        def reset_prefix_cache(self) -> None:
            save_file(self.parameters, os.path.join(self.folder.name, "model.safetensors"))
            self.post("collective_rpc", method="reload_from", kwargs={"folder": self.folder.name})
            self.post("reset_prefix_cache")

        def generate(self, prompts: Any, *args: Any, n: int = 1, **kwargs: Any) -> Any:
            self.asked.append((len(prompts), n))
            if not has_own_server:
                return super().generate(prompts, *args, n=n, **kwargs)
            options = {name: kwargs[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "logprobs")}
            options |= {"return_token_ids": True, **kwargs["generation_kwargs"]}
            choices = self.post("v1/completions", prompt=prompts, n=n, **options)["choices"]
            return {
                "prompt_ids": [choice["prompt_token_ids"] for choice in choices[::n]],
                "completion_ids": [choice["token_ids"] for choice in choices],
                "logprobs": [[[value] for value in choice["logprobs"]["token_logprobs"]] for choice in choices],
            }

    module.VLLMClient = FileClient
    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: 0  # TRL 1.0 asks for it
    return FileClient


@functools.cache
def use_engines_on_cpu(shared: bool = True) -> None:
    """
    Let engines take new weights in place: on a CPU, vLLM packs them for its matrix product and forgets them.

    Args:
        shared: Make one engine for each model folder, because a start takes seconds.
    """
    os.environ.update(ENVIRONMENT)
    os.environ.setdefault("MASTER_PORT", str(free_port()))  # TRL would take the same one in every run of tests
    import trl.generation.vllm_generation as module
    import vllm.model_executor.layers.utils as layers

    def plain(layer: Any, remove_weight: bool) -> None:
        layer.cpu_linear = torch.nn.functional.linear

    layers.dispatch_cpu_unquantized_gemm = plain
    use_shared_memory_of_its_own()
    make_engine, engines = module.LLM, {}

    def make_on_cpu(model: str, **options: Any) -> Any:
        if model not in engines or not shared:
            options |= {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 32}
            engines[model] = make_engine(model=model, **options)
        return engines[model]

    module.LLM = make_on_cpu


@functools.cache
def use_llava_on_cpu() -> None:
    """Let vLLM load a LLaVA without torchvision, which Pixtral alone needs, by the names of its newest parameters."""
    name = "vllm.model_executor.models.pixtral"
    parts = ("PixtralHFEncoderInfo", "PixtralHFVisionModel", "PixtralVisionConfig")
    sys.modules.setdefault(name, types.ModuleType(name)).__dict__.update({part: type(part, (), {}) for part in parts})
    from vllm import ModelRegistry
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    prefixes = LlavaForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix
    ours = {f"{before}vision_tower.": "vision_tower.vision_model." for before in ("model.", "")}
    LlavaForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix = ours | prefixes
    # A class, so that no process without the above looks at it.
    ModelRegistry.register_model("LlavaForConditionalGeneration", LlavaForConditionalGeneration)


def use_shared_memory_of_its_own() -> None:
    """
    Keep tensor parallel engines of other processes apart.

    Within a trainer, vLLM gives the shared memory of all engines the same name, refuses a name that is taken, and
    frees it when Python ends, which a rank of a test never sees.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as SharedMemory

    make_name, start = SharedMemory.make_group_name, SharedMemory._init_cpu_shm

    def make_own_name(communicator: Any) -> str:
        return f"{os.environ['MASTER_PORT']}-{make_name(communicator).lstrip('/')}"

    def start_and_free_name(self: Any) -> int:
        handle = start(self)  # returns when all ranks have opened the memory of all
        Path("/dev/shm", f"{self.group_name}_{self.communicator.rank}").unlink(missing_ok=True)
        return handle

    SharedMemory.make_group_name, SharedMemory._init_cpu_shm = staticmethod(make_own_name), start_and_free_name


@contextmanager
def counted_engine(engine: Any) -> Iterator[list[list[int]]]:
    """Prompts that reach an engine, or the client of a server, within the block, one per sequence."""
    asked: list[list[int]] = []
    generate = engine.generate

    def counted(prompts: Any, *args: Any, **kwargs: Any) -> Any:
        ids = [prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt for prompt in prompts]
        asked.extend(of_one for of_one in ids for _ in range(kwargs.get("n", 1)))
        return generate(prompts, *args, **kwargs)

    engine.generate = counted
    try:
        yield asked
    finally:
        del engine.generate
