"""The model card says how replay was set and what the buffer held, after a real training; TRL's part stays."""

import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from tiny import first_letter_reward, make_trainer
from trl import GRPOTrainer

import exgrpo_trl
from exgrpo_trl.strategies.samplers import UniformSampler

HEADING = "## Experience replay"


def card_of(folder):
    """The text of the card, whose front matter can be read."""
    card = ModelCard.load(folder / "README.md")
    assert {"trl", "exgrpo"} <= set(card.data.tags)
    return card.text


def tables_of(text):
    """Rows of all tables, as a reader sees them: the first cell and the second."""
    tables, cells, is_heading = [], [], False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "table_open":
            tables.append({})
        elif token.type == "tr_open":
            cells = []
        elif token.type == "tr_close":
            name, value = cells
            tables[-1][name] = value
        elif token.type in ("td_open", "th_open"):
            is_heading = True
        elif token.type == "inline" and is_heading:
            assert all(part.type in ("text", "code_inline") for part in token.children), token.content
            cells.append("".join(part.content for part in token.children))
            is_heading = False
    return tables


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer that has replayed, and its folder."""
    folder = tmp_path_factory.mktemp("trained")

    class Mine(UniformSampler):
        pass

    trainer = make_trainer(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        question_sampler=Mine(),
        weighting="balanced",
        max_staleness=50,
        log_replay="short",
    )
    trainer.train()
    return trainer, folder


def test_a_checkpoint_brings_the_card(trained):
    _, folder = trained
    _, held = tables_of(card_of(folder))
    assert "experience buffer after 4 optimizer steps" in held


def test_the_card_says_how_replay_was_set_and_what_the_buffer_holds(trained):
    trainer, folder = trained
    trainer.create_model_card(model_name="tiny", tags="mine")
    text, buffer = card_of(folder), trainer.experience_buffer
    settings, held = tables_of(text)
    assert settings == {
        "setting": "value",
        "reward functions": "first_letter_reward",
        "replay_fraction": "0.5",
        "replay_start_pass_rate": "None",
        "question_sampling": "trained.<locals>.Mine",
        "completion_selection": "'lowest_entropy'",
        "success_threshold": "1.0",
        "replay_weighting": "'balanced'",
        "max_staleness": "50",
    }
    num_replays = [buffer.reuse(experience).num_replays for _, _, experience in buffer.items()]
    assert held == {
        "experience buffer after 4 optimizer steps": "",
        "stored questions": str(buffer.num_questions),
        "stored completions": str(len(num_replays)),
        "their tokens": str(sum(len(experience.token_ids) for _, _, experience in buffer.items())),
        "their replays so far": str(sum(num_replays)),
        "retired questions (solved by a whole group)": str(len(buffer.retired)),
        "tokens taken from it instead of generated": str(trainer.replayer.metrics.tokens_saved),
    }
    assert sum(num_replays) > 0
    assert f"`exgrpo-trl` {exgrpo_trl.__version__}" in text
    section = text[text.index(HEADING) :]
    assert "arXiv 2510.02245" in section
    for citation in ("Cite ExGRPO as", "zhan2025exgrpo", "Cite TRL as", "vonwerra2020trl"):
        assert section.count(citation) == 1
    assert ModelCard.load(folder / "README.md").data.tags.count("mine") == 1


def test_a_card_has_one_section(trained, monkeypatch):
    trainer, folder = trained
    trainer.create_model_card()
    once = (folder / "README.md").read_text()
    assert once.count(HEADING) == 1
    trainer.create_model_card()
    assert (folder / "README.md").read_text() == once
    # Also where what is there is kept.
    monkeypatch.setattr(GRPOTrainer, "create_model_card", lambda self: None)
    trainer.create_model_card()
    assert (folder / "README.md").read_text() == once
    (folder / "README.md").write_text("# Mine")
    trainer.create_model_card()
    assert (folder / "README.md").read_text().startswith("# Mine\n\n" + HEADING)
    own = (folder / "README.md").read_text()
    trainer.create_model_card()
    assert (folder / "README.md").read_text() == own
    (folder / "README.md").unlink()
    trainer.create_model_card()
    assert not (folder / "README.md").exists()


def test_other_processes_write_nothing(trained, monkeypatch):
    trainer, folder = trained
    (folder / "README.md").write_text("of the main process")
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert (folder / "README.md").read_text() == "of the main process"


def test_without_replay_the_card_says_so(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, replay_fraction=0)
    trainer.train()
    trainer.create_model_card()
    text = card_of(tmp_path)
    assert "Trained without replay (`replay_fraction=0`), which is plain GRPO" in text
    assert tables_of(text) == []
    assert "vonwerra2020trl" in text


def test_whatever_a_name_holds_is_text_in_its_cell(tmp_path):
    def reward(completions, **kwargs):
        return first_letter_reward(completions)

    reward.__name__ = "a|b `c` ``d`` <b>e</b>\n## f | [g](h) *i* \\| \u202e"
    trainer = make_trainer(
        tmp_path, max_steps=1, reward_funcs=reward, success_reward=reward.__name__, question_id_column="uid"
    )
    trainer.create_model_card()
    text = card_of(tmp_path)
    settings, _ = tables_of(text)
    shown = reward.__name__.replace("\n", r"\n").replace("\u202e", r"\u202e")
    assert settings["reward functions"].replace("\\\\", "\\") == shown
    assert eval(settings["success_reward"]) == reward.__name__
    assert settings["question_id_column"] == "'uid'"
    [row] = [line for line in text.splitlines() if line.startswith("| reward functions")]
    # As GitHub splits rows: a backslash escapes any punctuation, itself included.
    assert len(re.findall(r"(?:\\[!-/:-@[-`{-~]|[^|\\]|\\)+", row)) == 2
    assert "\n## f" not in text
    assert "\u202e" not in text
