"""How the processes of a run talk: bytes between the main process and the others, never pickled objects."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator


class Processes:
    """
    The processes of a run. All of them call each method, at the same point of the run.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Accelerator of the trainer.

    Attributes:
        seconds (`dict[str, float]`):
            Time spent since the start in `"gathering"` to the main process and in `"broadcasting"` from it, waiting
            for the slowest process included; 0 for a single process.
        bytes_sent (`dict[str, int]`):
            Bytes that this process has sent in either, padding included.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.count: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self.seconds = {"gathering": 0.0, "broadcasting": 0.0}
        self.bytes_sent = {"gathering": 0, "broadcasting": 0}

    @property
    def is_main(self) -> bool:
        """Whether this is the main process."""
        return self.rank == 0

    def gather(self, payload: bytes) -> list[bytes]:
        """
        Send a payload of each process to the main process.

        Args:
            payload (`bytes`):
                Payload of this process.

        Returns:
            `list[bytes]`:
                By process on the main process, empty on the others.
        """
        if self.count == 1:
            return [payload]
        with self._timed("gathering"):
            sizes = [torch.empty(1, dtype=torch.int64, device=self.device) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(payload)], dtype=torch.int64, device=self.device))
            lengths = [int(size) for size in sizes]
            if max(lengths) == 0:
                return [b""] * self.count if self.is_main else []
            parts = [self._empty(max(lengths)) for _ in lengths] if self.is_main else None
            dist.gather(self._padded(payload, max(lengths)), parts, dst=0)
            self.bytes_sent["gathering"] += 0 if self.is_main else max(lengths)
            return [_to_bytes(part, length) for part, length in zip(parts or [], lengths, strict=False)]

    def scatter(self, payloads: Sequence[bytes] | None) -> bytes:
        """
        Give each process its payload.

        Args:
            payloads (`Sequence[bytes]` or `None`):
                One payload per process on the main process, `None` on the others.

        Returns:
            `bytes`:
                Payload for this process.
        """
        if payloads is not None and self.count == 1:
            return payloads[0]
        with self._timed("broadcasting"):
            sizes = torch.tensor(
                [0] * self.count if payloads is None else [len(payload) for payload in payloads],
                dtype=torch.int64,
                device=self.device,
            )
            dist.broadcast(sizes, src=0)
            longest = int(sizes.max())
            if longest == 0:
                return b""
            mine = self._empty(longest)
            dist.scatter(mine, None if payloads is None else [self._padded(p, longest) for p in payloads], src=0)
            self.bytes_sent["broadcasting"] += 0 if payloads is None else longest * (self.count - 1)
            return _to_bytes(mine, int(sizes[self.rank]))

    def broadcast(self, payload: bytes | None) -> bytes:
        """
        Give all processes the payload of the main process.

        Args:
            payload (`bytes` or `None`):
                Payload on the main process, `None` on the others.

        Returns:
            `bytes`:
                The payload.
        """
        return self.scatter(None if payload is None else [payload] * self.count)

    def wait(self) -> None:
        """Return once all processes have come here."""
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """
        Let all processes fail where one fails, instead of letting the others wait for it.

        The block must not end early on one process while another waits for it inside the block.

        Args:
            what (`str`):
                What the block does, for the message: "computing rewards".

        Raises:
            `RuntimeError`:
                On the processes that did not fail, with the error of the first one that did. That one raises what it
                raised.
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
            message = self._broadcast_message(f"{type(error).__name__}: {error}", first)
        if error is not None:
            raise error
        raise RuntimeError(f"Process {first} failed while {what}, so all processes stop. Its error: {message}")

    def _broadcast_message(self, message: str, source: int) -> str:
        text = message.encode()
        size = torch.tensor([len(text)], dtype=torch.int64, device=self.device)
        dist.broadcast(size, src=source)
        buffer = self._padded(text, int(size)) if self.rank == source else self._empty(int(size))
        dist.broadcast(buffer, src=source)
        return _to_bytes(buffer, int(size)).decode()

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)

    def _padded(self, payload: bytes, size: int) -> torch.Tensor:
        padded = torch.zeros(size, dtype=torch.uint8)
        if payload:
            padded[: len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return padded.to(self.device)

    @contextmanager
    def _timed(self, direction: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[direction] += time.perf_counter() - start


def _to_bytes(tensor: torch.Tensor, length: int) -> bytes:
    return tensor[:length].cpu().numpy().tobytes()
