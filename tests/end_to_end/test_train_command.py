"""`exgrpo-trl train`: TRL's script of GRPO, launched through accelerate, with replay."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate.commands.launch
import pytest
import torch
import trl
import yaml
from packaging.version import Version
from ranks import free_port
from tiny import tiny_arguments, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import Trainer
from trl.scripts import grpo

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer, ExperienceBuffer, cli, grpo_script

# What the reward function is asked about goes into a file of its process.
REWARDS = """
import os
from pathlib import Path

def first_letter(completions, **kwargs):
    with open(f"asked-{os.environ.get('RANK', '0')}.txt", "a") as file:
        file.write(f"{len(completions)} {os.environ.get('OF_THE_FILE')}\\n")
    return [float(text[:1].isalpha() and text[:1] <= "t") for text in completions]
"""


@pytest.fixture(scope="module", autouse=True)
def where_trl_trains_on_cpus():
    if Version(trl.__version__).release[:2] == (1, 15) and not torch.cuda.is_available():
        pytest.skip(f"trl {trl.__version__} computes log-probabilities on GPUs only")


def write_parts(folder, **changes):
    """A model, a dataset, a reward function and `run.yaml` for three steps of 4 questions."""
    tiny_model().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    tiny_dataset().to_parquet(folder / "data" / "train.parquet")
    (folder / "rewards_of_mine.py").write_text(REWARDS)
    run = {
        "model_name_or_path": "model",
        "dtype": "float32",
        "dataset_name": "data",
        "reward_funcs": ["rewards_of_mine.first_letter"],
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "replay_start_pass_rate": None,
        "env": {"OF_THE_FILE": "set"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tiny_arguments("out") | run | changes))
    return folder


def call(folder, *arguments):
    """`exgrpo-trl train` as a program; returns what it printed."""
    code = "import sys; from exgrpo_trl.cli import main; sys.exit(main(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", code, "train", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    return result.stdout


def history_of(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [line for line in state["log_history"] if "loss" in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder in which the command has trained from a file, for another number of steps than the file says."""
    folder = write_parts(tmp_path_factory.mktemp("run"), num_processes=1)
    printed = call(folder, "--config", "run.yaml", "--max_steps", "3")
    return folder, printed


def test_a_run_replays(run):
    folder, printed = run
    checkpoint = folder / "out" / "checkpoint-3"
    assert [line["replay/fraction"] for line in history_of(checkpoint)] == [0, 0.5, 0.5]
    assert ExperienceBuffer.load(checkpoint).num_completions > 4
    asked = (folder / "asked-0.txt").read_text().splitlines()
    assert asked == ["16 set"] * 3, "the reward function is that of the dotted path, and the file sets the environment"
    assert "2 of 3 generation batches replayed 4 stored completions" in printed
    assert (folder / "out" / "model.safetensors").exists()
    assert "ExGRPO" in (folder / "out" / "README.md").read_text()


def test_a_run_goes_on(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run[0], tmp_path / "run")
    (folder / "asked-0.txt").unlink()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OF_THE_FILE", "")
    arguments = ["--config", "run.yaml", "--max_steps", "4", "--save_steps", "4", "--resume_from_checkpoint", "True"]
    arguments += ["--log_replay", "all"]
    grpo_script.train(grpo_script.read_arguments(arguments)[0])
    assert (folder / "asked-0.txt").read_text() == "16 set\n", "one step is left"
    history = history_of(folder / "out" / "checkpoint-4")
    assert history[:3] == history_of(run[0] / "out" / "checkpoint-3")
    assert history[3]["replay/fraction"] == 0.5
    assert history[3]["replay/staleness_max"] > 1, "completions of before the checkpoint are replayed"


def test_two_processes(tmp_path):
    folder = write_parts(tmp_path, per_device_train_batch_size=8, num_processes=2)
    call(folder, "--config", "run.yaml", "--multi_gpu", "--main_process_port", str(free_port()), "--save_steps", "2")
    assert [(folder / f"asked-{rank}.txt").read_text() for rank in (0, 1)] == ["8 set\n" * 2] * 2
    checkpoint = folder / "out" / "checkpoint-2"
    assert [line["replay/fraction"] for line in history_of(checkpoint)] == [0, 0.5]
    assert ExperienceBuffer.load(checkpoint).num_completions > 2


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(write_parts(tmp_path))
    monkeypatch.setenv("OF_THE_FILE", "")
    return tmp_path


def read(*arguments):
    return grpo_script.read_arguments(["--config", "run.yaml", *arguments])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--replay_fractoin", "0.25"], "--replay_fractoin (did you mean --replay_fraction?)"),
        (["--replay_fractoin=0.25"], "--replay_fractoin (did you mean --replay_fraction?)"),
        (["--max_stepz", "3"], "--max_stepz (did you mean --max_steps?)"),
        (["--nothing_like_it"], "unknown arguments: --nothing_like_it. exgrpo-trl train --help"),
        (["astray"], "unknown arguments: astray"),
        (["--replay_fraction", "2"], "replay_fraction"),
        (["--max_steps", "many"], "many"),
        (["--num_processes", "many"], "many"),
        (["--accelerate_config", "no_such"], "no_such"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_launched(parts, capsys, monkeypatch, arguments, told):
    launched = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", launched.append)
    first = [] if "--config" in arguments else ["--config", "run.yaml"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *first, *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert told in error
    assert "Traceback" not in error
    assert len(error.splitlines()) < 6
    assert launched == []


def test_a_typo_in_the_file_is_refused(parts, capsys):
    (parts / "run.yaml").write_text("replay_fractoin: 0.25\nuse_cpu: true\nbf16: false\n")
    with pytest.raises(SystemExit):
        read()
    assert "--replay_fractoin (did you mean --replay_fraction?)" in capsys.readouterr().err


def test_what_is_for_the_launcher_is_left_to_it(parts):
    parsed, left = read("--num_processes", "8", "--replay_fraction", "0.25", "--accelerate_config", "zero2")
    assert left[:1] + left[2:] == ["--config_file", "--num_processes", "8"]
    assert Path(left[1]).name == "zero2.yaml"
    (config,) = [part for part in parsed if isinstance(part, ExGRPOConfig)]
    assert config.replay_fraction == 0.25
    assert [type(part) for part in parsed if part is not config] == [
        kind for kind in grpo.make_parser().dataclass_types if kind is not trl.GRPOConfig
    ]


def test_help_lists_the_arguments_of_both(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert printed.startswith("usage: exgrpo-trl train --model_name_or_path MODEL")
    for name in ("--replay_fraction", "--num_generations", "--reward_funcs", "--dataset_name", "--use_peft"):
        assert name in printed


def test_reward_functions_by_name(parts):
    trained = []

    class Noted(ExGRPOTrainer):
        def train(self, *args, **kwargs):
            trained.append(self.reward_func_names)

    names = ["think_format_reward", "get_soft_overlong_punishment", "rewards_of_mine.first_letter"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo_script, "ExGRPOTrainer", Noted)
        grpo_script.train(read("--reward_funcs", *names)[0])
    assert trained == [["think_format_reward", "soft_overlong_punishment_reward", "first_letter"]]
    with pytest.raises(ValueError, match="no_such_reward"):
        grpo_script.train(read("--reward_funcs", "no_such_reward")[0])


# What a release might do: take the trainer from elsewhere, train nothing, import the trainer as the module begins.
def test_grpo_without_replay_is_refused(parts, monkeypatch):
    real, of_trl, train = grpo.main, trl.GRPOTrainer, Trainer.train

    def from_elsewhere(*parsed):
        trl.GRPOTrainer = of_trl
        real(*parsed)

    for main in (from_elsewhere, lambda *parsed: None):
        monkeypatch.setattr(grpo, "main", main)
        with pytest.raises(RuntimeError, match="GRPO without replay"):
            grpo_script.train(read("--max_steps", "1")[0])
        assert (trl.GRPOTrainer, Trainer.train) == (of_trl, train), "they are put back"
    assert not (parts / "out" / "model.safetensors").exists(), "before a step is trained"


def test_a_release_that_imports_the_trainer_as_the_module_begins(parts, monkeypatch):
    monkeypatch.setattr(grpo, "GRPOTrainer", trl.GRPOTrainer, raising=False)
    made = []

    def main(script, config, *others):
        made.append(grpo.GRPOTrainer("model", lambda **kwargs: [1.0], config, train_dataset=tiny_dataset()))

    monkeypatch.setattr(grpo, "main", main)
    grpo_script.train(read()[0])
    assert type(made[0]) is ExGRPOTrainer
    assert grpo.GRPOTrainer is trl.GRPOTrainer


def test_a_release_with_another_configuration(monkeypatch):
    parser = trl.TrlParser((grpo.GRPOScriptArguments,))
    monkeypatch.setattr(grpo, "make_parser", lambda: parser)
    with pytest.raises(RuntimeError, match=r"reads \['GRPOScriptArguments'\] and no GRPOConfig"):
        grpo_script.make_parser()


ENDS = {
    "sys.exit(7)": 7,
    "os.kill(os.getpid(), signal.SIGTERM)": 128 + 15,
    # As a scheduler stops it: the launcher alone is told.
    "os.kill(os.getppid(), signal.SIGINT); time.sleep(60)": 128 + 2,
    "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)": 128 + 15,
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3)); os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)": 3,
}


@pytest.mark.parametrize("ending", ENDS)
def test_the_command_ends_as_the_script_ends(parts, monkeypatch, capfd, ending):
    (parts / "ending.py").write_text(f"import os, signal, sys, time\nprint('here', flush=True)\n{ending}\n")
    monkeypatch.setattr(grpo_script, "MODULE", "ending")
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--config", "run.yaml", "--num_processes", "1"])
    assert stop.value.code == ENDS[ending]
    assert "here\n" in capfd.readouterr().out


def test_the_script_that_is_launched():
    assert grpo_script.__name__ == grpo_script.MODULE
    assert os.path.exists(grpo_script.__file__)
