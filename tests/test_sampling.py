import itertools
import math
from collections import Counter

import numpy as np
import pytest

from exgrpo_trl.experience import Candidate, Experience
from exgrpo_trl.sampling import (
    COMPLETION_SELECTORS,
    QUESTION_SAMPLERS,
    gaussian_sampler,
    get_completion_selector,
    make_question_sampler,
    random_sampler,
    requires_scores,
    uniform_sampler,
    without_scores,
)


class Pool:
    """A pool of the given bucket sizes; question ids are `bucket-number`."""

    def __init__(self, sizes, group_size=8):
        self._buckets = {key: [f"{key}-{number}" for number in range(size)] for key, size in sorted(sizes.items())}
        self.group_size = group_size

    @property
    def num_questions(self):
        return sum(map(len, self._buckets.values()))

    def buckets(self):
        return self._buckets

    def completions(self, question_id):
        raise AssertionError("a built-in sampler must not look at completions")


def bucket_counts(pool, drawn):
    counts = Counter(int(question_id.split("-")[0]) for question_id in drawn)
    return tuple(counts[bucket] for bucket in pool.buckets())


def exact_multinomial(sizes, weights, total):
    """Probability of every vector of counts: multinomial, clipped, the excess drawn again where there is room."""
    result = Counter()

    def go(counts, probability):
        remaining = min(total, sum(sizes)) - sum(counts)
        if remaining == 0:
            result[counts] += probability
            return
        shares = [weight if count < size else 0.0 for weight, count, size in zip(weights, counts, sizes, strict=True)]
        for outcome in itertools.product(range(remaining + 1), repeat=len(sizes)):
            if sum(outcome) != remaining:
                continue
            chance = math.factorial(remaining)
            for number, share in zip(outcome, shares, strict=True):
                chance *= (share / sum(shares)) ** number / math.factorial(number)
            if chance:
                go(tuple(min(c + o, s) for c, o, s in zip(counts, outcome, sizes, strict=True)), probability * chance)

    go((0,) * len(sizes), 1.0)
    assert sum(result.values()) == pytest.approx(1)
    return result


def exact_hypergeometric(sizes, total):
    return {
        counts: math.prod(map(math.comb, sizes, counts)) / math.comb(sum(sizes), total)
        for counts in itertools.product(*(range(size + 1) for size in sizes))
        if sum(counts) == total
    }


def assert_frequencies(seen, expected, num_draws):
    assert set(seen) <= {outcome for outcome, probability in expected.items() if probability}
    for outcome, probability in expected.items():
        tolerance = 5 * math.sqrt(num_draws * probability * (1 - probability)) + 1e-6
        assert abs(seen[outcome] - num_draws * probability) <= tolerance, outcome


def gaussian_weights(buckets, group_size, mean, std):
    return [math.exp(-((bucket - group_size * mean) ** 2) / (2 * std**2)) for bucket in buckets]


SIZES = {2: 1, 3: 2, 4: 2, 7: 6}
CASES = {
    "gaussian": (gaussian_sampler(), exact_multinomial(SIZES.values(), gaussian_weights(SIZES, 8, 0.5, 1), 4), 50_000),
    "wide": (
        gaussian_sampler(0.8, 2.0),
        exact_multinomial(SIZES.values(), gaussian_weights(SIZES, 8, 0.8, 2), 4),
        10_000,
    ),
    "uniform": (uniform_sampler, exact_multinomial(SIZES.values(), [1, 1, 1, 1], 4), 10_000),
    "random": (random_sampler, exact_hypergeometric(list(SIZES.values()), 4), 10_000),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_match_the_exact_distribution(name):
    sampler, expected, num_draws = CASES[name]
    pool, rng = Pool(SIZES), np.random.default_rng(0)
    seen, questions, first = Counter(), Counter(), Counter()
    for _ in range(num_draws):
        drawn = sampler(pool, 4, rng)
        assert len(drawn) == len(set(drawn)) == 4
        counts = bucket_counts(pool, drawn)
        seen[counts] += 1
        questions.update(drawn)
        first[int(drawn[0].split("-")[0])] += 1
    assert_frequencies(seen, expected, num_draws)
    for index, (bucket, size) in enumerate(SIZES.items()):
        share = sum(probability * counts[index] for counts, probability in expected.items())
        # The questions of a bucket are alike, and any drawn one may come first.
        for question_id in pool.buckets()[bucket]:
            assert abs(questions[question_id] - num_draws * share / size) <= 5 * math.sqrt(num_draws / 4)
        assert abs(first[bucket] - num_draws * share / 4) <= 5 * math.sqrt(num_draws / 4)


def test_weight_belongs_to_the_bucket_not_to_the_question():
    pool, rng = Pool({3: 2000, 5: 20}), np.random.default_rng(0)
    counts = np.array([bucket_counts(pool, gaussian_sampler()(pool, 10, rng)) for _ in range(1000)])
    assert abs(counts[:, 1].mean() - 5) < 0.25
    counts = np.array([bucket_counts(pool, random_sampler(pool, 10, rng)) for _ in range(1000)])
    assert abs(counts[:, 1].mean() - 10 * 20 / 2020) < 0.05


@pytest.mark.parametrize("sampler", [*QUESTION_SAMPLERS.values(), gaussian_sampler(0.5, 1e-9)])
@pytest.mark.parametrize("n", [0, 1, 11, 12, 1000])
def test_all_questions_come_when_as_many_are_asked_for(sampler, n):
    pool = Pool(SIZES)
    drawn = sampler(pool, n, np.random.default_rng(1))
    assert len(drawn) == len(set(drawn)) == min(n, 11)
    assert sampler(Pool({}), n, np.random.default_rng(1)) == []


@pytest.mark.parametrize("std", [1e-3, 1e-9, 1e-160, 5e-324])
def test_tiny_std_takes_the_nearest_buckets_with_room(std):
    pool = Pool({1: 5, 4: 2, 6: 3, 7: 50})
    with np.errstate(all="raise", under="ignore"):
        for seed in range(20):
            drawn = gaussian_sampler(0.5, std)(pool, 7, np.random.default_rng(seed))
            assert bucket_counts(pool, drawn)[1:3] == (2, 3)
            drawn = gaussian_sampler(0.0, std)(pool, 3, np.random.default_rng(seed))
            assert bucket_counts(pool, drawn) == (3, 0, 0, 0)


def test_same_generator_state_gives_same_draws():
    pool = Pool(dict.fromkeys(range(1, 8), 100))
    for sampler in QUESTION_SAMPLERS.values():
        draws = [sampler(pool, 20, np.random.default_rng(3)) for _ in range(2)]
        assert draws[0] == draws[1] != sampler(pool, 20, np.random.default_rng(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-0.1, 1.0), "-0.1"), ((4, 1.0), "4"), ((math.nan, 1), "nan"), ((0.5, 0.0), "0.0"), ((0.5, math.inf), "inf")],
)
def test_gaussian_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_sampler(*arguments)


def test_gaussian_needs_the_group_size():
    with pytest.raises(ValueError, match="group_size"):
        gaussian_sampler()(Pool({1: 1}, group_size=None), 1, np.random.default_rng(0))


def test_make_question_sampler():
    pool = Pool({1: 50, 4: 50, 7: 50})
    make = make_question_sampler("gaussian", bucket_mean=0.125, bucket_std=0.01)
    assert bucket_counts(pool, make(pool, 10, np.random.default_rng(0))) == (10, 0, 0)
    assert make_question_sampler("uniform", bucket_mean=0.5, bucket_std=1.0) is uniform_sampler
    assert make_question_sampler("random") is random_sampler
    with pytest.raises(ValueError, match=r"'best'.*gaussian, uniform, random"):
        make_question_sampler("best")


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
    selector = get_completion_selector(name)
    assert selector(candidates(*rows), np.random.default_rng(0)) == index
    assert selector(candidates(rows[0]), np.random.default_rng(0)) == 0
    with pytest.raises(ValueError, match="empty"):
        selector([], np.random.default_rng(0))


def test_nan_scores_never_win():
    rows = [(0, math.nan, math.nan), (0, 0.5, 0.5), (0, math.nan, math.nan), (0, 0.6, 0.6)]
    expected = {"lowest_entropy": 1, "highest_entropy": 3, "lowest_negative_log_likelihood": 1}
    for name, index in expected.items():
        assert COMPLETION_SELECTORS[name](candidates(*rows), np.random.default_rng(0)) == index


def test_random_selector_is_uniform():
    rng, rows = np.random.default_rng(0), candidates(*[(0, None, None)] * 4)
    counts = Counter(COMPLETION_SELECTORS["random"](rows, rng) for _ in range(10_000))
    assert_frequencies(counts, dict.fromkeys(range(4), 0.25), 10_000)
    with pytest.raises(ValueError, match="empty"):
        COMPLETION_SELECTORS["random"]([], rng)


def test_only_selectors_that_look_at_scores_require_them():
    unscored = {name for name, selector in COMPLETION_SELECTORS.items() if not requires_scores(selector)}
    assert unscored == {"random", "most_recent"}
    for name, selector in COMPLETION_SELECTORS.items():
        if name in unscored:
            assert selector(candidates((0, None, None)), np.random.default_rng(0)) == 0
        else:
            with pytest.raises(ValueError, match="score them first"):
                selector(candidates((0, None, None)), np.random.default_rng(0))
    assert requires_scores(lambda candidates, rng: 0)
    assert not requires_scores(without_scores(lambda candidates, rng: 0))


def test_unknown_selector_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'best'.*lowest_entropy.*most_recent"):
        get_completion_selector("best")
