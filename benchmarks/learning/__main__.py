"""
Does replay learn more? GRPO and ExGRPO on hidden operations, through the trainers that users have.

    python -m benchmarks.learning --stage tune       # learning rates, on seeds that are not used again: 54 runs
    python -m benchmarks.learning --stage compare    # every setting, method and seed: 105 runs
    python -m benchmarks.learning --stage ablate     # what makes the difference on the bimodal task: 27 runs
    python -m benchmarks.learning --stage check      # GRPO at the learning rate of the balanced weighting: 15 runs
    python -m benchmarks.learning --stage extend     # 600 steps where the curves still rise at 300: 15 runs
    python -m benchmarks.learning --merge            # takes the finished runs into benchmarks/results/learning.parquet
    python -m benchmarks.learning --stage report     # tables, plots and targets of what is in that file
    python -m benchmarks.learning --stage short      # three runs of 125 steps and their report

Every finished run is a file in `outputs/benchmarks/learning`. A run whose file is there or that is in
`benchmarks/results/learning.parquet` is not made again: a stage that was stopped goes on where it was. To measure
everything anew, delete both. `--jobs 2` makes two runs at a time, each with one thread; a run takes about one and a
half minutes.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads are slower for models of this size
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse

from benchmarks.learning.records import RECORDED, SINGLE_RUNS, made, merge, read
from benchmarks.learning.report import report
from benchmarks.learning.stages import STAGES, make_runs, reported_runs, tuning_runs
from benchmarks.report import IMAGES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--stage", choices=[*STAGES, "report"])
    action.add_argument("--merge", action="store_true", help="take the finished runs into the file that is reported")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    if arguments.merge:
        print(f"{merge()} runs of {SINGLE_RUNS} taken into {RECORDED}")
    elif arguments.stage == "report":
        recorded = read(RECORDED)
        report(reported_runs(recorded), tuning_runs(), recorded, plots=IMAGES)
    else:
        runs = STAGES[arguments.stage](made())
        make_runs(runs, SINGLE_RUNS, arguments.jobs, recorded=read(RECORDED))
        if arguments.stage == "short":
            report(runs, [], made(), SINGLE_RUNS.with_suffix(".json"), plots=SINGLE_RUNS)


if __name__ == "__main__":
    main()
