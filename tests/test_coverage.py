"""Questions of a later phase come up although replay takes places."""

import json

import numpy as np
import pytest

from exgrpo_trl.coverage import Coverage, deal
from exgrpo_trl.plan import spare


def test_what_was_never_generated_is_remembered_by_epoch():
    coverage = Coverage()
    assert not coverage.is_on
    coverage.begin_phase("abcd")
    assert coverage.begin_epoch(is_new=True) == ["a", "b", "c", "d"]
    coverage.generated("ac")
    coverage.generated("ax")
    assert coverage.begin_epoch(is_new=False) == ["a", "b", "c", "d"], "the epoch is resumed"
    assert coverage.unseen_groups([{0: "a", 1: "b"}, {2: "x", 3: "d"}]) == {1, 3}
    resumed = Coverage()
    resumed.load_state_dict(json.loads(json.dumps(coverage.state_dict())))
    assert resumed.is_on
    assert resumed.begin_epoch(is_new=False) == ["a", "b", "c", "d"]
    assert resumed.begin_epoch(is_new=True) == ["b", "d"]


def test_replay_takes_the_places_of_others():
    assert spare([1, 9], num_groups=4, group_size=4, unseen={0}) == [5, 9], "the slot stays"
    assert spare([1, 9], num_groups=4, group_size=4, unseen={1, 3}) == [1, 9]
    assert spare([1, 9], num_groups=4, group_size=4, unseen={0, 1, 2}) == [9, 13]
    assert spare([1, 9], num_groups=2, group_size=4, unseen={0, 1}) == [1, 9], "there are no others"


@pytest.mark.parametrize("num_first", [1, 3, 6, 8, 11, 12])
def test_they_are_dealt_evenly(num_first):
    order = np.random.default_rng(num_first).permutation(12).tolist()
    first = set(range(num_first))
    dealt = deal(order[:8], first, batch_size=4)  # two batches, which lack some of the rows
    assert len(dealt) == 8
    batches = [dealt[:4], dealt[4:]]
    assert all(len(set(batch)) == 4 for batch in batches), "no question twice in a batch"
    assert first <= set(dealt) or num_first > 8
    counts = [len(set(batch) & first) for batch in batches]
    assert max(counts) - min(counts) <= 1
