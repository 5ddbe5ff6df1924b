"""How the processes of a run talk: the main process decides, all are told, and what they saw comes back to it."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


class Processes:
    """
    The processes of a run. All of them call each method, at the same point of the run.

    On a single process nothing is sent and nothing is copied.

    Args:
        state ([`~accelerate.PartialState`] or [`~accelerate.Accelerator`]):
            Which process this is, and of how many.

    Attributes:
        seconds (`dict[str, float]`):
            Time spent since the start in `"gathering"` to the main process and in `"broadcasting"` from it, waiting
            for the slowest process included; 0 for a single process.
    """

    def __init__(self, state: Any) -> None:
        self.rank: int = state.process_index
        self.count: int = state.num_processes
        self.device: torch.device = state.device
        self.seconds: dict[str, float] = {"gathering": 0.0, "broadcasting": 0.0}

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def decide(self, what: str, choose: Callable[[], T]) -> T:
        """What `choose` returns or raises on the main process, on all; `what` it decides, for the message."""
        if self.count == 1:
            return choose()
        error: Exception | None = None
        outcome: list[object] = [None, None]
        if self.is_main:
            try:
                outcome[0] = choose()
            except Exception as raised:
                error = raised
                outcome[1] = f"{type(error).__name__}: {error}"
        with self._timed("broadcasting"):
            dist.broadcast_object_list(outcome, src=0, device=self.device)
        if error is not None:
            raise error
        if outcome[1] is not None:
            raise _failure(0, what, outcome[1])
        return cast(T, outcome[0])

    def gather(self, mine: T) -> list[T]:
        """What each process has, by process on the main process; nothing on the others."""
        if self.count == 1:
            return [mine]
        with self._timed("gathering"):
            gathered: list[T] | None = [mine] * self.count if self.is_main else None
            dist.gather_object(mine, gathered, dst=0)
        return gathered or []

    def scatter(self, parts: Sequence[T]) -> T:
        """The part of each process, of those that the main process has; the others give nothing."""
        if self.count == 1:
            return parts[0]
        mine: list[T | None] = [None]
        with self._timed("broadcasting"):
            dist.scatter_object_list(mine, list(parts) if self.is_main else None, src=0)
        return cast(T, mine[0])

    def highest(self, mine: int) -> int:
        """The highest of the numbers that the processes have, on all."""
        if self.count == 1:
            return mine
        highest = torch.tensor([mine], device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """
        Let all processes fail where one fails, instead of letting the others wait for it.

        The block must not end early on one process while another waits for it inside the block.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            if self.count == 1:
                raise
            error = raised
        if self.count == 1:
            return
        with self._timed("gathering"):
            failed = torch.tensor([self.count if error is None else self.rank], device=self.device)
            dist.all_reduce(failed, op=dist.ReduceOp.MIN)
            first = int(failed)
            if first == self.count:
                return
            message = [f"{type(error).__name__}: {error}"]
            dist.broadcast_object_list(message, src=first, device=self.device)
        if error is not None:
            raise error
        raise _failure(first, what, message[0])

    @contextmanager
    def _timed(self, direction: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[direction] += time.perf_counter() - start


def _failure(process: int, what: str, message: object) -> RuntimeError:
    return RuntimeError(f"Process {process} failed while {what}, so all processes stop. Its error: {message}")
