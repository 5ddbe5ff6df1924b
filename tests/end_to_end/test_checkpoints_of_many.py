"""Checkpoints of several processes: exact resume, another number of processes, death at any moment."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from ranks import MODES, Ranks, assert_engaged, run_ranks, skip_unless_trainable, whole_parameters
from same_rollouts import buffer_contents, left_out, results, same_rollouts_trainer, train_and_save
from tiny import lora_config, make_trainer

from exgrpo_trl import ExperienceBuffer
from exgrpo_trl.checkpoints import is_complete, newest_complete_checkpoint


def train(mode, mode_options, folder, output_dir, options):
    """Train with TRL's own generation, and write down the end of it."""
    options = dict(options)
    resume, use_lora = options.pop("resume", None), options.pop("lora", False)
    options = {"per_device_train_batch_size": 8, "max_steps": 6, "save_strategy": "steps", "save_steps": 3} | options
    torch.manual_seed(0)
    trainer = make_trainer(output_dir, peft_config=lora_config() if use_lora else None, **mode_options | options)
    trainer.train(resume_from_checkpoint=resume)
    assert_engaged(trainer, mode, 2)
    buffer, is_main = trainer.experience_buffer, trainer.accelerator.is_main_process
    result = {
        "step": trainer.state.global_step,
        "parameters": whole_parameters(trainer),
        "retired": list(buffer.retired) if is_main else None,
        "buffer": buffer_contents(buffer) if is_main else None,
        "state": trainer.replayer.state_dict(),
        "history": trainer.state.log_history,
        "left_out": left_out(trainer),
    }
    torch.save(result, Path(folder) / f"result{trainer.accelerator.process_index}.pt")


def assert_equal(actual, expected):
    for mine, other in zip(actual, expected, strict=True):
        assert mine["step"] == other["step"]
        for name, parameter in other["parameters"].items():
            assert torch.equal(mine["parameters"][name], parameter), name
        assert mine["retired"] == other["retired"]
        assert mine["left_out"] == other["left_out"]
        assert mine["buffer"] == other["buffer"]
    assert actual[0]["state"] == expected[0]["state"]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("mode", MODES)
def test_resume_is_exact(tmp_path, mode, lora):
    skip_unless_trainable(mode, lora)
    whole, resumed = str(tmp_path / "whole"), str(tmp_path / "resumed")
    run_ranks(train, whole, whole + "/out", {"lora": lora}, folder=whole, mode=mode)
    checkpoint = Path(whole) / "out" / "checkpoint-3"
    assert is_complete(checkpoint)
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    options = {"lora": lora, "resume": str(checkpoint)}
    run_ranks(train, resumed, resumed + "/out", options, folder=resumed, mode=mode)
    expected = results(whole)
    assert_equal(results(resumed), expected)
    lines = [line for line in expected[0]["history"] if line["step"] > 3 and "loss" in line]
    assert all(line["replay/fraction"] == 0.5 for line in lines)
    start = ExperienceBuffer.load(checkpoint / "experience_buffer")
    assert buffer_contents(start) != expected[0]["buffer"]


@pytest.mark.parametrize(
    ("mode", "before", "after"), [("ddp", 2, 1), ("ddp", 1, 2), ("ddp", 2, 4), ("fsdp2", 2, 4), ("fsdp2", 4, 2)]
)
def test_resume_with_another_number_of_processes(tmp_path, mode, before, after):
    """The rest of the run is that of a run that never stopped, whatever the number of processes."""
    if mode == "fsdp2" and Version(transformers.__version__) < Version("5"):
        pytest.skip(f"transformers {transformers.__version__} cannot load the state of SGD with FSDP2")
    options = {"save_strategy": "steps", "save_steps": 6, "retire_solved": True, "reward_funcs": "easy"}
    options |= {"optim_args": "momentum=0.5", "learning_rate": 0.05}  # a state of the optimizer that matters
    whole = same_rollouts_trainer(tmp_path / "whole", **options)
    whole.train()

    def run(name, world, **more):
        chosen = options | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4 // world} | more
        folder = tmp_path / name
        if world > 1:
            run_ranks(train_and_save, str(folder), chosen, folder=folder, mode=mode, world=world)
            rows = {}
            for rank in results(folder, world):
                rows |= rank["rows"]
            return rows, results(folder, world)[0]
        resume = chosen.pop("resume", None)
        trainer = same_rollouts_trainer(folder / "out", **chosen)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.rows, {
            "buffer": buffer_contents(trainer.experience_buffer),
            "retired": list(trainer.experience_buffer.retired),
            "state": trainer.replayer.state_dict(),
            "parameters": whole_parameters(trainer),
        }

    run("first", before, max_steps=6)
    checkpoint = tmp_path / "first" / "out" / "checkpoint-6"
    saved = ExperienceBuffer.load(checkpoint / "experience_buffer")
    at_six = ExperienceBuffer.load(tmp_path / "whole" / "checkpoint-6" / "experience_buffer")
    for part in ("questions", "completions", "rng"):
        assert buffer_contents(saved)[part] == buffer_contents(at_six)[part]
    assert saved.replay_state == at_six.replay_state
    rows, end = run("second", after, resume=str(checkpoint))
    assert rows == {key: row for key, row in whole.rows.items() if int(key.split("/")[0]) >= 6}
    for part in ("questions", "completions", "rng"):
        assert end["buffer"][part] == buffer_contents(whole.experience_buffer)[part]
    assert end["retired"] == list(whole.experience_buffer.retired) != []
    assert end["state"] == whole.replayer.state_dict()
    for name, expected in whole_parameters(whole).items():
        torch.testing.assert_close(end["parameters"][name], expected, atol=2e-5, rtol=1e-4)


KILLED = {"save_steps": 2, "max_steps": 10, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The uninterrupted run of each mode."""
    runs = {}

    def run(mode):
        if mode not in runs:
            folder = str(tmp_path_factory.mktemp(mode))
            run_ranks(train, folder, folder + "/out", KILLED, folder=folder, mode=mode)
            runs[mode] = folder
        return runs[mode]

    return run


def wait_for(condition, processes, timeout=60):
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end and any(p.is_alive() for p in processes):
        time.sleep(0.0005)


# What is there when the ranks die, a few milliseconds later: a save writes the buffer, the model, the rest.
MOMENTS = {
    "before_the_buffer": "",
    "after_the_buffer": "experience_buffer",
    "after_the_model": "config.json",
    "after_the_save": "trainer_state.json",
}


@pytest.mark.parametrize(
    ("mode", "moment"),
    [("ddp", moment) for moment in MOMENTS]
    + [(mode, moment) for mode in ("fsdp2", "zero2", "zero3") for moment in ("before_the_buffer", "after_the_buffer")],
)
def test_death_of_all_ranks(tmp_path, mode, moment, whole_runs):
    """SIGKILL at a random moment around a save; resumed from the newest complete checkpoint, nothing is lost."""
    whole = whole_runs(mode)
    rng = np.random.default_rng([len(moment), len(mode)])
    out = tmp_path / "out"
    victim = out / f"checkpoint-{rng.choice([4, 6, 8])}"
    ranks = Ranks(train, (str(tmp_path / "first"), str(out), KILLED), tmp_path / "first", mode)
    wait_for((victim / MOMENTS[moment]).exists, ranks.processes)
    time.sleep(rng.uniform(0, 0.01))
    ranks.kill()
    assert not (tmp_path / "first" / "result0.pt").exists(), "the run was over before it was killed"
    newest = newest_complete_checkpoint(out)
    assert newest is not None
    saved = ExperienceBuffer.load(Path(newest) / "experience_buffer")
    promised = ExperienceBuffer.load(Path(whole) / "out" / Path(newest).name / "experience_buffer")
    assert buffer_contents(saved) == buffer_contents(promised)
    # resume_from_checkpoint=True finds it. The folder of the torn one is there, and is written over.
    resumed = str(tmp_path / "resumed")
    run_ranks(train, resumed, str(out), KILLED | {"resume": True}, folder=resumed, mode=mode)
    assert_equal(results(resumed), results(whole))
    for step in (2, 4, 6, 8, 10):
        ExperienceBuffer.load(out / f"checkpoint-{step}" / "experience_buffer")
        assert is_complete(out / f"checkpoint-{step}")


def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    def make():
        return make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)

    make().train()
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    resumed = make()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert json.loads(state.read_text())["global_step"] == 4
    for number in (2, 4):
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"None of the checkpoints \[2, 4\].*is complete"):
        make().train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-2")
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make().train(resume_from_checkpoint=True)


def test_a_checkpoint_that_is_written_over_is_incomplete(tmp_path):
    """Else a death in between would leave a mixture of two runs that looks complete."""
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    assert is_complete(tmp_path / "checkpoint-2")
    trainer = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    save_model = trainer.save_model

    def dies(*args, **kwargs):
        save_model(*args, **kwargs)
        raise KeyboardInterrupt

    trainer.save_model = dies
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not is_complete(tmp_path / "checkpoint-2")
