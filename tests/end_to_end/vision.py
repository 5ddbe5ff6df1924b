"""
Tiny real vision-language models, their processors and datasets of pictures, made on the spot.

TRL's own trainer trains on any of them. TRL 1.0 needs pictures in every batch, and for the plain and the tiled kind
one picture a row, of one tile for the latter. No release takes rows with and without pictures in one batch.
"""

import functools
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset
from PIL import Image
from tiny import tiny_tokenizer
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)

GRID_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
PLAIN_TOKENS = ("<image>",)
TILED_TOKENS = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>")
SIDE = 28  # pixels of the side of a picture: one token of the grid model, four of the others

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
_NORMALIZED = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def _tokenizer(special_tokens: tuple[str, ...]) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    tokenizer.add_tokens(list(special_tokens), special_tokens=True)
    return tokenizer


def _chat_template(image: str) -> str:
    """A template for contents that are text or parts, with `image` for a picture."""
    return (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )


def _image_processor(name: str, **options: Any) -> Any:
    """The image processor that does without torchvision: transformers 5 has it under a name of its own."""
    return (getattr(transformers, f"{name}Pil", None) or getattr(transformers, name))(**_NORMALIZED | options)


def _without_videos(processor_class: Any) -> Any:
    """The processor without its processor of videos, which needs torchvision, and for any tokenizer."""

    class ImagesAlone(processor_class):  # type: ignore[misc]
        attributes = ["image_processor", "tokenizer"]
        tokenizer_class = "AutoTokenizer"

        def __init__(self, image_processor: Any = None, tokenizer: Any = None, **options: Any) -> None:
            super().__init__(image_processor, tokenizer, **options)

    # TRL tells some processors by the name of their class.
    ImagesAlone.__name__ = ImagesAlone.__qualname__ = processor_class.__name__
    return ImagesAlone


def grid_processor() -> Any:
    """Flattens pictures into patches of 14 x 14 pixels, four of which are one token; sizes of 28 to 56 pixels stay."""
    return _without_videos(Qwen2VLProcessor)(
        _image_processor("Qwen2VLImageProcessor", min_pixels=SIDE * SIDE, max_pixels=4 * SIDE * SIDE),
        _tokenizer(GRID_TOKENS),
        chat_template=_chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def plain_processor(side: int = SIDE) -> Any:
    """Resizes each picture to 28 x 28 pixels, four tokens."""
    size = {"height": side, "width": side}
    return LlavaProcessor(
        _image_processor("CLIPImageProcessor", size=size, crop_size=size),
        _tokenizer(PLAIN_TOKENS),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat_template("<image>"),
    )


def tiled_processor() -> Any:
    """Cuts a picture into tiles of 28 x 28 pixels, one token each: a square one into one, a wide one into three."""
    tokenizer = _tokenizer(TILED_TOKENS)
    names = ("context_image_token", "start_image_token", "end_image_token", "video_token")
    for name, token in zip(names, TILED_TOKENS, strict=True):
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return _without_videos(InternVLProcessor)(
        _image_processor("GotOcr2ImageProcessor", size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=2),
        tokenizer,
        image_seq_length=1,
        chat_template=_chat_template("<IMG_CONTEXT>"),
    )


def _new_grid_model() -> Any:
    tokenizer = _tokenizer(GRID_TOKENS)
    image, video, start, end = tokenizer.convert_tokens_to_ids(list(GRID_TOKENS))
    rope = {"type": "mrope", "mrope_section": [2, 3, 3]}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_scaling": rope},
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
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


def _new_plain_model(side: int = SIDE, **text: Any) -> Any:
    tokenizer = _tokenizer(PLAIN_TOKENS)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**_TEXT | {"vocab_size": len(tokenizer)} | text),
            vision_config=CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=side,
                patch_size=14,
                projection_dim=32,
                initializer_range=0.2,
                initializer_factor=5.0,
            ),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            image_seq_length=(side // 14) ** 2,
            vision_feature_layer=-1,
        )
    )


def _new_served_model() -> Any:
    """
    What vLLM computes on a CPU, and never says `<image>`, which vLLM cannot be kept from like transformers.

    A picture is one token: TRL shows vLLM all tokens of a picture, the first of which vLLM replaces by all once more.
    """
    model = _new_plain_model(side=14, hidden_size=64)
    text, image = model.model.language_model, model.config.image_token_id
    with torch.no_grad():
        # A hidden value that is positive everywhere serves as a bias.
        text.embed_tokens.weight[:, 0] = 3.0
        model.model.multi_modal_projector.linear_2.weight[0] = 0.0
        model.model.multi_modal_projector.linear_2.bias[0] = 3.0
        for layer in text.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[image] = 0.0
        model.lm_head.weight[image, 0] = -100.0
    return model


def _new_tiled_model() -> Any:
    tokenizer = _tokenizer(TILED_TOKENS)
    return InternVLForConditionalGeneration(
        InternVLConfig(
            text_config=_TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [SIDE, SIDE],
                "patch_size": [14, 14],
                "layer_scale_init_value": 1.0,
                "initializer_range": 0.2,
            },
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            image_seq_length=1,
            tie_word_embeddings=False,
        )
    )


_KINDS = {
    "grid": (_new_grid_model, grid_processor, GRID_TOKENS),
    "plain": (_new_plain_model, plain_processor, PLAIN_TOKENS),
    "served": (_new_served_model, functools.partial(plain_processor, side=14), PLAIN_TOKENS),
    "tiled": (_new_tiled_model, tiled_processor, TILED_TOKENS),
}


@functools.cache
def _folder(kind: str, seed: int) -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory()
    new_model, _, special_tokens = _KINDS[kind]
    torch.manual_seed(seed)
    model = new_model()
    # A sampled image token would have no image behind it, which is an error of the model.
    tokens = _tokenizer(special_tokens).convert_tokens_to_ids(list(special_tokens))
    model.generation_config.suppress_tokens = tokens
    model.save_pretrained(folder.name)
    return folder


def grid_model(seed: int = 0) -> Any:
    """A Qwen2-VL of two layers: all patches of a batch in one tensor, and the grid of each picture."""
    return Qwen2VLForConditionalGeneration.from_pretrained(_folder("grid", seed).name)


def plain_model(seed: int = 0) -> Any:
    """A LLaVA of two layers: one entry of the pixels is one picture."""
    return LlavaForConditionalGeneration.from_pretrained(_folder("plain", seed).name)


def tiled_model(seed: int = 0) -> Any:
    """An InternVL of two layers: one entry of the pixels is one tile of a picture."""
    return InternVLForConditionalGeneration.from_pretrained(_folder("tiled", seed).name)


def served_folder() -> str:
    """Folder of a LLaVA for vLLM, with its processor."""
    folder = _folder("served", 0).name
    _KINDS["served"][1]().save_pretrained(folder)
    return folder


def vision_model(kind: str, seed: int = 0) -> tuple[Any, Any]:
    """Model and processor of the kind `"grid"`, `"plain"` or `"tiled"`."""
    make = {"grid": grid_model, "plain": plain_model, "tiled": tiled_model}[kind]
    return make(seed), _KINDS[kind][1]()


def random_images(number: int, seed: int = 0, sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),)) -> list[Any]:
    """Pictures of four fields of random colours; `sizes` are widths and heights, taken in turn."""
    generator = np.random.default_rng(seed)
    images = []
    for i in range(number):
        fields = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        images.append(fields.resize(sizes[i % len(sizes)], Image.Resampling.NEAREST))
    return images


# The sizes that make one, two and four tokens of the grid model.
SIZES = ((SIDE, SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE))


def vision_dataset(
    num_rows: int,
    column: str = "image",
    same_text: bool = False,
    seed: int = 0,
    sizes: tuple[tuple[int, int], ...] = ((SIDE, SIDE),),
    images_per_row: tuple[int, ...] = (1,),
) -> Dataset:
    """
    Questions about pictures.

    Args:
        num_rows: Number of rows.
        column: `"image"` for one picture a row, `"images"` for a list of them.
        same_text: All rows ask the same, so that nothing but the picture tells them apart.
        seed: Seed of the pictures.
        sizes: Widths and heights, taken in turn; `SIZES` for grids that differ.
        images_per_row: Numbers of pictures of the rows, taken in turn; for the column `"images"`.
    """
    counts = [images_per_row[i % len(images_per_row)] for i in range(num_rows)]
    images = iter(random_images(sum(counts), seed, sizes))
    pictures = [[next(images) for _ in range(count)] for count in counts]
    rows = {
        "prompt": [
            [{"role": "user", "content": "what is it?" if same_text else f"what is {i}?"}] for i in range(num_rows)
        ],
        column: [row[0] for row in pictures] if column == "image" else pictures,
        "answer": [str(i) for i in range(num_rows)],
    }
    return Dataset.from_dict(rows)
