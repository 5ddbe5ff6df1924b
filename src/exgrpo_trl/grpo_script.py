"""
TRL's training script of GRPO with [`ExGRPOTrainer`] in the place of its trainer: what `exgrpo-trl train` launches.

    accelerate launch -m exgrpo_trl.grpo_script --model_name_or_path ... --dataset_name ...

Reward functions, datasets, PEFT and all that is done with the model are TRL's `main`, whichever it is in the release.
"""

import dataclasses
import difflib
import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import trl
from accelerate.commands.launch import launch_command_parser
from transformers import Trainer
from trl import GRPOConfig, TrlParser
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts import grpo

from .compatibility import wrapped_value
from .config import ExGRPOConfig
from .trainer import ExGRPOTrainer

MODULE = "exgrpo_trl.grpo_script"
USAGE = "exgrpo-trl train --model_name_or_path MODEL --dataset_name DATASET --reward_funcs NAME [NAME ...] [...]"


def make_parser() -> TrlParser:
    """
    The parser of TRL's script, with [`ExGRPOConfig`] in the place of its configuration.

    Raises:
        RuntimeError: if the installed release has another configuration there.
    """
    types = list(grpo.make_parser().dataclass_types)
    if GRPOConfig not in types:
        raise RuntimeError(
            f"The GRPO script of TRL {trl.__version__} reads {[kind.__name__ for kind in types]} and no GRPOConfig, "
            "so it cannot be given the arguments of replay. Please report this, and train with ExGRPOTrainer in "
            "Python."
        )
    types[types.index(GRPOConfig)] = ExGRPOConfig
    return TrlParser(types, prog="exgrpo-trl train", usage=USAGE)


def read_arguments(argv: Sequence[str] | None = None) -> tuple[list[Any], list[str]]:
    """
    What the script is called with, on the command line and in the file of `--config`.

    Args:
        argv (`Sequence[str]`, *optional*):
            The command line; by default that of the process.

    Returns:
        The dataclasses that TRL's script takes, and the arguments that are left for `accelerate launch`.

    Raises:
        SystemExit: for `--help`, and with code 2 for an argument that neither knows or a value that cannot be.
    """
    parser = make_parser()
    try:
        *parsed, left = parser.parse_args_and_config(argv, return_remaining_strings=True)
        left = resolve_accelerate_config_argument(left)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    launcher = launch_command_parser()
    launcher.prog, launcher.usage = parser.prog, USAGE
    known, unknown = launcher.parse_known_args([*left, "--module", MODULE])
    if known.training_script != MODULE and not unknown:
        unknown = [known.training_script]
    if unknown:
        names = [field.name for part in parsed for field in dataclasses.fields(part) if field.init]
        told = [_with_near(argument.partition("=")[0], names) for argument in unknown]
        parser.error(f"unknown arguments: {', '.join(told)}. exgrpo-trl train --help lists those that there are.")
    return parsed, left


def _with_near(argument: str, names: list[str]) -> str:
    near = difflib.get_close_matches(argument.lstrip("-").replace("-", "_"), names, 1)
    return f"{argument} (did you mean --{near[0]}?)" if near and argument.startswith("--") else argument


def train(parsed: Sequence[Any]) -> None:
    """
    Run TRL's script with [`ExGRPOTrainer`].

    Args:
        parsed (`Sequence`):
            The dataclasses that `main` of TRL's script takes, with an [`ExGRPOConfig`].

    Raises:
        RuntimeError: if the installed release would train, or has trained, without [`ExGRPOTrainer`].
    """
    (config,) = (part for part in parsed if isinstance(part, ExGRPOConfig))
    if config.resume_from_checkpoint in ("True", "true"):
        config.resume_from_checkpoint = True  # the newest one
    original = Trainer.train
    made: list[ExGRPOTrainer] = []

    def make_trainer(*args: Any, **kwargs: Any) -> ExGRPOTrainer:
        trainer: Any = ExGRPOTrainer(*args, **kwargs)
        # Which `main` of TRL before 1.14 leaves out.
        trainer.train = functools.partial(trainer.train, resume_from_checkpoint=config.resume_from_checkpoint)
        made.append(trainer)
        return trainer

    refused = (
        f"The GRPO script of TRL {trl.__version__} takes its trainer from a place where exgrpo-trl could not put its "
        "own, so this is GRPO without replay. Please report this, and train with ExGRPOTrainer in Python."
    )

    @functools.wraps(original)
    def train_replaying(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(trainer, ExGRPOTrainer):
            raise RuntimeError(refused)
        return original(trainer, *args, **kwargs)

    with (
        _replaced(trl, "GRPOTrainer", make_trainer),
        _replaced(grpo, "GRPOTrainer", make_trainer),  # there where a release imports it as the module begins
        _replaced(Trainer, "train", train_replaying),
    ):
        grpo.main(*parsed)
    if not made:
        raise RuntimeError(refused)


def _replaced(owner: Any, name: str, value: Any) -> AbstractContextManager[None]:
    """Let another object stand for an attribute for a while; where there is none, nothing is done."""
    return wrapped_value(owner, name, value) if hasattr(owner, name) else nullcontext()


if __name__ == "__main__":
    train(read_arguments()[0])
