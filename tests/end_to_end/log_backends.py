"""
A run that reports to TensorBoard, wandb and trackio, and what each of them has written, read back from its files.

    python tests/end_to_end/log_backends.py FOLDER tensorboard wandb trackio

Nothing may leave the machine: a connection or an open port of this process is an error. What was logged and what was
read goes to `FOLDER/read.json`: for each backend the values by name and step.
"""

import importlib
import json
import os
import sqlite3
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Values = dict[str, dict[int, float]]
BLOCK = 32 * 1024  # of the log format of LevelDB, in which wandb writes


def local_environment(folder: Path) -> dict[str, str]:
    """Environment in which the backends keep everything in a folder, and to themselves."""
    return {
        "HOME": str(folder / "home"),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),  # before transformers 5 below `output_dir`
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_CONSOLE": "off",
        "WANDB_DISABLE_GIT": "true",
        "WANDB_DISABLE_CODE": "true",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_X_DISABLE_STATS": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
    }


REFUSED: list[str] = []  # also where a backend goes on without


def refuse_network(event: str, arguments: Any) -> None:
    """An audit hook: sockets in the file system are all that wandb may talk to its other half by."""
    is_local = event in ("socket.connect", "socket.bind") and isinstance(arguments[1], str | bytes)
    if event in ("socket.connect", "socket.bind", "socket.getaddrinfo") and not is_local:
        REFUSED.append(f"{event} {arguments[:2]}")
        raise RuntimeError(REFUSED[-1])


def train(folder: Path, backends: list[str]) -> list[dict[str, Any]]:
    """A tiny run; its training log lines."""
    from tiny import make_trainer

    options: dict[str, Any] = {"report_to": backends, "run_name": "tiny", "max_steps": 4, "retire_solved": False}
    trainer = make_trainer(folder / "run", **options)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def read_tensorboard(folder: Path) -> Values:
    """Scalars of the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: Values = {}
    for events in {path.parent for path in folder.rglob("events.out.tfevents.*")}:
        accumulator = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
        for name in accumulator.Tags()["scalars"]:
            values[name] = {event.step: event.value for event in accumulator.Scalars(name)}
    return values


def records_of(path: Path) -> Iterator[bytes]:
    """Records of a `.wandb` file, whose pieces do not cross blocks."""
    data, position, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        record += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_wandb(folder: Path) -> Values:
    """History of an offline run."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # so that its other half has written everything
    [path] = folder.rglob("run-*.wandb")
    records = map(wandb_internal_pb2.Record.FromString, records_of(path))
    histories = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return by_name({item.nested_key[0]: json.loads(item.value_json) for item in items} for items in histories)


def read_trackio(folder: Path) -> Values:
    """Metrics of its database."""
    [path] = folder.rglob("*.db")
    database = sqlite3.connect(path)
    rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by id")]
    database.close()
    return by_name(rows)


def by_name(rows: Iterable[dict[str, float]]) -> Values:
    """Values of the lines of a training; TRL writes rows of its own in between."""
    values: Values = defaultdict(dict)
    for row in rows:
        for name, value in row.items() if "train/loss" in row else ():
            values[name][int(row["train/global_step"])] = value
    return values


def main() -> None:
    folder, backends = Path(sys.argv[1]), sys.argv[2:]
    os.environ.update(local_environment(folder))
    importlib.import_module("urllib3")  # which tries whether there is IPv6
    sys.addaudithook(refuse_network)
    told: dict[str, Any] = {"logged": train(folder, backends)}
    for backend in backends:
        told[backend] = globals()[f"read_{backend}"](folder)
    assert not REFUSED, REFUSED
    (folder / "read.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
