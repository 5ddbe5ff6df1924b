"""A run in a notebook: examples/replay.ipynb, and the table of progress that it shows."""

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import nbclient
import nbformat
import pytest
import torch
import transformers
import trl
from packaging.version import Version
from tiny import make_trainer, tiny_dataset
from transformers.trainer_callback import ProgressCallback, TrainerCallback
from transformers.utils.notebook import NotebookProgressCallback

from exgrpo_trl.notebook import COLUMNS, ReplayProgress
from exgrpo_trl.replay_log import read_replay_log

pytest.importorskip("matplotlib", reason="the notebook ends with a report: `make test` installs matplotlib")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "replay.ipynb"


@pytest.fixture(scope="module", autouse=True)
def where_trl_trains_on_cpus():
    if Version(trl.__version__).release[:2] == (1, 15) and not torch.cuda.is_available():
        pytest.skip(f"trl {trl.__version__} computes log-probabilities on GPUs only")


class Tables(HTMLParser):
    """Rows of cells of all tables."""

    def __init__(self, html):
        super().__init__()
        self.rows = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.get_starttag_text().startswith(("<td", "<th")) and data.strip():
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder that the notebook ran in, and what its cells show, by their id."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(shutil.copy(NOTEBOOK, folder), as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return folder, {cell["id"]: cell["outputs"] for cell in notebook.cells if cell.cell_type == "code"}


def html_of(outputs):
    (html,) = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    return html


def test_the_table_of_progress_has_columns_of_replay(executed):
    header, *lines = Tables(html_of(executed[1]["train"])).rows
    assert header == ["Step", "Training Loss", *COLUMNS]
    assert [line[0] for line in lines] == [str(step) for step in range(5, 61, 5)]
    rates, fractions, questions = ([float(line[column]) for line in lines] for column in (2, 3, 4))
    assert rates[0] < 0.15 < 0.3 < rates[-1], "it learns"
    assert fractions[-1] == 0.5
    assert all(count.is_integer() for count in questions)
    log = read_replay_log(executed[0] / "outputs" / "replay_notebook")
    # 4 of 8 questions of a batch, as the table tells for five steps a line.
    assert log.num_rows == sum(round(5 * 8 * fraction) for fraction in fractions)


def test_what_is_stored_is_shown(executed):
    shown = executed[1]
    last_line = Tables(html_of(shown["train"])).rows[-1]
    buffer = Tables(html_of(shown["buffer"])).rows
    (retired,) = [int(row[1]) for row in buffer if row[0] == "retired questions"]
    assert int(last_line[5]) <= retired <= int(last_line[5]) + 8, "the last batch came in after the last line"
    prompts = {row[0] for row in buffer if len(row) == 8 and row[0].endswith("=")}
    assert len(prompts) == 8
    assert re.search(r"Question [a-h]{2}=", html_of(shown["show-question"]))
    assert re.search(r'title="id \d+, log-probability [^>]+>[a-h]</span>', html_of(shown["show-completion"]))
    header, *rows = Tables(html_of(shown["read-log"])).rows
    assert header[1:] == [
        *("step", "question_id", "bucket", "age", "num_replays"),
        *("entropy", "competitor_entropies", "mean_log_ratio"),
    ]
    assert len(rows) == 8
    for row in rows:
        competitors = [float(entropy) for entropy in re.findall(r"(\d+\.\d+)[,\]]", row[7])]
        assert all(float(row[6]) <= entropy + 1e-6 for entropy in competitors), "that of the lowest entropy is taken"


def test_nothing_of_ours_warns(executed):
    told = "".join(output.text for outputs in executed[1].values() for output in outputs if "text" in output)
    assert "59 of" in told or "generation batches replayed" in told
    warnings = [line for line in told.splitlines() if "Warning:" in line]
    # Of TRL, which sets what the newest transformers call otherwise, and of a notebook without widgets.
    assert [line for line in warnings if "activation_checkpointing" not in line and "TqdmWarning" not in line] == []
    assert not any("exgrpo" in line for line in warnings)


def test_the_notebook_is_stored_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) > 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)


class Watching(TrainerCallback):
    """Keeps the table of the progress, which is gone when the training ends."""

    def on_step_end(self, args, state, control, **kwargs):
        (progress,) = [cb for cb in self.of.callback_handler.callbacks if isinstance(cb, NotebookProgressCallback)]
        self.table = progress.training_tracker.inner_table


def make_in_a_notebook(monkeypatch, folder, **options):
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    monkeypatch.setattr("exgrpo_trl.trainer.is_in_notebook", lambda: True, raising=True)
    watching = Watching()
    watching.of = make_trainer(folder, disable_tqdm=False, max_steps=4, callbacks=[watching], **options)
    return watching.of, watching


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_with_evaluation_there_is_a_line_for_each(tmp_path, monkeypatch, strategy):
    trainer, watching = make_in_a_notebook(
        monkeypatch,
        tmp_path,
        eval_strategy=strategy,
        eval_steps=2,
        eval_dataset=tiny_dataset(4),
        train_dataset=tiny_dataset(8),
        per_device_eval_batch_size=4,
    )
    trainer.train()
    header, *lines = watching.table
    assert header[:3] == ["Step" if strategy == "steps" else "Epoch", "Training Loss", "Validation Loss"]
    assert set(COLUMNS) < set(header)
    assert [line[0] for line in lines] == ([2, 4] if strategy == "steps" else [1, 2])
    logged = [line for line in trainer.state.log_history if "loss" in line]
    for line, step in zip(lines, (2, 4), strict=True):
        shown = dict(zip(header, line, strict=False))
        assert shown["fresh/pass_rate"] == logged[step - 1]["fresh/pass_rate"]
        assert shown["replay/questions"] == f"{logged[step - 1]['replay/questions']:.0f}"


def test_what_replay_has_not_logged_yet(tmp_path, monkeypatch):
    trainer, watching = make_in_a_notebook(monkeypatch, tmp_path)
    trainer.train()
    header, first, *_, last = watching.table
    assert header == ["Step", "Training Loss", *COLUMNS]
    assert first[-1] == "No Log", "nothing was replayed in the first step"
    assert isinstance(last[-1], float)


def test_other_progress_stays_as_it_is(tmp_path, monkeypatch):
    def progress_of(trainer):
        kinds = (ProgressCallback, NotebookProgressCallback)
        return [type(callback) for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]

    class Mine(NotebookProgressCallback):
        pass

    assert progress_of(make_trainer(tmp_path, disable_tqdm=False)) == [ProgressCallback]
    monkeypatch.setattr("exgrpo_trl.trainer.is_in_notebook", lambda: True)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", NotebookProgressCallback)
    assert progress_of(make_trainer(tmp_path, disable_tqdm=False)) == [ReplayProgress]
    assert progress_of(make_trainer(tmp_path, disable_tqdm=False, replay_fraction=0.0)) == [NotebookProgressCallback]
    monkeypatch.setattr(transformers.trainer, "DEFAULT_PROGRESS_CALLBACK", Mine)
    assert progress_of(make_trainer(tmp_path, disable_tqdm=False)) == [Mine]
