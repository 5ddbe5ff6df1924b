"""Every command of the documentation is run, or asked of the parser that would read it."""

import shutil

import pytest
import yaml
from datasets import Dataset
from pages import PAGES, ROOT, Block, blocks_in, blocks_of
from shell_blocks import arguments_of_train, commands_of, run_block
from tiny import make_trainer

WITH_BASH = [page for page in PAGES if any(block.language == "bash" for block in blocks_of(page))]
# Questions that the pages name, and others.
IDS = ["sow sow dog owl", "q0", "fox fox", "bee zho elk", *(f"q{i}" for i in range(1, 13))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder with `outputs/train_agent` and `outputs` as runs, with the checkpoints that the pages name."""
    folder = tmp_path_factory.mktemp("documented")
    outputs = folder / "outputs"
    rows = {"prompt": [f"sqrt {i} {text} = " for i, text in enumerate(IDS)], "route": IDS}
    trainer = make_trainer(
        outputs / "train_agent",
        train_dataset=Dataset.from_dict(rows),
        question_id_column="route",
        retire_solved=False,
        max_steps=30,
        save_strategy="steps",
        save_steps=15,
    )
    trainer.train()
    shutil.copytree(outputs / "train_agent" / "checkpoint-30", outputs / "checkpoint-500")
    shutil.copytree(outputs / "train_agent" / "replay_log", outputs / "replay_log")
    return folder


@pytest.mark.parametrize("page", WITH_BASH, ids=lambda page: page.name)
def test_the_commands_work(page, saved, tmp_path, capsys):
    folder = shutil.copytree(saved, tmp_path / "run")
    for block in blocks_of(page):
        if block.language == "bash":
            run_block(block, folder)
            assert "no completion" not in capsys.readouterr().err


def test_the_commands_of_the_examples_are_read_by_their_parsers():
    """Those in the docstrings and in the README of the examples, which are indented."""
    for path in (ROOT / "examples").glob("*.*"):
        text = path.read_text()
        found = [line[4:] for line in text.replace("\\\n", "").splitlines() if line.startswith("    accelerate ")]
        for line in found:
            run_block(Block(path, 1, "bash", line, None), path.parent)


def test_yaml_has_fields_that_exist():
    known = arguments_of_train()
    for block in blocks_in("yaml"):
        values = yaml.safe_load(block.code)
        if not block.not_run:
            assert set(values) <= known, f"{block}: {sorted(set(values) - known)}"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("frobnicate --now", "nobody runs or checks frobnicate"),
        ("exgrpo-trl shows outputs", "exit code|2"),
        ("exgrpo-trl show nowhere", "exit code 1"),
        (
            "exgrpo-trl train --dataset_name d --replay_fractoin 1 --num_processes 4",
            "no arguments ..replay_fractoin..",
        ),
        ("pip install 'exgrpo-trl[maths]'", "no extras"),
        ("make tset", "no tset"),
        ("make bench SEEDS=3", "no SEEDS"),
        ("accelerate launch --config_file examples/configs/fsdp3.yaml examples/train_math.py", "no examples/configs"),
        ("accelerate launch --num_proceses 2 examples/train_math.py", "2"),
        ("accelerate launch examples/train_math.py --replay_fractoin 0.5", "fractoin"),
        ("python -m benchmarks.step_cost --quick", "no --quick"),
    ],
)
def test_a_wrong_command_is_found(command, complaint, saved):
    with pytest.raises((AssertionError, ValueError), match=complaint):
        run_block(Block(ROOT / "README.md", 1, "bash", f"{command}\n", None), saved)


def test_a_marked_block_is_checked_and_not_run(tmp_path):
    def block(code: str) -> Block:
        return Block(ROOT / "README.md", 1, "bash", code, "needs a GPU")

    run_block(block("vllm serve model\nexgrpo-trl show nowhere\n"), tmp_path)
    with pytest.raises(AssertionError):
        run_block(block("exgrpo-trl show --no-such-option\n"), tmp_path)


def test_commands_are_split_as_a_shell_does():
    code = "A=1 B=2 run \\\n    --x 'a b'  # why\n\n# nothing\nother $RANK_OF_THIS_NODE\n"
    assert commands_of(code) == [["run", "--x", "a b"], ["other", "0"]]
