"""Tables and pictures of the learning benchmark, and the file of its summary."""

from pathlib import Path

from benchmarks.learning.pictures import draw_all
from benchmarks.learning.records import Made
from benchmarks.learning.run import Run
from benchmarks.learning.summary import (
    ABLATION_COLUMNS,
    COMPARISON_COLUMNS,
    ablation_rows,
    comparison_rows,
    grouped,
    summarized,
)
from benchmarks.report import Target, show, show_targets, write_json


def report(runs: list[Run], tuning_runs: list[Run], made: Made, output: Path | None = None, *, plots: Path) -> None:
    """
    Print tables, draw plots and write a summary of the runs that have been made.

    Args:
        runs: Runs to report.
        tuning_runs: Runs that chose the learning rates.
        made: What they have left.
        output: JSON file of the summary, if there is to be one: everything in it follows from the runs.
        plots: Folder of the plots.
    """
    num_missing = sum(run not in made for run in runs)
    if num_missing:
        print(f"{num_missing} of {len(runs)} runs are not there.")
    content = summarized(runs, tuning_runs, made)
    summary = content["results"]
    show("Held-out questions at the end", COMPARISON_COLUMNS, comparison_rows(summary["compared"]))
    if summary["ablated"]:
        show("Bimodal, three seeds", ABLATION_COLUMNS, ablation_rows(summary["ablated"]))
    draw_all(grouped(runs, made)[0], summary["ablated"], plots)
    show_targets([Target(**target) for target in content["targets"]])
    if output:
        write_json(output, content)
    print(f"Written to {' and '.join(str(path) for path in (output, plots) if path)}")
