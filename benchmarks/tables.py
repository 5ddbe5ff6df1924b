"""
Write the committed results into docs/benchmarks.md, and draw their pictures: what is shown there is what was measured.

    python -m benchmarks.tables
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

from benchmarks.buffer_scale import summary as buffer_scale
from benchmarks.buffer_scale.picture import draw_buffer_scale
from benchmarks.learning import saving
from benchmarks.learning import summary as learning
from benchmarks.learning.pictures import draw_all
from benchmarks.learning.records import RECORDED, read
from benchmarks.learning.stages import reported_runs
from benchmarks.recorded import content_in, files_of, targets_in
from benchmarks.report import IMAGES, RESULTS, ROOT, TARGET_COLUMNS, picture_of, target_rows
from benchmarks.step_cost import summary as step_cost
from benchmarks.step_cost.picture import draw_step_cost

PAGE = ROOT / "docs" / "benchmarks.md"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def versions(machine: dict[str, Any]) -> str:
    """Where something was measured."""
    packages = ("trl", "transformers", "torch", "pyarrow", "numpy")
    listed = ", ".join(f"{name} {machine[name]}" for name in packages if name in machine)
    return f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {listed}."


def step_cost_tables(content: dict[str, Any]) -> Iterator[str]:
    """A table per batch, and one of memory."""
    for result in content["results"]:
        size = result["size"]
        batch = f"{size['num_questions']} questions of 8 completions of {size['length']} tokens"
        if "steps" in result:
            count = len(next(iter(result["steps"].values())))
            yield f"**{size['model']}**, {batch}, {count} steps of each; median milliseconds by phase:"
            yield markdown(step_cost.COLUMNS, step_cost.table_rows(result["steps"]))
    yield "What a completion costs, with eight stored of each question:"
    yield markdown(step_cost.PRICE_COLUMNS, step_cost.price_rows(content["results"]))
    memory = [result for result in content["results"] if "peak_memory_gib" in result]
    if memory:
        yield "Peak resident memory, GiB:"
        rows = [
            [of["size"]["model"], method, " ".join(f"{value:.3f}" for value in values)]
            for of in memory
            for method, values in of["peak_memory_gib"].items()
        ]
        yield markdown(["model", "method", "measured"], rows)


def buffer_tables(content: dict[str, Any]) -> Iterator[str]:
    """One table."""
    yield markdown(buffer_scale.COLUMNS, buffer_scale.table_rows(content["results"]))


def tuning_tables(content: dict[str, Any]) -> Iterator[str]:
    """Mean of the seeds by learning rate, the best of each row in bold."""
    tuned = content["results"]["tuned"]
    rates = sorted({rate for of in tuned.values() for by_rate in of.values() for rate in by_rate}, key=float)
    rows = []
    for setting, by_method in tuned.items():
        for method, by_rate in by_method.items():
            means = {rate: float(np.mean(values)) for rate, values in by_rate.items()}
            best = max(means, key=lambda rate: means[rate])
            cells = {rate: f"**{mean:.3f}**" if rate == best else f"{mean:.3f}" for rate, mean in means.items()}
            rows.append([setting, method, *(cells.get(rate, "") for rate in rates)])
    yield markdown(["setting", "method", *rates], rows)


def comparison_tables(content: dict[str, Any]) -> Iterator[str]:
    """One table."""
    rows = learning.comparison_rows(content["results"]["compared"])
    yield markdown(learning.COMPARISON_COLUMNS, rows)


def ablation_tables(content: dict[str, Any]) -> Iterator[str]:
    """One table."""
    rows = learning.ablation_rows(content["results"]["ablated"])
    yield markdown(learning.ABLATION_COLUMNS, rows)


def ways_tables(content: dict[str, Any]) -> Iterator[str]:
    """A table for each size."""
    for result in content["results"]:
        size = result["size"]
        yield f"{size['model']}, {size['num_questions']} questions of 8 completions of {size['length']} tokens:"
        yield markdown(step_cost.COLUMNS[:4], [row[:4] for row in step_cost.table_rows(result["steps"])])


def saving_tables(content: dict[str, Any]) -> Iterator[str]:
    """One table."""
    yield markdown(saving.COLUMNS, content["results"]["saved"])


# Name of a place in the page: file of results, what makes its tables, and the part that has machines of its own.
PLACES = {
    "step-cost": ("step_cost.json", step_cost_tables, None),
    "step-cost-ways": ("step_cost_ways.json", ways_tables, None),
    "buffer": ("buffer_scale.json", buffer_tables, None),
    "tuning": ("learning.parquet", tuning_tables, "tuned"),
    "comparison": ("learning.parquet", comparison_tables, "compared"),
    "ablations": ("learning.parquet", ablation_tables, "ablated"),
    "ways": ("learning.parquet", saving_tables, "saved"),
}


def targets_table(results: Path) -> str:
    """All targets of a folder of results."""
    rows = [row for file in files_of(results) for row in target_rows(targets_in(file))]
    return markdown(TARGET_COLUMNS, rows)


def filled(page: str, results: Path) -> str:
    """
    The page with the tables of a folder of results.

    A place whose results are not there is left as it is.

    Raises:
        ValueError: if the page has no such place.
    """
    contents = {"targets": targets_table(results)}
    for place, (name, tables, part) in PLACES.items():
        if (results / name).exists():
            content = content_in(results / name)
            about = content["results"]["machines"][part] if part else content["machine"]
            contents[place] = "\n\n".join([*tables(content), versions(about)])
    for place, text in contents.items():
        pattern = re.compile(rf"(<!-- {place} -->\n).*?(<!-- /{place} -->)", flags=re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"The page has no place <!-- {place} --> ... <!-- /{place} -->.")
        page = pattern.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", page)  # type: ignore[misc]
    return page


def draw_pictures() -> None:
    """All pictures of the committed results, as far as these are there."""
    for name, draw in (("step_cost.json", draw_step_cost), ("buffer_scale.json", draw_buffer_scale)):
        if (RESULTS / name).exists():
            draw(content_in(RESULTS / name)["results"], picture_of(RESULTS / name))
    if made := read(RECORDED):
        compared, *_ = learning.grouped(reported_runs(made), made)
        draw_all(compared, content_in(RECORDED)["results"]["ablated"], IMAGES)


def main() -> None:
    PAGE.write_text(filled(PAGE.read_text(), RESULTS))
    draw_pictures()
    print(f"Written to {PAGE} and {IMAGES}")


if __name__ == "__main__":
    main()
