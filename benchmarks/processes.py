"""
What replay costs on several processes: seconds per step of its parts, beside TRL's own step.

    python benchmarks/processes.py --output benchmarks/results/processes.json

On each process, `trl.GRPOTrainer` and `ExGRPOTrainer` train the same model with the same batch, one after the other in
alternating order; every process has `--rows` completions, so the batch grows with the number of processes. Runs on CPU
cores with gloo. Where there are more processes than cores, the steps of both trainers slow down; compare the ratios.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "tests" / "end_to_end")  # not this folder: its profile.py would hide Python's

PARTS = ("selection", "scoring", "gathering", "broadcasting")
WARM_UP = 4  # steps: nothing is replayed in the first, and caches fill


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--rows", type=int, default=16, help="completions of a process in a batch")
    parser.add_argument("--steps", type=int, default=8, help=f"steps of a run, besides {WARM_UP} to warm up")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size of the four-layer model")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/processes.json"))
    return parser.parse_args()


def even_reward(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """1 for completions that begin with an even token: about half of a random model's."""
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def train(name: str, mode_options: dict[str, Any], chosen: dict[str, Any], seed: int) -> list[dict[str, Any]]:
    """Log lines of one run, without those of the warm-up."""
    import torch
    from ranks import assert_engaged
    from tiny import make_trainer, tiny_dataset, tiny_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOTrainer

    torch.manual_seed(seed)
    hidden = chosen["hidden"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tiny_tokenizer()), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            initializer_range=0.02,
        )
    )  # fmt: skip
    options: dict[str, Any] = {
        "model": model,
        "train_dataset": tiny_dataset(64),
        "reward_funcs": even_reward,
        "per_device_train_batch_size": chosen["rows"],
        "num_generations": 8,
        "max_completion_length": chosen["length"],
        "max_steps": WARM_UP + chosen["steps"],
        "learning_rate": 1e-5,
        "seed": seed,
    }
    if name == "exgrpo":
        options |= {"retire_solved": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, GRPOTrainer if name == "grpo" else None, **mode_options | options)
        trainer.train()
        if chosen["world"] > 1:
            assert_engaged(trainer, "ddp", chosen["world"])
    return [line for line in trainer.state.log_history if "step_time" in line][WARM_UP:]


def measure(mode: str, mode_options: dict[str, Any], chosen: dict[str, Any], folder: str) -> None:
    """Seconds per step of each trainer and part, on the main process."""
    rank = int(os.environ["RANK"])
    results = []
    for seed in range(chosen["seeds"]):
        order = ("grpo", "exgrpo") if seed % 2 == 0 else ("exgrpo", "grpo")
        with contextlib.redirect_stdout(None):
            lines = {name: train(name, mode_options, chosen, seed) for name in order}
        if rank > 0:
            continue  # the main process describes replay
        assert all(line["replay/fraction"] > 0 for line in lines["exgrpo"])
        result = {name: mean(line["step_time"] for line in lines[name]) for name in lines}
        result |= {part: mean(line[f"replay/{part}_seconds"] for line in lines["exgrpo"]) for part in PARTS}
        result["candidates_scored"] = mean(line["replay/candidates_scored"] for line in lines["exgrpo"])
        results.append(result)
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))


def main() -> None:
    from ranks import run_ranks
    from rich.console import Console
    from rich.table import Table

    arguments = parse_arguments()
    chosen = {name: getattr(arguments, name) for name in ("rows", "steps", "seeds", "hidden", "length")}
    measured: dict[int, list[dict[str, float]]] = {}
    for world in arguments.processes:
        with tempfile.TemporaryDirectory() as folder:
            run_ranks(measure, chosen | {"world": world}, folder, folder=folder, world=world, timeout=3600)
            measured[world] = json.loads(Path(folder, "results.json").read_text())
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.platform(),
        "python": platform.python_version(),
    } | {package: version(package) for package in ("torch", "trl", "transformers", "accelerate", "exgrpo-trl")}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"settings": chosen, "machine": machine, "runs": measured}, indent=1))

    table = Table(title=f"Seconds per step, mean of {arguments.seeds} runs (lowest to highest)")
    columns = ("processes", "GRPO", "ExGRPO", "ratio", *PARTS, "candidates")
    for column in columns:
        table.add_column(column, justify="right")
    for world, runs in measured.items():
        ratios = [run["exgrpo"] / run["grpo"] for run in runs]
        cells = [f"{mean(run[name] for run in runs):.3f}" for name in ("grpo", "exgrpo")]
        cells.append(f"{mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
        cells += [f"{mean(run[part] for run in runs):.4f}" for part in PARTS]
        cells.append(f"{mean(run['candidates_scored'] for run in runs):.0f}")
        table.add_row(str(world), *cells)
    console = Console(width=130)
    console.print(table)
    console.print(f"{machine['cores']} cores, {machine['machine']}, trl {machine['trl']}, torch {machine['torch']}")
    console.print(f"Written to {arguments.output}")


if __name__ == "__main__":
    main()
