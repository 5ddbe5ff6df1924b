import gc
import os

# Before torch is imported: two threads on two busy cores are many times slower, and no test may reach a hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch
import trl
from packaging.version import Version

CONTRACT = Path(__file__).parent / "matrix" / "contract.txt"
TRL = Version(trl.__version__)


def pytest_addoption(parser):
    parser.addoption("--contract", action="store_true", help="only the tests that every release of TRL has to pass")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--contract"):
        return
    names = [line for line in CONTRACT.read_text().splitlines() if line and not line.startswith("#")]
    kept = {
        name: [item for item in items if item.nodeid.rpartition("/")[2] == name or is_begun_by(item, name)]
        for name in names
    }
    unknown = [name for name, found in kept.items() if not found]
    # Before, TRL had fewer kinds of environments, and no images of tools.
    if unknown and Version("1.11") <= TRL:
        raise pytest.UsageError(f"{CONTRACT} names tests that do not exist: {unknown}")
    wanted = {item for found in kept.values() for item in found}
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = [item for item in items if item in wanted]


def is_begun_by(item, name):
    return name.endswith("*") and item.nodeid.rpartition("/")[2].startswith(name[:-1])


def pytest_collection_finish():
    """
    Trainers collect garbage when they end: a third of their time, unless it leaves alone what was imported.

    In between there is little to collect, and looking for it takes a twentieth.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def without_training_where_trl_needs_a_gpu(monkeypatch):
    """TRL 1.15 computes log-probabilities by a kernel that exists for GPUs alone: its trainers do not run on CPUs."""
    if TRL.release[:2] == (1, 15) and not torch.cuda.is_available():
        reason = f"trl {TRL} computes log-probabilities on GPUs only"
        monkeypatch.setattr(trl.GRPOTrainer, "train", lambda *args, **kwargs: pytest.skip(reason))
