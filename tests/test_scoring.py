"""Candidates are dealt evenly over the processes."""

import numpy as np
import pytest

from exgrpo_trl.scoring import deal_forwards


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
@pytest.mark.parametrize("num_sequences", [0, 1, 2, 5, 16, 33, 200])
def test_the_same_number_of_forwards_of_similar_size(num_sequences, batch_size, num_processes):
    lengths = np.random.default_rng(num_sequences).integers(1, 1000, num_sequences).tolist()
    dealt = deal_forwards(lengths, num_processes, batch_size)
    assert len(dealt) == num_processes
    assert {i for share in dealt for batch in share for i in batch} == set(range(num_sequences))
    num_forwards = {len(share) for share in dealt}
    assert num_forwards == {-(-num_sequences // (num_processes * batch_size))}
    for together in zip(*dealt, strict=True):
        sizes = [len(batch) for batch in together]
        assert 1 <= min(sizes) <= max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1
    num_batches = sum(len(share) for share in dealt)
    if num_sequences >= num_batches:
        assert sum(len(batch) for share in dealt for batch in share) == num_sequences, "nothing is scored twice"
        # Forwards that wait for each other hold neighbours in length.
        longest_first = [max(lengths[i] for i in batch) for together in zip(*dealt, strict=True) for batch in together]
        assert longest_first == sorted(longest_first, reverse=True)
