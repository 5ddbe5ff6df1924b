"""
Train a tiny language model as an agent, with experience replay: by calling tools, it finds the way out of mazes.

    python examples/train_agent.py

needs neither a GPU nor a hub, and takes less than ten minutes on one core. First the model imitates a poor player, so
that it knows how to call tools but seldom gets out; then `ExGRPOTrainer` trains it in the environment `Maze`.
Successes are rare at first, so most groups teach nothing; replay makes more of the few that do. `--replay_fraction 0`
is plain GRPO. Every field of `ExGRPOConfig` is a flag, and `--config file.yaml` reads them from a file.

The file reads from top to bottom: environment, model, imitation, training. For an agent of yours, replace the first
three. A model that knows how to call tools needs no imitation.
"""

import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # environments are experimental in TRL

import numpy as np
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback
from trl import TrlParser

from exgrpo_trl import ExGRPOConfig, ExGRPOTrainer

# ----------------------------------------------------------------------------------------------------
# The environment: TRL calls `reset` with a row of the dataset, offers its other public methods as tools, and takes
# the reward from `get_reward`.
# ----------------------------------------------------------------------------------------------------

SIGNS = (
    "ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "jay", "koi", "owl", "pig", "ram", "sow", "yak", "zho",
)  # fmt: skip
DIRECTIONS = ("north", "east", "south", "west", "up", "down")
# Where the signs point to. The model is not told: it has to find out by trial and error.
MEANING = dict(zip(SIGNS, np.random.default_rng(0).choice(DIRECTIONS, len(SIGNS)).tolist(), strict=True))
LENGTHS = (2, 3, 4)  # of routes, in signs
QUESTION = "Find the way out. "


class Maze:
    """A maze with a sign at every junction. The last one leads to a door; one wrong turn, and there is no way back."""

    num_steps = 0  # calls of tools and resets, in all mazes together

    def reset(self, route: str, **row: Any) -> str:
        """Begin with a row of the dataset; what it returns comes after the question."""
        Maze.num_steps += 1
        self.signs_ahead = route.split()
        self.is_lost = self.is_outside = False
        return self._view()

    def go(self, direction: str) -> str:
        """
        Go to the next junction.

        Args:
            direction: north, east, south, west, up or down.

        Returns:
            What is there.
        """
        Maze.num_steps += 1
        if self.signs_ahead and direction == MEANING[self.signs_ahead[0]]:
            self.signs_ahead.pop(0)
        else:
            self.is_lost = True
        return self._view()

    def open(self) -> str:
        """
        Open the door.

        Returns:
            What is behind it.
        """
        Maze.num_steps += 1
        self.is_outside = not (self.is_lost or self.signs_ahead)
        return self._view()

    def get_reward(self) -> float:
        return float(self.is_outside)

    def _view(self) -> str:
        if self.is_lost:
            return "dead end"
        if self.signs_ahead:
            return f"sign {self.signs_ahead[0]}"
        return "outside" if self.is_outside else "door"


def mazes(num_train: int, num_held_out: int, seed: int) -> tuple[Dataset, Dataset]:
    """Mazes to train on, and others to measure on."""
    if num_train + num_held_out > (most := sum(len(SIGNS) ** length for length in LENGTHS)):
        raise SystemExit(f"There are {most} mazes, fewer than --num_train and --num_held_out ask for.")
    rng = np.random.default_rng(seed)
    routes: dict[str, None] = {}  # in the order in which they were drawn, each of them once
    while len(routes) < num_train + num_held_out:
        routes[" ".join(rng.choice(SIGNS, rng.choice(LENGTHS)))] = None
    prompt = [{"role": "user", "content": QUESTION}]
    dataset = Dataset.from_list([{"prompt": prompt, "route": route} for route in routes])
    return dataset.select(range(num_train)), dataset.select(range(num_train, len(routes)))


# ----------------------------------------------------------------------------------------------------
# The model: a Llama of 90,000 parameters whose tokens are whole pieces of tool calls.
# ----------------------------------------------------------------------------------------------------

# "generation" marks what the model says, which is what it is to imitate.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}<|end|>{% endgeneration %}{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# How to find the tool calls in what the model wrote.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}
CALL = '<tool_call>\n{"name": "%s", "arguments": {'
TOKENS = [
    "<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|unknown|>", QUESTION,
    CALL % "go" + '"direction": "', *DIRECTIONS, '"}}\n</tool_call>', CALL % "open" + "}}\n</tool_call>",
    "sign ", *SIGNS, "dead end", "door", "outside", "done",
]  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of `TOKENS`."""
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<|unknown|>"))
    pattern = "|".join(map(re.escape, sorted(TOKENS, key=len, reverse=True)))  # the longest one that fits
    words.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=256,
            initializer_range=0.1,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # transformers' 0.02 is meant for wide models
    return model


# ----------------------------------------------------------------------------------------------------
# Imitation: the model learns to call tools from a player who has the wrong idea of most signs.
# ----------------------------------------------------------------------------------------------------


def habits(strength: float) -> np.ndarray:
    """Probability of each direction at each sign: the player favours one, which is right at every third sign."""
    right = np.array([DIRECTIONS.index(MEANING[sign]) for sign in SIGNS])
    favourite = (right + np.arange(len(SIGNS)) % 3) % len(DIRECTIONS)
    return (1 - strength) / len(DIRECTIONS) + strength * np.eye(len(DIRECTIONS))[favourite]


def play(row: dict[str, Any], habit: np.ndarray, rng: np.random.Generator) -> list[dict[str, Any]]:
    """The messages of a game of that player."""
    maze = Maze()
    seen = maze.reset(**row)
    messages: list[dict[str, Any]] = [{"role": "user", "content": QUESTION + seen}]
    while seen not in ("dead end", "outside"):
        name, arguments = "open", {}
        if seen != "door":
            chosen = rng.choice(DIRECTIONS, p=habit[SIGNS.index(seen.removeprefix("sign "))])
            name, arguments = "go", {"direction": str(chosen)}
        seen = getattr(maze, name)(**arguments)
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": name, "content": seen})
    return [*messages, {"role": "assistant", "content": "done"}]


def imitate(model: Any, tokenizer: Any, rows: Dataset, *, strength: float, steps: int, seed: int) -> None:
    """Next-token prediction on games of that player, of what the player says only."""
    rng, rows, habit = np.random.default_rng(seed), rows.to_list(), habits(strength)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=max(steps, 2))
    for _ in range(steps):
        games = [play(rows[i], habit, rng) for i in rng.integers(len(rows), size=32)]
        batch = tokenizer.apply_chat_template(
            games, padding=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        is_said = torch.as_tensor(batch.pop("assistant_masks")).bool()
        model(**batch, labels=batch["input_ids"].masked_fill(~is_said, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------
# Training: as with any GRPOTrainer that has an environment.
# ----------------------------------------------------------------------------------------------------

# Chosen by measurement so that the run fits into ten minutes on one core, and learns. Any flag overrides them.
DEFAULTS: dict[str, Any] = {
    "output_dir": "outputs/train_agent",
    "max_steps": 200,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 200,
    "num_generations": 8,
    "num_generations_eval": 1,
    "max_completion_length": 64,
    "max_tool_calling_iterations": max(LENGTHS) + 1,
    "learning_rate": 5e-4,
    "lr_scheduler_type": "constant",
    "loss_type": "dr_grpo",
    "scale_rewards": "none",
    "question_id_column": "route",
    "replay_start_pass_rate": None,
    "replay_weighting": "balanced",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 5,
    "report_to": "none",
    "log_replay": "all",  # for the number of stored completions
}


@dataclass
class Arguments:
    """What comes before the training, besides the fields of `ExGRPOConfig`."""

    num_train: int = field(default=1000, metadata={"help": "Mazes to train on."})
    num_held_out: int = field(default=200, metadata={"help": "Mazes held out to measure the success rate."})
    imitation_steps: int = field(default=300, metadata={"help": "Steps of imitation before the training."})
    habit: float = field(default=0.7, metadata={"help": "How often the player that is imitated follows its habits."})


def parse_arguments() -> tuple[Arguments, ExGRPOConfig]:
    """Flags and YAML over the defaults above."""
    parser = TrlParser((Arguments, ExGRPOConfig))
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:  # so that no flag is required
        action.required = action.required and action.dest not in DEFAULTS
    return parser.parse_args_and_config()


class Progress(TrainerCallback):
    """A line of text for what is logged."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        shown = [
            f"step {state.global_step}/{state.max_steps}",
            f"success {logs.get('fresh/pass_rate', logs['reward']):.2f}",
        ]
        if "replay/questions" in logs:
            shown.append(f"replayed {logs['replay/fraction']:.0%} of the mazes")
            held = "completions" if "replay/completions" in logs else "questions"  # of a short log line
            shown.append(f"buffer {logs[f'replay/{held}']:.0f} {'games' if held == 'completions' else 'mazes'}")
        print(" | ".join(shown), flush=True)


def success_rate(trainer: Any) -> float:
    """Share of the held-out mazes that the model gets out of, at the temperature of the training and with its seed."""
    set_seed(trainer.args.seed)
    return float(trainer.evaluate()["eval_reward"])


def main() -> None:
    arguments, config = parse_arguments()
    torch.set_num_threads(1)  # accelerate asks for all cores, which is slower for a model of this size
    train, held_out = mazes(arguments.num_train, arguments.num_held_out, config.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, config.seed)
    print(f"Imitating a poor player for {arguments.imitation_steps} steps ...", flush=True)
    start = time.perf_counter()
    imitate(model, tokenizer, train, strength=arguments.habit, steps=arguments.imitation_steps, seed=config.seed)
    seconds_of_imitation = time.perf_counter() - start

    trainer = ExGRPOTrainer(
        model=model,
        args=config,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        environment_factory=Maze,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress)
    before = success_rate(trainer)
    start, Maze.num_steps = time.perf_counter(), 0
    resume = config.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=resume in ("True", "true") or resume)
    seconds, num_steps = time.perf_counter() - start, Maze.num_steps
    trainer.save_model()
    after = success_rate(trainer)

    table = Table(title="An agent in mazes that it has not seen", show_header=False)
    table.add_row("Held-out success before", f"{before:.3f}")
    table.add_row("Held-out success after", f"{after:.3f}")
    table.add_row("Environment steps in training", f"{num_steps}")
    table.add_row("Seconds of imitation, of training", f"{seconds_of_imitation:.0f}, {seconds:.0f}")
    lines = [line for line in trainer.state.log_history if "replay/fraction" in line]
    if lines:
        buffer = trainer.experience_buffer
        groups_per_step = config.generation_batch_size / config.num_generations / config.num_iterations
        steps = np.diff([0, *(line["step"] for line in lines)])
        replayed = groups_per_step * np.dot(steps, [line["replay/fraction"] for line in lines])
        table.add_row("Games replayed", f"{replayed:.0f}")
        table.add_row("In the buffer", f"{buffer.num_completions} games in {buffer.num_questions} mazes")
        table.add_row("Retired mazes", f"{len(buffer.retired)}")
    table.add_row("Model", config.output_dir)
    Console().print(table)
    checkpoint = Path(config.output_dir) / f"checkpoint-{trainer.state.global_step}"
    if (checkpoint / "experience_buffer").exists():
        print(f"Look at the buffer: exgrpo-trl show {checkpoint}")


if __name__ == "__main__":
    main()
