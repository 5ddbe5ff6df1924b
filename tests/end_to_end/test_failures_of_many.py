"""Where one process fails, all end with its error, and none waits for it."""

import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from ranks import MODES, Ranks
from tiny import first_letter_reward, make_trainer, tiny_arguments, tiny_dataset, tiny_model

from exgrpo_trl import ExGRPOConfig, ExperienceBuffer

# Far below the timeout of a collective, which is half an hour.
SECONDS = 60


def is_rank(rank):
    return torch.distributed.get_rank() == rank


def broken_reward(completions, trainer_state, **kwargs):
    if is_rank(1) and trainer_state.global_step == 2:
        raise ZeroDivisionError("the verifier is broken")
    return first_letter_reward(completions)


async def broken_async_reward(completions, **kwargs):
    return broken_reward(completions, **kwargs)


def broken_sampler(buffer, n, rng):
    raise KeyError("no such question")


def broken_selector(candidates, rng):
    return len(candidates)


def broken_save(*args, **kwargs):
    raise OSError(28, "No space left on device")


class BrokenBuffer(ExperienceBuffer):
    def save(self, path):
        raise OSError(28, "No space left on device")


def fail(mode, mode_options, output_dir, case):
    options = {"per_device_train_batch_size": 8, "max_steps": 6} | mode_options
    resume = None
    if case == "reward":
        options["reward_funcs"] = broken_reward
    elif case == "async_reward":
        options["reward_funcs"] = [first_letter_reward, broken_async_reward]
    elif case == "save":
        options |= {"experience_buffer": BrokenBuffer(group_size=4), "save_strategy": "steps", "save_steps": 2}
    elif case in ("path", "model"):
        options |= {"save_strategy": "steps", "save_steps": 2}
    elif case == "sampler":
        options["question_sampler"] = broken_sampler
    elif case == "selector":
        options["completion_selector"] = broken_selector
    elif case == "split_batches":
        options["accelerator_config"] = {"split_batches": True}
        model = tiny_model()
        # Every process refuses it at once; without this, one may be gone before the other has found it.
        ExGRPOConfig(**tiny_arguments(output_dir, **options))
        options["model"] = model
        PartialState().wait_for_everyone()
        time.sleep(1)
    elif case == "resume":
        resume = str(Path(output_dir) / "checkpoint-2")
    trainer = make_trainer(output_dir, **options)
    if case == "model":
        trainer._save = broken_save
    trainer.train(resume_from_checkpoint=resume)


CASES = {
    "reward": "the verifier is broken",
    "async_reward": "the verifier is broken",
    "save": "No space left on device",
    "path": "model.safetensors is not part of one",
    "sampler": "no such question",
    "selector": "Return the index of one",
    "resume": "has no metadata.json",
    "split_batches": "split_batches=True",
}


def assert_all_end(ranks, message):
    start = time.monotonic()
    codes = ranks.wait(SECONDS)
    assert codes == [1, 1], ranks.logs()
    assert time.monotonic() - start < SECONDS
    for rank in range(2):
        log = (ranks.folder / f"rank{rank}.log").read_text()
        assert message in log.rsplit("Traceback", 1)[-1], log[-3000:]


@pytest.mark.parametrize("case", CASES)
def test_all_processes_end(tmp_path, case):
    if case == "path":
        (tmp_path / "out" / "checkpoint-2" / "experience_buffer").mkdir(parents=True)
        (tmp_path / "out" / "checkpoint-2" / "experience_buffer" / "model.safetensors").touch()
    if case == "resume":
        first = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 8}
        make_trainer(tmp_path / "out", **first).train()
        (tmp_path / "out" / "checkpoint-2" / "experience_buffer" / "metadata.json").unlink()
    assert_all_end(Ranks(fail, (str(tmp_path / "out"), case), tmp_path), CASES[case])


@pytest.mark.parametrize("mode", ["fsdp2", "zero2", "zero3"])
@pytest.mark.parametrize("case", ["reward", "save"])
def test_all_processes_end_where_forwards_wait_for_each_other(tmp_path, mode, case):
    assert_all_end(Ranks(fail, (str(tmp_path / "out"), case), tmp_path, mode), CASES[case])


@pytest.mark.parametrize("mode", MODES)
def test_no_process_waits_for_one_that_cannot_save_the_model(tmp_path, mode):
    """TRL's part of a checkpoint: the main process ends with its error, the others with that of a lost connection."""
    ranks = Ranks(fail, (str(tmp_path / "out"), "model"), tmp_path, mode)
    assert ranks.wait(SECONDS) == [1, 1], ranks.logs()
    assert "No space left on device" in (tmp_path / "rank0.log").read_text()


def evaluate_first(mode, mode_options, output_dir, on_start):
    trainer = make_trainer(
        output_dir,
        eval_dataset=tiny_dataset(4),
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        num_generations_eval=4,
        eval_on_start=on_start,
        max_steps=4,
        **mode_options,
    )
    if not on_start:
        trainer.evaluate()
    trainer.train()
    assert trainer.state.log_history[-2]["replay/fraction" if trainer.is_world_process_zero() else "step"] > 0
    sums = [None, None]
    torch.distributed.all_gather_object(sums, sum(p.sum().item() for p in trainer.model.parameters()))
    assert sums[0] == sums[1]


@pytest.mark.parametrize("on_start", [False, True])
def test_evaluation_before_training(tmp_path, on_start):
    """transformers would go on without DDP, and each process would train a model of its own."""
    ranks = Ranks(evaluate_first, (str(tmp_path / "out"), on_start), tmp_path)
    codes = ranks.wait(SECONDS)
    if on_start:
        assert codes == [0, 0], ranks.logs()
    else:
        assert codes == [1, 1], ranks.logs()
        assert "eval_on_start=True" in (tmp_path / "rank0.log").read_text()
