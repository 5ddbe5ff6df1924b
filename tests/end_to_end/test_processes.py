"""How processes talk: what arrives, what it costs, and what a process without the buffer may do."""

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from same_rollouts import left_out, same_rollouts_trainer

from exgrpo_trl import Experience, ExperienceBuffer, Question
from exgrpo_trl.buffer import RemoteBuffer
from exgrpo_trl.processes import Processes


def stored_things():
    """What processes tell each other: a question with columns of many types, a completion, scores."""
    rng = np.random.default_rng(0)
    example = {"prompt": [{"role": "user", "content": "é\n"}], "answer": 3, "day": date(2026, 1, 2), "x": float("inf")}
    experience = Experience.create(
        rng.integers(0, 2**31, 1000), -rng.exponential(size=1000), policy_version=10**12, reward=0.1
    )
    return Question("seven", example), experience, [(0.1, 1e-9), (float("nan"), 3.0)]


def fields(stored):
    return stored.token_bytes, stored.logp_bytes, stored.policy_version, stored.reward, repr(stored.entropy)


def outcome(processes, error):
    """What is raised on a process where `error` is raised, or nothing."""
    try:
        with processes.together("counting"):
            if error is not None:
                raise error
    except Exception as raised:
        return raised


def talk(mode, mode_options, folder):
    from accelerate import Accelerator

    processes = Processes(Accelerator(cpu=True))
    rank, count = processes.rank, processes.count
    assert count == 3
    payload = bytes([rank]) * (10 * rank)
    gathered = processes.gather(payload)
    assert gathered == ([b"", b"\1" * 10, b"\2" * 20] if rank == 0 else [])
    assert processes.gather(None) == ([None] * 3 if rank == 0 else [])
    called = []

    def choose():
        called.append(rank)
        return stored_things()

    question, experience, scores = processes.decide("choosing", choose)
    assert called == ([0] if rank == 0 else []), "the main process alone decides"
    expected = stored_things()
    assert question == expected[0]
    assert fields(experience) == fields(expected[1])
    assert repr(scores) == repr(expected[2])
    assert processes.decide("choosing nothing", lambda: None) is None
    shares = processes.gather({rank: stored_things()[1]})
    for other, share in enumerate(shares):
        assert fields(share[other]) == fields(expected[1])
    mine, theirs = (
        KeyError("é"),
        RuntimeError("Process 0 failed while choosing, so all processes stop. Its error: KeyError: 'é'"),
    )

    def fail():
        raise mine

    with pytest.raises(type(mine if rank == 0 else theirs)) as raised:
        processes.decide("choosing", fail)
    assert repr(raised.value) == repr(mine if rank == 0 else theirs)
    with processes.together("doing nothing"):
        pass
    theirs = RuntimeError(
        "Process 1 failed while counting, so all processes stop. Its error: ValueError: é is no number"
    )
    errors = [None, ValueError("é is no number"), None]
    assert repr(outcome(processes, errors[rank])) == repr(errors[rank] or theirs)
    # Where two fail, each raises its own error, and the others that of the first.
    theirs = RuntimeError("Process 1 failed while counting, so all processes stop. Its error: KeyError: 'first'")
    errors = [None, KeyError("first"), OSError("second")]
    assert repr(outcome(processes, errors[rank])) == repr(errors[rank] or theirs)
    assert processes.gather(b"still here") == ([b"still here"] * 3 if rank == 0 else [])
    assert min(processes.seconds.values()) > 0
    (Path(folder) / f"done{rank}").touch()


def test_what_is_sent_arrives(tmp_path):
    run_ranks(talk, str(tmp_path), folder=tmp_path, world=3)
    assert all((tmp_path / f"done{rank}").exists() for rank in range(3))


def measure_traffic(mode, mode_options, folder, output_dir, options):
    trainer = same_rollouts_trainer(output_dir, mode, **mode_options | options)
    # What the processes gather goes through torch's `gather`: count its bytes while a batch is collected.
    sent, num_bytes = [], [0]
    collect, send = trainer.replayer.collect, torch.distributed.distributed_c10d.gather

    def counted(tensor, *args, **kwargs):
        num_bytes[0] += tensor.numel() * tensor.element_size()
        return send(tensor, *args, **kwargs)

    def measured():
        batch = trainer.replayer.batch
        is_pending = batch is not None and not batch.is_collected
        recorded = list(batch.experiences.values()) if is_pending else []
        before = num_bytes[0]
        collect()
        sent.append((sum(e.num_tokens for e in recorded), len(recorded), num_bytes[0] - before))

    torch.distributed.distributed_c10d.gather = counted
    trainer.replayer.collect = measured
    trainer.train()
    (Path(folder) / f"sent{trainer.accelerator.process_index}.json").write_text(json.dumps(sent))


@pytest.mark.parametrize("threshold", [0.5, 2.0], ids=["some_are_correct", "none_is_correct"])
def test_traffic_is_proportional_to_what_was_collected(tmp_path, threshold):
    options = {"per_device_train_batch_size": 8, "success_threshold": threshold, "replay_start_pass_rate": None}
    run_ranks(measure_traffic, str(tmp_path), str(tmp_path / "out"), options, folder=tmp_path)
    sent = json.loads((tmp_path / "sent1.json").read_text())
    tokens, counts, traffic = (sum(column) for column in zip(*sent, strict=True))
    if threshold > 1:
        assert (tokens, counts, traffic) == (0, 0, 0), "nothing was collected, so nothing is sent"
    else:
        assert traffic > 8 * tokens, "nothing is counted"
        assert tokens > 100
        num_questions = 4 * 12
        # Tokens and log-probabilities, a row of the dataset, and the frame of a message per batch. Padding to the
        # longer message of the two processes may double it.
        assert traffic < 2 * (8 * tokens + 100 * counts + 200 * num_questions + 1500 * len(sent))


def check_remote_buffer(mode, mode_options, output_dir):
    mine = ExperienceBuffer(group_size=4)
    trainer = same_rollouts_trainer(
        output_dir,
        experience_buffer=mine,
        per_device_train_batch_size=8,
        reward_funcs="easy",
        max_steps=4,
        **mode_options | {"retire_solved": True},
    )
    trainer.train()
    buffer = trainer.experience_buffer
    if trainer.accelerator.is_main_process:
        assert buffer is mine
        assert buffer.num_completions > 0
    else:
        assert isinstance(buffer, RemoteBuffer)
        with pytest.raises(AttributeError, match=r"lives on the main process.*'num_completions'.*is_main_process"):
            _ = buffer.num_completions
    buffer.save(Path(output_dir) / "saved")  # on all processes, as a script would
    told = [None, None]
    torch.distributed.all_gather_object(told, left_out(trainer))
    assert told[0] == told[1]
    assert told[0]
    torch.distributed.barrier()
    if trainer.accelerator.is_main_process:
        saved = ExperienceBuffer.load(Path(output_dir) / "saved")
        assert saved.num_completions == buffer.num_completions


def test_the_main_process_owns_the_buffer(tmp_path):
    run_ranks(check_remote_buffer, str(tmp_path / "out"), folder=tmp_path)
