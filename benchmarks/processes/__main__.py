"""
What replay costs on several processes: seconds per step of its parts, beside TRL's own step.

    python -m benchmarks.processes --output benchmarks/results/processes.json

On each process, `trl.GRPOTrainer` and `ExGRPOTrainer` train the same model with the same batch, one after the other in
alternating order; every process has `--rows` completions, so the batch grows with the number of processes. Runs on CPU
cores with gloo. Where there are more processes than cores, the steps of both trainers slow down; compare the ratios.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.processes.measure import PARTS, WARM_UP, measure
from benchmarks.report import ROOT, write_json

sys.path.insert(0, str(ROOT / "tests" / "end_to_end"))  # its real processes and tiny models


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
    write_json(arguments.output, {"settings": chosen, "machine": machine, "runs": measured})

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
