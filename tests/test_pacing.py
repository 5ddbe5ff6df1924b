"""How many questions a batch replays: the share holds on average, steps back, recovers; questions rest."""

import json
import re

import pytest

from exgrpo_trl import ExGRPOConfig
from exgrpo_trl.pacing import Pacing


def config(num_groups=4, **fields):
    return ExGRPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, report_to="none", num_generations=4,
        per_device_train_batch_size=4 * num_groups, **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("num_groups", "fraction", "expected"),
    [
        (4, 0.5, [2, 2, 2, 2]),
        (1, 0.5, [0, 1, 0, 1]),
        (3, 0.5, [1, 2, 1, 2]),
        (1, 0.1, [0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        (1, 0.3, [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]),
        (100, 0.29, [29] * 50),  # 0.29 * 100 is a little less than 29
        (100, 0.07, [7] * 50),  # 0.07 * 100 is a little more than 7
    ],
)
def test_the_share_holds_on_average(num_groups, fraction, expected):
    pacing = Pacing(config(num_groups, replay_fraction=fraction))
    assert [pacing.next_batch() for _ in expected] == expected
    assert max(expected) == pacing.args.num_groups_to_replay


def test_over_a_long_run_nothing_is_lost():
    pacing = Pacing(config(7, replay_fraction=0.37))
    assert sum(pacing.next_batch() for _ in range(10_000)) == pytest.approx(10_000 * 7 * 0.37, abs=1)


@pytest.mark.parametrize(
    ("num_groups", "whole", "most"), [(1, True, 1), (2, False, 1), (2, True, 2), (4, False, 3), (4, True, 4)]
)
def test_a_question_stays_fresh_where_whole_groups_are_replayed(num_groups, whole, most):
    fields = {"replay_unit": "group", "replay_whole_batches": whole, "replay_fraction": 0.99}
    pacing = Pacing(config(num_groups, **fields))
    assert max(pacing.next_batch() for _ in range(200)) == most


def test_a_batch_without_room_for_a_group_is_refused():
    with pytest.raises(ValueError, match=r"1 question\(s\) for each process.*replay_whole_batches=True"):
        config(1, replay_unit="group")


def test_it_steps_back_and_recovers():
    pacing = Pacing(config(8, replay_fraction=0.5, min_effective_sample_size=0.5))
    seen = []
    for size in (0.4, 0.49, 0.1, 0.1, None, 0.5, 0.9, 1.0):
        seen.append((pacing.next_batch(), pacing.fraction_allowed))
        pacing.observe(size)
    assert seen == [
        (4, 0.5), (2, 0.25), (1, 0.125), (1, 0.125), (1, 0.125), (1, 0.125), (2, 0.25), (4, 0.5),
    ]  # fmt: skip
    assert pacing.next_batch() == 4


def test_less_than_a_question_is_not_halved():
    pacing = Pacing(config(1, replay_fraction=0.5, min_effective_sample_size=0.5))
    pacing.observe(0.1)
    assert [pacing.next_batch() for _ in range(4)] == [0, 1, 0, 1]


def test_nothing_steps_back_unless_it_is_asked_to():
    pacing = Pacing(config(8))
    pacing.observe(0.0)
    assert pacing.next_batch() == 4


def test_questions_rest():
    pacing = Pacing(config(replay_cooldown=2))
    pacing.replayed(["a", "b"], 5)
    assert set(pacing.resting(6)) == {"a", "b"}
    pacing.replayed(["c"], 6)
    assert set(pacing.resting(7)) == {"a", "b", "c"}
    assert set(pacing.resting(8)) == {"c"}
    assert set(pacing.resting(9)) == set()
    without = Pacing(config())
    without.replayed(["a"], 5)
    assert not without.resting(5)


def test_its_state_survives_json():
    fields = {"replay_fraction": 0.3, "replay_cooldown": 3, "min_effective_sample_size": 0.5}
    pacing, resumed = (Pacing(config(5, **fields)) for _ in range(2))
    pacing.next_batch()
    pacing.observe(0.2)
    pacing.replayed(["a"], 5)
    resumed.load_state_dict(json.loads(json.dumps(pacing.state_dict())))
    assert resumed.state_dict() == pacing.state_dict()
    for one in (pacing, resumed):
        assert set(one.resting(6)) == {"a"}
    assert [pacing.next_batch() for _ in range(9)] == [resumed.next_batch() for _ in range(9)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"replay_fraction": 1}, "replay_fraction=1 is out of range: it leaves no fresh question"),
        ({"candidate_scores": "latest"}, "candidate_scores='latest' is unknown. Choose current or last_known"),
        ({"log_replay": "none"}, "log_replay='none' is unknown. Choose short or all"),
        ({"replay_unit": "question"}, "replay_unit='question' is unknown. Choose completion or group"),
        ({"stored_per_group": 0}, "stored_per_group=0"),
        ({"stored_per_group": None}, "stored_per_group=None"),
        ({"stored_per_group": 1.5}, "stored_per_group=1.5"),
        ({"max_replays": 0}, "max_replays=0"),
        ({"replay_cooldown": -1}, "replay_cooldown=-1"),
        ({"max_drift": 0}, "max_drift=0"),
        ({"max_drift": float("nan")}, "max_drift=nan"),
        ({"min_effective_sample_size": 0}, "min_effective_sample_size=0"),
        ({"min_effective_sample_size": 1.1}, "min_effective_sample_size=1.1"),
        ({"replay_unit": "group", "stored_per_group": 2}, "stored_per_group=2 has no meaning"),
        ({"replay_unit": "group", "fill_failed_groups": True}, "does not tell them from successes"),
        ({"group_selection": "newest"}, "group_selection='newest' is unknown"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        config(**fields)
