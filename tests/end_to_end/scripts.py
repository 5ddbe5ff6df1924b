"""Scripts in processes of their own, [`forked`], so they start at once."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ranks import forked


def _script(script: str, arguments: list[str], cwd: str, environment: dict[str, str], outputs: list[Path]) -> None:
    for descriptor, path in enumerate(outputs, 1):
        with open(path, "w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(cwd)
    os.environ.update(environment)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")


def run_script(script: Path, *arguments: Any, cwd: Path, timeout: float = 280) -> subprocess.CompletedProcess[str]:
    """Run a script as `python script arguments` in the directory `cwd` does, with what it prints as plain text."""
    environment = os.environ | {"TERM": "dumb", "COLUMNS": "100", "CUDA_VISIBLE_DEVICES": ""}
    with TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        command = [str(script), *map(str, arguments)]
        process = forked().Process(target=_script, args=(command[0], command[1:], str(cwd), environment, outputs))
        process.start()
        process.join(timeout)
        stdout, stderr = (path.read_text() if path.exists() else "" for path in outputs)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout, stdout, stderr)
        return subprocess.CompletedProcess(command, process.exitcode, stdout, stderr)
