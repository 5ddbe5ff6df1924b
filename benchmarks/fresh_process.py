"""A process of its own for a measurement, so that none finds the memory or the caches of another."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """
    What a function returns, called in a process that is started for it and has ended when this returns.

    Raises:
        BrokenProcessPool: if the process was killed, by lack of memory for instance.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *arguments).result()
