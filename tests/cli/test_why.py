"""`exgrpo-trl why` on the log of a real run, and on logs that nobody should have written."""

import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from exgrpo_trl.cli import main
from exgrpo_trl.replay_log import LOG_SCHEMA, parts_of
from exgrpo_trl.replay_log_writer import write_part

TRAIN = """
import sys
from tiny import make_trainer, tiny_dataset
make_trainer(
    sys.argv[1], train_dataset=tiny_dataset(6), max_steps=8, retire_solved=False, save_strategy="steps", save_steps=8
).train()
"""
NEVER_TORCH = (
    "import sys; from exgrpo_trl.cli import main; code = main(sys.argv[1:]); "
    "sys.exit(code or ('torch' in sys.modules) * 50 or ('trl' in sys.modules) * 60)"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("why") / "run"
    folder = os.path.join(os.path.dirname(__file__), "..", "end_to_end")
    subprocess.run(
        [sys.executable, "-c", TRAIN, str(path)],
        cwd=folder,
        check=True,
        capture_output=True,
    )
    return path


def why(*arguments, code=0, **environment):
    """Output of the command as a process of its own, which must not import torch."""
    result = subprocess.run(
        [sys.executable, "-c", NEVER_TORCH, "why", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        check=False,
    )
    assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
    return result.stdout if code == 0 else result.stderr


def hand_made(folder, *rows):
    """A log of rows that say otherwise than a plain one."""
    plain = {
        "step": 3, "last_step": 3, "batch": 0, "policy_version": 2, "row": 5, "group_size": 4, "question_id": "q",
        "bucket": 1, "num_tokens": 7, "reward": 1.0, "age": 1, "num_replays": 0, "is_fill": False,
        "competitor_ages": [], "competitor_entropies": [], "competitor_negative_log_likelihoods": [],
        "mean_log_ratio": 0.5, "drift": 0.5,
    }  # fmt: skip
    (folder / "replay_log").mkdir()
    table = pa.Table.from_pylist([plain | row for row in rows], schema=LOG_SCHEMA)
    write_part(table, folder / "replay_log" / "part-00000.parquet")
    return folder


def test_what_it_prints(run):
    found = json.loads(why(run, "--step", 8, "--json"))
    assert found["path"] == str(run / "replay_log")
    assert found["step"] == 8
    assert len(found["replays"]) == 2
    lines = [" ".join(line.split()) for line in why(run, "--step", 8).splitlines()]
    assert lines[0] == "Step 8 replayed 2 stored completions"
    for replay in found["replays"]:
        assert f"Question {replay['question_id']}" in lines
        assert (
            f"bucket {replay['bucket']}/4, group {replay['row'] // 4}, row {replay['row']} of a batch for step 8"
            in lines
        )
        times = f"{replay['num_replays']} time{'' if replay['num_replays'] == 1 else 's'}"
        steps = f"{replay['age']} step{'' if replay['age'] == 1 else 's'}"
        assert f"{steps} old, {replay['num_tokens']} tokens, reward 1, replayed {times} before" in lines
        assert any(f"importance ratio {replay['importance_ratio']:.4g} (" in line for line in lines)
        assert replay["competitors"], "a run in which there is something to choose"
        assert f"chosen out of {len(replay['competitors']) + 1}, by scores of now:" in lines
        shown = [("chosen ", replay), *(("", other) for other in replay["competitors"])]
        for mark, of_one in shown:
            scores = f"{of_one['entropy']:.3f} {of_one['negative_log_likelihood']:.3f}"
            assert f"{mark}{of_one['age']} {scores}" in lines


def test_where_it_looks(run):
    by_run = why(run, "--json")
    assert json.loads(by_run)["step"] == 8, "the last step with replays"
    for path in (run / "checkpoint-8", run / "replay_log"):
        assert why(path, "--json") == by_run
    assert why(run) == why(run, "--step", 8)


def test_a_question(run):
    replays = json.loads(why(run, "--step", 8, "--json"))["replays"]
    wanted = replays[0]["question_id"]
    found = json.loads(why(run, "--step", 8, "--json", "--question", wanted))
    assert found["replays"] == [replay for replay in replays if replay["question_id"] == wanted]
    assert "Nothing was replayed of question [bold]x, says" in why(run, "--question", "[bold]x")
    assert json.loads(why(run, "--question", "\udcff", "--json"))["replays"] == []


def test_a_step_without_replays(run, tmp_path):
    assert json.loads(why(run, "--step", 1, "--json"))["nearest_steps"] == [2]
    hand_made(tmp_path, {"step": 3, "last_step": 4}, {"step": 9, "last_step": 9})
    for step, nearest in ((-1, [3]), (5, [3, 9]), (10**30, [9])):
        assert json.loads(why(tmp_path, "--step", step, "--json"))["nearest_steps"] == nearest
    assert [line.strip() for line in why(tmp_path, "--step", 5).splitlines()] == [
        f"Step 5 replayed nothing, says {tmp_path / 'replay_log'}.",
        "The nearest steps that did: 3 and 9.",
    ]
    for step in (3, 4):
        assert "of a batch for steps 3 to 4" in why(tmp_path, "--step", step)


def test_what_is_not_known(tmp_path):
    unknown = {"bucket": None, "num_replays": None, "reward": None, "mean_log_ratio": None, "drift": None}
    scores = {"competitor_ages": [2], "competitor_entropies": [None], "competitor_negative_log_likelihoods": [None]}
    known = {
        "entropy": 0.5, "negative_log_likelihood": float("nan"), "scored_at": 0, "competitor_ages": [2],
        "competitor_entropies": [float("inf")], "competitor_negative_log_likelihoods": [1.25],
    }  # fmt: skip
    last = {"is_fill": True, "evicted": "used_up", "mean_log_ratio": float("-inf")}
    hand_made(tmp_path, unknown, scores, known, last)
    text = " ".join(why(tmp_path).split())
    for told in (
        "bucket unknown, group 1",
        "reward unknown, replayed an unknown number of times before",
        "importance ratio unknown: not trained before",
        "there was nothing to choose from",
        "chosen out of 2, without scores:",
        "chosen out of 2, by last known scores, its own 2 steps old:",
        "chosen 1 0.500 unknown 2 unknown 1.250",
        "took the place of a failure",
        "left the buffer afterwards: used up",
        "importance ratio 0 (",
    ):
        assert told in text, told
    replays = json.loads(why(tmp_path, "--json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))[
        "replays"
    ]
    assert replays[3]["importance_ratio"] == 0.0
    assert replays[2]["competitors"] == [{"age": 2, "entropy": None, "negative_log_likelihood": 1.25}]


def test_ids_of_strangers(tmp_path):
    hostile = ["[bold red]x[/]", "\x1b[31mred\x1b[0m\x07", "a\nb\r\u202ec", "[/nothing]", ":smile:", "x" * 500]
    hand_made(tmp_path, *({"question_id": name, "evicted": name} for name in hostile))
    text = why(tmp_path, COLUMNS="30")
    assert "\x1b" not in text
    assert "\r" not in text
    for shown in ("[bold red]x[/]", r"\x1b[31mred\x1b[0m\x07", r"a\nb\r\u202ec", "[/nothing]", ":smile:", "x" * 500):
        assert f"Question {shown}\n" in text
    for name in hostile:
        (replay,) = json.loads(why(tmp_path, "--question", name, "--json"))["replays"]
        assert replay["question_id"] == name


def test_errors_name_the_path_and_the_way_out(run, tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    for path, told in (
        (tmp_path, "replay_log=True"),
        (tmp_path / "checkpoint-3", "replay_log=True"),
        (tmp_path / "[bold]none", "does not exist"),
        (parts_of(run / "replay_log")[0], "is a file"),
    ):
        for extra in ([], ["--json"]):
            error = why(path, *extra, code=1)
            assert told in error
            assert str(path) in error
            assert error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\x00" * 64 + b"PAR1"])
def test_a_damaged_part(tmp_path, content):
    part = hand_made(tmp_path, {}) / "replay_log" / "part-00001.parquet"
    part.write_bytes(content)
    error = why(tmp_path, code=1)
    assert str(part) in error
    assert "Move this file away" in error


def test_numbers_that_make_no_sense(tmp_path):
    """A file may hold anything that fits its columns."""
    hand_made(
        tmp_path,
        {"group_size": 0, "row": -(2**63), "age": -(2**63), "num_replays": -1, "last_step": 2**63 - 1},
        {"competitor_ages": [1, 2, 3], "competitor_entropies": [], "mean_log_ratio": 1e30, "step": -(2**63)},
        {"competitor_ages": [None], "competitor_entropies": [1.0], "competitor_negative_log_likelihoods": [1.0]},
    )
    why(tmp_path, "--step", 3)
    json.loads(why(tmp_path, "--step", 3, "--json"))


def test_help_comes_at_once(capsys):
    start = time.perf_counter()
    assert "--step" in why("--help")
    assert time.perf_counter() - start < 3, "well under a second, on a machine that does nothing else"
    with pytest.raises(SystemExit) as caught:
        main(["why"])
    assert caught.value.code == 2
    assert "path" in capsys.readouterr().err
