"""Continuous batching of transformers: fresh rows alone are generated, each from its own prompt."""

import copy
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from ranks import assert_engaged, run_ranks
from tiny import make_trainer, tiny_model

from exgrpo_trl import ExGRPOTrainer

pytestmark = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"),
    reason=f"continuous batching of transformers {transformers.__version__} does not run on a CPU",
)

OPTIONS = {
    "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "max_batch_tokens": 256, "page_size": 16},
    "top_k": 1,  # one choice for every token: what a prompt leads to can be computed
    "retire_solved": False,
}


def every_second(completions, **kwargs):
    """All completions of a question are the same; half of them count."""
    return [float(i % 2) for i in range(len(completions))]


class Recorder(ExGRPOTrainer):
    """Records the prompts that are generated from, and computes what each row should hold."""

    def __init__(self, *args, model, **kwargs):
        self.twin = copy.deepcopy(model)
        super().__init__(model, *args, **kwargs)
        self.asked, self.fresh, self.num_replayed = [], [], []
        generate = self.model.generate_batch

        def recorded(inputs, *args, **kwargs):
            self.asked += inputs
            return generate(inputs, *args, **kwargs)

        self.model.generate_batch = recorded

    def _generate_and_score_completions(self, inputs):
        self.twin.load_state_dict(self.model.state_dict())
        output = super()._generate_and_score_completions(inputs)
        self.num_replayed.append(int(output["is_replayed"].sum()))
        for row in (~output["is_replayed"]).nonzero()[:, 0].tolist():
            prompt = output["prompt_ids"][row][output["prompt_mask"][row].bool()]
            completion = output["completion_ids"][row][output["completion_mask"][row].bool()]
            self.fresh.append((prompt.tolist(), completion.tolist(), self.likeliest(prompt)))
        return output

    @torch.no_grad()
    def likeliest(self, prompt):
        ids = prompt.tolist()
        while len(ids) < len(prompt) + self.max_completion_length and ids[-1] != 1:
            ids.append(int(self.twin(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[len(prompt) :]


def check(asked, fresh, num_replayed):
    assert [prompt for prompt, _, _ in fresh] == asked, "fresh rows alone are generated"
    assert all(completion == expected for _, completion, expected in fresh)
    assert len({tuple(expected) for _, _, expected in fresh}) > 3, "prompts lead to different completions"
    assert sum(num_replayed) >= 3


@pytest.mark.parametrize(
    ("options", "num_replayed"),
    [({}, [0, 2, 2, 2, 2]), ({"replay_unit": "group"}, [0, 8, 8, 8, 8])],
    ids=["completions", "groups"],
)
def test_fresh_rows_alone_are_generated(tmp_path, options, num_replayed):
    trainer = make_trainer(tmp_path, Recorder, reward_funcs=every_second, max_steps=5, **OPTIONS, **options)
    trainer.train()
    assert trainer.num_replayed == num_replayed
    check(trainer.asked, trainer.fresh, trainer.num_replayed)


def train_and_save(mode, mode_options, folder):
    options = OPTIONS | mode_options | {"per_device_train_batch_size": 8}
    trainer = make_trainer(
        Path(folder) / "out", Recorder, model=tiny_model(), reward_funcs=every_second, max_steps=5, **options
    )
    trainer.train()
    assert_engaged(trainer, mode, 2)
    rank = trainer.accelerator.process_index
    torch.save((trainer.asked, trainer.fresh, trainer.num_replayed), Path(folder) / f"told{rank}.pt")


def test_two_processes(tmp_path):
    run_ranks(train_and_save, str(tmp_path), folder=tmp_path)
    for rank in range(2):
        check(*torch.load(tmp_path / f"told{rank}.pt"))
