"""Tiny vision-language models that call tools, tools that return pictures, and environments that show them."""

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from agents import BROKEN_CALL, CALL_TOKENS, PIECES, ROLES, Room, tool_tokenizer
from datasets import Dataset
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from vision import GRID_TOKENS, SIDE, SIZES, _image_processor, _without_videos, random_images

# TRL knows the first one as that of a picture.
GEMMA_TOKENS = ("<|image|>", "<start_of_image>", "<end_of_image>")

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}


def _chat_template(image: str) -> str:
    """The template of the agents, for contents that are text or parts."""
    content = (
        "{% if message.content is string %}{{ message.content }}{% else %}"
        "{% for part in message.content or [] %}"
        "{% if part.type == 'image' %}" + image + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}"
    )
    return (
        "{% if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}{{ '\n' }}{% endif %}"
        "{% for message in messages %}{{ message.role }}:" + content + "{% for call in message.tool_calls or [] %}"
        "<tool_call>\n"
        '{"name": {{ call.function.name | tojson }}, "arguments": {{ call.function.arguments | tojson }}}'
        "\n</tool_call>"
        "{% endfor %}"
        "{% if message.role == 'assistant' %}<eos>{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def _tokenizer(special_tokens: tuple[str, ...]) -> Any:
    tokenizer = tool_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    return tokenizer


def grid_tool_processor() -> Any:
    """That of Qwen2-VL: pictures of 28 to 56 pixels a side are one, two or four tokens."""
    return _without_videos(Qwen2VLProcessor)(
        _tensor_processor("Qwen2VLImageProcessor", min_pixels=SIDE * SIDE, max_pixels=4 * SIDE * SIDE),
        _tokenizer(GRID_TOKENS),
        chat_template=_chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def gemma_tool_processor() -> Any:
    """That of Gemma 3: a picture is four tokens, which attend to each other."""
    tokenizer = _tokenizer(GEMMA_TOKENS)
    for name, token in zip(("image_token", "boi_token", "eoi_token"), GEMMA_TOKENS, strict=True):
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return Gemma3Processor(
        _tensor_processor("Gemma3ImageProcessor", size={"height": SIDE, "width": SIDE}),
        tokenizer,
        image_seq_length=4,
        chat_template=_chat_template("<start_of_image>"),
    )


def _tensor_processor(name: str, **options: Any) -> Any:
    """An image processor that always returns tensors, as those with torchvision do, which TRL relies on."""
    processor = _image_processor(name, **options)
    processor.__class__ = _returning_tensors(type(processor))
    return processor


@functools.cache
def _returning_tensors(processor_class: Any) -> Any:
    class ReturningTensors(processor_class):  # type: ignore[misc]
        def __call__(self, *args: Any, return_tensors: Any = None, **kwargs: Any) -> Any:
            output = super().__call__(*args, return_tensors=return_tensors or "pt", **kwargs)
            if "images" in kwargs:
                # Asked by TRL, which gives a model all of it, and no Gemma takes this. The processor asks by position.
                output.pop("num_crops", None)
            return output

    ReturningTensors.__name__ = ReturningTensors.__qualname__ = processor_class.__name__
    return ReturningTensors


def _new_grid_model(tokenizer: Any) -> Any:
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(GRID_TOKENS))
    rope = {"type": "mrope", "mrope_section": [4, 6, 6]}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_scaling": rope},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 2,
                "mlp_ratio": 2,
                "initializer_range": 0.2,
            },
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=False,
        )
    )


def _new_gemma_model(tokenizer: Any) -> Any:
    image, begin, end = tokenizer.convert_tokens_to_ids(list(GEMMA_TOKENS))
    return Gemma3ForConditionalGeneration(
        Gemma3Config(
            text_config=_TEXT | {"vocab_size": len(tokenizer), "head_dim": 32, "sliding_window": 64},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": SIDE,
                "patch_size": 14,
            },
            mm_tokens_per_image=4,
            image_token_index=image,
            boi_token_index=begin,
            eoi_token_index=end,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )


_KINDS = {
    "grid": (_new_grid_model, grid_tool_processor, GRID_TOKENS),
    "gemma": (_new_gemma_model, gemma_tool_processor, GEMMA_TOKENS),
}


@functools.cache
def _folder(kind: str, seed: int) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    new_model, _, special_tokens = _KINDS[kind]
    tokenizer = _tokenizer(special_tokens)
    torch.manual_seed(seed)
    model = new_model(tokenizer)
    special = tokenizer.convert_tokens_to_ids(list(special_tokens))
    bias = torch.zeros(len(tokenizer))
    bias[tokenizer.convert_tokens_to_ids(CALL_TOKENS[:-1])] = 2.0
    bias[tokenizer.convert_tokens_to_ids([*PIECES, BROKEN_CALL])] = -1.0
    bias[tokenizer.convert_tokens_to_ids([*ROLES, "<pad>", "<unk>"])] = -20.0
    bias[special] = -20.0
    bias[tokenizer.eos_token_id] = 4.2
    text = model.model.language_model
    with torch.no_grad():
        # A hidden value that is the same for all tokens of text serves as a bias, as in the model of `agents`.
        text.embed_tokens.weight[:, 0] = 3.0
        for layer in text.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        hidden = text(input_ids=torch.arange(len(tokenizer))[None]).last_hidden_state[0, :, 0].mean()
        model.lm_head.weight *= 0.5
        model.lm_head.weight[:, 0] = bias / hidden
    model.generation_config.suppress_tokens = special
    model.save_pretrained(folder.name)
    return folder


def tool_vision_model(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """Model and processor of the kind `"grid"` or `"gemma"`; half of its rollouts call tools."""
    classes = {"grid": Qwen2VLForConditionalGeneration, "gemma": Gemma3ForConditionalGeneration}
    return classes[kind].from_pretrained(_folder(kind, seed).name), _KINDS[kind][1]()


def picture_options(model_kind: str = "grid", **overrides: Any) -> dict[str, Any]:
    """Options of `make_trainer` for rollouts with pictures."""
    model, processor = tool_vision_model(model_kind)
    return {
        "model": model,
        "processing_class": processor,
        "train_dataset": picture_dataset(),
        "reward_funcs": picture_reward,
        "max_completion_length": 40,
        "learning_rate": 2e-4,
        "success_threshold": 0.5,
        "max_steps": 6,
    } | overrides


def picture_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """1 if a tool returned a picture, and something for every message."""
    return [float(bool(images_in(completion))) + 0.1 * len(completion) for completion in completions]


# Pictures


def picture_of(*key: int | str) -> Any:
    """A picture of random colours, always the same for a key; its size depends on the key, too."""
    seed = [part if isinstance(part, int) else sum(map(ord, part)) for part in key]
    return random_images(1, seed=seed, sizes=(SIZES[sum(seed) % len(SIZES)],))[0]


def same_image(one: Any, other: Any) -> bool:
    """Whether two pictures are equal in mode and every pixel."""
    return one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


def images_in(messages: Any) -> list[Any]:
    """Pictures in messages, in order."""
    contents = [message.get("content") for message in messages if isinstance(message.get("content"), list)]
    return [part["image"] for parts in contents for part in parts if "image" in part]


class Pictures:
    """
    Tools that draw, and keep a list of their calls: name, argument, picture.

    Args:
        anew: Draw something new with every call; by default what is drawn depends on the argument only.
    """

    def __init__(self, anew: bool = False) -> None:
        self.anew = anew
        self.calls: list[tuple[str, str, Any]] = []

    @property
    def tools(self) -> list[Callable]:
        """All of them, as TRL takes them."""
        return [self.look, self.find, self.fail]

    def _draw(self, name: str, place: str) -> Any:
        image = picture_of(name, place, *([len(self.calls)] if self.anew else []))
        self.calls.append((name, place, image))
        return image

    def look(self, place: str) -> Any:
        """
        Look at a place.

        Args:
            place: Where to look.

        Returns:
            A picture of it.
        """
        if place == "c":
            self.calls.append(("look", place, None))
            return "dark"
        return [{"type": "image", "image": self._draw("look", place)}, {"type": "text", "text": f"{place} seen"}]

    async def find(self, place: str) -> Any:
        """
        Find what belongs to a place.

        Args:
            place: Where it belongs.

        Returns:
            A picture of it.
        """
        return [{"type": "text", "text": "it"}, {"type": "image", "image": self._draw("find", place)}]

    def fail(self, place: str) -> Any:
        """
        Fail.

        Args:
            place: Where to fail.

        Returns:
            Nothing, ever.
        """
        self.calls.append(("fail", place, None))
        raise RuntimeError(f"no {place}")


class PictureRoom(Room):
    """A room that shows pictures: one at the start, which is new for each rollout, and one for each look."""

    def reset(self, **row: Any) -> Any:
        """Start anew for a row of the dataset."""
        super().reset(**row)
        shown = picture_of(self._number, self._num_resets) if self._factory.observe == "anew" else row["map"]
        return [{"type": "text", "text": " map "}, {"type": "image", "image": shown}]

    def look(self, place: str) -> Any:
        """
        Look at a place.

        Args:
            place: Where to look.

        Returns:
            A picture of it.
        """
        said = super().look(place)
        return [{"type": "image", "image": picture_of("look", place)}, {"type": "text", "text": said[:1]}]


def picture_dataset(num_rows: int = 16, images: bool = False, placeholders: bool = False) -> Dataset:
    """
    Questions, with or without a picture of their own, and a column `map` that TRL does not know.

    Args:
        num_rows: How many.
        images: Add a column `image`.
        placeholders: Let the prompt say where the picture goes, as it has to where an environment adds parts to it.
    """
    texts = [f"go to {i}" for i in range(num_rows)]
    prompts: list[Any] = [[{"role": "user", "content": text}] for text in texts]
    if placeholders:
        parts = [[{"type": "image", "text": None}, {"type": "text", "text": text}] for text in texts]
        prompts = [[{"role": "user", "content": of_row}] for of_row in parts]
    columns = {"prompt": prompts, "seed": list(range(num_rows)), "map": random_images(num_rows, 9)}
    return Dataset.from_dict(columns | ({"image": random_images(num_rows, 8, SIZES)} if images else {}))
