"""
Commands of the documentation. `exgrpo-trl` runs, on what a tiny run has saved under the names of the pages. The others
are read by their own parsers, and the files, targets, extras and options that they name have to exist.
"""

import dataclasses
import importlib.util
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from contextlib import ExitStack, chdir
from pathlib import Path
from unittest import mock

import pytest
from accelerate.commands.launch import launch_command_parser
from pages import ROOT, Block
from trl import ModelConfig
from trl.scripts.grpo import GRPOScriptArguments

from exgrpo_trl import ExGRPOConfig, cli

# What variables stand for, as `$RANK_OF_THIS_NODE`.
VARIABLES = {"RANK_OF_THIS_NODE": "0", "IP_OF_THE_FIRST_NODE": "127.0.0.1"}
_ASSIGNMENT = re.compile(r"[A-Z][A-Z0-9_]*=.*")


def commands_of(code: str) -> list[list[str]]:
    """The commands of a block as lists of words, without comments and assignments before them."""
    commands = []
    for line in code.replace("\\\n", " ").splitlines():
        for name, value in VARIABLES.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.fullmatch(words[0]):
            words.pop(0)
        if words:
            commands.append(words)
    return commands


def run_block(block: Block, folder: Path) -> None:
    """
    Run or check all commands of a block.

    Args:
        block: A block of the language bash; one that is marked is checked and never run.
        folder: Where the stand-in of a run is.
    """
    for words in commands_of(block.code):
        program = Path(words[0]).name
        if program not in CHECKS:
            assert block.not_run, f"{block}: nobody runs or checks {program}. Say why it does not run, or add a check"
            continue
        try:
            if words[1:2] == ["train"]:
                check_train(words)
            elif program == "exgrpo-trl":
                run_exgrpo_trl(words, None if block.not_run else folder)
            else:
                CHECKS[program](words)
        except (AssertionError, SystemExit) as error:
            raise AssertionError(f"{block}: {shlex.join(words)}: {error}") from error


def run_exgrpo_trl(words: list[str], folder: Path | None) -> None:
    """The command line itself; without a folder its parser alone."""
    with ExitStack() as stack:
        if folder is None:
            for command in cli.COMMANDS.values():
                stack.enter_context(mock.patch.object(command, "run"))
        else:
            stack.enter_context(chdir(folder))
        code = cli.main(words[1:])
    assert code == 0, f"exit code {code}"


def check_train(words: list[str]) -> None:
    """A training is not begun: its arguments have to be those of TRL's script, of replay, or of the launcher."""
    unknown = {word[2:] for word in words if word.startswith("--")} - arguments_of_train()
    assert not unknown, f"no arguments {sorted(unknown)}"


def arguments_of_train() -> set[str]:
    """What TRL's script of GRPO takes, with the fields of replay, and what accelerate launches with."""
    kinds = (GRPOScriptArguments, ExGRPOConfig, ModelConfig)
    launcher = {option.lstrip("-") for option in launch_command_parser()._option_string_actions}
    return {"config", "env"} | launcher | {field.name for kind in kinds for field in dataclasses.fields(kind)}


def check_pip(words: list[str]) -> None:
    """What is installed are packages with extras that exist, or the checkout with them."""
    assert words[1] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[2:]:
        if found := re.fullmatch(r"(exgrpo-trl|\.)(?:\[([\w,]+)\])?", word):
            unknown = set((found[2] or "").split(",")) - {"", *project["optional-dependencies"]}
            assert not unknown, f"no extras {sorted(unknown)}"


def check_make(words: list[str]) -> None:
    """Targets and variables are those of the Makefile."""
    makefile = (ROOT / "Makefile").read_text()
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, makefile, re.MULTILINE), f"the Makefile has no {name}"


def check_accelerate(words: list[str]) -> None:
    """accelerate's own parser reads its part, and that of the script the rest."""
    assert words[1] == "launch"
    arguments = launch_command_parser().parse_args(words[2:])
    if arguments.config_file is not None:
        assert (ROOT / arguments.config_file).is_file(), f"there is no {arguments.config_file}"
    parse_as_script(ROOT / arguments.training_script, arguments.training_script_args)


def check_python(words: list[str]) -> None:
    """A module of the checkout, with options that are in its source; or a script, whose parser reads them."""
    if words[1] != "-m":
        parse_as_script(ROOT / words[1], words[2:])
        return
    if words[2].split(".")[0] not in ("benchmarks", "tests"):
        pytest.importorskip(words[2].split(".")[0])
        return
    path = ROOT / words[2].replace(".", "/")
    source = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    for option in (word for word in words[3:] if word.startswith("--")):
        assert f'"{option}"' in source, f"{words[2]} has no {option}"


def parse_as_script(script: Path, words: list[str]) -> None:
    """Have an example of ours parse its command line."""
    assert script.is_file(), f"there is no {script}"
    spec = importlib.util.spec_from_file_location(f"documented_{script.stem}", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch.dict(sys.modules, {spec.name: module}),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
    ):
        spec.loader.exec_module(module)
        on_cpu = ["--use_cpu", "True", "--bf16", "False"]
        with mock.patch.object(sys, "argv", [str(script), *words, *on_cpu]):
            try:
                module.parse_arguments()
            except SystemExit as end:  # of --help
                if end.code:
                    raise AssertionError(f"its parser refuses that: {end.code}") from end


CHECKS: dict[str, Callable[..., None]] = {
    "exgrpo-trl": run_exgrpo_trl,
    "pip": check_pip,
    "make": check_make,
    "accelerate": check_accelerate,
    "python": check_python,
}
