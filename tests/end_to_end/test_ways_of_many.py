"""Ways of replay on several processes do what they do on one: DDP, FSDP2 and ZeRO-3."""

import pytest
from ranks import run_ranks
from same_rollouts import results, train_and_save
from test_many_processes import assert_agree, assert_same_metrics, run_single

WAYS = {
    "several_stored": {"stored_per_group": 2},
    "last_known": {"candidate_scores": "last_known", "stored_per_group": 3},
    "groups": {"replay_unit": "group"},
    "bounded": {"max_replays": 2, "replay_cooldown": 1, "max_drift": 0.3, "replay_fraction": 0.4},
    "stepping_back": {"min_effective_sample_size": 0.97},
}
ENGAGED = [("ddp", way) for way in WAYS] + [
    (mode, way) for mode in ("fsdp2", "zero3") for way in ("last_known", "groups")
]


@pytest.mark.parametrize(("mode", "way"), ENGAGED)
def test_agrees_with_a_single_process(tmp_path, mode, way):
    single, start = run_single(tmp_path / "single", dict(WAYS[way]))
    parallel = WAYS[way] | {"per_device_train_batch_size": 8}
    run_ranks(train_and_save, str(tmp_path), parallel, folder=tmp_path, mode=mode)
    ranks = results(tmp_path)
    assert_agree(single, ranks, start)
    assert_same_metrics(single, ranks[0])
    state, expected = (of_one["state"]["pacing"] for of_one in (ranks[0], single))
    assert state == expected
    lines = [line for line in single["history"] if "loss" in line]
    if way == "groups":
        for step in range(12):
            stored = [[ranks[rank]["rows"][f"{step}/{8 * rank + i}"][2] for i in range(8)] for rank in range(2)]
            for of_rank in stored:  # all of a group, or nothing
                assert of_rank[:4] in ([True] * 4, [False] * 4)
                assert of_rank[4:] in ([True] * 4, [False] * 4)
                assert not all(of_rank), "a question of every process stays fresh"
        generated = [rank["num_generated"] for rank in ranks]
        assert [4, 4] in [list(of_step) for of_step in zip(*generated, strict=True)]
    if way == "bounded":
        assert sum(line.get("replay/evicted_used_up", 0) for line in lines)
    if way == "stepping_back":
        assert min(line["replay/fraction_allowed"] for line in lines) < 0.5
    if way == "last_known":
        assert not any(rank["num_scored"] for rank in ranks)


def test_groups_that_processes_share(tmp_path):
    """Two processes hold the halves of each group: there is one fresh question for both."""
    options = {"replay_unit": "group", "per_device_train_batch_size": 8}
    single, start = run_single(tmp_path / "single", options)
    run_ranks(train_and_save, str(tmp_path), options | {"per_device_train_batch_size": 2}, folder=tmp_path, world=4)
    ranks = results(tmp_path, 4)
    assert_agree(single, ranks, start)
    assert any(min(per_rank) == 0 for per_rank in zip(*(rank["num_generated"] for rank in ranks), strict=True))
