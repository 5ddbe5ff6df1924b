import math
from collections import Counter

import numpy as np
import pytest

from exgrpo_trl.records import Candidate, Experience
from exgrpo_trl.strategies.base import as_strategy, make_strategy
from exgrpo_trl.strategies.selectors import COMPLETION_SELECTORS, CompletionSelector


def candidates(*rows):
    """Candidates of (policy version, entropy, negative log-likelihood)."""
    return [
        Candidate(Experience.create([1], [-1.0], policy_version=version, reward=1.0), entropy, likelihood)
        for version, entropy, likelihood in rows
    ]


@pytest.mark.parametrize(
    ("name", "index"),
    [("lowest_entropy", 2), ("highest_entropy", 0), ("lowest_negative_log_likelihood", 1), ("most_recent", 3)],
)
def test_selectors(name, index):
    # Every extreme is there twice: the first wins, except that most_recent takes the later one.
    rows = [(5, 0.9, 0.5), (7, 0.4, 0.1), (1, 0.1, 0.9), (7, 0.1, 0.1), (0, 0.9, 0.9)]
    selector = COMPLETION_SELECTORS[name]()
    assert selector(candidates(*rows), np.random.default_rng(0)) == index
    assert selector(candidates(rows[0]), np.random.default_rng(0)) == 0
    with pytest.raises(ValueError, match="empty"):
        selector([], np.random.default_rng(0))


def test_nan_scores_never_win():
    rows = [(0, math.nan, math.nan), (0, 0.5, 0.5), (0, math.nan, math.nan), (0, 0.6, 0.6)]
    expected = {"lowest_entropy": 1, "highest_entropy": 3, "lowest_negative_log_likelihood": 1}
    for name, index in expected.items():
        assert COMPLETION_SELECTORS[name]()(candidates(*rows), np.random.default_rng(0)) == index


def test_random_selector_is_uniform():
    rng, rows = np.random.default_rng(0), candidates(*[(0, None, None)] * 4)
    counts = Counter(COMPLETION_SELECTORS["random"]()(rows, rng) for _ in range(10_000))
    # Each count is binomial with mean 2500 and standard deviation 43.
    assert all(abs(counts[index] - 2500) <= 5 * 43.3 for index in range(4))
    assert counts.total() == 10_000
    with pytest.raises(ValueError, match="empty"):
        COMPLETION_SELECTORS["random"]()([], rng)


def test_only_selectors_that_look_at_scores_require_them():
    selectors = {name: kind() for name, kind in COMPLETION_SELECTORS.items()}
    unscored = {name for name, selector in selectors.items() if not selector.requires_scores}
    assert unscored == {"random", "most_recent"}
    for name, selector in selectors.items():
        if name in unscored:
            assert selector(candidates((0, None, None)), np.random.default_rng(0)) == 0
        else:
            with pytest.raises(ValueError, match="score them first"):
                selector(candidates((0, None, None)), np.random.default_rng(0))
    function = as_strategy(CompletionSelector, lambda candidates, rng: 0)
    assert function.requires_scores

    def longest(candidates, rng):
        return 0

    longest.requires_scores = False
    assert not as_strategy(CompletionSelector, longest).requires_scores


def test_unknown_selector_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"completion_selection='best'.*lowest_entropy.*most_recent"):
        make_strategy(COMPLETION_SELECTORS, "completion_selection", "best", {})
