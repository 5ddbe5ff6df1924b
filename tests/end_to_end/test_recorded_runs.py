"""Numbers that were written down by an earlier version come out again, and its checkpoint goes on as it did."""

import json

import pytest
from recorded_run import CHECKPOINT, CONTINUATION, LOG, continuation, log_of


def assert_same_lines(lines, recorded):
    """Counts to the digit; what depends on rounding, which another machine or torch does in its way, closely."""
    assert len(lines) == len(recorded)
    for mine, other in zip(lines, recorded, strict=True):
        for name in mine.keys() & other.keys():
            # TRL 1.0 logs losses with four digits.
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=6e-5), (other["step"], name)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_gives_the_numbers_of_the_record(world):
    recorded = json.loads(LOG.read_text())["logs"][f"scripted, {world}"]
    lines = log_of("scripted", world)
    assert_same_lines(lines, recorded)
    assert [line.keys() for line in lines] == [line.keys() for line in recorded]
    assert sum(line["replay/fraction"] > 0 for line in recorded) > 10


def test_a_checkpoint_of_the_first_layout_resumes_exactly():
    recorded = json.loads(CONTINUATION.read_text())
    # It was made to hold all of these.
    settings = json.loads((CHECKPOINT / "experience_buffer" / "metadata.json").read_text())["settings"]
    assert (settings["capacity"], settings["max_completions_per_question"]) == (24, 3)
    assert recorded["retired"]
    assert all(line["replay/fraction"] == 0.5 for line in recorded["lines"])
    resumed = json.loads(json.dumps(continuation(CHECKPOINT)))
    assert_same_lines(resumed.pop("lines"), recorded.pop("lines"))
    assert resumed == recorded, "every completion, bucket and retired question, and the next draws"
