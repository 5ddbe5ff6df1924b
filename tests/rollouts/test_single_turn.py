"""transformers is asked for fresh rows only, and stored completions take the others."""

import numpy as np
import pytest

from exgrpo_trl.batch import Batch
from exgrpo_trl.plan import Plan
from exgrpo_trl.records import Experience, Question, Replay
from exgrpo_trl.rollouts import SingleTurnRollouts
from exgrpo_trl.rollouts.base import lacks_logps, put_stored


def stored_completion():
    return Experience.create([5, 6], np.array([-0.5, -0.25]), policy_version=0, reward=1.0, entropy=0.1)


@pytest.mark.parametrize("stored_rows", [set(), {0}, {1, 2}, {0, 1, 2, 3}])
@pytest.mark.parametrize("first_row", [0, 4])
def test_transformers(stored_rows, first_row):
    asked = []

    def generate(prompt_ids, images, fields):
        assert images is None
        asked.extend(prompt_ids)
        assert fields == {"token_type_ids": [[ids[0] * 10] for ids in prompt_ids]}
        return [[ids[0], 7] for ids in prompt_ids], None, "more"

    prompts = [[1], [2], [3], [4]]
    question = Question("q", {"prompt": "p"})
    replays = tuple(Replay(question, stored_completion(), first_row + row) for row in stored_rows)
    batch = Batch(Plan(0, True, replays), first_row, 4, num_groups=8, group_size=1)
    fields = {"token_type_ids": [[10], [20], [30], [40]]}
    completion_ids, logps, more = SingleTurnRollouts()(generate, prompts, None, fields, batch)
    # A process with no fresh row generates one, because others may wait for it.
    assert asked == ([ids for row, ids in enumerate(prompts) if row not in stored_rows] or [[1]])
    assert completion_ids == [[5, 6] if row in stored_rows else [row + 1, 7] for row in range(4)]
    assert (logps, more) == (None, "more")


def test_stored_completions_come_with_their_log_probabilities():
    stored = {1: stored_completion()}
    ids, logps = put_stored([[1], [], [2]], [[-1.0], [], [-2.0]], stored)
    assert ids == [[1], [5, 6], [2]]
    assert logps == [[-1.0], [-0.5, -0.25], [-2.0]]
    assert put_stored([[1], []], None, stored) == ([[1], [5, 6]], None)


def test_missing_log_probabilities():
    assert not lacks_logps([])
    assert not lacks_logps([-1.0, 0.0])
    assert lacks_logps([-1.0, None])
    assert lacks_logps([float("nan"), -1.0])
