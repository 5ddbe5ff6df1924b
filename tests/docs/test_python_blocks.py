"""Every Python block of the documentation runs, on tiny models and data under the names that it uses."""

import re
from contextlib import chdir
from pathlib import Path

import pytest
from pages import PAGES, ROOT, SHOWN, Block, blocks_of
from python_blocks import run_blocks
from stand_ins import GIVEN, pictures
from tiny import first_letter_reward, make_trainer
from trl import GRPOTrainer

from exgrpo_trl import ExGRPOTrainer, ExperienceBuffer

RUN = {"python": "test_python_blocks.py", "bash": "test_shell_blocks.py", "yaml": "test_shell_blocks.py"}
WITH_PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks_of(page))]


def test_every_block_is_run_or_says_why_not():
    for page in PAGES:
        assert len(blocks_of(page)) == page.read_text().count("```") / 2, f"{page}: a fence that is not understood"
        for block in blocks_of(page):
            assert block.language in RUN or block.language in SHOWN, f"{block}: say which language it is"


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_blocks_run(page, tmp_path, capsys, caplog):
    if "trl.rewards" in page.read_text():
        pytest.importorskip(
            "math_verify", reason="the reward of the example needs the extra `math`, which `make test` has"
        )
    names = GIVEN.get(page.name, dict)()
    if page.name in ("checkpoints.md", "report.md"):
        names["trainer"] = interrupted_trainer(tmp_path)
    blocks = [block for block in blocks_of(page) if block.language == "python"]
    ran = run_blocks(blocks, tmp_path, names, before=give)
    assert len(ran) + sum(bool(block.not_run) for block in blocks) == len(blocks) > 0
    names["said"] = caplog.messages
    if page.name in AFTER:
        AFTER[page.name](names, capsys.readouterr().out, tmp_path)


def give(block: Block, names: dict) -> None:
    """What the text above a block says of its data."""
    if "image" in block.code and block.page.name == "agents.md":
        names["dataset"] = pictures()


def interrupted_trainer(folder: Path) -> ExGRPOTrainer:
    """A run that saved a checkpoint, which has the name that it has on the page."""
    with chdir(folder):
        trainer = make_trainer("outputs", max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train()
        Path("outputs/checkpoint-2").rename("outputs/checkpoint-500")
    return trainer


def of_agents(names: dict, printed: str, folder: Path) -> None:
    assert names["trainer"].state.global_step == 0
    assert len(names["dataset"]) == 16


def of_checkpoints(names: dict, printed: str, folder: Path) -> None:
    assert names["trainer"].state.global_step == 4
    assert len(ExperienceBuffer.load(folder / "outputs/checkpoint-500")) == 0


def of_guide(names: dict, printed: str, folder: Path) -> None:
    assert names["args"].difficulty == "reward_std"
    [question] = [question for question, _, _ in names["buffer"]]
    assert question.example == names["row"]


def of_migrating(names: dict, printed: str, folder: Path) -> None:
    """What the page says of both directions of a resume, and of several rewards."""
    assert isinstance(names["trainer"], names["Clipped"])
    assert any(line.get("replay/questions") for line in names["trainer"].state.log_history)
    with chdir(folder):
        saved = make_trainer("saved", max_steps=4, save_strategy="steps", save_steps=2)
        saved.train()
        of_trl = make_trainer("saved", GRPOTrainer, max_steps=4)
        of_trl.train(resume_from_checkpoint="saved/checkpoint-2")
        assert (folder / "saved" / "checkpoint-2" / "experience_buffer").is_dir()
        assert of_trl.state.global_step == 4
        rewards = [first_letter_reward, names["brief"]]
        for deciding, is_stored in ((None, False), ("first_letter_reward", True)):
            trainer = make_trainer("several", reward_funcs=rewards, success_reward=deciding, max_steps=2)
            trainer.train()
            assert bool(len(trainer.experience_buffer)) == is_stored


def of_start(names: dict, printed: str, folder: Path) -> None:
    """The page quotes what the run says, and leaves out numbers that depend on the model."""
    page = ROOT / "docs" / "start.md"
    first, last = (" ".join(block.code.split()) for block in blocks_of(page) if block.language == "text")
    assert any(message.startswith(first) for message in names["said"])
    assert re.fullmatch(re.escape(last).replace(r"\.\.\.", r"\d+"), names["said"][-1])
    lines = names["trainer"].state.log_history
    assert (lines[0]["replay/questions"], lines[0]["replay/fraction"]) == (0, 0)
    assert lines[1]["replay/fraction"] == 0.5
    assert "replay/effective_sample_size" in lines[2]


def of_own_experience(names: dict, printed: str, folder: Path) -> None:
    page = ROOT / "docs" / "own_experience.md"
    [shown] = [block.code for block in blocks_of(page) if block.language == "text"]
    assert shown in printed
    assert len(names["first"].experience_buffer) > 4
    assert names["second"].state.log_history[0]["replay/questions"] > 1
    assert len(names["third"].experience_buffer) == len(names["hard"]) > 0
    assert len(names["report"].refused) == 2
    # The policy that scored them replays them: all ratios are alike.
    assert names["trainer"].state.log_history[0]["replay/effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert not any(e.behavior_per_token_logps.any() for _, _, e in names["luffy"].experience_buffer)


AFTER = {
    "agents.md": of_agents,
    "checkpoints.md": of_checkpoints,
    "guide.md": of_guide,
    "migrating.md": of_migrating,
    "own_experience.md": of_own_experience,
    "start.md": of_start,
}
