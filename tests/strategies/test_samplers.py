import itertools
import math
from collections import Counter

import numpy as np
import pytest

from exgrpo_trl.strategies.base import make_strategy
from exgrpo_trl.strategies.samplers import QUESTION_SAMPLERS, GaussianSampler, RandomSampler, UniformSampler


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
    "gaussian": (GaussianSampler(), exact_multinomial(SIZES.values(), gaussian_weights(SIZES, 8, 0.5, 1), 4), 50_000),
    "wide": (
        GaussianSampler(0.8, 2.0),
        exact_multinomial(SIZES.values(), gaussian_weights(SIZES, 8, 0.8, 2), 4),
        10_000,
    ),
    "uniform": (UniformSampler(), exact_multinomial(SIZES.values(), [1, 1, 1, 1], 4), 10_000),
    "random": (RandomSampler(), exact_hypergeometric(list(SIZES.values()), 4), 10_000),
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
    counts = np.array([bucket_counts(pool, GaussianSampler()(pool, 10, rng)) for _ in range(1000)])
    assert abs(counts[:, 1].mean() - 5) < 0.25
    counts = np.array([bucket_counts(pool, RandomSampler()(pool, 10, rng)) for _ in range(1000)])
    assert abs(counts[:, 1].mean() - 10 * 20 / 2020) < 0.05


@pytest.mark.parametrize("sampler", [*(kind() for kind in QUESTION_SAMPLERS.values()), GaussianSampler(0.5, 1e-9)])
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
            drawn = GaussianSampler(0.5, std)(pool, 7, np.random.default_rng(seed))
            assert bucket_counts(pool, drawn)[1:3] == (2, 3)
            drawn = GaussianSampler(0.0, std)(pool, 3, np.random.default_rng(seed))
            assert bucket_counts(pool, drawn) == (3, 0, 0, 0)


def test_same_generator_state_gives_same_draws():
    pool = Pool(dict.fromkeys(range(1, 8), 100))
    for sampler in (kind() for kind in QUESTION_SAMPLERS.values()):
        draws = [sampler(pool, 20, np.random.default_rng(3)) for _ in range(2)]
        assert draws[0] == draws[1] != sampler(pool, 20, np.random.default_rng(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((-0.1, 1.0), "-0.1"), ((4, 1.0), "4"), ((math.nan, 1), "nan"), ((0.5, 0.0), "0.0"), ((0.5, math.inf), "inf")],
)
def test_gaussian_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianSampler(*arguments)


def test_gaussian_needs_the_group_size():
    with pytest.raises(ValueError, match="group_size"):
        GaussianSampler()(Pool({1: 1}, group_size=None), 1, np.random.default_rng(0))


def test_by_name():
    pool = Pool({1: 50, 4: 50, 7: 50})
    easy = make_strategy(
        QUESTION_SAMPLERS, "question_sampling", "gaussian", {"bucket_mean": 0.125, "bucket_std": 0.01}
    )
    assert bucket_counts(pool, easy(pool, 10, np.random.default_rng(0))) == (10, 0, 0)
    for name, kind in (("uniform", UniformSampler), ("random", RandomSampler)):
        assert type(make_strategy(QUESTION_SAMPLERS, "question_sampling", name, {})) is kind
    with pytest.raises(ValueError, match=r"question_sampling='best'.*'gaussian', 'uniform', 'random'"):
        make_strategy(QUESTION_SAMPLERS, "question_sampling", "best", {})
