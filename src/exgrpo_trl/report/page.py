"""The page of a report: one file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources
from typing import Any

from .. import __version__
from .charts import Chart
from .drawing import Drawn, drawn, stack_colours, thinned
from .questions import Stored
from .run import Run
from .shown import json_in_page, packed, visible
from .signs import HINT, UNKNOWN, WARNING, Sign
from .words import counted

# By which a report knows another one.
GENERATOR = '<meta name="generator" content="exgrpo-trl report">'


def page(run: Run, said: list[str], signs: list[Sign], charts: list[Chart], stored: Stored, when: str) -> str:
    """
    The page as text.

    Args:
        run ([`Run`]):
            What it is about.
        said (`list[str]`):
            The sentences at the top.
        signs (`list[Sign]`), charts (`list[Chart]`), stored ([`Stored`]):
            What it shows.
        when (`str`):
            Time of writing.
    """
    template, style, script = (_file(name) for name in ("template.html", "style.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Runs of no other script, and asks nobody for anything: the icon keeps browsers from asking for one.
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    pictures = [drawn(chart) if chart.lines else None for chart in charts]
    parts = {
        "POLICY": policy,
        "GENERATOR": GENERATOR,
        "TITLE": _escaped(run.name),
        "STYLE": style,
        "SCRIPT": script,
        "STATE": _escaped(_state(run)),
        "SAID": "".join(f"<p>{_escaped(sentence)}</p>" for sentence in said),
        "LEVEL": {WARNING: "warned", HINT: "unsure", UNKNOWN: "unsure"}.get(signs[0].level, ""),
        "OPEN": "open" if signs[0].level == WARNING else "",
        "SIGNS": "".join(map(_sign, signs)),
        "NUM_SIGNS": str(len(signs)),
        "CHARTS": "".join(map(_figure, charts, pictures)),
        "NOTES": "".join(f"<li>{_escaped(note)}</li>" for note in notes(run, stored)),
        "DATA": json_in_page(_data(run, charts, pictures, stored)),
        "INDEX": packed(stored.columns),
        "CHUNKS": "".join(f'<script type="text/plain" class="chunk">{chunk}</script>\n' for chunk in stored.chunks),
        "FOOTER": _escaped(f"Written {when} by exgrpo-trl {__version__} from {run.path}."),
    }
    # In one pass: what one part holds is no place for another.
    pieces = template.split("@@")
    return "".join(parts[piece] if number % 2 else piece for number, piece in enumerate(pieces))


def notes(run: Run, stored: Stored) -> list[str]:
    """What a reader has to know about what is and what is not there."""
    found = [run.text_note] if run.text_note else []
    if stored.num_left_out:
        found.append(
            f"The text of {counted(stored.num_left_out, 'completion')} is left out, those of the questions that were "
            "updated longest ago: the page would be too large for a browser. exgrpo-trl show PATH --question ID shows "
            "it."
        )
    if run.log is None:
        found.append(run.log_note)
    elif not run.is_log_whole:
        found.append("The replay log has lost its oldest rows, as it is bounded.")
    if run.history.source is None:
        found.append(
            "There are no log lines: no trainer_state.json was found. Each checkpoint has one; trainer.save_state() "
            "writes one at the end of a run."
        )
    return found + run.notes


def _file(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def _escaped(text: str) -> str:
    return html.escape(visible(text))


def _state(run: Run) -> str:
    """How far the run has come, and what of it is here."""
    step = f"Step {run.last_step:,}"
    if run.history.max_steps:
        step += f" of {run.history.max_steps:,}"
    parts = [step] if run.last_step else []
    if run.buffer is not None:
        buffer = run.buffer.buffer
        parts.append(counted(buffer.num_questions, "stored question"))
        parts.append(counted(buffer.num_completions, "completion"))
        parts.append(f"{len(buffer.retired):,} retired")
    parts.append(counted(run.history.num_lines, "log line"))
    return " · ".join(parts)


def _sign(sign: Sign) -> str:
    value = "not known" if sign.level == UNKNOWN and sign.value == "unknown" else sign.value
    meaning = f'<p class="meaning">{_escaped(sign.meaning)}</p>' if sign.meaning else ""
    return (
        f'<li class="{sign.level}"><span class="level">{sign.level}</span><div><b>{_escaped(sign.name)}</b> '
        f'<span class="value">{_escaped(value)}</span> <span class="quiet">warns {_escaped(sign.threshold)}</span>'
        f"{meaning}</div></li>"
    )


def _figure(chart: Chart, picture: Drawn | None) -> str:
    head = f'<h3>{_escaped(chart.title)}</h3><p class="about">{_escaped(chart.about)}</p>'
    if picture is None:
        return (
            f'<figure class="empty">{head}<p class="missing">Nothing to show. {_escaped(chart.missing)}</p></figure>'
        )
    note = f'<p class="quiet note">{_escaped(chart.note)}</p>' if chart.note else ""
    colours = stack_colours(len(chart.lines))
    legend = "".join(
        f"<li>{_swatch(number, colours[number] if chart.is_stack else None)}{_escaped(line.name)} "
        f'<b data-line="{number}">{_number(line.series.last)}</b></li>'
        for number, line in (reversed(list(enumerate(chart.lines))) if chart.is_stack else enumerate(chart.lines))
    )
    last = max(int(line.series.steps[-1]) for line in chart.lines)
    label = f"{chart.title}, {chart.unit}. " + "; ".join(
        f"{line.name}: {_number(line.series.values[0])} at step {line.series.steps[0]:,}, "
        f"{_number(line.series.last)} at step {line.series.steps[-1]:,}"
        for line in chart.lines
    )
    return (
        f'<figure data-chart="{chart.key}">{head}<ul class="legend" aria-live="polite">{legend}</ul>'
        f'<div class="plot" role="img" tabindex="0" aria-label="{_escaped(label)}">{picture.svg}</div>'
        f'<p class="readout quiet">at step {last:,}, the newest</p>{note}</figure>'
    )


def _swatch(number: int, band: int | None) -> str:
    if band is not None:
        return f'<i class="swatch" style="background: var(--b{band})"></i>'
    dash = ' stroke-dasharray="6 3"' if number else ""
    return (
        '<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true"><path d="M0 4H22" fill="none" '
        f'style="stroke: var(--c{number + 1})" stroke-width="3"{dash}/></svg>'
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _data(run: Run, charts: list[Chart], pictures: list[Drawn | None], stored: Stored) -> dict[str, Any]:
    """What the script needs besides the questions; numbers of the plots as they are drawn."""
    return {
        "now": run.buffer.now if run.buffer is not None else 0,
        "group_size": run.buffer.buffer.group_size if run.buffer is not None else None,
        "num_questions": stored.num_questions,
        "num_completions": stored.num_completions,
        "has_text": run.decoder is not None,
        "charts": {
            chart.key: {
                "axes": [picture.left, picture.right, picture.top, picture.bottom, picture.first, picture.last],
                "lines": [
                    {"name": line.name, "steps": points.steps.tolist(), "values": points.values.tolist()}
                    for line, points in ((line, thinned(line.series)) for line in chart.lines)
                ],
            }
            for chart, picture in zip(charts, pictures, strict=True)
            if picture is not None
        },
    }
