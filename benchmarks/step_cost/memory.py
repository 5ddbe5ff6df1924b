"""Peak memory of a training."""

import tempfile
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.step_cost.steps import Method, Size, make_trainer


def peak_memory(size: Size, method: Method, steps: int) -> float:
    """GiB of resident memory at the most, of a process that takes a few steps. Call it in a process of its own."""
    transformers_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(size, method, steps, folder).train()
    # Not `ru_maxrss`: it begins with the memory of the process that started this one.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20


def measure_memory(size: Size, methods: list[Method], repetitions: int) -> dict[str, list[float]]:
    """Peak memory by method, in turn."""
    peaks: dict[str, list[float]] = {str(method): [] for method in methods}
    for _ in range(repetitions):
        for method in methods:
            peaks[str(method)].append(in_a_fresh_process(peak_memory, size, method, 2))
    return peaks
