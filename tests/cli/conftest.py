"""Runs that saved checkpoints, one of every kind, and the command line as users call it."""

import os
import subprocess
import sys

import pytest
from saved_runs import CODE, new_trainer


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
