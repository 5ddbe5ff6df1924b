"""examples/train_agent.py as a user runs it, at a tiny size, and the environment that it trains in."""

import importlib.util
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from example_runs import flags
from packaging.version import Version
from scripts import run_script

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_agent.py"

pytestmark = pytest.mark.skipif(
    Version(version("transformers")) < Version("5.13"),
    reason="the example parses tool calls as transformers 5.13 does",
)

# Every step has the same eight mazes. Such a model seldom gets out of them: count everything as a success, so that
# there is something to replay in the third step.
TINY = {
    "max_steps": 3,
    "imitation_steps": 30,
    "num_train": 8,
    "num_held_out": 8,
    "per_device_train_batch_size": 32,
    "num_generations": 4,
    "success_threshold": 0.0,
    "retire_solved": False,
    "logging_steps": 1,
    "output_dir": "out",
}


def run(options, cwd):
    return run_script(EXAMPLE, *flags(options), cwd=cwd)


def reported(name, text):
    return re.search(rf"│ {name} +│ (.*?) +│", text).group(1)


@pytest.fixture(scope="module")
def train_agent():
    specification = importlib.util.spec_from_file_location("train_agent", EXAMPLE)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_training_with_replay(tmp_path):
    result = run(TINY, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("before", "after"):
        assert 0 <= float(reported(f"Held-out success {name}", result.stdout)) <= 1
    assert "step 3/3 | success " in result.stdout
    assert int(reported("Games replayed", result.stdout)) == 8, "half of 8 mazes in the second step and the third"
    games, in_mazes = re.match(r"(\d+) games in (\d+) mazes", reported("In the buffer", result.stdout)).groups()
    assert int(games) >= int(in_mazes) == 8
    # A step takes 32 games of at least a reset and a call; four games of the last two are not played anew.
    assert int(reported("Environment steps in training", result.stdout)) >= 2 * (3 * 32 - 8) - 16
    assert "Look at the buffer: exgrpo-trl show out/checkpoint-3\n" in result.stdout
    assert (tmp_path / "out" / "checkpoint-3" / "experience_buffer" / "metadata.json").exists()
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_training_without_replay(tmp_path):
    result = run(TINY | {"replay_fraction": 0, "max_steps": 1}, tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Held-out success after" in result.stdout
    assert "Games replayed" not in result.stdout


def test_a_maze(train_agent):
    maze = train_agent.Maze()
    before = train_agent.Maze.num_steps
    first, second = (train_agent.MEANING[sign] for sign in ("fox", "owl"))
    assert maze.reset(prompt=[], route="fox owl") == "sign fox"
    assert maze.open() == "sign fox"
    assert maze.go(first) == "sign owl"
    assert maze.go(second) == "door"
    assert maze.get_reward() == 0
    assert maze.open() == "outside"
    assert maze.get_reward() == 1
    assert maze.reset(route="fox owl") == "sign fox"
    wrong = next(direction for direction in train_agent.DIRECTIONS if direction != first)
    assert maze.go(wrong) == "dead end"
    assert maze.go(first) == "dead end"
    assert maze.open() == "dead end"
    assert maze.get_reward() == 0
    assert train_agent.Maze.num_steps == before + 9


def test_mazes_to_train_on_are_not_those_to_measure_on(train_agent):
    train, held_out = train_agent.mazes(300, 100, seed=1)
    assert len(set(train["route"]) | set(held_out["route"])) == 400
    assert {len(route.split()) for route in train["route"]} == set(train_agent.LENGTHS)
    again, _ = train_agent.mazes(300, 100, seed=1)
    assert list(again["route"]) == list(train["route"])


def test_a_game_is_a_few_tokens_that_come_back_as_tool_calls(train_agent):
    from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response

    tokenizer = train_agent.make_tokenizer()
    assert is_chat_template_prefix_preserving(tokenizer)
    habit = train_agent.habits(0.5)
    game = train_agent.play({"route": "ant fox"}, habit, train_agent.np.random.default_rng(0))
    text = tokenizer.apply_chat_template(game, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_tokens_to_ids("<|unknown|>") not in ids
    assert len(ids) <= 5 + 9 * len(game)
    speaks = tokenizer.convert_tokens_to_ids("<|assistant|>")
    begin = ids.index(speaks) + 1
    end = ids.index(tokenizer.eos_token_id, begin) + 1
    said = parse_response(tokenizer, ids[begin:end], prefix=ids[:begin])
    assert said["tool_calls"] == game[1]["tool_calls"]


def test_the_player_favours_the_right_direction_at_every_third_sign(train_agent):
    habit = train_agent.habits(0.4)
    assert habit.sum(axis=1) == pytest.approx(1)
    favourites = [train_agent.DIRECTIONS[i] for i in habit.argmax(axis=1)]
    is_right = [favourites[i] == train_agent.MEANING[sign] for i, sign in enumerate(train_agent.SIGNS)]
    assert is_right == [i % 3 == 0 for i in range(len(train_agent.SIGNS))]
