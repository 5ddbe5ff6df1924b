"""The runs of each stage of the learning benchmark, and making them."""

import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np

from benchmarks.fresh_process import in_a_fresh_process
from benchmarks.learning.records import Made
from benchmarks.learning.run import (
    EQUAL_TIME_STEPS,
    EXTENDED_STEPS,
    METHODS,
    SAVING,
    SETTINGS,
    SHORT_STEPS,
    Run,
    finish,
    warm_up_folder,
)
from benchmarks.learning.summary import COMPARED

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


def tuning_runs() -> list[Run]:
    """Two seeds for each learning rate and method, on the two settings that lie furthest apart."""
    return [
        Run(setting, method, learning_rate, seed)
        for setting in TUNED
        for learning_rate in LEARNING_RATES[setting]
        for method in COMPARED
        for seed in TUNING_SEEDS
    ]


def best_learning_rate(setting: str, method: str, made: Made) -> float:
    """The one of highest mean held-out pass@1 at the end of the tuning runs."""
    means = {}
    for learning_rate in LEARNING_RATES[setting]:
        runs = [Run(setting, method, learning_rate, seed) for seed in TUNING_SEEDS]
        if missing := [run for run in runs if run not in made]:
            raise FileNotFoundError(f"Run --stage tune first, and --merge for a report: {missing} are not there.")
        means[learning_rate] = np.mean([made[run]["curve"][-1]["pass_at_1"] for run in runs])
    return max(means, key=lambda learning_rate: means[learning_rate])


def compared_runs(made: Made) -> list[Run]:
    """GRPO, the paper's weighting and the balanced one in every setting; two warm-ups where tuned, one elsewhere."""
    # Seed by seed, so that a stage that was stopped has something to say about every setting.
    return [
        Run(setting, method, best_learning_rate(TUNED_ON[setting], method, made), seed, warm_up)
        for seed in range(5)
        for setting in SETTINGS
        for warm_up in ((0, 1) if setting in TUNED else (0,))
        for method in COMPARED
    ]


def ablated_runs(made: Made) -> list[Run]:
    """Three seeds of everything else on the bimodal task, with the learning rate of the balanced weighting or GRPO."""
    # For a comparison at equal wall-clock: read where it has taken as long as the others.
    learning_rate = best_learning_rate("bimodal", "grpo", made)
    longer = [Run("bimodal", "grpo", learning_rate, seed, steps=EQUAL_TIME_STEPS) for seed in range(3)]
    others = [method for method in METHODS if method not in (*COMPARED, *SAVING)]
    tuned_as = {method: "grpo" if method.startswith("grpo") else "balanced" for method in others}
    return longer + [
        Run("bimodal", method, best_learning_rate("bimodal", tuned_as[method], made), seed)
        for method in others
        for seed in range(3)
    ]


def checked_runs(made: Made) -> list[Run]:
    """GRPO at the learning rate of the balanced weighting, where tuning chose another: two tuning seeds are few."""
    settings = [setting for setting in SETTINGS if TUNED_ON[setting] == "bimodal"]
    learning_rate = best_learning_rate("bimodal", "balanced", made)
    return [Run(setting, "grpo", learning_rate, seed) for setting in settings for seed in range(5)]


def extended_runs(made: Made) -> list[Run]:
    """Even-0.9 for longer, where all curves still rise at the end of the comparison."""
    return [
        Run("even-0.9", method, best_learning_rate(TUNED_ON["even-0.9"], method, made), seed, steps=EXTENDED_STEPS)
        for seed in range(5)
        for method in COMPARED
    ]


def saving_runs(made: Made) -> list[Run]:
    """Ways to save, at the learning rate of the balanced weighting; seed by seed."""
    return [
        Run(setting, method, best_learning_rate(TUNED_ON[setting], "balanced", made), seed)
        for seed in range(5)
        for setting in ("bimodal", "even-0.9")
        for method in SAVING
    ]


def short_runs(made: Made) -> list[Run]:
    """One seed of each compared method on bimodal, not half as long."""
    return [
        Run("bimodal", method, best_learning_rate("bimodal", method, made), 0, steps=SHORT_STEPS)
        for method in COMPARED
    ]


def reported_runs(made: Made) -> list[Run]:
    """What the report is about, besides the tuning."""
    return compared_runs(made) + ablated_runs(made) + checked_runs(made) + extended_runs(made)


STAGES: dict[str, Callable[[Made], list[Run]]] = {
    "tune": lambda made: tuning_runs(),
    "compare": compared_runs,
    "ablate": ablated_runs,
    "check": checked_runs,
    "extend": extended_runs,
    "save": saving_runs,
    "short": short_runs,
}


def make_runs(runs: list[Run], folder: Path, jobs: int, recorded: Collection[Run] = ()) -> None:
    """Make the runs whose files are not there and that are not recorded elsewhere."""
    start = time.perf_counter()
    missing = [run for run in runs if run not in recorded and not run.file(folder).exists()]
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
