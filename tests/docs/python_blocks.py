"""Runs the Python blocks of a page one after the other, in one namespace, as a reader would."""

import ast
import inspect
import os
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

from pages import Block
from stand_ins import REWRITTEN, prepare_folder, tiny_configs

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer


def run_blocks(
    blocks: list[Block], folder: Path, names: dict[str, Any], before: Callable[[Block, dict[str, Any]], None]
) -> list[Block]:
    """
    Run the blocks of a page that are not marked, in a folder.

    Args:
        blocks: The Python blocks of the page.
        folder: Where they run, with the stand-ins for what they name.
        names: Their namespace: what the page takes for granted, and then what the blocks define.
        before: Called before each block.

    Returns:
        The blocks that have run.
    """
    prepare_folder(folder, "".join(block.code for block in blocks))
    ran = []
    with chdir(folder), tiny_configs():
        for block in blocks:
            if block.not_run:
                check_calls(block)
                continue
            before(block, names)
            code = block.code
            for old, new in REWRITTEN.get(block.page.name, {}).items():
                code = code.replace(old, new)
            # Line numbers of the page in tracebacks.
            exec(compile("\n" * block.line + code, os.fspath(block.page), "exec"), names)
            ran.append(block)
    return ran


def check_calls(block: Block) -> None:
    """Compile a block that cannot run, and check the arguments of our configuration and trainer in it."""
    known = {of.__name__: inspect.signature(of).parameters for of in (ExGRPOConfig, ExGRPOTrainer)}
    for node in ast.walk(ast.parse(block.code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known:
            unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - set(known[node.func.id])
            assert not unknown, f"{block}: {node.func.id} has no {', '.join(sorted(unknown))}"
