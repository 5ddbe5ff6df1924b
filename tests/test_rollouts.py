"""Where stored completions are put into a generation batch."""

import numpy as np
import pytest

from exgrpo_trl.rollouts import plan_rows


@pytest.mark.parametrize(("num_groups", "group_size"), [(1, 2), (4, 4), (6, 3), (16, 8), (7, 5), (128, 8)])
def test_every_process_gets_its_share(num_groups, group_size):
    num_rows = num_groups * group_size
    rng = np.random.default_rng(0)
    for num_replayed in range(1, num_groups + 1):
        for _ in range(20):
            rows = plan_rows(num_groups, group_size, num_replayed, rng)
            assert rows == sorted(rows)
            assert 0 <= rows[0] <= rows[-1] < num_rows
            assert len({row // group_size for row in rows}) == len(rows) == num_replayed
            for num_processes in (n for n in range(1, num_rows + 1) if num_rows % n == 0):
                per_process = np.bincount(np.array(rows) * num_processes // num_rows, minlength=num_processes)
                share = num_replayed // num_processes
                assert set(per_process.tolist()) <= {share, share + 1}


def test_every_row_is_as_likely():
    rng = np.random.default_rng(1)
    counts = np.zeros(24)
    for _ in range(6000):
        counts[plan_rows(6, 4, 3, rng)] += 1
    assert counts.sum() == 18000
    # Each count is binomial with mean 750 and standard deviation 26.
    assert np.abs(counts - 750).max() < 5 * 26
