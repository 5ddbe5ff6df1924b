"""Batches planned and collected without a trainer: what is drawn, scored, chosen, stored, evicted and retired."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from rules import LeastReplayed

from exgrpo_trl import (
    ExGRPOConfig,
    Experience,
    ExperienceBuffer,
    ExperienceBufferError,
    Question,
    question_id_of,
)
from exgrpo_trl.dataset import DroppedQuestions
from exgrpo_trl.processes import Processes
from exgrpo_trl.prompts import Prompts
from exgrpo_trl.questions import TrainingQuestions
from exgrpo_trl.replayer import Replayer
from exgrpo_trl.scoring import on_cpu
from exgrpo_trl.strategies import Strategies
from exgrpo_trl.success import SuccessRule

K, NUM_GROUPS = 4, 4
CPU = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cpu"))


def stored(*ids, version=0):
    return Experience.create(ids, [-1.0] * len(ids), policy_version=version, reward=1.0)


def filled_buffer(num_questions=4, completions=2):
    """Questions q0, q1, ... with completions [number, 1], [number, 2], ..."""
    buffer = ExperienceBuffer(group_size=K)
    for number in range(num_questions):
        experiences = [stored(number, index + 1) for index in range(completions)]
        buffer.collect(Question(f"q{number}", {"prompt": f"q{number}"}), experiences, num_correct=2, group_size=K)
    return buffer


def tokenize_prompts(prompts):
    return [[int(prompt[1:], 36), 99] for prompt in prompts], None, {}


def id_of(row, group):
    return row["prompt"]


def make_replayer(buffer=None, score=None, rows=(), **options):
    strategies = {name: options.pop(name) for name in ("question_sampler", "completion_selector") if name in options}
    args = ExGRPOConfig(
        output_dir="unused", use_cpu=True, bf16=False, report_to="none", num_generations=K,
        per_device_train_batch_size=K * NUM_GROUPS,
        **{"replay_start_pass_rate": None, "replay_log": False, "log_replay": "all"} | options,
    )  # fmt: skip
    # Of a stream nothing is known beforehand.
    questions = TrainingQuestions(Dataset.from_dict({"prompt": list(rows)}) if rows else iter(()), None)
    return Replayer(
        filled_buffer() if buffer is None else buffer,
        args,
        Strategies.choose(args, **strategies),
        Processes(CPU),
        DroppedQuestions(questions, min_rows=1),
        questions,
        SuccessRule(["right"], [1.0], 1.0, None),
        prompts=Prompts(SimpleNamespace(_tokenize_prompts=tokenize_prompts)),
        score=score or (lambda prompted: [(float(ids[1]), -float(ids[1])) for _, ids, *_ in prompted]),
    )


def step(replayer, rewards, global_step=0, names="abcd", is_trained=True):
    """One batch: plan, place, reward, record, but collect; fresh completions are [row, step]."""
    rows = [{"prompt": f"q{name}"} for name in names for _ in range(K)]
    batch = replayer.next_batch(rows, global_step)
    placed = batch.place(rows, id_of if replayer.questions.is_stream else replayer.questions.id_of)
    token_ids = [[100 + row, 200 + global_step] for row in range(K * NUM_GROUPS)]
    batch.take_rewards(torch.tensor(rewards, dtype=torch.float32).reshape(-1, 1), token_ids)
    completion_ids, mask = torch.tensor(token_ids), torch.ones(K * NUM_GROUPS, 2)
    prompt_ids = torch.tensor(replayer.prompts.token_ids(placed))
    replayer.observe(batch, {"completion_mask": mask, "prompt_ids": prompt_ids, "prompt_mask": mask})
    if is_trained:
        ((trained, at),) = replayer.trained_rows({"completion_ids": completion_ids, **batch.columns(completion_ids)})
        assert trained is batch
        batch.record(at, (on_cpu(-mask), on_cpu(mask)))
    return batch


ROWS = [{"prompt": f"x{row // K}"} for row in range(K * NUM_GROUPS)]
ONE_EACH = [[1, 0, 0, 0]] * NUM_GROUPS


def test_half_of_the_questions_and_the_completion_of_lowest_entropy():
    scored = []

    def score(prompted):
        scored.extend((list(prompt), ids.tolist()) for prompt, ids, *_ in prompted)
        return [(float(ids[1]), 0.0) for _, ids, *_ in prompted]

    replayer = make_replayer(score=score)
    batch = replayer.next_batch(ROWS, 7)
    assert len(batch.replays) == 2
    assert [replay.row for replay in batch.replays] == sorted(replay.row for replay in batch.replays)
    for replay in batch.replays:
        number = int(replay.question.question_id[1:])
        assert replay.experience.token_ids.tolist() == [number, 1]
        assert replay.entropy == 1.0
    numbers = sorted(int(replay.question.question_id[1:]) for replay in batch.replays)
    assert sorted(scored) == [([number, 99], [number, index]) for number in numbers for index in (1, 2)]
    assert batch.policy_version == 7


@pytest.mark.parametrize("options", [{"completions": 1}, {"completion_selection": "most_recent"}])
def test_nothing_is_scored_where_nothing_depends_on_it(options):
    buffer = filled_buffer(completions=options.pop("completions", 2))
    replayer = make_replayer(buffer, score=lambda prompted: pytest.fail("scored"), **options)
    batch = replayer.next_batch(ROWS, 0)
    assert [replay.entropy for replay in batch.replays] == [None, None]


def test_successes_enter_the_buffer_with_the_next_plan():
    replayer = make_replayer(filled_buffer(0))
    batch = step(replayer, [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1]], global_step=5)
    assert replayer.buffer.num_completions == 0
    assert not batch.is_collected
    replayer.next_batch(ROWS, 6)
    assert batch.is_collected
    assert {s: list(ids) for s, ids in replayer.buffer.buckets().items()} == {1: ["qd"], 2: ["qa"]}
    assert [e.token_ids.tolist() for e in replayer.buffer.completions("qa")] == [[100, 205], [101, 205]]
    assert [e.policy_version for e in replayer.buffer.completions("qd")] == [5]
    assert list(replayer.buffer.retired) == ["qc"]
    replayer.collect()
    assert replayer.buffer.num_completions == 3, "a batch is collected once"


def test_a_replayed_completion_that_no_longer_counts_leaves():
    replayer = make_replayer(filled_buffer(2, completions=1))
    batch = step(replayer, [[0, 0, 0, 0]] * NUM_GROUPS)
    assert {replay.question.question_id for replay in batch.replays} == {"q0", "q1"}
    replayer.collect()
    assert replayer.buffer.num_completions == 0
    assert replayer.log_metrics()["replay/evicted_incorrect"] == 2


def test_the_delayed_start():
    replayer = make_replayer(filled_buffer(2), replay_start_pass_rate=0.25)
    first = step(replayer, ONE_EACH)  # 0.25: not above
    second = step(replayer, [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    third = step(replayer, ONE_EACH)
    assert [batch.plan.is_started for batch in (first, second, third)] == [False, False, True]
    assert [len(batch.replays) for batch in (first, second, third)] == [0, 0, 2]
    assert replayer.buffer.num_completions == 4, "the batch that crossed the threshold is not collected"
    assert list(replayer.buffer.retired) == ["qc"], "but its solved questions have retired"


def test_versions_go_on_above_those_of_the_buffer():
    buffer = filled_buffer(1)
    buffer.collect(Question("q0", {"prompt": "q0"}), [stored(7, 9, version=41)], num_correct=2, group_size=K)
    replayer = make_replayer(buffer)
    replayer.begin_training()
    assert replayer.next_batch(ROWS, 3).policy_version == 45


def test_the_state_survives_json_and_decides_what_comes_next():
    def run(replayer, steps):
        chosen = []
        for number in steps:
            batch = step(replayer, ONE_EACH, number, names=[f"{number}{i}" for i in range(NUM_GROUPS)])
            chosen += [(r.row, r.question.question_id, r.experience.token_ids.tolist()) for r in batch.replays]
        replayer.collect()
        return chosen

    whole = make_replayer(completion_selection="random")
    run(whole, range(3))
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = make_replayer(ExperienceBuffer(group_size=K), completion_selection="random")
    copied = ExperienceBuffer.from_dataset(whole.buffer.to_dataset(), group_size=K)
    copied.rng.bit_generator.state = whole.buffer.rng.bit_generator.state
    copied.replay_state = state
    resumed.load(lambda: copied, "copied")
    assert resumed.state_dict() == whole.state_dict()
    assert run(resumed, range(3, 8)) == run(whole, range(3, 8))
    assert resumed.state_dict() == whole.state_dict()


def test_state_of_a_version_without_strategies():
    replayer = make_replayer()
    state = replayer.state_dict()
    del state["state_version"], state["strategies"], state["success_rule"], state["coverage"]
    state["replayer"]["tokens_saved"] = 77
    replayer.load_state_dict(json.loads(json.dumps(state)))
    assert replayer.metrics.tokens_saved == 77


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        (None, "replayer", ...),
        (None, "replayer", [1]),
        (None, "state_version", "2"),
        (None, "strategies", 5),
        (None, "coverage", ...),
        ("replayer", "is_started", "yes"),
        ("replayer", "tokens_saved", 10**30),
        ("replayer", "version_offset", -1),
        ("replayer", "best_reward", math.inf),
        ("replayer", "num_batches_without_success", []),
        ("replayer", "rng", {"bit_generator": "PCG64", "state": {"state": -1, "inc": 1}}),
        ("dropped_questions", "epoch", 1.5),
        ("dropped_questions", "num_retired", None),
        ("success_rule", "judges", ["ab"]),
        ("success_rule", "judges", [[["a"]]]),
        ("coverage", "unseen", [1]),
        ("coverage", "is_on", 1),
        ("pacing", "carried", "0"),
        ("pacing", "last_replayed", {"q0": math.nan}),
    ],
)
def test_a_malformed_state_is_the_one_error(part, name, value):
    """A checkpoint may be a stranger's, and nothing of it may fail later."""
    state = json.loads(json.dumps(make_replayer().state_dict()))
    owner = state if part is None else state[part]
    owner[name] = value
    if value is ...:
        del owner[name]
    buffer = filled_buffer()
    buffer.replay_state = state
    with pytest.raises(
        ExperienceBufferError, match=rf"of a stranger .*metadata.json, `replay_state`.*`({name}|has_uint32|state|q0)`"
    ):
        make_replayer(ExperienceBuffer(group_size=K)).load(lambda: buffer, "of a stranger")


def test_a_stateful_sampler_observes_reports_and_is_saved(tmp_path):
    options = {"retire_solved": False, "drop_retired_questions": False}
    replayer = make_replayer(question_sampler=LeastReplayed(), **options)
    drawn = []
    for number in range(3):
        batch = step(replayer, [[1, 0, 0, 0]] * NUM_GROUPS, number, names=["0", "1", "2", "3"])
        drawn.append({replay.question.question_id for replay in batch.replays})
    assert drawn[:2] == [{"q0", "q1"}, {"q2", "q3"}]
    assert replayer.log_metrics()["replay/most_replayed"] == 1
    replayer.save(str(tmp_path))
    resumed = make_replayer(question_sampler=LeastReplayed(), **options)
    resumed.load(lambda: ExperienceBuffer.load(tmp_path / "experience_buffer"), "saved")
    assert resumed.strategies.question_sampler.counts == replayer.strategies.question_sampler.counts
    assert sum(resumed.strategies.question_sampler.counts.values()) == 6


def test_an_epoch_leaves_out_what_had_retired_when_it_began():
    replayer = make_replayer(filled_buffer(0), rows=["qa", "qb", "qc"])
    replayer.buffer.retire(question_id_of("qb"))
    assert replayer.begin_epoch(1) == ({1}, set())
    replayer.buffer.retire(question_id_of("qa"))
    assert replayer.begin_epoch(1) == ({1}, set()), "the same epoch, resumed"
    assert replayer.begin_epoch(2) == ({0, 1}, set())


def test_a_batch_is_collected_before_an_epoch_begins():
    replayer = make_replayer(filled_buffer(0), rows=["qa"])
    step(replayer, [[1, 1, 1, 1]] + [[0, 0, 0, 0]] * 3)
    replayer.begin_epoch(0)
    assert list(replayer.buffer.retired) == [question_id_of("qa")]


def test_of_several_batches_the_one_that_is_trained_is_collected():
    replayer = make_replayer(filled_buffer(0))
    rejected = step(replayer, ONE_EACH, names="1234", is_trained=False)
    chosen = step(replayer, ONE_EACH, names="abcd")
    late = step(replayer, ONE_EACH, names="5678", is_trained=False)
    replayer.next_batch(ROWS, 1)
    assert [batch.is_collected for batch in (rejected, chosen, late)] == [False, True, False]
    assert set(replayer.buffer.buckets()[1]) == {"qa", "qb", "qc", "qd"}
    replayer.next_batch(ROWS, 1)
    replayer.collect()
    assert replayer.buffer.num_completions == 4


def test_rows_of_two_batches_may_be_trained_together():
    replayer = make_replayer(filled_buffer(0))
    batches = [step(replayer, ONE_EACH, names=names, is_trained=False) for names in ("abcd", "efgh")]
    ids = [torch.tensor(batch.token_ids) for batch in batches]
    columns = [batch.columns(of_batch) for batch, of_batch in zip(batches, ids, strict=True)]
    mixed = {name: torch.cat([columns[0][name][:8], columns[1][name][8:]]) for name in columns[0]}
    mixed["completion_ids"] = torch.cat([ids[0][:8], ids[1][8:]])
    trained = replayer.trained_rows(mixed)
    assert trained == [(batches[0], {row: row for row in range(8)}), (batches[1], {row: row for row in range(8, 16)})]
    for batch, at in trained:
        batch.record(at, (on_cpu(-torch.ones(16, 2)), on_cpu(torch.ones(16, 2))))
    replayer.collect()
    assert sorted(replayer.buffer.buckets()[1]) == ["qa", "qb", "qg", "qh"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda inputs: inputs.pop("rollout_rows"), r"\['rollout_rows'\] are missing"),
        (lambda inputs: inputs["completion_ids"].__setitem__((3, 1), 7), "row 3 holds other tokens in the loss"),
        (
            lambda inputs: inputs.update(completion_ids=inputs["completion_ids"][:5]),
            "5 completions have the identity of 16",
        ),
        (lambda inputs: inputs.update(completion_ids=inputs["completion_ids"][:, :1]), "row 0 holds other tokens"),
    ],
)
def test_rows_that_were_changed_before_the_loss(change, message):
    replayer = make_replayer(filled_buffer(0))
    batch = step(replayer, ONE_EACH, is_trained=False)
    inputs = {"completion_ids": torch.tensor(batch.token_ids)}
    inputs |= batch.columns(inputs["completion_ids"])
    change(inputs)
    with pytest.raises(ValueError, match=message):
        replayer.trained_rows(inputs)
    assert not batch.is_trained


def test_a_replayed_completion_without_a_verdict_stays():
    replayer = make_replayer(filled_buffer(2, completions=1))
    batch = step(replayer, [[float("nan")] * K] * NUM_GROUPS)
    assert len(batch.replays) == 2
    replayer.collect()
    assert replayer.buffer.num_completions == 2


def test_a_completion_whose_prompt_renders_to_other_tokens_is_not_replayed():
    replayer = make_replayer(filled_buffer(0))
    step(replayer, ONE_EACH, names="1234")
    replayer.collect()
    for buffer, expected in ((replayer.buffer, 2), (filled_buffer(4), 2)):
        resumed = make_replayer(buffer)
        resumed.begin_training()
        assert len(resumed.next_batch(ROWS, 1).replays) == expected
        resumed.prompts.token_ids = lambda rows: [[int(row["prompt"][1:], 36), 99, 7] for row in rows]
        resumed.begin_training()
        # Completions that do not know their prompt (of an earlier version) are judged by the chat template.
        assert len(resumed.next_batch(ROWS, 1).replays) == (0 if buffer is replayer.buffer else 2)
    assert replayer.buffer.num_completions == 4, "nothing is lost"


def test_questions_that_are_gone_are_not_drawn_and_new_successes_bring_them_back():
    names = [f"q{number}" for number in range(4)]
    buffer = ExperienceBuffer(group_size=K)
    for name in names:
        buffer.collect(Question(question_id_of(name), {"prompt": name}), [stored(1, 2)], num_correct=2, group_size=K)
    replayer = make_replayer(buffer, rows=names[:1])
    replayer.begin_training()
    for global_step in range(5):
        batch = replayer.next_batch(ROWS, global_step)
        assert [replay.question.question_id for replay in batch.replays] == [question_id_of("q0")]
    assert buffer.num_questions == 4
    replayer.replayable.collected(Question(question_id_of("q2"), {"prompt": "q2"}), [], tuple)
    assert len(replayer.next_batch(ROWS, 5).replays) == 2


def test_questions_of_a_later_phase_that_replay_displaced_come_first():
    names = [f"q{number}" for number in range(8)]
    replayer = make_replayer(filled_buffer(0), rows=["q9"], retire_solved=False)
    replayer.bind(TrainingQuestions(Dataset.from_dict({"prompt": names}), None))
    assert replayer.begin_epoch(0) == (set(), set(range(8)))
    seen = set()
    for number, some in enumerate((names[:4], names[4:])):
        batch = step(replayer, ONE_EACH, number, names=[name[1:] for name in some])
        seen |= {row for group, row in enumerate(some) if group not in batch.replayed_questions}
    replayer.collect()
    displaced = {index for index, name in enumerate(names) if name not in seen}
    assert len(displaced) == 2
    _, first = replayer.begin_epoch(1)
    assert first == displaced
    # In a batch with both of them, replay takes the places of the others.
    others = [name for name in names if name in seen][:2]
    together = [names[index] for index in displaced] + others
    batch = step(replayer, ONE_EACH, 2, names=[name[1:] for name in together])
    assert set(batch.replayed_questions) == {2, 3}
    replayer.collect()
    assert replayer.begin_epoch(2) == (set(), set())
