"""
Does replay learn more? GRPO and ExGRPO on hidden operations, through the trainers that users have.

    python -m benchmarks.learning --stage tune       # learning rates, on seeds that are not used again: 54 runs
    python -m benchmarks.learning --stage compare    # every setting, method and seed: 105 runs
    python -m benchmarks.learning --stage ablate     # what makes the difference on the bimodal task: 27 runs
    python -m benchmarks.learning --stage check      # GRPO at the learning rate of the balanced weighting: 15 runs
    python -m benchmarks.learning --stage extend     # 600 steps where the curves still rise at 300: 15 runs
    python -m benchmarks.learning --stage report     # tables, plots and targets of what is there
    python -m benchmarks.learning --stage short      # three runs of 125 steps and their report

Every finished run is a file in `benchmarks/results/learning`, and a run whose file is there is not made again: a stage
that was stopped goes on where it was. `--jobs 2` makes two runs at a time, each with one thread; a run takes about one
and a half minutes.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: more threads are slower for models of this size
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not __package__:  # run as a file: this folder would come first, and its profile.py would hide Python's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor, as_completed

import numpy as np

from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.learning_report import report
from benchmarks.learning_run import EQUAL_TIME_STEPS, EXTENDED_STEPS, METHODS, SETTINGS, Run, finish, warm_up_folder
from benchmarks.learning_summary import COMPARED
from benchmarks.report import RESULTS, ROOT

TUNED = ("bimodal", "even-0.97")
# Where the learning rate of a setting was chosen: the tuned setting that is closer in how many groups teach something.
TUNED_ON = {
    "bimodal": "bimodal",
    "even": "bimodal",
    "even-0.5": "bimodal",
    "even-0.9": "even-0.97",
    "even-0.97": "even-0.97",
}
# The first four were fixed before any run. Where the lowest was the best, a lower one was added for all methods alike.
LEARNING_RATES = {"bimodal": (1e-4, 3e-4, 6e-4, 1e-3), "even-0.97": (1e-4, 3e-4, 6e-4, 1e-3, 3e-5)}
TUNING_SEEDS = (100, 101)
TUNING_RESULTS = RESULTS / "learning"


def tuning_runs() -> list[Run]:
    """Two seeds for each learning rate and method, on the two settings that lie furthest apart."""
    return [
        Run(setting, method, learning_rate, seed)
        for setting in TUNED
        for learning_rate in LEARNING_RATES[setting]
        for method in COMPARED
        for seed in TUNING_SEEDS
    ]


def best_learning_rate(setting: str, method: str) -> float:
    """The one of highest mean held-out pass@1 at the end of the tuning runs."""
    means = {}
    for learning_rate in LEARNING_RATES[setting]:
        files = [Run(setting, method, learning_rate, seed).file(TUNING_RESULTS) for seed in TUNING_SEEDS]
        if missing := [file.name for file in files if not file.exists()]:
            raise FileNotFoundError(f"Run --stage tune first: {missing} are not there.")
        means[learning_rate] = np.mean([json.loads(file.read_text())["curve"][-1]["pass_at_1"] for file in files])
    return max(means, key=lambda learning_rate: means[learning_rate])


def compared_runs() -> list[Run]:
    """GRPO, the paper's weighting and the balanced one in every setting; two warm-ups where tuned, one elsewhere."""
    # Seed by seed, so that a stage that was stopped has something to say about every setting.
    return [
        Run(setting, method, best_learning_rate(TUNED_ON[setting], method), seed, warm_up)
        for seed in range(5)
        for setting in SETTINGS
        for warm_up in ((0, 1) if setting in TUNED else (0,))
        for method in COMPARED
    ]


def ablated_runs() -> list[Run]:
    """Three seeds of everything else on the bimodal task, with the learning rate of the balanced weighting or GRPO."""
    # For a comparison at equal wall-clock: read where it has taken as long as the others.
    learning_rate = best_learning_rate("bimodal", "grpo")
    longer = [Run("bimodal", "grpo", learning_rate, seed, steps=EQUAL_TIME_STEPS) for seed in range(3)]
    others = [method for method in METHODS if method not in COMPARED]
    tuned_as = {method: "grpo" if method.startswith("grpo") else "balanced" for method in others}
    return longer + [
        Run("bimodal", method, best_learning_rate("bimodal", tuned_as[method]), seed)
        for method in others
        for seed in range(3)
    ]


def checked_runs() -> list[Run]:
    """GRPO at the learning rate of the balanced weighting, where tuning chose another: two tuning seeds are few."""
    settings = [setting for setting in SETTINGS if TUNED_ON[setting] == "bimodal"]
    learning_rate = best_learning_rate("bimodal", "balanced")
    return [Run(setting, "grpo", learning_rate, seed) for setting in settings for seed in range(5)]


def extended_runs() -> list[Run]:
    """Even-0.9 for longer, where all curves still rise at the end of the comparison."""
    return [
        Run("even-0.9", method, best_learning_rate(TUNED_ON["even-0.9"], method), seed, steps=EXTENDED_STEPS)
        for seed in range(5)
        for method in COMPARED
    ]


def short_runs() -> list[Run]:
    """One seed of each compared method on bimodal, not half as long."""
    return [Run("bimodal", method, best_learning_rate("bimodal", method), 0, steps=125) for method in COMPARED]


STAGES = {
    "tune": tuning_runs,
    "compare": compared_runs,
    "ablate": ablated_runs,
    "check": checked_runs,
    "extend": extended_runs,
    "short": short_runs,
}


def make_runs(runs: list[Run], folder: Path, jobs: int) -> None:
    """Make the runs whose files are not there."""
    start = time.perf_counter()
    missing = [run for run in runs if not run.file(folder).exists()]
    print(f"{len(runs) - len(missing)} of {len(runs)} runs are there.", flush=True)
    # Before the runs, so that no two of them make the same one.
    warm_ups = sorted({(SETTINGS[run.setting][0], run.warm_up) for run in missing})
    with ThreadPoolExecutor(jobs) as at_a_time:
        try:
            list(at_a_time.map(lambda warm_up: in_a_fresh_process(warm_up_folder, warm_up), warm_ups))
            lines = [at_a_time.submit(in_a_fresh_process, finish, run, folder) for run in missing]
            for number, line in enumerate(as_completed(lines), 1):
                print(f"[{number}/{len(missing)}, {time.perf_counter() - start:.0f} s] {line.result()}", flush=True)
        except BaseException:
            at_a_time.shutdown(cancel_futures=True)  # no run begins after one that failed
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=[*STAGES, "report"], required=True)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments = parser.parse_args()
    is_short = arguments.stage == "short"
    folder = ROOT / "outputs" / "benchmarks" / "learning" if is_short else TUNING_RESULTS
    if arguments.stage != "report":
        make_runs(STAGES[arguments.stage](), folder, arguments.jobs)
    if is_short:
        report(short_runs(), [], folder, folder.with_suffix(".json"), plots=folder)
    elif arguments.stage == "report":
        report(
            compared_runs() + ablated_runs() + checked_runs() + extended_runs(),
            tuning_runs(),
            folder,
            folder.with_suffix(".json"),
            plots=ROOT / "docs" / "images",
        )


if __name__ == "__main__":
    main()
