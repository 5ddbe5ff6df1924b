"""Tools, environments and rollout functions that TRL runs for real with a tiny random model that often calls tools."""

import functools
import json
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from tiny import CHARACTERS, save_tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# Tool calls that the model may write; each is one token. No run knows all of these tools.
CALLS = [
    ("look", {"place": "a"}),
    ("look", {"place": "b"}),
    ("look", {"place": "c"}),
    ("find", {"place": "a"}),
    ("find", {"place": "b"}),
    ("take", {"thing": "key"}),
    ("buy", {"thing": "hat"}),
    ("fail", {"place": "a"}),
    ("look", {"wrong": "a"}),
    ("gone", {"place": "a"}),
]
# Pieces of what tools and templates say; without them results alone would fill a completion.
PIECES = [
    *("system:", "user:", "assistant:", "tool:", "tools:"),
    *("{'error': '", "'}", "Tool ", " not found.", " got an unexpected keyword argument ", "Watched."),
    *("Room.", "Shop.", "look", "find", "take", "buy", "fail", "gone", "()", "'wrong'"),
]
ROLES = PIECES[:5]

CHAT_TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}{{ '\n' }}{% endif %}"
    "{% for message in messages %}{{ message.role }}:{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n"
    '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
    "\n</tool_call>"
    "{% endfor %}"
    "{% if message.role == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant:",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": "<eos>", "content": "text"},
    },
}
RESPONSE_SCHEMA = {
    "x-regex": r"\A(?P<content>.*?)(?P<tool_calls><tool_call>.*)?(?:<eos>)?\Z",
    "type": "object",
    "properties": {
        "role": {"const": "assistant"},
        "content": {"type": "string"},
        "tool_calls": {
            "type": "array",
            "x-regex-iterator": r"<tool_call>(.*?)</tool_call>",
            "items": {
                "x-parser": "json",
                "x-parser-args": {"transform": "{type: 'function', function: @}"},
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "arguments": {"type": "object", "additionalProperties": {}},
                        },
                    },
                },
            },
        },
    },
}


def skip_unless_able(kind: str) -> None:
    """Skip tools and environments where TRL refuses them; a rollout function needs nothing."""
    if not kind.startswith("function") and Version(transformers.__version__) < Version("5"):
        pytest.skip(f"TRL has tools and environments from transformers 5 on, here is {transformers.__version__}")


def call_text(name: str, arguments: dict[str, str]) -> str:
    """A tool call as the model writes it, and as the chat template renders it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


BROKEN_CALL = '<tool_call>\n{"name": \n</tool_call>'
CALL_TOKENS = [*(call_text(name, arguments) for name, arguments in CALLS), BROKEN_CALL]


def tool_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per tool call, per piece and per character, and the way to parse calls."""
    pieces = [*CALL_TOKENS, *PIECES]
    characters = [c for c in CHARACTERS + "ABCDEFGHIJKLMNOPQRSTUVWXYZ_{}[]()<>/'\",;" if c not in pieces]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *pieces, *dict.fromkeys(characters)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    if Version(transformers.__version__) >= Version("5.13"):
        fast.response_template = RESPONSE_TEMPLATE
    else:
        fast.response_schema = RESPONSE_SCHEMA
    return fast


def save_tool_model(folder: Any, seed: int = 0, calls: float = 1.5, ends: float = 4.2) -> None:
    """
    Save a random model for `tool_tokenizer`, with heads of 32, the least that vLLM computes on a CPU.

    Args:
        folder: Where.
        seed: Of its weights.
        calls: How much likelier than a character a tool call is, in nats.
        ends: The same of the end token.
    """
    tokenizer = tool_tokenizer()
    save_tiny_model(
        folder,
        seed,
        vocab_size=len(tokenizer),
        hidden_size=64,
        # More than a prompt, a completion of calls alone and all results: TRL 1.0 trains on results that exceed it.
        max_position_embeddings=1024,
        initializer_range=0.15,
    )
    model = LlamaForCausalLM.from_pretrained(folder)
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.convert_tokens_to_ids(CALL_TOKENS[:-1])] = calls
    bias[tokenizer.convert_tokens_to_ids([*PIECES, BROKEN_CALL])] = -1.0
    bias[tokenizer.convert_tokens_to_ids([*ROLES, "<pad>", "<unk>"])] = -20.0
    bias[tokenizer.eos_token_id] = ends
    with torch.no_grad():
        # Llama has no bias: a hidden value that is the same for all tokens and positions serves as one.
        model.model.embed_tokens.weight[:, 0] = 3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        hidden = model.model(torch.arange(len(tokenizer))[None]).last_hidden_state[0, :, 0].mean()
        model.lm_head.weight *= 0.5
        model.lm_head.weight[:, 0] = bias / hidden
    model.save_pretrained(folder)


@functools.cache
def _tool_model_folder(seed: int, calls: float, ends: float) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    save_tool_model(folder.name, seed, calls, ends)
    return folder


def tool_model(seed: int = 0, calls: float = 1.5, ends: float = 4.2) -> LlamaForCausalLM:
    """The model of `save_tool_model`; half of its rollouts call tools, and a few call them three times."""
    return LlamaForCausalLM.from_pretrained(_tool_model_folder(seed, calls, ends).name)


def agent_options(**overrides: Any) -> dict[str, Any]:
    """Options of `make_trainer` for rollouts of several turns."""
    return {
        "model": tool_model(),
        "processing_class": tool_tokenizer(),
        "train_dataset": tool_dataset(),
        "reward_funcs": last_letter_reward,
        "max_completion_length": 40,
        "learning_rate": 2e-4,
    } | overrides


# Tools


class Watched:
    """Tools that keep a list of their calls: name, argument. What they say depends on the argument only."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []

    @property
    def tools(self) -> list[Callable]:
        """All of them, as TRL takes them."""
        return [self.look, self.find, self.fail]

    def look(self, place: str) -> str:
        """
        Look at a place.

        Args:
            place: Where to look.

        Returns:
            What is there.
        """
        self.calls.append(("look", place))
        return f"{place} has {7 * ord(place[:1] or 'z') % 100}"

    async def find(self, place: str) -> str:
        """
        Find what belongs to a place.

        Args:
            place: Where it belongs.

        Returns:
            What belongs there.
        """
        self.calls.append(("find", place))
        return f"{place}{place} in {3 * ord(place[:1] or 'z') % 10}"

    def fail(self, place: str) -> str:
        """
        Fail.

        Args:
            place: Where to fail.

        Returns:
            Nothing, ever.
        """
        self.calls.append(("fail", place))
        raise RuntimeError(f"no {place}")


# Environments


class Room:
    """
    An environment that keeps a list of what is asked of it, and rewards what was seen in it.

    Args:
        factory: Where it was made; its `log` receives number of the room, what was called, and with what.
    """

    def __init__(self, factory: "Rooms") -> None:
        self._factory, self._number = factory, len(factory.made)
        self._num_resets = 0
        self._seen: list[str] = []

    def _note(self, event: str, argument: Any) -> None:
        self._factory.log.append((self._number, event, argument))

    def reset(self, **row: Any) -> str | None:
        """Start anew for a row of the dataset."""
        self._note("reset", row)
        self._num_resets += 1
        self._seen = []
        observe = self._factory.observe
        if observe == "row":
            return f" door {row['seed']}"
        if observe == "rollout":
            return f" day {self._number}.{self._num_resets}"
        return observe

    def look(self, place: str) -> str:
        """
        Look at a place.

        Args:
            place: Where to look.

        Returns:
            What is there.
        """
        self._note("look", place)
        self._seen.append(place)
        return f"{place} is seen {len(self._seen)}"

    async def find(self, place: str) -> str:
        """
        Find what belongs to a place.

        Args:
            place: Where it belongs.

        Returns:
            What belongs there.
        """
        self._note("find", place)
        self._seen.append(place)
        return f"{place} found"

    def _worth(self) -> float:
        return float("a" in self._seen) + 0.1 * len(self._seen)


class Shop(Room):
    """Another environment, with a tool of its own."""

    def buy(self, thing: str) -> str:
        """
        Buy a thing.

        Args:
            thing: What to buy.

        Returns:
            What it costs.
        """
        self._note("buy", thing)
        self._seen.append("a")
        return f"{thing} for {len(thing)}"


class RewardingRoom(Room):
    """A room that gives the reward itself (TRL 1.8 and later)."""

    def get_reward(self) -> float:
        """What was seen in it."""
        self._note("get_reward", None)
        return self._worth()


class RewardingShop(Shop):
    """A shop that gives the reward itself, asynchronously."""

    async def get_reward(self) -> float:
        """What was seen in it."""
        self._note("get_reward", None)
        return self._worth()


class Rooms:
    """
    An environment factory.

    Args:
        kind: Class of what it makes.
        observe: What `reset` says: nothing, this text, `"row"`: the row's seed, `"rollout"`: something new every time.
    """

    def __init__(self, kind: type[Room] = Room, observe: str | None = None) -> None:
        self.kind, self.observe = kind, observe
        self.made: list[Room] = []
        self.log: list[tuple[int, str, Any]] = []

    def __call__(self) -> Room:
        self.made.append(self.kind(self))
        return self.made[-1]

    def events(self, *names: str) -> list[tuple[int, str, Any]]:
        """Entries of the log of these events."""
        return [entry for entry in self.log if entry[1] in names]


# Rewards


def last_letter_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 if the last thing that the model said begins with a letter from a to m, and something for every message."""
    texts = [completion[-1]["content"] if completion[-1]["role"] == "assistant" else "" for completion in completions]
    return [
        float(text[:1].isalpha() and text[:1] <= "m") + 0.1 * len(completion)
        for text, completion in zip(texts, completions, strict=True)
    ]


def environment_reward(environments: list[Room], **kwargs: Any) -> list[float]:
    """What was seen in the environments."""
    return [environment._worth() for environment in environments]


async def slow_environment_reward(environments: list[Room], **kwargs: Any) -> list[float]:
    """The same, asynchronously."""
    return [environment._worth() for environment in environments]


def score_reward(completions: list[Any], score: list[float], **kwargs: Any) -> list[float]:
    """The field `score` of a rollout function."""
    return list(score)


# Rollout functions


class Rollouts:
    """
    A rollout function: the model writes, somebody else says `tool:42`, the model writes again.

    It takes the same number of forwards whatever is written, so that sharded models do not hang.

    Args:
        whole_groups: Read one prompt per group, as functions for a vLLM server do.
        turn: Tokens of a turn at most.
    """

    def __init__(self, whole_groups: bool = False, turn: int = 5) -> None:
        self.whole_groups, self.turn = whole_groups, turn
        self.asked: list[list[Any]] = []

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        self.asked.append(list(prompts))
        mode = "num_generations" if trainer.model.training else "num_generations_eval"
        if self.whole_groups:
            prompts = [prompt for prompt in prompts[:: getattr(trainer, mode)] for _ in range(getattr(trainer, mode))]
        tokenizer = trainer.processing_class
        template = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        prompt_ids = [
            tokenizer.apply_chat_template(prompt, **template, **trainer.chat_template_kwargs) for prompt in prompts
        ]
        first = self._write(prompt_ids, trainer)
        said = tokenizer("\ntool:42\nassistant:", add_special_tokens=False)["input_ids"]
        second = self._write([ids + one + said for ids, (one, _) in zip(prompt_ids, first, strict=True)], trainer)
        turns = [(*one, *two) for one, two in zip(first, second, strict=True)]
        completion_ids = [one + said + two for one, _, two, _ in turns]
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": completion_ids,
            "logprobs": [of_one + [0.0] * len(said) + of_two for _, of_one, _, of_two in turns],
            "env_mask": [[1] * len(one) + [0] * len(said) + [1] * len(two) for one, _, two, _ in turns],
            "score": [sum(ids[:3]) % 7 / 7 for ids in completion_ids],
            "style": "plain",
        }

    def _write(self, rows: list[list[int]], trainer: Any) -> list[tuple[list[int], list[float]]]:
        """A turn of every row, with its log-probabilities."""
        eos, device = trainer.processing_class.eos_token_id, trainer.accelerator.device
        longest = max(map(len, rows), default=0)
        ids = torch.tensor([[eos] * (longest - len(row)) + row for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        logprobs = []
        with torch.no_grad():
            for _ in range(self.turn):
                positions = torch.arange(ids.size(1), device=device) - (longest - lengths)[:, None]
                inputs = {"attention_mask": (positions >= 0).long(), "position_ids": positions.clamp(min=0)}
                logits = trainer.model(input_ids=ids, **inputs).logits[:, -1]
                distribution = torch.log_softmax(logits.float() / trainer.temperature, dim=-1)
                written = torch.multinomial(distribution.exp(), 1)
                logprobs.append(distribution.gather(1, written))
                ids = torch.cat([ids, written], dim=1)
        all_written, all_logprobs = ids[:, longest:].tolist(), torch.cat(logprobs, dim=1).tolist()
        kept = [written.index(eos) + 1 if eos in written else self.turn for written in all_written]
        return [
            (written[:num], of_row[:num]) for written, of_row, num in zip(all_written, all_logprobs, kept, strict=True)
        ]


# Datasets


def tool_dataset(num_rows: int = 16) -> Dataset:
    """Conversational questions that differ in their text, with further columns."""
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"go to {i}"}] for i in range(num_rows)],
            "answer": [i % 10 for i in range(num_rows)],
            "uid": [f"q{i}" for i in range(num_rows)],
        }
    )


def room_dataset(num_rows: int = 16, prompt: str = "own", environments: tuple[str, ...] = ()) -> Dataset:
    """
    Rows for environments, which differ in a column `seed`.

    Args:
        num_rows: How many.
        prompt: `"own"`: texts that differ; `"none"`: no such column (TRL 1.8 and later); `"same"`: a placeholder.
        environments: Names for a column `environment`, in turn.
    """
    columns: dict[str, Any] = {"seed": list(range(num_rows))}
    if prompt != "none":
        texts = [f"go to {i}" if prompt == "own" else "play" for i in range(num_rows)]
        columns["prompt"] = [[{"role": "user", "content": text}] for text in texts]
    if environments:
        columns["environment"] = [environments[i % len(environments)] for i in range(num_rows)]
    return Dataset.from_dict(columns)
