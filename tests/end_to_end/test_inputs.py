"""Everything that TRL users feed a trainer works with replay: prompts, rewards, datasets, adapters, evaluation."""

import asyncio

import pytest
import torch
import trl
from datasets import Dataset, IterableDataset, List, Value
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tiny import (
    first_letter_reward,
    lora_config,
    make_trainer,
    parameters_of,
    tiny_dataset,
    tiny_model,
    tiny_tokenizer,
)
from transformers import TrainerCallback

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer
from exgrpo_trl.examples import dataset_question_ids


def lines_of(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def assert_replayed(trainer, steps=5):
    assert trainer.state.global_step == steps
    assert sum(line["replay/fraction"] for line in lines_of(trainer)) > 0
    assert trainer.experience_buffer.check_valid()[0]


@pytest.mark.parametrize("conversational", [False, True])
def test_plain_and_conversational_prompts(tmp_path, conversational):
    trainer = make_trainer(tmp_path, max_steps=5, train_dataset=tiny_dataset(conversational=conversational))
    trainer.train()
    assert_replayed(trainer)


def test_several_rewards_with_weights_decide_by_their_sum(tmp_path):
    def length_reward(completions, **kwargs):
        return [len(c) / 100 for c in completions]

    trainer = make_trainer(
        tmp_path,
        max_steps=5,
        reward_funcs=[first_letter_reward, length_reward],
        reward_weights=[2.0, 1.0],
        success_reward="weighted_sum",
        success_threshold=2.05,
        retire_solved=False,
    )
    trainer.train()
    assert_replayed(trainer)
    buffer = trainer.experience_buffer
    rewards = [e.reward for questions in buffer.buckets().values() for q in questions for e in buffer.completions(q)]
    assert rewards
    assert all(2.05 <= reward < 2.2 for reward in rewards)


def test_one_named_reward_decides(tmp_path):
    def nothing(completions, **kwargs):
        return [0.0] * len(completions)

    options = {"max_steps": 4, "reward_funcs": [nothing, first_letter_reward], "reward_weights": [1.0, 0.1]}
    by_sum = make_trainer(tmp_path / "sum", success_reward="weighted_sum", **options)
    by_sum.train()
    assert by_sum.experience_buffer.num_completions == 0
    by_name = make_trainer(tmp_path / "name", success_reward="first_letter_reward", **options)
    by_name.train()
    assert by_name.experience_buffer.num_completions > 0


def test_a_reward_that_returns_none(tmp_path):
    def silent_on_digits(completions, **kwargs):
        rewards = first_letter_reward(completions)
        return [None if c[:1].isdigit() else reward for c, reward in zip(completions, rewards, strict=True)]

    trainer = make_trainer(tmp_path, max_steps=5, reward_funcs=[silent_on_digits], retire_solved=False)
    trainer.train()
    assert_replayed(trainer)
    buffer = trainer.experience_buffer
    for questions in buffer.buckets().values():
        for question_id in questions:
            for experience in buffer.completions(question_id):
                assert experience.reward == 1.0


def test_async_rewards(tmp_path):
    async def slow_reward(completions, **kwargs):
        await asyncio.sleep(0)
        return first_letter_reward(completions)

    trainer = make_trainer(tmp_path, max_steps=5, reward_funcs=slow_reward)
    trainer.train()
    assert_replayed(trainer)


def test_rewards_may_write_into_their_columns(tmp_path):
    def greedy_reward(completions, notes, **kwargs):
        for note in notes:
            note.append("seen")
            assert note == ["seen"], "a stored row carries what an earlier call wrote"
        return first_letter_reward(completions)

    dataset = tiny_dataset().add_column("notes", [[] for _ in range(16)], feature=List(Value("string")))
    trainer = make_trainer(tmp_path, max_steps=5, reward_funcs=greedy_reward, train_dataset=dataset)
    trainer.train()
    assert_replayed(trainer)


def test_evaluation_neither_reads_nor_writes_the_buffer(tmp_path):
    sizes, evaluated = [], []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.replayer.collect()  # as the next batch would
            sizes.append(trainer.experience_buffer.metrics())

        def on_evaluate(self, args, state, control, **kwargs):
            evaluated.append(trainer.experience_buffer.metrics())

    def reward(prompts, completions, uid, **kwargs):
        assert not (set(uid) & {"q100", "q101"} and set(uid) & {"q0", "q1", "q2"})
        return first_letter_reward(completions)

    held_out = Dataset.from_dict({"prompt": ["1 = ", "2 = "], "answer": [1, 2], "uid": ["q100", "q101"]})
    trainer = make_trainer(
        tmp_path,
        max_steps=5,
        reward_funcs=reward,
        eval_dataset=held_out,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        callbacks=[Watch()],
    )
    trainer.train()
    assert_replayed(trainer)
    assert evaluated == sizes
    ids = dataset_question_ids(held_out, None)
    assert not any(question_id in trainer.experience_buffer for question_id in ids)
    assert not any(key.startswith("eval_replay") for line in trainer.state.log_history for key in line)


def test_evaluation_does_not_change_training_data(tmp_path):
    def run(name, **options):
        trainer = make_trainer(tmp_path / name, max_steps=3, **options)
        trainer.train()
        return trainer

    plain = run("plain")
    untouched = plain.experience_buffer.metrics()
    plain.evaluate(tiny_dataset(4))
    assert plain.experience_buffer.metrics() == untouched


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="TRL streams datasets since a later release")
def test_iterable_dataset(tmp_path, caplog):
    dataset = tiny_dataset(64).to_iterable_dataset()
    assert isinstance(dataset, IterableDataset)
    trainer = make_trainer(tmp_path, max_steps=5, train_dataset=dataset)
    trainer.train()
    assert_replayed(trainer)


def test_peft_config(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, peft_config=lora_config())
    assert isinstance(trainer.model, PeftModel)
    before = parameters_of(trainer)
    trainer.train()
    assert_replayed(trainer)
    after = parameters_of(trainer)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora" in name for name in moved)


def test_ready_peft_model(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, model=get_peft_model(tiny_model(), lora_config()))
    trainer.train()
    assert_replayed(trainer)


def test_default_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")

    class CpuConfig(ExGRPOConfig):  # TRL's own default, bf16, needs a GPU
        def __init__(self, output_dir):
            super().__init__(output_dir, use_cpu=True, bf16=False, report_to="none")

    monkeypatch.setattr("exgrpo_trl.trainer.ExGRPOConfig", CpuConfig)
    trainer = ExGRPOTrainer("base", first_letter_reward, train_dataset=tiny_dataset(64))
    assert isinstance(trainer.args, ExGRPOConfig)
    assert trainer.args.output_dir == "base-ExGRPO"
    assert trainer.args.replay_fraction == 0.5


def test_retired_questions_leave_the_dataset_from_the_next_epoch(tmp_path):
    """The first half of the questions is solved in the first epoch and must not be drawn from the dataset later."""
    drawn = []

    def reward(prompts, completions, uid, trainer_state, **kwargs):
        drawn.append((trainer_state.global_step, set(uid)))
        return [1.0 if int(u[1:]) < 8 else float(i % 4 == 3) for i, u in enumerate(uid)]

    trainer = make_trainer(tmp_path, num_train_epochs=3, reward_funcs=reward, learning_rate=0.0)
    trainer.train()
    steps_per_epoch = 4
    assert trainer.state.global_step == 3 * steps_per_epoch, "the number of steps stays what it was"
    easy = {f"q{i}" for i in range(8)}
    first = set().union(*(uids for step, uids in drawn if step < steps_per_epoch))
    later = set().union(*(uids for step, uids in drawn if step >= steps_per_epoch))
    assert len(first & easy) >= 4
    assert not later & {u for u in first if u in easy}
    assert len(later & {f"q{i}" for i in range(8, 16)}) >= 6, "replayed questions take some slots of the others"


def test_retired_questions_stay_in_the_dataset_on_request(tmp_path):
    drawn = []

    def reward(completions, uid, trainer_state, **kwargs):
        drawn.append((trainer_state.global_step, set(uid)))
        return [1.0] * len(uid)

    trainer = make_trainer(
        tmp_path, num_train_epochs=2, reward_funcs=reward, learning_rate=0.0, drop_retired_questions=False
    )
    trainer.train()
    assert len(trainer.experience_buffer.retired) == 16
    assert set().union(*(uids for step, uids in drawn if step >= 4)) == {f"q{i}" for i in range(16)}


def test_training_never_runs_dry(tmp_path, caplog):
    def reward(completions, **kwargs):
        return [1.0] * len(completions)

    trainer = make_trainer(tmp_path, num_train_epochs=3, reward_funcs=reward, learning_rate=0.0)
    trainer.train()
    assert trainer.state.global_step == 12
    assert len(trainer.experience_buffer.retired) == 16


def test_question_id_column(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=5, question_id_column="uid")
    trainer.train()
    assert_replayed(trainer)
    buffer = trainer.experience_buffer
    stored = {q for questions in buffer.buckets().values() for q in questions} | set(buffer.retired)
    assert stored
    assert stored <= {f"q{i}" for i in range(16)}


def test_mask_truncated_completions_stores_only_finished_ones(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=6, mask_truncated_completions=True, max_completion_length=16, retire_solved=False
    )
    trainer.train()
    buffer, tokenizer = trainer.experience_buffer, trainer.processing_class
    stored = [e for questions in buffer.buckets().values() for q in questions for e in buffer.completions(q)]
    assert stored
    # TRL counts a completion that ends in padding as finished, too.
    assert all(e.token_ids[-1] in (tokenizer.eos_token_id, tokenizer.pad_token_id) for e in stored)
    assert any(e.num_tokens < 16 for e in stored)


def test_continuous_rewards(tmp_path):
    def letter_rank(completions, **kwargs):
        return [(ord(c[0]) % 32) / 40 if c else 0.0 for c in completions]

    trainer = make_trainer(
        tmp_path, max_steps=6, reward_funcs=letter_rank, difficulty="reward_std", retire_solved=False
    )
    trainer.train()
    assert_replayed(trainer, steps=6)
    assert len(trainer.experience_buffer.buckets()) > 1


def test_continuous_rewards_need_no_success(tmp_path, monkeypatch):
    from exgrpo_trl import notices

    messages = []
    monkeypatch.setattr(notices.logger, "warning", lambda message, *args: messages.append(message))

    def letter_rank(completions, **kwargs):
        return [None if not c else (ord(c[0]) % 32) / 40 for c in completions]

    trainer = make_trainer(
        tmp_path,
        max_steps=12,
        reward_funcs=[letter_rank, first_letter_reward],
        success_reward="letter_rank",
        difficulty="reward_std",
    )
    trainer.train()
    assert trainer.experience_buffer.num_completions > 0
    assert not any(message.startswith("No completion") for message in messages)


def test_rewards_are_compared_as_the_float32_that_they_are(tmp_path):
    def nine_tenths(completions, **kwargs):
        return [0.9 * reward for reward in first_letter_reward(completions)]

    trainer = make_trainer(tmp_path / "one", max_steps=2, reward_funcs=nine_tenths, success_threshold=0.9)
    trainer.train()
    assert trainer.experience_buffer.num_completions > 0

    def ones(completions, **kwargs):
        return first_letter_reward(completions)

    def more_ones(completions, **kwargs):
        return first_letter_reward(completions)

    trainer = make_trainer(
        tmp_path / "sum",
        max_steps=2,
        reward_funcs=[ones, more_ones, first_letter_reward],
        reward_weights=[0.1, 0.2, 0.7],
        success_reward="weighted_sum",
    )
    trainer.train()
    assert trainer.experience_buffer.num_completions > 0


@pytest.mark.parametrize("difficulty", ["success_rate", "reward_std"])
def test_infinite_rewards_are_not_stored(tmp_path, difficulty):
    def infinite(completions, **kwargs):
        return [
            float("inf") if r and c[0] > "j" else r
            for c, r in zip(completions, first_letter_reward(completions), strict=True)
        ]

    trainer = make_trainer(tmp_path, max_steps=1, reward_funcs=infinite, difficulty=difficulty, learning_rate=0.0)
    trainer.train()
    buffer = trainer.experience_buffer
    rewards = [e.reward for questions in buffer.buckets().values() for q in questions for e in buffer.completions(q)]
    assert float("inf") not in rewards


def test_a_second_training_goes_on_from_the_first(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4, retire_solved=False)
    trainer.train()
    trainer.train()
    lines = lines_of(trainer)
    assert all(line.get("replay/staleness_mean", 1) >= 1 for line in lines)
    buffer = trainer.experience_buffer
    versions = {e.policy_version for qs in buffer.buckets().values() for q in qs for e in buffer.completions(q)}
    assert max(versions) > 4


def test_no_limit_on_the_length(tmp_path):
    first = make_trainer(tmp_path / "first", max_steps=2, retire_solved=False)
    first.train()
    make_trainer(
        tmp_path / "second",
        max_steps=1,
        experience_buffer=first.experience_buffer,
        max_completion_length=None,
        retire_solved=False,
    ).train()


def test_dropout_does_not_blur_the_scores(tmp_path):
    """Two scorings of the same candidates agree, although LoRA's dropout is on in training."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    trainer = make_trainer(tmp_path, max_steps=4, peft_config=config, retire_solved=False)
    trainer.train()
    trainer.model.train()
    buffer = trainer.experience_buffer
    prompted = [
        (trainer.processing_class(question.example["prompt"])["input_ids"], experience.token_ids)
        for question, _, experience in buffer.items()
    ]
    assert trainer.replayer.score(prompted) == trainer.replayer.score(prompted) != []
    assert trainer.model.training


def test_a_filled_buffer_is_used_at_once(tmp_path):
    first = make_trainer(tmp_path / "first", max_steps=5)
    first.train()
    second = make_trainer(tmp_path / "second", max_steps=1, experience_buffer=first.experience_buffer)
    assert second.experience_buffer is first.experience_buffer
    second.train()
    assert lines_of(second)[0]["replay/fraction"] == 0.5


def test_max_staleness(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, max_staleness=2, retire_solved=False, learning_rate=0.0)
    trainer.train()
    assert_replayed(trainer, steps=8)
    assert max(line.get("replay/staleness_max", 0) for line in lines_of(trainer)) == 2
    assert trainer.experience_buffer.metrics()["evicted"] > 0


def test_custom_strategies_are_called(tmp_path):
    calls = []

    def sampler(pool, n, rng):
        calls.append(n)
        return [q for questions in pool.buckets().values() for q in questions][:1]

    def selector(candidates, rng):
        assert all(c.entropy is not None for c in candidates)
        return len(candidates) - 1

    trainer = make_trainer(tmp_path, max_steps=5, question_sampler=sampler, completion_selector=selector)
    trainer.train()
    assert calls
    assert {line["replay/fraction"] for line in lines_of(trainer)} == {0, 0.25}


def test_the_config_survives_json_and_the_command_line(tmp_path):
    from trl import TrlParser

    (config,) = TrlParser(ExGRPOConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--replay_fraction", "0.25", "--replay_weighting", "balanced", "--use_cpu",
         "--bf16", "false", "--retire_solved", "false"]
    )  # fmt: skip
    assert (config.replay_fraction, config.replay_weighting, config.retire_solved) == (0.25, "balanced", False)
    import json

    assert json.loads(config.to_json_string())["replay_fraction"] == 0.25
