"""What counts as a success in a real training: several reward functions, outages, on one process and on two."""

import pytest
from ranks import run_ranks
from tiny import first_letter_reward, make_trainer


def form(completions, **kwargs):
    """1 for all that end in time, or begin with a letter up to m."""
    return [float(len(c) < 8 or (c[:1].isalpha() and c[:1] <= "m")) for c in completions]


def never(completions, **kwargs):
    return [0.0] * len(completions)


def always(completions, **kwargs):
    return [1.0] * len(completions)


def texts_of(trainer):
    """Stored completions as the reward functions saw them."""
    return [
        trainer.processing_class.decode(experience.token_ids.tolist(), skip_special_tokens=True)
        for _, _, experience in trainer.experience_buffer.items()
    ]


def test_the_right_form_of_a_wrong_answer_is_no_success(tmp_path):
    trainer = make_trainer(tmp_path, reward_funcs=[never, always], num_train_epochs=1, learning_rate=0.0)
    trainer.train()
    assert trainer.experience_buffer.num_completions == len(trainer.experience_buffer.retired) == 0


def test_every_function_has_to_agree(tmp_path):
    trainer = make_trainer(
        tmp_path, reward_funcs=[first_letter_reward, form], max_steps=8, learning_rate=0.0, retire_solved=False
    )
    trainer.train()
    texts = texts_of(trainer)
    assert len(texts) > 5
    assert first_letter_reward(texts) == form(texts) == [1.0] * len(texts)
    assert any(line["replay/fraction"] > 0 for line in trainer.state.log_history if "loss" in line)


@pytest.mark.parametrize("both_are_down", [False, True])
def test_an_outage_of_the_judge_changes_nothing(tmp_path, both_are_down):
    sizes = {}

    def judge(completions, trainer_state, **kwargs):
        step = trainer_state.global_step
        buffer = trainer.experience_buffer
        sizes[step] = (buffer.num_completions, len(buffer.retired))
        return [None] * len(completions) if 4 <= step < 9 else first_letter_reward(completions)

    def shape(completions, trainer_state, **kwargs):
        is_down = both_are_down and 4 <= trainer_state.global_step < 9
        return [float("nan") if is_down else 1.0 for _ in completions]

    trainer = make_trainer(tmp_path, reward_funcs=[judge, shape], max_steps=12, learning_rate=0.0)
    trainer.train()
    # A batch is collected when the next one is planned: that of step 3 during step 4.
    assert sizes[4][0] > 0
    assert {sizes[step] for step in range(4, 10)} == {sizes[4]}, "nothing is stored, evicted or retired meanwhile"
    assert sizes[11] != sizes[4], "and it goes on afterwards"
    assert all(line["replay/fraction"] > 0 for line in trainer.state.log_history if line.get("step", 0) in range(5, 9))


def train_two_rewards(mode, mode_options, output_dir):
    sizes = {}

    def judge(completions, trainer_state, **kwargs):
        if trainer.accelerator.is_main_process:
            buffer = trainer.experience_buffer
            sizes[trainer_state.global_step] = (buffer.num_completions, len(buffer.retired))
        return [None] * len(completions) if 4 <= trainer_state.global_step < 8 else first_letter_reward(completions)

    trainer = make_trainer(
        output_dir, reward_funcs=[judge, form], max_steps=10, learning_rate=0.0, per_device_train_batch_size=8,
        **mode_options,
    )  # fmt: skip
    trainer.train()
    assert trainer.accelerator.num_processes == 2
    if trainer.accelerator.is_main_process:
        assert sizes[4][0] > 0
        assert {sizes[step] for step in range(4, 9)} == {sizes[4]}
        texts = texts_of(trainer)
        assert first_letter_reward(texts) == form(texts) == [1.0] * len(texts)


def test_two_processes_judge_alike(tmp_path):
    run_ranks(train_two_rewards, str(tmp_path / "out"), folder=tmp_path)


def test_a_name_that_two_functions_have_cannot_decide(tmp_path):
    def twin(completions, **kwargs):
        return [0.0] * len(completions)

    twin.__name__ = "first_letter_reward"
    with pytest.raises(ValueError, match=r"'first_letter_reward' is the name of 2 reward functions"):
        make_trainer(
            tmp_path, reward_funcs=[first_letter_reward, twin], success_reward="first_letter_reward", max_steps=1
        )
