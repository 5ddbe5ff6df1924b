"""
Does replay help an agent? GRPO and ExGRPO in the environment of `examples/train_agent.py`.

    python -m benchmarks.agents                      # every method with five seeds: 15 runs
    python -m benchmarks.agents --methods grpo       # those of one method
    python -m benchmarks.agents --short              # one seed and 40 steps of each
    python -m benchmarks.agents --merge              # takes the finished runs into benchmarks/results/agents.parquet
    python -m benchmarks.agents --report             # the table of what is in that file

Held-out success is measured every 20 steps, beside the steps taken in the environment (calls of tools and resets) and
the seconds of the training. Every finished run is a file in `outputs/benchmarks/agents`. A run whose file is there or
that is in `benchmarks/results/agents.parquet` is not made again; to measure everything anew, delete both. `--jobs 2`
makes two runs at a time, each with one thread.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads are slower for models of this size
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import argparse
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

from benchmarks.agents.records import RECORDED, SINGLE_RUNS, Made, made, merge, read
from benchmarks.agents.run import METHODS, SHORT_STEPS, Run, finish, imitation_folder
from benchmarks.agents.summary import COLUMNS, summarized, table_rows
from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.report import Target, show, show_targets, write_json
from examples.train_agent import DEFAULTS

SEEDS = range(5)


def runs_of(methods: list[str], learning_rate: float, is_short: bool) -> list[Run]:
    """Seed by seed, so that a benchmark that was stopped has something to say about every method."""
    if is_short:
        return [Run(method, learning_rate, 0, SHORT_STEPS) for method in methods]
    return [Run(method, learning_rate, seed) for seed in SEEDS for method in methods]


def make_runs(runs: list[Run], jobs: int) -> None:
    """Make the runs that have not been made."""
    start, there = time.perf_counter(), made()
    missing = [run for run in runs if run not in there]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there.", flush=True)
    with ThreadPoolExecutor(jobs) as at_a_time:
        try:
            # Before the runs, so that no two of them make the same one.
            seeds = sorted({run.seed for run in missing})
            list(at_a_time.map(lambda seed: in_a_fresh_process(imitation_folder, seed), seeds))
            lines = [at_a_time.submit(in_a_fresh_process, finish, run, SINGLE_RUNS) for run in missing]
            for number, line in enumerate(as_completed(lines), 1):
                print(f"[{number}/{len(missing)}, {time.perf_counter() - start:.0f} s] {line.result()}", flush=True)
        except BaseException:
            at_a_time.shutdown(cancel_futures=True)  # no run begins after one that failed
            raise


def report(runs: list[Run], there: Made) -> None:
    """Print the table of the runs that have been made, and write their summary."""
    content = summarized(runs, there)
    if not content["results"]:
        raise SystemExit("None of the runs has been made.")
    show(f"Held-out mazes, {runs[0].steps} steps", COLUMNS, table_rows(content["results"]))
    if content["targets"]:
        show_targets([Target(**target) for target in content["targets"]])
    write_json(SINGLE_RUNS.with_suffix(".json"), content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--short", action="store_true", help="one seed and few steps")
    action.add_argument("--merge", action="store_true", help="take the finished runs into the file that is reported")
    action.add_argument("--report", action="store_true", help="show the runs in that file")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--learning_rate", type=float, default=DEFAULTS["learning_rate"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    runs = runs_of(arguments.methods, arguments.learning_rate, arguments.short)
    if arguments.merge:
        print(f"{merge()} runs of {SINGLE_RUNS} taken into {RECORDED}")
    elif arguments.report:
        report(runs, read())
    else:
        make_runs(runs, arguments.jobs)
        report(runs, made())


if __name__ == "__main__":
    main()
