import json
import os
import subprocess
import sys

import pytest

from exgrpo_trl import RolloutDetails, StoredImage, __version__
from exgrpo_trl.buffer import ExperienceBuffer
from exgrpo_trl.cli import main
from exgrpo_trl.records import Experience, Question, Reuse


@pytest.fixture
def path(tmp_path):
    buffer = ExperienceBuffer(capacity=5000)
    for number in range(120):
        experience = Experience.create([1] * 10, [-0.5] * 10, policy_version=3 + number, reward=1.0)
        bucket = 2 if number < 100 else 5 if number < 119 else 7
        question = Question(f"q{number}", {"prompt": "a"})
        buffer.collect(question, [experience], num_correct=bucket, group_size=8)
    for number in range(60):
        buffer.note_reuse(f"q{number}", buffer.completions(f"q{number}")[0], Reuse(1 + number % 2))
    buffer.retire("solved")
    buffer.provenance = {"tokenizer": "[red]abc[/red]", "temperature": 0.75}
    buffer.save(tmp_path / "checkpoint-10" / "experience_buffer")
    return tmp_path / "checkpoint-10" / "experience_buffer"


@pytest.mark.parametrize("of", ["buffer", "checkpoint", "run"])
def test_show(path, capsys, of):
    (path.parent / "trainer_state.json").write_text("{}")
    assert main(["show", str({"buffer": path, "checkpoint": path.parent, "run": path.parents[1]}[of])]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert str(path) in printed.out
    for expected in (
        "questions 120",
        "tokens 1,200",
        "retired 1",
        "policy versions 3 to 122",
        "replays of a completion 0.75 on average, at most 2",
        "capacity 5000",
        "max completions per question none",
        "tokenizer [red]abc[/red]",
        "temperature 0.75",
        "1/8 0",
        f"2/8 100 {'#' * 40}",
        f"5/8 19 {'#' * 8}",
        "6/8 0",
        "7/8 1 #",
    ):
        assert expected in lines


def test_show_json(path, capsys):
    assert main(["show", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["buckets"] == {"2": 100, "5": 19, "7": 1}
    assert summary["counts"]["tokens"] == 1200
    assert summary["policy_versions"] == {"oldest": 3, "newest": 122}
    assert summary["replays"] == {"mean": 0.75, "highest": 2}
    assert summary["settings"]["capacity"] == 5000
    assert summary["provenance"]["temperature"] == 0.75


def test_show_counts_turns_and_images(path, tmp_path, capsys):
    image_module = pytest.importorskip("PIL.Image")
    stored = [StoredImage.of(image_module.new("RGB", (400, 300), color)) for color in ("red", "blue")]
    buffer = ExperienceBuffer.load(path)
    for number in range(3):
        messages = [{"role": "tool", "content": [stored[number % 2]]}]
        details = RolloutDetails.create(is_model=[1, 0, number % 2], messages=messages)
        experience = Experience.create([1, 2, 3], [-0.5] * 3, policy_version=1, reward=1.0, details=details)
        question = Question(f"image {number}", {"prompt": [stored[0]]})
        buffer.collect(question, [experience], num_correct=2, group_size=8)
    details = RolloutDetails.create(rewards={"a": 1.0})
    experience = Experience.create([5], [-0.5], policy_version=1, reward=1.0, details=details)
    buffer.collect(Question("one turn", {"prompt": "a"}), [experience], num_correct=2, group_size=8)
    buffer.save(tmp_path / "buffer")
    num_bytes = sum(len(image.content) for image in stored)
    assert main(["show", str(tmp_path / "buffer")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "completions of several turns 3" in lines
    assert f"images 2 ({num_bytes / 1e6:.1f} MB)" in lines
    assert main(["show", str(tmp_path / "buffer"), "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["counts"]
    assert (counts["several_turns"], counts["images"], counts["image_bytes"]) == (3, 2, num_bytes)
    assert counts["completions"] == 124
    # A buffer of text does not speak of them, but in JSON.
    assert main(["show", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "several turns" not in printed
    assert "MB" not in printed
    assert main(["show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["images"] == 0


def test_show_counts_groups(path, tmp_path, capsys):
    buffer = ExperienceBuffer(unit="group")
    for name, first in (("a", 1), ("a", 5), ("b", 1)):
        group = [Experience.create([first + row], [-0.5], policy_version=1, reward=1.0) for row in range(4)]
        buffer.collect(Question(name, {"prompt": "a"}), group, num_correct=2, group_size=4)
    buffer.save(tmp_path / "buffer")
    assert main(["show", str(tmp_path / "buffer")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "groups 3" in lines
    assert "unit group" in lines
    assert main(["show", str(tmp_path / "buffer"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["counts"]["groups"], summary["counts"]["completions"]) == (3, 12)
    assert summary["settings"]["unit"] == "group"
    # A buffer of single completions does not speak of them.
    assert main(["show", str(path), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert "groups" not in summary["counts"]
    assert "unit" not in summary["settings"]


def test_show_empty_buffer(tmp_path, capsys):
    ExperienceBuffer().save(tmp_path / "buffer")
    assert main(["show", str(tmp_path / "buffer")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "policy versions none replays of a completion none" in printed


def test_errors_are_one_line_and_exit_code_1(path, tmp_path, capsys):
    (path / "completions.parquet").unlink()
    for broken, message in ((path, "has no completions.parquet"), (tmp_path / "[bold]none", "does not exist")):
        for extra in ([], ["--json"]):
            assert main(["show", str(broken), *extra]) == 1
            printed = capsys.readouterr()
            assert printed.out == ""
            assert message in printed.err
            assert str(broken) in printed.err
            assert printed.err.count("\n") == 1


def test_show_after_a_save_that_died(path, capsys):
    path.rename(path.with_name(".experience_buffer.replaced"))
    assert main(["show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"]["questions"] == 120


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"exgrpo-trl {__version__}\n"


def test_usage(capsys):
    for arguments in ([], ["unknown"], ["show"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_command_never_imports_torch(path):
    code = (
        "import sys; from exgrpo_trl.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or ('torch' in sys.modules) * 50 or ('trl' in sys.modules) * 60)"
    )
    environment = {**os.environ, "COLUMNS": "30"}
    for arguments, expected in ((["show", str(path)], 0), (["show", str(path / "x")], 1)):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
        )
        assert (result.returncode, "Traceback" in result.stderr) == (expected, False), result.stderr


def test_show_leaves_out_the_empty_buckets_of_huge_groups(tmp_path, capsys):
    buffer = ExperienceBuffer()
    experience = Experience.create([1], [-0.5], policy_version=1, reward=1.0)
    buffer.collect(Question("q", {"prompt": "a"}), [experience], num_correct=300, group_size=30_000)
    buffer.save(tmp_path / "buffer")
    assert main(["show", str(tmp_path / "buffer")]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"300/30000 1 {'#' * 40}" in lines
    assert len(lines) < 30
