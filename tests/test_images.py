import copy
import io
import json
import pickle
import random

import numpy as np
import pytest
from packaging.version import Version

from exgrpo_trl import images
from exgrpo_trl.images import ImageReference, StoredImage, pixel_digest
from exgrpo_trl.values import copied, from_json, referenced_digests, to_json, value_and_digests

PIL = pytest.importorskip("PIL")
Image = pytest.importorskip("PIL.Image")


def picture(mode="RGB", size=(13, 7), seed=0):
    """Noise of any mode."""
    rng = np.random.default_rng(seed)
    width, height = size
    if mode == "1":
        return Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)).point(lambda x: x // 2 * 2, "1")
    if mode in ("P", "PA"):
        image = Image.fromarray(rng.integers(0, 200, (height, width), dtype=np.uint8), "L")
        image.putpalette(rng.integers(0, 256, 600, dtype=np.uint8).tobytes())
        return image.convert(mode)
    num_bytes = len(Image.new(mode, size).tobytes())
    if mode == "F":
        content = rng.normal(size=width * height).astype(np.float32).tobytes()
    else:
        content = rng.integers(0, 256, num_bytes, dtype=np.uint8).tobytes()
    return Image.frombytes(mode, size, content)


STORABLE = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I", "F", "I;16", "I;16B"]
READS_OWN_YCBCR = Version(PIL.__version__) >= Version("13")


@pytest.mark.skipif(READS_OWN_YCBCR, reason="this Pillow reads the YCbCr that it writes")
def test_what_pillow_cannot_read_back_is_refused():
    with pytest.raises(
        ValueError, match=r"'YCbCr' and size \(13, 7\) cannot be stored without loss. Convert it to RGB"
    ):
        StoredImage.of(picture("YCbCr"))


@pytest.mark.parametrize("mode", [*STORABLE, *(["YCbCr"] if READS_OWN_YCBCR else [])])
def test_pixels_come_back_exactly(mode):
    image = picture(mode)
    stored = StoredImage.of(image)
    again = stored.open()
    assert (again.mode, again.size, again.tobytes()) == (mode, (13, 7), image.tobytes())
    if mode in ("P", "PA"):
        assert again.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    assert pixel_digest(again) == stored.digest == pixel_digest(image)
    assert StoredImage.of(again).digest == stored.digest
    assert stored.open() is not again
    through_json = from_json(json.dumps(to_json(stored)))
    assert (through_json.content, through_json.digest) == (stored.content, stored.digest)


@pytest.mark.parametrize("way", ["opaque", "one colour", "per colour", "in the palette", "of a GIF"])
def test_palettes_keep_their_opacity(way):
    image = picture("P")
    if way == "one colour":
        image.info["transparency"] = 3
    elif way == "per colour":
        image.info["transparency"] = bytes(range(100))
    elif way == "in the palette":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 800, dtype=np.uint8).tobytes(), "RGBA")
    elif way == "of a GIF":
        content = io.BytesIO()
        image.info["transparency"] = 3
        image.save(content, format="GIF")
        image = Image.open(content)
    stored = StoredImage.of(image)
    again = stored.open()
    assert again.convert("RGBA").tobytes() == image.convert("RGBA").tobytes()
    assert again.mode == image.mode
    if image.mode == "P":
        assert stored.content.startswith(b"\x89PNG")
        assert (stored.digest == StoredImage.of(picture("P")).digest) == (way == "opaque")


def test_files_of_the_usual_kinds(tmp_path):
    for name in ("a.png", "a.jpg", "a.webp", "a.bmp"):
        picture(size=(32, 32)).save(tmp_path / name)
        image = Image.open(tmp_path / name)  # decoded when it is looked at
        assert StoredImage.of(image).open().tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", ["HSV", "La", "RGBa", "RGBX"])
def test_what_no_file_holds_is_refused(mode):
    with pytest.raises(ValueError, match=rf"mode '{mode}' and size \(13, 7\) cannot be stored.*Convert it to RGB"):
        StoredImage.of(Image.new(mode, (13, 7)))


def test_a_broken_image_is_refused_with_the_way_out():
    content = io.BytesIO()
    picture(size=(64, 64)).save(content, format="PNG")
    image = Image.open(io.BytesIO(content.getvalue()[:2000]))
    for call in (StoredImage.of, pixel_digest):
        with pytest.raises(ValueError, match=r"size \(64, 64\) cannot be decoded.*Remove its row from the dataset"):
            call(image)


def test_the_digest_is_that_of_mode_size_and_pixels():
    image = picture("L", (6, 4))
    other = image.copy()
    other.putpixel((5, 3), (image.getpixel((5, 3)) + 1) % 256)
    reshaped = Image.frombytes("L", (4, 6), image.tobytes())
    other_mode = Image.frombytes("P", (6, 4), image.tobytes())
    assert len({pixel_digest(each) for each in (image, other, reshaped, other_mode)}) == 4
    image.info["dpi"] = (72, 72)
    assert pixel_digest(image) == pixel_digest(image.copy()) == pixel_digest(picture("L", (6, 4)))
    palettes = [picture("P"), picture("P")]
    palettes[1].putpalette(b"\1\2\3" * 200)
    assert palettes[0].tobytes() == palettes[1].tobytes()
    assert pixel_digest(palettes[0]) != pixel_digest(palettes[1])


def row_of(*some):
    return {
        "prompt": [{"role": "user", "content": [{"type": "image", "image": some[0]}, {"type": "text", "text": "a"}]}],
        "images": list(some),
        "pair": (1, some[-1]),
        "answer": 3.5,
        "nothing": None,
    }


def test_a_row_is_stored_and_opened():
    row = row_of(picture(seed=1), picture(seed=2))
    stored = images.stored(row)
    assert [type(image) for image in stored["images"]] == [StoredImage] * 2
    assert type(stored["pair"]) is tuple
    assert stored["answer"] == 3.5
    assert images.stored(stored) is stored
    assert isinstance(row["images"][0], Image.Image), "the row that was given is as it was"
    opened = images.opened(stored)
    assert [image.tobytes() for image in opened["images"]] == [image.tobytes() for image in row["images"]]
    assert opened["prompt"][0]["content"][0]["image"].tobytes() == row["images"][0].tobytes()
    assert copied(stored)["pair"][1].tobytes() == row["images"][1].tobytes()


def test_a_row_without_images_is_not_copied():
    row = row_of("a", 2)
    for call in (images.stored, images.opened, images.referenced):
        assert call(row) is row
    assert images.resolved(row, {}) is row


def test_references_stand_for_images():
    row = images.stored(row_of(picture(seed=1), picture(seed=2)))
    found = {}
    referenced = images.referenced(row, found)
    first, second = (image.digest for image in row["images"])
    assert list(found) == [first, second]
    assert referenced["images"] == [ImageReference(first), ImageReference(second)]
    assert referenced == images.referenced(images.opened(row)), "images compare by their pixels"
    assert images.resolved(referenced, found) == row, "these very images"
    with pytest.raises(KeyError, match=second):
        images.resolved(referenced, {first: found[first]})
    text = json.dumps(to_json(referenced))
    assert set(referenced_digests(text)) == {first, second}
    assert from_json(text) == referenced


def test_text_that_looks_like_a_reference_is_none():
    for value in (
        '{"__exgrpo_type__": "image_reference", "digest": "a"}',
        {"__exgrpo_type__": "image_reference", "digest": "a"},
    ):
        text = json.dumps(to_json({"content": value}))
        assert referenced_digests(text) == []
        assert from_json(text) == {"content": value}


REFERENCE = '{"__exgrpo_type__": "image_reference", "digest": "0f"}'
# What holds references, `R`, and what only looks so.
TEXTS_WITH_REFERENCES = [
    *("", "{", "1", '"a"', '{"a": NaN}', " [1] ", "R", "RR", " R", "R ", "[R]", "[R, R]", '{"a": 1, "a": R}'),
    *('"R"', '"aR', '"aR"', r'"a\R"', '["R", "a"]', '{"R": 1}', "{R: 1}", "[R, {}, 1.5, null]", '{"a": R}'),
    *('[{"role": "tool", "content": [R, "R"]}]', r'[R, "\u4e2d"]', r'[R, "\u00fc"]', r'[R, "\""]', r'{"b\"": R}'),
    *("[" * 199 + "R" + "]" * 199, "[" * 200 + "R" + "]" * 200, f'[R, "{"[" * 300}"]', f"[R, {'[' * 300}]"),
    *(
        REFERENCE.replace('", "', '","'),
        REFERENCE.replace("}", ', "a": 1}'),
        REFERENCE.replace("type__", r"typ\u0065__"),
    ),
    *(f"[R, {REFERENCE.replace(old, new)}]" for old, new in [("image_ref", "no"), ("e__", r"\u0065__"), ("}", ",}")]),
    *(f"[R, {REFERENCE.replace('0f', digest)}]" for digest in ("", "F", "x", "a\\", "\n", r"\n", r"\u0030")),
    f"[R, {json.dumps(to_json(StoredImage(b'content', 'd')))}]",
    json.dumps({"a": REFERENCE, "b": json.dumps(REFERENCE)}),
]


def found_by_a_check(text):
    """What a check asks of the value of a JSON text, and its digests; or the error."""
    try:
        value, digests = value_and_digests(text)
    except ValueError as error:
        return str(error)
    return asked_of(value), digests


def found_in_the_value(text):
    try:
        value = from_json(text)
    except ValueError as error:
        return str(error)
    return asked_of(value), {image.digest for image in images.images_in(value)}


def asked_of(value):
    if isinstance(value, dict):
        return str({name: part if isinstance(part, int | float) else None for name, part in value.items()})
    is_messages = isinstance(value, list) and all(isinstance(message, dict) for message in value)
    return "text" if isinstance(value, str) else "messages" if is_messages else "neither"


def test_a_check_of_a_text_finds_what_is_in_its_value():
    chance = random.Random(0)
    for text in TEXTS_WITH_REFERENCES:
        text = text.replace("R", REFERENCE)
        assert found_by_a_check(text) == found_in_the_value(text), text
        for _ in range(50):
            position = chance.randrange(len(text) + 1)
            part = chance.choice(("", '"', "\\", "[", "}", ",", REFERENCE))
            changed = text[:position] + part + text[position + chance.randrange(2) :]
            assert found_by_a_check(changed) == found_in_the_value(changed), changed


def test_a_check_of_a_text_does_not_miss_what_is_given_twice():
    assert value_and_digests(f'{{"a": {REFERENCE}, "a": 1}}') == ({"a": 1}, {"0f"})


def test_a_stored_image_is_itself():
    one, two = StoredImage.of(picture()), StoredImage.of(picture())
    assert one != two
    assert one.digest == two.digest
    assert one.content not in (None, b"")
    assert repr(one) == f"StoredImage({len(one.content)} bytes, digest={one.digest[:12]!r})"
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (again.content, again.digest) == (one.content, one.digest)
