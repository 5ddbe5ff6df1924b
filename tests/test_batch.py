"""A generation batch: where stored completions go, what is recorded of the others, what comes of it."""

import numpy as np
import pytest
import torch

from exgrpo_trl import Admission, Experience, Question
from exgrpo_trl.batch import COLUMNS, Batch, Share
from exgrpo_trl.plan import Plan, plan_rows
from exgrpo_trl.records import Replay, prompt_hash
from exgrpo_trl.rows import checksums
from exgrpo_trl.scoring import on_cpu


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


def experience(*ids, reward=1.0):
    return Experience.create(ids, [-float(i) for i in ids], policy_version=3, reward=reward)


def question(name):
    return Question(name, {"prompt": name, "answer": [name]})


def two_processes(is_started=True):
    """The same batch on two processes: 4 groups of 3, of which groups 0 and 2 hold a stored completion."""
    replays = (Replay(question("old"), experience(1, 2), 1), Replay(question("older"), experience(4), 7, 0.5))
    plan = Plan(policy_version=9, is_started=is_started, replays=replays if is_started else ())
    return [Batch(plan, first_row, 6, num_groups=4, group_size=3) for first_row in (0, 6)]


def dataset_rows(*names):
    return [{"prompt": name, "answer": [name]} for name in names for _ in range(3)]


def padded(token_ids, width=4):
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in token_ids])


def as_output(completion_ids):
    return {"completion_ids": completion_ids, "completion_mask": torch.ones_like(completion_ids)}


def id_of(row, group):
    return row["prompt"]


def admit(batch, is_worth_storing, mask=None):
    """Admit with all correct solved, and the number of successes as the bucket."""
    is_worth_storing = np.array(is_worth_storing, dtype=bool)
    counts = is_worth_storing.sum(axis=1)
    rewards = np.where(is_worth_storing, 1.0, 0.25)
    admission = Admission(is_worth_storing, counts, counts, is_worth_storing.all(axis=1))
    output = {
        "completion_mask": torch.ones(6, 4) if mask is None else mask,
        "prompt_ids": torch.arange(6)[:, None] // 3 + torch.tensor([0, 10]),
        "prompt_mask": torch.tensor([[0, 1]] * 3 + [[1, 1]] * 3),
    }
    batch.admit(rewards, rewards == 1.0, admission, output)


def test_every_process_knows_the_plan_and_its_own_positions():
    first, second = two_processes()
    for batch in (first, second):
        assert batch.stored_rows == {1, 7}
        assert {group: q.question_id for group, q in batch.replayed_questions.items()} == {0: "old", 2: "older"}
        assert np.flatnonzero(~batch.is_fresh).tolist() == [1, 7]
        assert batch.is_fresh.shape == (4, 3)
    assert {position: e.token_ids.tolist() for position, e in first.stored.items()} == {1: [1, 2]}
    assert {position: e.token_ids.tolist() for position, e in second.stored.items()} == {1: [4]}


def test_stored_rows_take_the_place_of_dataset_rows():
    first, second = two_processes()
    rows = dataset_rows("a", "b")
    placed = first.place(rows, id_of)
    assert [row["prompt"] for row in placed] == ["old"] * 3 + ["b"] * 3
    assert {group: q.example["prompt"] for group, q in first.questions.items()} == {1: "b"}
    assert first.questions[1].question_id == "b"
    assert {q.question_id for q in second.place(dataset_rows("c", "d"), id_of) and second.questions.values()} == {"d"}
    # What a reward function writes into a row reaches neither the stored question nor the recorded one.
    for row in (*placed, *rows):
        row["answer"].append("scribble")
    assert first.replayed_questions[0].example["answer"] == ["old"]
    assert first.questions[1].example["answer"] == ["b"]


def test_stored_tensors_go_to_the_device_of_the_fresh_ones():
    """A GPU would need one; `meta` stands for it."""
    replay = Replay(Question("old", {"prompt": "old", "x": torch.ones(2), "y": [1]}), experience(1), 0)
    batch = Batch(Plan(0, True, (replay,)), 0, 6, num_groups=2, group_size=3)
    rows = [{"prompt": "a", "x": torch.ones(2, device="meta" if i < 2 else "cpu"), "y": [1]} for i in range(6)]
    placed = batch.place(rows, id_of)
    assert [row["x"].device.type for row in placed] == ["meta"] * 2 + ["cpu"] * 4
    assert placed[0]["y"] == [1]


def test_a_group_belongs_to_the_process_of_its_first_row():
    batch = Batch(Plan(0, True), first_row=4, num_rows=4, num_groups=4, group_size=3)
    batch.place([{"prompt": str(row)} for row in range(4, 8)], id_of)
    assert {group: q.example["prompt"] for group, q in batch.questions.items()} == {2: "6"}


def test_columns_for_the_loss():
    _, second = two_processes()
    second.number, second.token_ids = 3, [[1], [4], [2, 3], [1], [1], [1]]
    columns = second.columns(padded(second.token_ids))
    assert set(columns) == set(COLUMNS)
    assert columns["rollout_rows"][:, :3].tolist() == [[3, row, 2 if row == 8 else 1] for row in range(6, 12)]
    assert columns["is_replayed"].tolist() == [False, True, False, False, False, False]
    assert columns["behavior_per_token_logps"].tolist() == [[0] * 4, [-4, 0, 0, 0], *([[0] * 4] * 4)]


def test_what_is_recorded():
    """Fresh rows that are worth storing, have tokens to train and known log-probabilities; each once."""
    first, _ = two_processes()
    first.token_ids = [[10, 11], [1, 2], [12], [13], [14, 15], [16]]
    first.without_logps = {5}
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    # Worth storing: rows 0, 1 (replayed), 3 (masked), 4, 5 (without log-probabilities).
    admit(first, [[1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]], mask)
    logps = -torch.arange(24.0).reshape(6, 4)
    order = torch.tensor([4, 0, 1, 2, 3, 5])
    at = {row: position for position, row in enumerate(order.tolist())}
    entropies = torch.full((6, 4), 7.0).scatter(1, torch.zeros(6, 1, dtype=torch.long), 1.0)
    first.record(at, (on_cpu(logps[order]), on_cpu(entropies[order])))
    assert sorted(first.experiences) == [0, 4]
    stored = first.experiences[4]
    assert stored.token_ids.tolist() == [14, 15]
    assert stored.behavior_per_token_logps.tolist() == [-16, -17]
    assert (stored.policy_version, stored.reward, stored.entropy) == (9, 1.0, 4.0)
    assert stored.prompt_hash == prompt_hash([1, 11])
    assert first.experiences[0].prompt_hash == prompt_hash([10]), "without padding"
    first.record(at, (on_cpu(2 * logps[order]), on_cpu(entropies[order])))
    assert first.experiences[4] is stored, "the first forward is that of the generating policy"


def test_nothing_is_recorded_before_replay_has_started_or_once_collected():
    first, second = two_processes(is_started=False)
    for batch in (first, second):
        batch.token_ids = [[1]] * 6
        admit(batch, [[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 0, 0]])
    second.plan = Plan(0, True)
    second.is_collected = True
    for batch in (first, second):
        at = {batch.first_row + position: position for position in range(6)}
        batch.record(at, (-np.ones((6, 1), np.float32), np.ones((6, 1), np.float32)))
        assert batch.experiences == {}
    assert first.concerns_buffer.tolist() == [True, False, False, False], "solved questions alone"


def test_entropies_are_found_by_value():
    batch, mask = two_processes()[0], torch.tensor([[True, False], [True, True]])
    logps, entropies = torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]), torch.rand(2, 2)
    with batch.generating():
        batch.forwards += [(logps - 1, entropies + 1), (logps, entropies)]
        copied = logps.clone()
        copied[0, 1] = 5.0  # padding may be anything
        assert batch.entropies_of(copied, mask) is entropies
        assert batch.entropies_of(logps + 1e-3, mask).isnan().all()
    assert batch.forwards == []
    assert not batch.is_generating


def test_what_all_processes_know_is_united():
    first, second = two_processes()
    is_worth_storing = [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]]
    for batch, names in ((first, "ab"), (second, "cd")):
        batch.place(dataset_rows(*names), id_of)
        batch.token_ids = [[1]] * 6
        admit(batch, is_worth_storing)
        at = {batch.first_row + position: position for position in range(6)}
        batch.record(at, (-np.ones((6, 1), np.float32), np.ones((6, 1), np.float32)))
    shares = [batch.share() for batch in (first, second)]
    assert shares[0] == Share({}, first.experiences, ("b",)), "group 1 had no success, group 0 is replayed"
    first.unite(shares)
    told = [(group, q.question_id, len(stored)) for group, q, stored in first.groups()]
    assert told == [(0, "old", 1), (2, "older", 0), (3, "d", 3)]
    assert sorted(first.experiences) == [0, 9, 10, 11]


def test_what_came_back_is_compared_token_for_token():
    first, _ = two_processes()  # a stored completion of tokens 1 and 2 at position 1
    first.token_ids = [[10, 11], [1, 2], [12], [13], [14, 15], [16]]
    first.check_tokens(as_output(padded(first.token_ids)))
    first.check_tokens(as_output(padded(first.token_ids, width=9)))
    for position, message in ((1, "row 1 holds other tokens than those"), (4, "row 4 holds other tokens than those")):
        changed = padded(first.token_ids)
        changed[position, 1] += 1
        with pytest.raises(ValueError, match=message):
            first.check_tokens(as_output(changed))
    with pytest.raises(ValueError, match="5 rows came back and 6 were rewarded, of 6"):
        first.check_tokens(as_output(padded(first.token_ids)[:5]))
    for other in ([1, 2, 3], [1], [2, 1]):
        first.token_ids[1] = other
        with pytest.raises(ValueError, match="row 1 holds other tokens than the stored completion"):
            first.check_tokens(as_output(padded(first.token_ids)))


def test_checksums_tell_tokens_apart_and_not_padding():
    rows = [[1, 2, 3], [1, 2], [2, 1], [1, 2, 0], [0], [0, 0], [3, 2, 1], [150_000, 1], [1, 150_000]]
    lengths = np.array([len(row) for row in rows])
    narrow, wide = padded(rows).numpy(), padded(rows, width=7).numpy()
    sums = checksums(narrow, lengths)
    assert len(set(sums.tolist())) == len(rows)
    assert np.array_equal(checksums(wide, lengths), sums)
    assert np.array_equal(checksums(wide + (np.arange(7) >= lengths[:, None]), lengths), sums)
    assert np.array_equal(checksums(narrow[:, :2], lengths) == sums, lengths <= 2), "nor do missing tokens go unseen"


class OfAppleSilicon(torch.Tensor):
    """As on a device that knows no float64 (MPS): what stays there cannot become such."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_rewards_come_from_a_device_without_float64():
    first, _ = two_processes()
    first.take_rewards(torch.full((12, 1), 0.25).as_subclass(OfAppleSilicon), [[1]] * 6)
    assert first.rewards_per_func.dtype == np.float64
    assert first.rewards_per_func.tolist() == [[0.25]] * 12


def test_rewards_of_another_number_are_refused():
    first, _ = two_processes()
    first.take_rewards(torch.ones(12, 2), [[1]] * 6)
    assert first.rewards_per_func.shape == (12, 2)
    with pytest.raises(ValueError, match=r"shape \(6, 2\), of 12 rows"):
        first.take_rewards(torch.ones(6, 2), [[1]] * 6)


def test_a_failure_that_gave_its_place_is_generated_and_not_fresh():
    _, batch = two_processes()
    batch.rewards, batch.is_correct = np.zeros((4, 3)), np.zeros((4, 3), dtype=bool)
    batch.rewards.flat[[1, 4, 7, 10]] = 1.0
    batch.is_correct.flat[[1, 4, 7, 10]] = True
    assert batch.stored.keys() == {1}
    assert batch.fresh_pass_rate == 2 / 10
    success = experience(5, 6)
    batch.fill([Replay(question("new"), success, 10)], {10: -1.0})
    assert [replay.row for replay in batch.replays] == [1, 7, 10]
    assert [replay.row for replay in batch.planned] == [1, 7]
    assert batch.stored == {1: batch.replays[1].experience, 4: success}
    assert np.flatnonzero(~batch.is_fresh).tolist() == [1, 7, 10]
    assert np.flatnonzero(~batch.is_generated).tolist() == [1, 7]
    assert batch.generated_rewards[3].tolist() == [0, -1, 0]
    assert np.isnan(batch.generated_rewards.flat[[1, 7]]).all()
    assert batch.fresh_pass_rate == 1 / 10
    assert set(batch.replayed_questions) == {0, 2, 3}
