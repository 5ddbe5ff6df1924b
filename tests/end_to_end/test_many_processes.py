"""Several processes do what one does: DDP, FSDP2, ZeRO-2 and ZeRO-3, full fine-tuning and LoRA."""

import pytest
import torch
import trl
from packaging.version import Version
from ranks import MODES, run_ranks, skip_unless_trainable
from same_rollouts import result_of, results, same_rollouts_trainer, train_and_save


def run_single(folder, options):
    trainer = same_rollouts_trainer(folder, **options)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    return result_of(trainer), start


def assert_agree(single, ranks, start):
    rows = {}
    for rank in ranks:
        assert not rows.keys() & rank["rows"].keys()
        rows |= rank["rows"]
    assert rows == single["rows"]
    assert sum(is_replayed for _, _, is_replayed in rows.values()) > 10
    main = ranks[0]["buffer"]
    assert ranks[0]["retired"] == single["retired"]
    for part in ("questions", "completions", "rng"):
        assert main[part] == single["buffer"][part], part
    for mine, other in zip(main["logps"], single["buffer"]["logps"], strict=True):
        assert mine == pytest.approx(other, abs=1e-4)
    moved = 0.0
    for rank in ranks:
        assert rank["left_out"] == single["left_out"]
        assert rank["is_started"] == single["is_started"]
        assert rank["parameters"].keys() == single["parameters"].keys()
        for name, expected in single["parameters"].items():
            torch.testing.assert_close(rank["parameters"][name], expected, atol=2e-5, rtol=1e-4)
            moved = max(moved, (expected - start[name]).abs().max().item())
    assert moved > 1e-2, "nothing was learned, so agreement says nothing"


def assert_same_metrics(single, main):
    """Replay is described as on one process, but for the time it takes."""
    ours, theirs = ([line for line in run["history"] if "loss" in line] for run in (main, single))
    num_compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        assert {name for name in mine if name.startswith(("replay/", "fresh/"))} == {
            name for name in other if name.startswith(("replay/", "fresh/"))
        }
        for name, value in other.items():
            if name.startswith(("replay/", "fresh/")) and not name.endswith("_seconds"):
                assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
                num_compared += 1
    assert num_compared > 100


def assert_even(ranks, rows_per_rank):
    """No rank generates more than its share, and all make the same number of forwards to score candidates."""
    for per_rank in zip(*(rank["num_generated"] for rank in ranks), strict=True):
        num_replayed = rows_per_rank * len(ranks) - sum(per_rank)
        assert max(per_rank) <= rows_per_rank - num_replayed // len(ranks)
    forwards = [[step for step, _ in rank["num_scored"]] for rank in ranks]
    assert all(mine == forwards[0] for mine in forwards)
    assert forwards[0], "nothing was scored"
    for sizes in zip(*([size for _, size in rank["num_scored"]] for rank in ranks), strict=True):
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_a_single_process(tmp_path, mode, lora):
    skip_unless_trainable(mode, lora)
    options = {"lora": lora}
    single, start = run_single(tmp_path / "single", options)
    parallel = options | {"per_device_train_batch_size": 8}
    run_ranks(train_and_save, str(tmp_path), parallel, folder=tmp_path, mode=mode)
    ranks = results(tmp_path)
    assert_agree(single, ranks, start)
    assert_same_metrics(single, ranks[0])
    assert_even(ranks, 8)


# Batch of a single process, batch of each rank, ranks: how groups lie over the ranks.
SHAPES = {
    "four_ranks": ({}, {"per_device_train_batch_size": 4}, 4),
    "group_split_in_the_middle": (
        {"per_device_train_batch_size": 12, "replay_fraction": 0.67},
        {"per_device_train_batch_size": 6},
        2,
    ),
    "ranks_within_a_group": (
        {"per_device_train_batch_size": 8, "replay_fraction": 0.5},
        {"per_device_train_batch_size": 2},
        4,
    ),
    "a_rank_with_only_the_replayed_row": (
        {"per_device_train_batch_size": 4, "num_generations": 2, "replay_fraction": 0.5},
        {"per_device_train_batch_size": 1},
        4,
    ),
    "accumulation": (
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2},
        2,
    ),
    "retirement": ({"retire_solved": True, "reward_funcs": "easy"}, {"per_device_train_batch_size": 8}, 2),
    "delayed_start": ({"replay_start_pass_rate": 0.4}, {"per_device_train_batch_size": 8}, 2),
    "reward_std": ({"difficulty": "reward_std", "reward_funcs": "long"}, {"per_device_train_batch_size": 8}, 2),
    "iterable": ({"iterable": True, "drop_retired_questions": False}, {"per_device_train_batch_size": 8}, 2),
    "capacity": ({"buffer_capacity": 9, "max_staleness": 5}, {"per_device_train_batch_size": 8}, 2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_however_the_rows_lie(tmp_path, shape):
    if shape == "iterable" and Version(trl.__version__) < Version("1.15"):
        pytest.skip(f"trl {trl.__version__} does not take iterable datasets")
    options, parallel, world = SHAPES[shape]
    single, start = run_single(tmp_path / "single", options)
    run_ranks(train_and_save, str(tmp_path), options | parallel, folder=tmp_path, world=world)
    ranks = results(tmp_path, world)
    assert_agree(single, ranks, start)
    assert_same_metrics(single, ranks[0])
    num_rows = len(single["rows"]) // 12
    assert_even(ranks, num_rows // world)
    if shape == "retirement":
        assert single["retired"]
        assert single["left_out"]
    if shape == "delayed_start":
        active = [line["replay/active"] for line in single["history"] if "loss" in line]
        assert active[0] == 0
        assert active[-1] == 1
    if shape == "a_rank_with_only_the_replayed_row":
        assert any(min(per_rank) == 0 for per_rank in zip(*(r["num_generated"] for r in ranks), strict=True))


@pytest.mark.parametrize("mode", ["fsdp2", "zero3"])
def test_a_rank_without_fresh_rows_takes_part(tmp_path, mode):
    """Where a forward waits for all ranks, a rank that has nothing to generate must not stay away."""
    options, parallel, world = SHAPES["a_rank_with_only_the_replayed_row"]
    single, start = run_single(tmp_path / "single", options)
    run_ranks(train_and_save, str(tmp_path), options | parallel, folder=tmp_path, mode=mode, world=world)
    ranks = results(tmp_path, world)
    assert_agree(single, ranks, start)
    assert any(min(per_rank) == 0 for per_rank in zip(*(rank["num_generated"] for rank in ranks), strict=True))
