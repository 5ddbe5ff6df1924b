"""Runs that saved checkpoints, one of every kind, and the command line as users call it."""

import os
import subprocess
import sys

import pytest
from agents import Watched, agent_options, skip_unless_able, tool_tokenizer
from tiny import first_letter_reward, make_trainer, tiny_dataset, tiny_tokenizer
from vision import vision_dataset, vision_model

# Leaves 100 if the command imported what it must not.
CODE = (
    "import sys; from exgrpo_trl.cli import main; code = main(sys.argv[1:]); "
    "heavy = {'torch', 'trl', 'transformers'} & set(sys.modules); "
    "print(*heavy, file=sys.stderr); sys.exit(100 if heavy else code)"
)


def options_of(kind):
    """Options of `make_trainer`, and the tokenizer."""
    if kind == "tools":
        skip_unless_able(kind)
        # So that questions are solved at times.
        return agent_options(tools=Watched().tools, learning_rate=1e-3), tool_tokenizer()
    if kind == "images":
        model, processor = vision_model("grid")
        dataset = vision_dataset(16)
        options = {"model": model, "processing_class": processor, "train_dataset": dataset, "learning_rate": 1e-3}
        return options | {"reward_funcs": first_letter_reward}, processor.tokenizer
    options = {"train_dataset": tiny_dataset(16, conversational=kind == "chat"), "processing_class": tiny_tokenizer()}
    if kind == "groups":
        options["replay_unit"] = "group"
    if kind == "ids":
        options["question_id_column"] = "uid"
    return options, options["processing_class"]


def new_trainer(folder, kind, **changes):
    options = options_of(kind)[0] | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | changes
    return make_trainer(folder, **options)


@pytest.fixture(scope="session")
def run_of(tmp_path_factory):
    """Folder of a run of a kind, with checkpoints after steps 3 and 6; it must stay as it is."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folder = tmp_path_factory.mktemp(kind)
            new_trainer(folder, kind).train()
            folders[kind] = folder
        return folders[kind]

    return run


@pytest.fixture
def command(tmp_path):
    """Calls `exgrpo-trl` as a program, which must import no torch; returns exit code, output and errors."""

    def call(*arguments, code=0, **environment):
        result = subprocess.run(
            [sys.executable, "-c", CODE, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "COLUMNS": "120", **environment},
            cwd=tmp_path,
            check=False,
        )
        assert (result.returncode, "Traceback" in result.stderr) == (code, False), result.stderr
        return result.stdout if code == 0 else result.stderr

    return call
