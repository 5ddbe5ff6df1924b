"""Checkpoints hold the buffer, and a resumed run does what the uninterrupted one would have done."""

import errno
import json
import os
import shutil
import stat

import pytest
import torch
import transformers
from packaging.version import Version
from rewriting import rewrite_metadata
from tiny import lora_config, make_trainer, parameters_of, tiny_dataset, tiny_tokenizer

from exgrpo_trl import ExperienceBuffer, ExperienceBufferError


def contents(buffer):
    """Everything in a buffer that matters, in order."""
    return {
        "questions": {s: list(questions) for s, questions in buffer.buckets().items()},
        "completions": {
            question_id: [
                (e.token_ids.tolist(), e.behavior_per_token_logps.tolist(), e.policy_version, e.reward, e.entropy)
                for e in buffer.completions(question_id)
            ]
            for questions in buffer.buckets().values()
            for question_id in questions
        },
        "retired": list(buffer.retired),
        "rng": buffer.rng.bit_generator.state,
        "metrics": buffer.metrics(),
    }


SETTINGS = {
    "plain": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "many_epochs": {"train_dataset": 8, "max_steps": 12, "save_steps": 5},  # 2 steps an epoch, resumed inside one
    "epoch_boundary": {"train_dataset": 8, "max_steps": 8, "save_steps": 4},
    "num_iterations": {"num_iterations": 2, "max_steps": 8, "save_steps": 4},
    "steps_per_generation": {
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "max_steps": 8,
        "save_steps": 4,
    },
    "lora": {"lora": True},
    "delayed_start": {"replay_start_pass_rate": 0.3},
    "random_choices": {"question_sampling": "random", "completion_selection": "random", "buffer_capacity": 12},
    "last_known": {"candidate_scores": "last_known", "max_steps": 10, "save_steps": 5},
    "several_stored": {"stored_per_group": 2, "max_steps": 8, "save_steps": 4},
    "bounded": {
        "max_replays": 2,
        "replay_cooldown": 2,
        "max_drift": 0.2,
        "learning_rate": 1e-2,
        "max_steps": 10,
        "save_steps": 5,
    },
    "stepping_back": {"min_effective_sample_size": 0.9, "learning_rate": 2e-2, "max_steps": 8, "save_steps": 4},
    "groups": {"replay_unit": "group", "max_steps": 8, "save_steps": 4},
    "random_groups": {
        "replay_unit": "group",
        "group_selection": "random",
        "max_replays": 2,
        "replay_cooldown": 1,
        "max_steps": 10,
        "save_steps": 5,
    },
    "carried": {"replay_fraction": 0.4, "max_steps": 8, "save_steps": 3},  # 1.6 questions of 4
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_resume_is_exact(tmp_path, setting):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 2e-3} | SETTINGS[setting]
    num_rows, use_lora = options.pop("train_dataset", 16), options.pop("lora", False)

    def make(name):
        return make_trainer(
            tmp_path / name,
            train_dataset=tiny_dataset(num_rows),
            peft_config=lora_config() if use_lora else None,
            **options,
        )

    whole = make("whole")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{options['save_steps']}"
    assert (checkpoint / "experience_buffer" / "metadata.json").exists()
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))

    assert resumed.state.global_step == whole.state.global_step == options["max_steps"]
    expected, actual = parameters_of(whole), parameters_of(resumed)
    for name in expected:
        assert torch.equal(expected[name], actual[name]), name
    assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)
    assert resumed.replayer.state_dict() == whole.replayer.state_dict()
    ours = [line for line in resumed.state.log_history if line.get("step", 0) > options["save_steps"]]
    theirs = [line for line in whole.state.log_history if line.get("step", 0) > options["save_steps"]]
    compared = 0
    for mine, other in zip(ours, theirs, strict=True):
        for key in mine:
            if key.startswith(("replay/", "fresh/")) and not key.endswith("seconds") and key in other:
                assert mine[key] == other[key], key
                compared += 1
    assert compared > 20
    assert any(line.get("replay/fraction", 0) > 0 for line in theirs), "nothing was replayed after the checkpoint"
    if setting == "many_epochs":
        assert whole.experience_buffer.retired, "no question was retired, so none could leave the dataset"


def test_an_epoch_goes_on_with_the_questions_that_it_began_with(tmp_path):
    """Questions that retire within an epoch leave the dataset with the next one, also after a resume."""

    def run(name, checkpoint=None):
        drawn = []

        def reward(completions, uid, trainer_state, **kwargs):
            drawn.append((trainer_state.global_step, tuple(uid)))
            # Every fourth question is solved at once; those of the first batch of the second epoch are all solved.
            is_solved = [int(u[1:]) % 4 == 0 or trainer_state.global_step == 4 for u in uid]
            return [float(is_solved[i] or i % 4 == 3) for i in range(len(uid))]

        trainer = make_trainer(
            tmp_path / name, max_steps=12, save_strategy="steps", save_steps=5, reward_funcs=reward, learning_rate=0.0
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return [draw for draw in drawn if draw[0] >= 5]

    whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoint-5"
    saved = ExperienceBuffer.load(checkpoint / "experience_buffer")
    assert 0 < saved.replay_state["dropped_questions"]["num_retired"] < len(saved.retired)
    assert run("resumed", str(checkpoint)) == whole


def test_the_last_checkpoint_holds_the_last_batch(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    saved = ExperienceBuffer.load(tmp_path / "checkpoint-3" / "experience_buffer")
    assert saved.num_completions > 0
    assert contents(saved) == contents(trainer.experience_buffer)


def test_a_checkpoint_inside_a_generation_batch_loses_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        per_device_train_batch_size=8,
        steps_per_generation=2,
        retire_solved=False,
    )
    trainer.train()
    first, second = (ExperienceBuffer.load(tmp_path / f"checkpoint-{n}" / "experience_buffer") for n in (1, 2))
    assert first.num_completions > 0
    assert contents(first)["completions"] == contents(second)["completions"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("run")
    make_trainer(output_dir, max_steps=2, save_strategy="steps", save_steps=2).train()
    return output_dir / "checkpoint-2"


def resume(tmp_path, checkpoint, damage=None, **options):
    copied = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copied)
    if damage is not None:
        damage(copied / "experience_buffer")
    trainer = make_trainer(tmp_path / "out", max_steps=4, **options)
    trainer.train(resume_from_checkpoint=str(copied))
    return trainer


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing_folder": shutil.rmtree,
    "missing_file": lambda folder: (folder / "completions.parquet").unlink(),
    "empty_file": lambda folder: (folder / "completions.parquet").write_bytes(b""),
    "truncated_file": lambda folder: (folder / "questions.parquet").write_bytes(
        (folder / "questions.parquet").read_bytes()[:-10]
    ),
    "flipped_bit": lambda folder: flip_bit(folder / "completions.parquet"),
    "flipped_bit_in_metadata": lambda folder: flip_bit(folder / "metadata.json"),
    "no_metadata": lambda folder: (folder / "metadata.json").unlink(),
    # With right checksums, as a stranger may write them.
    "other_metadata": lambda folder: rewrite_metadata(folder, lambda about: about["counts"].update(tokens=2**62)),
    "other_state": lambda folder: rewrite_metadata(folder, lambda about: about["replay_state"]["replayer"].clear()),
    "other_state_of_strategies": lambda folder: rewrite_metadata(
        folder, lambda about: about["replay_state"]["strategies"].update(weighting=[1])
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_buffer_is_an_error(tmp_path, checkpoint, damage):
    with pytest.raises(ExperienceBufferError, match=r"(?i)experience.buffer") as error:
        resume(tmp_path, checkpoint, DAMAGES[damage])
    assert "experience_buffer" in str(error.value), "the message names the folder"


def test_a_checkpoint_written_without_replay_is_resumed_with_an_empty_buffer(tmp_path):
    make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, replay_fraction=0).train()
    trainer = make_trainer(tmp_path, max_steps=4, replay_start_pass_rate=None)
    with pytest.raises(ExperienceBufferError, match=r"written without replay.*begin with an empty") as error:
        trainer.train(resume_from_checkpoint=True)
    exec(str(error.value).rsplit(": ", 1)[1], {"ExperienceBuffer": ExperienceBuffer})  # what the message says to do
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert trainer.experience_buffer.num_completions > 0


def test_a_newer_schema_is_an_error(tmp_path, checkpoint):
    def make_newer(folder):
        text = (folder / "metadata.json").read_text()
        assert json.loads(text)["schema_version"] == 5
        (folder / "metadata.json").write_text(text.replace('"schema_version": 5', '"schema_version": 6'))

    with pytest.raises(ExperienceBufferError, match=r"(?is)experience buffer.*schema.*[Uu]pgrade"):
        resume(tmp_path, checkpoint, make_newer)


def test_another_tokenizer_is_an_error(tmp_path, checkpoint):
    with pytest.raises(ExperienceBufferError, match=r"experience buffer.*another tokenizer"):
        resume(tmp_path, checkpoint, processing_class=tiny_tokenizer(extra="_"))


def test_another_chat_template_is_an_error_where_prompts_cannot_be_compared(tmp_path):
    """A checkpoint of a version that did not keep the tokens of prompts knows the text of the template alone."""
    from recorded_run import CHECKPOINT, recorded_trainer

    copied = shutil.copytree(CHECKPOINT, tmp_path / CHECKPOINT.name)
    other = tiny_tokenizer(chat_template="{{ messages }}")
    trainer = recorded_trainer("scripted", tmp_path / "out", processing_class=other)
    with pytest.raises(ExperienceBufferError, match=r"experience buffer.*another chat template"):
        trainer.train(resume_from_checkpoint=str(copied))


def test_shorter_completions_are_an_error(tmp_path, checkpoint):
    with pytest.raises(ExperienceBufferError, match="max_completion_length=2"):
        resume(tmp_path, checkpoint, max_completion_length=2)


def test_another_number_of_generations_is_an_error(tmp_path, checkpoint):
    with pytest.raises(
        ValueError,
        match=r"checkpoint-2.experience_buffer has group_size=4.*num_generations=8.*Set num_generations=4, or",
    ):
        resume(tmp_path, checkpoint, num_generations=8)


def test_another_rule_of_retirement_is_an_error(tmp_path, checkpoint):
    with pytest.raises(ValueError, match=r"retire_solved=True.*retire_solved=False"):
        resume(tmp_path, checkpoint, retire_solved=False)


def test_another_column_of_ids_is_an_error(tmp_path, checkpoint):
    with pytest.raises(
        ExperienceBufferError,
        match=r"checkpoint-2.experience_buffer was collected with question_id_column=None, .* "
        r"question_id_column='uid'.* Set question_id_column=None, or",
    ):
        resume(tmp_path, checkpoint, question_id_column="uid")
    trainer = make_trainer(tmp_path, question_id_column="uid")
    with pytest.raises(ExperienceBufferError, match=r"question_id_column=None.*'uid'"):
        trainer.experience_buffer = ExperienceBuffer.load(checkpoint)


@pytest.mark.parametrize("buffer", ["old", "empty"])
def test_ids_of_an_old_or_an_empty_buffer_are_not_checked(tmp_path, checkpoint, buffer):
    given = ExperienceBuffer.load(checkpoint) if buffer == "old" else ExperienceBuffer()
    if buffer == "old":
        del given.provenance["question_id_column"]
    else:
        given.provenance["question_id_column"] = "another"
    trainer = make_trainer(tmp_path, question_id_column="uid", experience_buffer=given)
    assert trainer.experience_buffer.provenance["question_id_column"] == "uid"


def test_retired_questions_have_ids_too(tmp_path):
    buffer = ExperienceBuffer()
    buffer.retire("q1")
    buffer.provenance["question_id_column"] = "uid"
    with pytest.raises(ExperienceBufferError, match=r"question_id_column='uid'.*question_id_column=None"):
        make_trainer(tmp_path, experience_buffer=buffer)


@pytest.mark.parametrize("adapter", ["checkpoint", "trainer"])
def test_lora_and_full_fine_tuning_do_not_mix(tmp_path, adapter):
    first, second = (lora_config(), None) if adapter == "checkpoint" else (None, lora_config())
    make_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, peft_config=first).train()
    trainer = make_trainer(tmp_path, max_steps=2, peft_config=second)
    before = parameters_of(trainer)
    message = (
        "checkpoint-1 holds an adapter.*Pass the peft_config" if first else "checkpoint-1 holds a whole.*Leave out"
    )
    for checkpoint in (str(tmp_path / "checkpoint-1"), True):
        with pytest.raises(ValueError, match=rf"{message}"):
            trainer.train(resume_from_checkpoint=checkpoint)
    assert all(torch.equal(before[name], value) for name, value in parameters_of(trainer).items())


def test_another_temperature_is_said(tmp_path, checkpoint, monkeypatch):
    from exgrpo_trl import checkpoints

    messages = []
    monkeypatch.setattr(checkpoints.logger, "warning", messages.append)
    resume(tmp_path, checkpoint, temperature=0.7)
    (message,) = messages
    assert "temperature=1.0" in message
    assert "temperature=0.7" in message


class OwnBuffer(ExperienceBuffer):
    """A subclass of a user."""


def test_a_subclass_stays_one_after_resume(tmp_path, checkpoint):
    trainer = resume(tmp_path, checkpoint, experience_buffer=OwnBuffer(group_size=4))
    assert isinstance(trainer.experience_buffer, OwnBuffer)


def test_an_empty_buffer_can_be_put_in_place_of_a_lost_one(tmp_path, checkpoint):
    def replace(folder):
        shutil.rmtree(folder)
        ExperienceBuffer().save(folder)

    trainer = resume(tmp_path, checkpoint, replace)
    assert trainer.state.global_step == 4
    assert trainer.experience_buffer.num_completions > 0


def test_limits_of_the_configuration_hold_after_resume(tmp_path, checkpoint):
    assert ExperienceBuffer.load(checkpoint / "experience_buffer").num_completions > 3
    trainer = resume(tmp_path, checkpoint, buffer_capacity=3)
    assert trainer.experience_buffer.num_completions <= 3
    assert trainer.experience_buffer.capacity == 3


def test_replay_off_neither_saves_nor_asks_for_a_buffer(tmp_path):
    options = {"replay_fraction": 0.0, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **options).train()
    assert not (tmp_path / "checkpoint-1" / "experience_buffer").exists()
    make_trainer(tmp_path, max_steps=2, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_resume_with_another_batch_size(tmp_path, checkpoint):
    """Old transformers goes on with the batch size of the checkpoint, new ones with the configured one."""
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
    if Version(transformers.__version__) < Version("5"):
        with pytest.raises(ValueError, match=r"(?s)per_device_train_batch_size=8.*16 of the checkpoint.*accumulation"):
            resume(tmp_path, checkpoint, **options)
    else:
        assert resume(tmp_path, checkpoint, **options).state.global_step == 4


def test_a_file_system_that_cannot_sync_directories(tmp_path, monkeypatch):
    def run(name, **options):
        options |= {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = make_trainer(tmp_path / name, retire_solved=False, **options)
        trainer.train(resume_from_checkpoint=(tmp_path / name / "checkpoint-2").exists())
        return trainer

    whole = run("whole", max_steps=4)
    fsync = os.fsync

    def refuse_directories(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    run("bucket", max_steps=2)
    resumed = run("bucket", max_steps=4)
    assert contents(resumed.experience_buffer) == contents(whole.experience_buffer)
    assert resumed.experience_buffer.num_completions > 0
