"""Buffers of strangers: one error, bounded memory, nothing written, nothing executed."""

import json
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import hostile_buffer, hostile_table
from hostile_use import show, use, use_dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parquet_by_hand import BINARY, I32, I64, LIST, STRUCT, encoded, page, put, retired_file, varint
from peak import peak_bytes
from rewriting import LAYOUT, rewrite_metadata, seal

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question, RolloutDetails, StoredImage
from exgrpo_trl.buffer import files, limits
from exgrpo_trl.buffer.locations import find_buffer
from exgrpo_trl.buffer.parquet_layout import layout_of
from exgrpo_trl.values import MAX_DEPTH

MIB = 2**20
# The same inputs every time; `make fuzz` tries many more.
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "120")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)


@FUZZ
@given(chance=st.randoms(use_true_random=False))
def test_hostile_buffers_end_in_one_error_or_in_a_buffer(tmp_path_factory, chance):
    folder = tmp_path_factory.mktemp("hostile")
    hostile_buffer(chance, folder / "buffer")
    use(folder / "buffer", folder / "elsewhere")


@FUZZ
@given(chance=st.randoms(use_true_random=False))
def test_hostile_datasets_end_in_one_error_or_in_a_buffer(chance):
    unit, table, _ = hostile_table(chance)
    use_dataset(unit, table)


def test_hostile_buffers_are_refused_and_loaded(tmp_path):
    """The two tests above would pass as well if everything was refused, or nothing."""
    outcomes = []
    for seed in range(60):
        hostile_buffer(random.Random(seed), tmp_path / "buffer")
        outcomes.append(use(tmp_path / "buffer", tmp_path / "elsewhere"))
    assert min(outcomes.count("refused"), outcomes.count("loaded")) > 5


@pytest.fixture
def path(tmp_path):
    buffer = ExperienceBuffer(seed=3)
    details = RolloutDetails.create(is_model=[1, 0], messages=[{"role": "tool", "content": "x"}], rewards={"a": 1.0})
    for number in range(3):
        made = Experience.create([1, 2], [-0.5, 0], policy_version=number, reward=1.0, details=details)
        buffer.collect(Question(f"q{number}", {"prompt": "p"}), [made], num_correct=1, group_size=4)
    for name in ("a", "b"):
        buffer.retire(name)
    buffer.provenance = {"tokenizer": "abc"}
    buffer.save(tmp_path / "buffer")
    return tmp_path / "buffer"


def assert_refused(path, name, reason):
    before = peak_bytes()
    with pytest.raises(ExperienceBufferError, match=reason) as caught:
        ExperienceBuffer.load(path)
    assert str(path) in str(caught.value)
    assert name in str(caught.value)
    assert peak_bytes() - before < 64 * MIB


def test_a_file_written_by_hand_is_read(path):
    put(path, "retired.parquet", retired_file())
    assert list(ExperienceBuffer.load(path).retired) == ["a", "b"]


NESTED = [{4: (BINARY, b"a"), 5: (I32, 1)}] * 100_000 + [{1: (I32, 1), 4: (BINARY, b"a")}]
DEEP_STRUCT = b"\x1c" * 100_000 + b"\0" * 100_000
RUN_OF_NULLS = varint(2**31 - 1 << 1) + b"\0"
BY_HAND = {
    "rows": (retired_file(num_rows=2**62, group_rows=2), "declares 4611686018427387904 rows"),
    "rows of a group": (retired_file(num_rows=2**62), "pages of a column hold 2 of 4611686018427387904"),
    "negative rows": (retired_file(num_rows=-1), "declares -1 rows"),
    "values": (retired_file(num_values=2**62), "4611686018427387904 values for 2 rows"),
    "values of a page": (retired_file(page(num_values=2**31 - 1)), "asks for more than 512 MiB of memory"),
    "nulls": (
        retired_file(page((), num_values=2**31 - 1, levels=RUN_OF_NULLS), num_rows=2**31 - 1),
        "asks for more than 512 MiB of memory",
    ),
    "bytes of a page": (retired_file(page(decoded=2**31 - 1), about={4: (I32, 6)}), "asks for more than 512 MiB"),
    "bytes of a page that is not compressed": (retired_file(page(decoded=2**31 - 1)), "a page declares 2147483647"),
    "negative bytes": (retired_file(page(decoded=-5)), "declares -5 bytes of a page"),
    "dictionary": (retired_file(page(kind=2)), "encoded with a dictionary"),
    "dictionary of a column": (retired_file(about={11: (I64, 4)}), "encoded with a dictionary"),
    "differences": (retired_file(page(encoding=7)), "encoded in a way"),
    "compression": (retired_file(about={4: (I32, 2)}), "compressed in another way"),
    "another file": (retired_file(chunk={1: (BINARY, b"../../secret.parquet")}), "refers to another file"),
    "encrypted": (retired_file(metadata={8: (STRUCT, {})}), "encrypted"),
    "the same bytes twice": (retired_file(num_rows=4, group_rows=2, groups=2), "over another one"),
    "outside of the file": (retired_file(about={9: (I64, 2**40)}), "outside of its file"),
    "two schemas": (retired_file(footer=b"\x09\x04" + encoded(LIST, (STRUCT, NESTED))), "out of order"),
    "nested schema": (retired_file(schema=NESTED), "schema has 100001 elements"),
    "nested struct": (retired_file(footer=b"\x1c" + DEEP_STRUCT), "nested too deeply"),
    "a list that is not there": (retired_file(footer=b"\x19\xf5" + varint(2**31 - 1)), "list of 2147483647 items"),
    "a number of 80 bits": (retired_file(footer=b"\x16" + b"\xff" * 11 + b"\1"), "more than 64 bits"),
    "nothing": (b"", "no Parquet file"),
    "a footer longer than the file": (b"PAR1" + b"\xff" * 4 + b"PAR1", "declares 4294967295 bytes"),
}


@pytest.mark.parametrize("what", BY_HAND)
def test_files_that_declare_what_they_have_not(path, what):
    content, reason = BY_HAND[what]
    put(path, "retired.parquet", content)
    assert_refused(path, "retired.parquet", reason)


def test_every_number_of_a_footer(path):
    """Each byte of it replaced by numbers of up to nine bytes: refused, or read as if nothing had happened."""
    content = (path / "retired.parquet").read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    before = peak_bytes()
    refused = 0
    for at in range(start, len(content) - 8):
        for number in (2**63,) if at % 2 else (2**32 - 2,):
            footer = content[start:at] + varint(number) + content[at + 1 : -8]
            put(path, "retired.parquet", content[:start] + footer + len(footer).to_bytes(4, "little") + b"PAR1")
            try:
                assert len(ExperienceBuffer.load(path).retired) == 2
            except ExperienceBufferError as error:
                assert "retired.parquet" in str(error)  # noqa: PT017
                refused += 1
    assert refused > 100
    assert peak_bytes() - before < 64 * MIB


@pytest.mark.parametrize(
    "options",
    [{"compression": "gzip"}, {"compression": "snappy"}, {"use_dictionary": True}, {"data_page_version": "2.0"}],
    ids=str,
)
def test_other_layouts_are_refused(path, options):
    pq.write_table(pq.read_table(path / "completions.parquet"), path / "completions.parquet", **LAYOUT | options)
    seal(path)
    assert_refused(path, "completions.parquet", "compressed in another way|dictionary|encoded in")


# Memory


BOMBS = {
    # 544 MiB of zeros, and a footer that says so.
    "images": """
schema = image_files.IMAGE_SCHEMA
with pq.ParquetWriter(path / "images.parquet", schema, compression="zstd", use_dictionary=False) as file:
    for number in range(34):
        file.write_batch(pa.record_batch([[str(number)], [bytes(2**24)]], schema=schema))
""",
    "retired ids": """
column = pa.nulls(2**27, pa.string())
pq.write_table(pa.table({"question_id": column}), path / "retired.parquet", compression="zstd", use_dictionary=False)
""",
    # Small as text, large as objects.
    "empty lists": """
texts = ['{"prompt": "p", "b": [' + "[]," * 2**22 + "1]}"] * 2 + ['{"prompt": "p"}']
table = pq.read_table(path / "questions.parquet").set_column(1, "example", pa.array(texts, pa.large_string()))
pq.write_table(table, path / "questions.parquet", compression="zstd", use_dictionary=False)
""",
    "messages": """
texts = ["[" + "{}," * 2**24 + "{}]", None, None]
table = pq.read_table(path / "completions.parquet")
table = table.set_column(table.column_names.index("messages"), "messages", pa.array(texts, pa.large_string()))
pq.write_table(table, path / "completions.parquet", compression="zstd", use_dictionary=False)
""",
}
MEASURED = """
import sys
sys.path.insert(0, sys.argv[2])
from peak import peak_bytes
from exgrpo_trl import ExperienceBuffer, ExperienceBufferError
try:
    ExperienceBuffer.load(sys.argv[1])
    print("loaded")
except ExperienceBufferError as error:
    print(error)
print(peak_bytes())
"""


def run(code, *arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True, **kwargs
    ).stdout


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_that_become_large_are_refused_before_they_do(path, name):
    run(
        "import sys; from pathlib import Path; import pyarrow as pa; import pyarrow.parquet as pq\n"
        f"from exgrpo_trl.buffer import image_files\npath = Path(sys.argv[1])\n{BOMBS[name]}",
        path,
    )
    about = json.loads((path / "metadata.json").read_text())
    about["counts"]["retired"] = pq.ParquetFile(path / "retired.parquet").metadata.num_rows
    (path / "metadata.json").write_text(json.dumps(about))
    seal(path)
    assert sum(file.stat().st_size for file in path.iterdir()) < MIB
    *printed, peak = run(MEASURED, path, Path(__file__).parent).splitlines()
    assert "asks for more than 512 MiB of memory" in " ".join(printed)
    # What is decoded at a time is bounded, and so is what is parsed; Python, Arrow and NumPy are 120 MiB.
    assert int(peak) < 600 * MIB


JUST_ALLOWED = {
    "images": ("images.parquet", {"digest": [str(number) for number in range(60)], "content": [bytes(MIB)] * 60}),
    "retired ids": ("retired.parquet", {"question_id": [f"{number:06d}" for number in range(350_000)]}),
    "questions": (
        "questions.parquet",
        {
            "question_id": ["q0", "q1", "q2"],
            "example": ['{"prompt": "p", "b": [' + "[], " * 480_000 + "1]}", '{"prompt": "p"}', '{"prompt": "p"}'],
            "bucket": [1, 1, 1],
        },
    ),
}


@pytest.mark.parametrize("name", JUST_ALLOWED)
def test_what_is_allowed_stays_within_the_bound(path, name):
    """A process takes at most three times of what is decoded. Here 64 MiB are, not 512: only the factor counts."""
    file, columns = JUST_ALLOWED[name]
    table = pa.table(columns).cast(pq.read_schema(path / file))
    pq.write_table(table, path / file, **LAYOUT)
    rewrite_metadata(path, lambda about: about["counts"].update(retired=len(table) if name == "retired ids" else 2))
    seal(path)
    allowing = "from exgrpo_trl.buffer import limits; limits.FREE_BYTES = 2**26\n"
    *printed, peak = run(allowing + MEASURED, path, Path(__file__).parent).splitlines()
    assert printed == ["loaded"]
    assert int(peak) < 130 * MIB + 3.2 * 64 * MIB


def test_what_compresses_too_well_is_written_without_compression(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "FREE_BYTES", 2**14)
    monkeypatch.setattr(limits, "BYTES_PER_BYTE", 8)
    buffer = ExperienceBuffer()
    for number in range(500):
        same = Experience.create([1] * 200, [0.0] * 200, policy_version=1, reward=1.0)
        buffer.collect(Question(f"q{number}", {"prompt": "p" * 100}), [same], num_correct=1, group_size=4)
    written = []
    write_data = files._write_data
    monkeypatch.setattr(files, "_write_data", lambda *args: (written.append(args[-1]), write_data(*args))[1])
    buffer.save(tmp_path / "buffer")
    assert written == ["zstd", "none"]
    assert ExperienceBuffer.load(tmp_path / "buffer").num_tokens == 100_000
    assert layout_of(tmp_path / "buffer" / "completions.parquet").num_rows == 500


def test_a_large_group_size_is_no_number_of_buckets(path):
    with pytest.raises(ValueError, match="at most 65536"):
        ExperienceBuffer(group_size=2**62)
    rewrite_metadata(path, lambda about: about["settings"].update(group_size=2**62))
    assert_refused(path, "metadata.json", "`group_size` in `settings` is 4611686018427387904")


# Metadata


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda about: about["settings"].update(seed=1), "`settings` has .'seed'."),
        (lambda about: about["settings"].update(retire_solved=1), "`retire_solved` is 1 instead of true or false"),
        (lambda about: about["settings"].update(unit=["group"]), "`unit` must be"),
        (lambda about: about["settings"].pop("capacity"), "`settings` has no `capacity`"),
        (lambda about: about["counts"].update(evicted=10**30), "`evicted` in `counts`"),
        (lambda about: about["counts"].update(questions=True), "`questions` in `counts` is True"),
        (lambda about: about["counts"].update(completions=2**62), "3 rows, but metadata.json counts 46116860184"),
        (lambda about: about["files"].update({"../../x": {}}), "`files` names"),
        (lambda about: about["rng"]["state"].update(inc=2), "`inc` of `rng` is even"),
        (lambda about: about["rng"].update(uinteger=-1), "`uinteger` in `rng` is -1"),
        (lambda about: about["rng"].update(bit_generator="MT19937"), "instead of PCG64"),
        (lambda about: about.update(provenance=[]), "`provenance` is .. instead of an object"),
        (lambda about: about["provenance"].update(a=10**400), "a number has 401 digits"),
        (lambda about: about.pop("package_version"), "no `package_version`"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be(path, change, reason):
    rewrite_metadata(path, change)
    assert_refused(path, "metadata.json", reason)


def test_metadata_with_a_key_twice_or_too_deep(path):
    rewrite_metadata(path, lambda about: None, lambda text: text.replace('"rng"', '"provenance": {}, "rng"'))
    assert_refused(path, "metadata.json", "twice")
    for levels in (MAX_DEPTH + 1, 10**5):
        (path / "metadata.json").write_text("[" * levels + "]" * levels)
        assert_refused(path, "metadata.json", "nested more than 200 levels")


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    deep = 1
    for _ in range(MAX_DEPTH - 1):  # the metadata and the state are two levels
        deep = [deep]
    buffer = ExperienceBuffer()
    buffer.replay_state = {"a": deep}
    with pytest.raises(TypeError, match="nested more than 200 levels"):
        buffer.save(tmp_path / "buffer")
    buffer.replay_state = {"a": deep[0]}
    buffer.save(tmp_path / "buffer")
    assert ExperienceBuffer.load(tmp_path / "buffer").replay_state == {"a": deep[0]}
    assert show(tmp_path / "buffer", "--json") == 0


def test_a_run_with_a_state_that_is_nested_deeply(path):
    checkpoint = path.parent / "run" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    path.rename(checkpoint / "experience_buffer")
    (checkpoint / "trainer_state.json").write_text("[" * 10**5)
    with pytest.raises(ExperienceBufferError, match=r"trainer_state.json is missing from checkpoint-1, or damaged"):
        find_buffer(checkpoint.parent)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["metadata.json", "completions.parquet"])
def test_a_pipe_in_the_place_of_a_file(path, name):
    (path / name).unlink()
    os.mkfifo(path / name)
    assert_refused(path, name, f"has no {name}")


# Texts of details, which nobody reads before they are replayed


IMAGE = '{"__exgrpo_type__": "image_reference", "digest": "0f"}'
EMPTY_ITEMS = '{"a": {"__exgrpo_type__": "numpy_array", "dtype": "<U0", "shape": [1099511627776], "value": ""}}'


@pytest.mark.parametrize(
    ("column", "text", "reason"),
    [
        ("messages", "[", "`messages` is not JSON of a rollout"),
        ("messages", "[1]", "neither text nor a list of messages"),
        ("messages", "[" * 10**5 + "]" * 10**5, "nested more than 200 levels"),
        ("messages", '[{"a": {"digest": "x", "__exgrpo_type__": "image_reference"}}]', "refers to the images .'x'."),
        # References are read apart from the rest, which has to be right without them.
        ("messages", f'[{{"a": {IMAGE}}}]', "refers to the images .'0f'."),
        ("messages", f'[{{"a": {IMAGE}, "b": {{"__exgrpo_type__": "none"}}}}]', "the unknown type 'none'"),
        ("messages", f'[{{"a": {IMAGE}, "b": {{"__exgrpo_typ\\u0065__": "none"}}}}]', "the unknown type 'none'"),
        ("messages", f'[{{"a": "b{IMAGE}"}}]', "`messages` is not JSON of a rollout: Expecting .* column 12 "),
        ("messages", f'[{{"a": {IMAGE}]', "`messages` is not JSON of a rollout: Expecting .* column 62 "),
        ("messages", "[" * 200 + IMAGE + "]" * 200, "nested more than 200 levels"),
        ("shown_prompt", "{}", "`shown_prompt` is neither"),
        ("fields", "[]", "`fields` is no object"),
        ("fields", EMPTY_ITEMS, "too many"),
        ("rewards", '{"a": "1"}', "`rewards` is no object of numbers"),
        ("rewards", '{"a": 1' + "0" * 400 + "}", "`rewards` is no object of numbers"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_texts_of_details(path, column, text, reason):
    table = pq.read_table(path / "completions.parquet")
    texts = pa.array([None, text, None], pa.large_string())
    table = table.set_column(table.column_names.index(column), table.schema.field(column), texts)
    pq.write_table(table, path / "completions.parquet", **LAYOUT)
    seal(path)
    assert_refused(path, "completions.parquet", reason)


# What is shown


CONTROL = "\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202e\ud800[red]x[/red]\n forged row"


def test_show_obeys_nothing_that_is_stored(tmp_path, capsys):
    buffer = ExperienceBuffer()
    buffer.provenance = {"tokenizer": CONTROL, CONTROL: 1, "nested": {"a": CONTROL}}
    buffer.save(tmp_path / "buffer")
    assert show(tmp_path / "buffer") == 0
    assert show(tmp_path / "buffer", "--json") == 0
    from exgrpo_trl.cli import main

    assert main(["show", str(tmp_path / "buffer")]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert r"\x1b[2J\x1b]0;title\x07\r\x08\x9b31m\u202e\ud800[red]x[/red]\nforgedrow" in printed


def test_the_error_of_show_obeys_nothing(path, capsys):
    rewrite_metadata(path, lambda about: about["settings"].update({CONTROL: 1}))
    hidden = path.with_name("\x1b[2J")
    path.rename(hidden)
    assert show(hidden) == 1


# Images, which are decoded when they are used


def test_images_of_strangers():
    from PIL import Image

    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n%%EOF\n"
    with pytest.raises(ExperienceBufferError, match=r"'d' .*cannot be decoded .*format EPS"):
        StoredImage(eps, "d").open()
    for content in (b"", b"x", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ExperienceBufferError, match="cannot be decoded"):
            StoredImage(content, "d").open()
    small = StoredImage.of(Image.new("1", (1, 1)))
    wide = (200_000).to_bytes(4, "big")
    header = b"IHDR" + wide + wide + small.content[24:29]
    bomb = small.content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small.content[33:]
    before = peak_bytes()
    with pytest.raises(ExperienceBufferError, match="DecompressionBombError"):
        StoredImage(bomb, "d").open()
    assert peak_bytes() - before < 64 * MIB


# Nothing is executed, nothing is written


AUDITED = """
import random, shutil, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from hostile import hostile_buffer, hostile_table
from hostile_use import use, use_dataset
from exgrpo_trl import ExperienceBuffer, ExperienceBufferError

seen = None
def hook(event, arguments):
    if seen is None:
        return
    is_write = event == "open" and (any(c in str(arguments[1] or "") for c in "wax+") or (arguments[2] or 0) & 3)
    forbidden = ("pickle.", "subprocess.", "socket.", "ctypes.", "shutil.", "urllib.", "http.", "ftplib.", "tempfile.")
    of_os = event.startswith("os.") and event not in ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
    if is_write or of_os or event.startswith(forbidden):
        seen.append((event, *map(str, arguments)))
sys.addaudithook(hook)
folder = Path(tempfile.mkdtemp())
inputs = []
for seed in range(60):
    hostile_buffer(random.Random(seed), folder / str(seed))
    inputs.append(folder / str(seed))
use(folder / "0", folder / "elsewhere"), use_dataset(*hostile_table(random.Random(0))[:2])  # imports what it needs
before = sorted(folder.rglob("*"))
seen = []
loaded = 0
for path in inputs:
    try:
        ExperienceBuffer.load(path)
        loaded += 1
    except ExperienceBufferError:
        pass
found, seen = seen, None
assert sorted(folder.rglob("*")) == before
assert 5 < loaded < 55, loaded
for event in found:
    print(event)
shutil.rmtree(folder)
"""


def test_loading_writes_and_executes_nothing():
    """Python tells of every file that is opened, every process, every pickled name: none of these is there."""
    assert run(AUDITED, Path(__file__).parent) == ""
