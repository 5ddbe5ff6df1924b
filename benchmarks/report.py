"""What the benchmarks have in common: the machine, files of results, means with their spread, targets."""

import json
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
PACKAGES = ("exgrpo-trl", "trl", "transformers", "torch", "accelerate", "datasets", "pyarrow", "numpy", "torchrl")


@dataclass(frozen=True)
class Target:
    """A number that was aimed at, and what was measured.

    Attributes:
        name: What was measured.
        aim: What was aimed at, as text.
        measured: What came out, as text with its spread.
        is_met: Whether the aim was reached.
        cause: What decides it; shown where it was missed.
    """

    name: str
    aim: str
    measured: str
    is_met: bool
    cause: str


def machine() -> dict[str, Any]:
    """Cores, operating system and versions."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
    } | {name: found for name in PACKAGES if (found := installed(name))}


def together(machines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """One description of the machines that results come from; where they differ, all values."""
    values: dict[str, list[Any]] = {}
    for about in machines:
        for name, value in about.items():
            if value not in values.setdefault(name, []):
                values[name].append(value)
    return {name: of[0] if len(of) == 1 else " and ".join(map(str, of)) for name, of in values.items()}


def processor() -> str:
    """Name of the processor."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(name: str) -> str | None:
    """Version of a package, `None` where it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def content_of(
    *, settings: dict[str, Any], results: Any, targets: list[Target], about: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What a file of results holds, measured here unless `about` names a machine."""
    return {
        "settings": settings,
        "machine": about or machine(),
        "targets": [asdict(target) | {"is_met": bool(target.is_met)} for target in targets],
        "results": results,
    }


def write(file: Path, **parts: Any) -> None:
    """Write a file of results, of what `content_of` takes."""
    write_json(file, content_of(**parts))


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write compact JSON with a line for every part, and for every item of a list; no unfinished file has the name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"{json.dumps(name)}:{_in_lines(part)}" for name, part in content.items()]
    unfinished = file.with_suffix(".unfinished")
    unfinished.write_text("{" + ",\n".join(parts) + "}\n")
    unfinished.rename(file)


def _in_lines(part: Any) -> str:
    """Compact JSON of a part, a line for every item of a list."""
    if isinstance(part, list):
        return "[\n" + ",\n".join(map(_compact, part)) + "]"
    return _compact(part)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def picture_of(output: Path) -> Path:
    """Picture of a file of results: beside it, and in the documentation if it is one of the committed ones."""
    folder = IMAGES if output.resolve().parent == RESULTS else output.parent
    return folder / f"{output.stem}.png"


def with_spread(values: Any, digits: int = 2) -> str:
    """`mean ± standard deviation` of a sample, the number alone where there is only one."""
    values = np.asarray(values, dtype=float)
    mean = f"{values.mean():.{digits}f}"
    return f"{mean} ± {values.std(ddof=1):.{digits}f}" if values.size > 1 else mean


def middle(values: Any, digits: int = 2) -> str:
    """`median (lower to upper quartile)` of a sample: what a machine does that is interrupted now and then."""
    low, median, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)


def show_targets(targets: list[Target]) -> None:
    """Print what was aimed at and what came out."""
    show("Targets", TARGET_COLUMNS, target_rows(targets))


TARGET_COLUMNS = ["what", "aim", "measured", "met", "cause"]


def target_rows(targets: list[Target]) -> list[list[str]]:
    """A row per target."""
    return [[t.name, t.aim, t.measured, *(("yes", "") if t.is_met else ("MISSED", t.cause))] for t in targets]
