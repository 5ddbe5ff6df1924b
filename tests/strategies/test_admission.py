"""What is stored, in which bucket, what retires: against numbers worked out by hand."""

import numpy as np

from exgrpo_trl.strategies.admission import ADMISSION_RULES, reward_std_buckets
from exgrpo_trl.success import reaches

NAN = np.nan


def test_success_rate():
    rewards = np.array([[1.0, 0.0, 1.0, NAN], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    is_fresh = np.array([[False, True, True, True]] * 3)
    admission = ADMISSION_RULES["success_rate"]()(rewards, reaches(rewards, 1.0), is_fresh)
    assert admission.is_worth_storing.tolist() == [
        [True, False, True, False],
        [True, True, True, True],
        [False, False, False, False],
    ]
    # The replayed completion counts, too.
    assert admission.num_successes.tolist() == admission.buckets.tolist() == [2, 4, 0]
    assert admission.is_solved.tolist() == [False, True, False]
    assert admission.concerns_buffer.tolist() == [True, True, False]


def test_reward_spread():
    rewards = np.array([[0.5, 0.1, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2], [0.0, 0.4, NAN, 0.8], [1.0, 1.0, 1.0, 1.0]])
    is_fresh = np.ones((4, 4), dtype=bool)
    is_fresh[0, 0] = False  # what stands out was replayed: nothing new
    admission = ADMISSION_RULES["reward_std"]()(rewards, reaches(rewards, 1.0), is_fresh)
    assert admission.is_worth_storing.tolist() == [
        [True, False, False, False],
        [False, False, False, False],
        [False, False, False, True],
        [False, False, False, False],
    ]
    assert admission.num_successes.tolist() == [0, 0, 1, 4]
    # Standard deviations 0.1732, 0, 0.3266, 0 over their range, times 4: 2.12, 0, 4, 0.
    assert admission.buckets.tolist() == [2, 0, 4, 0]
    assert admission.is_solved.tolist() == [False, False, False, True]


def test_equal_spreads_are_bucket_0():
    assert reward_std_buckets(np.array([[0.0, 1.0], [1.0, 0.0]])).tolist() == [0, 0]
    assert reward_std_buckets(np.array([[NAN, NAN], [np.inf, 0.0]])).tolist() == [0, 0]
