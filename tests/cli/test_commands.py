"""
What holds for every command: no torch, nothing that a terminal obeys, errors in one line.

`train` aside, which is nothing without torch: see tests/end_to_end/test_train_command.py.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from saved_runs import CODE
from tokenizers import Tokenizer, models

from exgrpo_trl import Experience, ExperienceBuffer, Question, RolloutDetails
from exgrpo_trl.cli import COMMANDS

LOOKING = [name for name in COMMANDS if name != "train"]

# What moves cursors, sets titles, shows text in another order, or is markup of rich.
HOSTILE = "[bold]x[/bold]\x1b[31m\x1b]0;t\x07\r\x08\u202e\u2028\x9b1mend\ny"


def hostile_buffer(folder, version=1, other=""):
    """A buffer with such text in every place, and a tokenizer that decodes to it."""
    buffer = ExperienceBuffer()
    for number in range(3):
        details = RolloutDetails.create(
            is_model=[1, 0, 1],
            messages=[{"role": "assistant", "content": HOSTILE}, {"role": HOSTILE, "content": HOSTILE}],
            fields={HOSTILE: HOSTILE},
            rewards={HOSTILE: 1.0},
        )
        experience = Experience.create([1, 2, 1], [-0.5] * 3, policy_version=version, reward=1.0, details=details)
        prompt = [{"role": HOSTILE, "content": HOSTILE, "tool_calls": [{"function": {"name": HOSTILE}}]}]
        question = Question(f"{HOSTILE}{other}{number}", {"prompt": prompt, HOSTILE: HOSTILE})
        buffer.collect(question, [experience], num_correct=2, group_size=4)
    buffer.retire(f"{HOSTILE}retired{other}")
    buffer.provenance = {HOSTILE: f"{HOSTILE}{other}"}
    buffer.save(folder / "experience_buffer")
    tokenizer = Tokenizer(models.WordLevel({"a": 0, HOSTILE: 1, f"{HOSTILE}2": 2}, unk_token="a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_nothing_that_is_stored_is_obeyed(command, tmp_path):
    path = hostile_buffer(tmp_path / "a")
    ExperienceBuffer.load(path).save(tmp_path / "same")
    question_id = f"{HOSTILE}0"
    calls = [
        (["show", path, "--list"], 0),
        (["show", path, f"--question={question_id}"], 0),
        (["show", path, f"--question={HOSTILE[:20]}"], 1),
        (["show", path, f"--question={HOSTILE}no"], 1),
        (["show", path, "--filter", f"text~{HOSTILE}", "--list"], 0),
        (["diff", path, hostile_buffer(tmp_path / "b", 2, "other")], 0),
        (["merge", path, "same", "-o", f"merged{HOSTILE}"], 0),
        (["merge", path, tmp_path / "b", "-o", "no"], 1),
        (["export", path, "-o", f"{HOSTILE}.jsonl"], 0),
        (["export", path, "-o", f"{HOSTILE}.jsonl"], 1),
        (["prune", path, "-o", f"pruned{HOSTILE}", "--filter", "bucket=2"], 0),
        (["report", path, "-o", f"{HOSTILE}.html"], 0),
    ]
    for arguments, code in calls:
        printed = command(*arguments, code=code)
        assert [c for c in printed if not c.isprintable() and c != "\n"] == [], arguments
        if HOSTILE in repr(arguments) or arguments[0] == "show":
            assert "[bold]x" in printed, arguments
    for arguments in (["show", path, "--list"], ["show", path, f"--question={question_id}"], ["diff", path, "same"]):
        json.loads(command(*arguments, "--json"))


def test_a_terminal_with_colours_sees_our_colours_alone(tmp_path):
    pty = pytest.importorskip("pty")
    path = hostile_buffer(tmp_path)
    parent, child = pty.openpty()
    arguments = ["show", str(path), f"--question={HOSTILE}0"]
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, *arguments],
        stdout=child,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(child)
    printed = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:
            break
        if not part:
            break
        printed += part
    os.close(parent)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.decode()).replace("\r\n", "\n")
    assert [c for c in text if not c.isprintable() and c != "\n"] == []
    assert "[bold]x[/bold]" in text


@pytest.fixture
def paths(run_of, tmp_path):
    ExperienceBuffer.load(run_of("ids")).save(tmp_path / "buffer")
    return {"run": run_of("ids"), "buffer": tmp_path / "buffer", "out": tmp_path / "out", "none": tmp_path / "none"}


# Every command at work, with what is decoded, and refused.
CALLS = {
    "show": ["show {run}", "show {run} --list --filter text~a", "show {run} --question q1 --json", "show {none}"],
    "report": ["report {run} -o {out}.html", "report {none} -o {out}.2.html"],
    "why": ["why {run}", "why {run} --json", "why {none}"],
    "diff": ["diff {buffer} {run}", "diff {buffer} {none}"],
    "export": ["export {run} -o {out}.parquet", "export {run} -o {out}.jsonl", "export {none} -o {out}.2.jsonl"],
    "merge": ["merge {buffer} {run} -o {out}", "merge {buffer} {none} -o {out}.2"],
    "prune": ["prune {run} -o {out} --filter text~a", "prune {none} -o {out} --filter age>3"],
}


@pytest.mark.parametrize("name", LOOKING)
def test_no_command_imports_torch(command, paths, name):
    for call in CALLS[name]:
        arguments = [argument.format(**paths) for argument in call.split()]
        if str(paths["none"]) in arguments:
            error = command(*arguments, code=1)
            assert error.count("\n") == 1
            assert error.startswith("error: The ")
            assert str(paths["none"]) in error
            assert "does not exist" in error
        else:
            assert command(*arguments)


def test_the_test_of_imports_can_fail(command, paths, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import torch\n")
    with pytest.raises(AssertionError, match=r"imported .*torch"):
        command("show", paths["buffer"], PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_help_imports_little():
    slow = {"torch", "trl", "transformers", "datasets", "pandas", "pyarrow", "tokenizers", "PIL", "matplotlib"}
    code = (
        "import sys; from exgrpo_trl.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"except SystemExit as stop: print(stop.code, sorted({slow} & set(sys.modules)), file=sys.stderr)"
    )
    for arguments in (["--help"], *([name, "--help"] for name in LOOKING)):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=os.environ
        )
        assert result.stderr == "0 []\n"
        assert result.stdout.startswith("usage: exgrpo-trl")


def test_files_that_cannot_be_written(command, paths):
    paths["out"].write_text("a file")
    for arguments in (
        ["export", paths["run"], "-o", paths["out"] / "x.jsonl"],
        ["merge", paths["run"], "-o", paths["out"] / "x"],
    ):
        error = command(*arguments, code=1)
        assert str(paths["out"]) in error
        assert error.count("\n") == 1


def test_a_reader_that_stops(paths):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "show", str(paths["run"]), "--list", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_a_terminal_without_unicode(command, paths):
    printed = command("show", paths["run"], "--question", "q1", PYTHONIOENCODING="ascii")
    assert printed.isascii()
