"""Another dataset between two trainings, and samplers of users: what is drawn, through `train()`."""

import pytest
from datasets import Dataset
from tiny import first_letter_reward, make_trainer, tiny_dataset
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from exgrpo_trl import ExGRPOTrainer, question_id_of

NUM_GROUPS, GROUP_SIZE = 4, 4
WITHOUT_REPLAY = {"question_sampler": lambda pool, n, rng: []}  # all rows are the dataset's; what is solved retires


def prompts_of(name, num_rows):
    return [f"{name} {row} = " for row in range(num_rows)]


def questions(**num_rows):
    return Dataset.from_dict({"prompt": [prompt for named in num_rows.items() for prompt in prompts_of(*named)]})


class Drawn:
    """Rewards that let whole groups of easy prompts succeed, and no others; keeps the prompts of every batch."""

    __name__ = "drawn"  # TRL 1.0.0 asks for it

    def __init__(self, is_easy=lambda prompt: False):
        self.is_easy, self.batches = is_easy, []

    def __call__(self, prompts, completions, **kwargs):
        groups = [prompts[start : start + GROUP_SIZE] for start in range(0, len(prompts), GROUP_SIZE)]
        assert all(len(set(group)) == 1 for group in groups), "a group has one question"
        self.batches.append([group[0] for group in groups])
        luck = [lucky if row % GROUP_SIZE else 0.0 for row, lucky in enumerate(first_letter_reward(completions))]
        return [1.0 if self.is_easy(prompt) else lucky for prompt, lucky in zip(prompts, luck, strict=True)]

    @property
    def prompts(self):
        return {prompt for batch in self.batches for prompt in batch}


def in_two_phases(tmp_path, first, second, *, between=lambda trainer: None, **options):
    """A trainer that has solved all of the first dataset, and was trained for two epochs on the second."""
    drawn = Drawn(is_easy=lambda prompt: prompt.startswith("easy"))
    options = {"num_train_epochs": 1, "learning_rate": 0.0, "reward_funcs": drawn} | WITHOUT_REPLAY | options
    trainer = make_trainer(tmp_path, train_dataset=first, **options)
    trainer.train()
    assert len(trainer.experience_buffer.retired) == len(first)
    between(trainer)
    trainer.train_dataset = second
    trainer.args.num_train_epochs = 2
    drawn.batches.clear()
    trainer.train()
    return trainer, drawn


# Smaller than the first dataset, as large as one batch, larger, and a size that is no multiple of a batch.
@pytest.mark.parametrize("num_rows", [16, 8, 4, 40, 10])
def test_another_dataset_is_trained_on_whole(tmp_path, num_rows):
    trainer, drawn = in_two_phases(tmp_path, questions(easy=16), questions(hard=num_rows))
    assert trainer.state.global_step == 2 * (num_rows // NUM_GROUPS)
    hard = set(prompts_of("hard", num_rows))
    assert drawn.prompts <= hard
    assert num_rows % NUM_GROUPS or drawn.prompts == hard
    assert trainer.experience_buffer.check_valid()[0]


def test_retired_questions_of_the_first_phase_stay_away_in_the_second(tmp_path):
    both = questions(hard=8, easy=8)
    _, drawn = in_two_phases(tmp_path, questions(easy=16), both)
    assert drawn.prompts == set(prompts_of("hard", 8))


def test_a_second_phase_of_retired_questions_alone_goes_on(tmp_path):
    trainer, drawn = in_two_phases(tmp_path, questions(easy=16), questions(easy=12))
    assert trainer.state.global_step == 6
    assert len(drawn.prompts) >= NUM_GROUPS


def test_an_evaluation_in_between_changes_nothing(tmp_path):
    def run(name, between):
        return in_two_phases(tmp_path / name, questions(easy=16), questions(hard=16), between=between)[1].batches

    evaluated = run("evaluated", lambda trainer: trainer.evaluate(questions(other=8)))
    assert evaluated[:4] == run("not", lambda trainer: None)[:4]


def test_another_dataset_is_checked(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, question_id_column="uid")
    trainer.train()
    trainer.train_dataset = tiny_dataset().map(lambda row: {"uid": "same"})
    with pytest.raises(ValueError, match="two different prompts"):
        trainer.train()
    trainer.train_dataset = questions(other=16)
    with pytest.raises(ValueError, match="not a column"):
        trainer.train()
    trainer.train_dataset = tiny_dataset(24)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_second_phase_is_resumed_exactly(tmp_path):
    def run(name, resume_from=None):
        drawn = Drawn(is_easy=lambda prompt: prompt.startswith("easy"))
        options = {"num_train_epochs": 1, "reward_funcs": drawn, "save_strategy": "steps", "save_steps": 3}
        trainer = make_trainer(tmp_path / name, train_dataset=questions(easy=12), **options)
        if resume_from is None:
            trainer.train()
        trainer.train_dataset = questions(hard=12, easy=4)
        trainer.args.num_train_epochs = 2
        drawn.batches.clear()
        trainer.train(resume_from_checkpoint=resume_from)
        return drawn.batches

    whole = run("whole")
    assert len(whole) == 8
    assert run("resumed", str(tmp_path / "whole" / "checkpoint-6")) == whole[6:]


@pytest.mark.parametrize("options", [{"num_train_epochs": 3}, {"max_steps": 3}], ids=str)
def test_a_dataset_smaller_than_a_batch_is_as_in_trl(tmp_path, options):
    def outcome(name, trainer_class):
        trainer = make_trainer(tmp_path / name, trainer_class, train_dataset=tiny_dataset(3), **options)
        try:
            trainer.train()
        except ValueError as error:
            return str(error)
        return trainer.state.global_step

    assert outcome("ours", ExGRPOTrainer) == outcome("trl", GRPOTrainer)


@pytest.mark.parametrize("options", [{"steps_per_generation": 2}, {"num_iterations": 2}], ids=str)
def test_a_training_may_end_inside_a_generation_batch(tmp_path, options):
    trainer = make_trainer(
        tmp_path,
        max_steps=5,
        per_device_train_batch_size=16 // options.get("steps_per_generation", 1),
        retire_solved=False,
        save_strategy="steps",
        save_steps=4,
        **options,
    )
    trainer.train()
    trainer.train_dataset = questions(hard=16)
    trainer.train()
    assert trainer.state.global_step == 5
    trainer.train(resume_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainer.state.global_step == 5


# Samplers


class Curriculum(Sampler):
    """All rows from the last to the first, in whole batches."""

    def __init__(self, num_rows):
        self.num_rows = num_rows

    def __len__(self):
        return self.num_rows * GROUP_SIZE

    def __iter__(self):
        return (row for row in range(self.num_rows - 1, -1, -1) for _ in range(GROUP_SIZE))


class InBetween(GRPOTrainer):
    def _get_train_sampler(self, dataset=None):
        return Curriculum(len(dataset or self.train_dataset))


class WithCurriculum(ExGRPOTrainer, InBetween):
    """An order of its own below the trainer."""


def test_the_order_of_another_sampler_is_kept_without_the_retired(tmp_path):
    drawn = Drawn(is_easy=lambda prompt: prompt in prompts[:6])
    dataset, prompts = questions(row=16), prompts_of("row", 16)
    options = {"train_dataset": dataset, "reward_funcs": drawn, "num_train_epochs": 3, "learning_rate": 0.0}
    options |= {"save_strategy": "steps", "save_steps": 6} | WITHOUT_REPLAY
    make_trainer(tmp_path / "whole", WithCurriculum, **options).train()
    whole = drawn.batches
    backwards = [prompts[::-1][start : start + 4] for start in range(0, 16, 4)]
    assert whole[:4] == backwards
    for batch, before in zip(whole[4:], backwards * 2, strict=True):
        assert len(set(batch)) == 4
        assert not set(batch) & set(prompts[:6])
        assert all(mine == theirs for mine, theirs in zip(batch, before, strict=True) if theirs not in prompts[:6])
    drawn.batches = []
    trainer = make_trainer(tmp_path / "resumed", WithCurriculum, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert drawn.batches == whole[6:]


class Wrapper(Sampler):
    """Whole groups of another sampler, every batch of them in order."""

    def __init__(self, sampler):
        self.sampler = sampler

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        rows = list(self.sampler)
        for start in range(0, len(rows), NUM_GROUPS * GROUP_SIZE):
            yield from sorted(rows[start : start + NUM_GROUPS * GROUP_SIZE])


def test_a_sampler_around_ours(tmp_path):
    class Around(ExGRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return Wrapper(super()._get_train_sampler(dataset))

    drawn = Drawn(is_easy=lambda prompt: prompt.startswith("easy"))
    both = questions(easy=8, hard=8)
    trainer = make_trainer(
        tmp_path, Around, train_dataset=both, reward_funcs=drawn, num_train_epochs=2, **WITHOUT_REPLAY
    )
    trainer.train()
    assert [sorted(batch) for batch in drawn.batches] == drawn.batches
    solved = {prompt for batch in drawn.batches[:4] for prompt in batch if prompt.startswith("easy")}
    assert {question_id_of(prompt) for prompt in solved} <= set(trainer.experience_buffer.retired)
    later = {prompt for batch in drawn.batches[4:] for prompt in batch}
    assert solved
    assert not solved & later


def test_attributes_of_the_sampler_decide(tmp_path):
    seen = []

    class InOrder(ExGRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            sampler = super()._get_train_sampler(dataset)
            assert isinstance(sampler, RepeatSampler)
            seen.append((sampler.mini_repeat_count, sampler.batch_size, sampler.repeat_count, sampler.num_samples))
            sampler.shuffle = False
            return sampler

    drawn = Drawn()
    dataset = questions(row=16)
    options = {"num_train_epochs": 2, "retire_solved": False} | WITHOUT_REPLAY
    make_trainer(tmp_path, InOrder, train_dataset=dataset, reward_funcs=drawn, **options).train()
    assert seen == [(4, 4, 1, 16)]
    assert [prompt for batch in drawn.batches for prompt in batch] == prompts_of("row", 16) * 2


def test_a_sampler_that_gives_no_order_is_none(tmp_path):
    class NoSampler(GRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return None

    class Ours(ExGRPOTrainer, NoSampler):
        pass

    repeated = Dataset.from_dict({"prompt": [f"{row} = " for row in range(16) for _ in range(GROUP_SIZE)]})
    trainer = make_trainer(tmp_path, Ours, train_dataset=repeated, max_steps=2, reward_funcs=Drawn())
    trainer.train()
    assert trainer.state.global_step == 2
