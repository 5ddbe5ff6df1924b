"""The page of troubleshooting quotes real messages, all that a user meets, and metrics that exist."""

import re

import pytest
from messages import GAP, is_part_of, quoted_on_the_page, raised_in, texts_in
from pages import ROOT

PACKAGE = ROOT / "src" / "exgrpo_trl"
# Whose messages end up with a user. The others are those of strangers' files, which are told as one of a few errors,
# and those of code that breaks a signature.
MODULES = [
    "checkpoints",
    "compatibility",
    "config",
    "dataset",
    "examples",
    "generation",
    "notices",
    "own_experience",
    "replay_log",
    "success",
    "trainer",
    "replayer",
    "rewards",
    "selection",
    "strategies/chosen",
    "strategies/eviction",
    "buffer/merging",
    "buffer/from_dataset",
    "rollouts/environments",
    "rollouts/functions",
    "rollouts/vllm",
    "inspection/output",
    "inspection/text",
    "cli/question",
]
# Of these, what is said of values that only code can pass, or follows from an error that is there.
LEFT_OUT = [
    "has no attribute",
    "The columns of an example must be strings",
    "An encoded example must be a JSON object",
    "it has no prompt",
    "has another prompt in an earlier row",
    "There is no experience buffer to merge",
    "are no limits of an experience buffer",
    "it declares",
    "null in",
    "it has the columns",
    "are missing from the inputs of the loss",
    "completions have the identity of",
    "holds other tokens in the loss",
    "its question is not in the training dataset",
    "its prompt is not that of question",
    "generation batches replayed",
    "has retired: a whole group of it was correct",
    "Name the tokenizer that it was collected with",
    "cannot be saved to",
]


def test_what_is_quoted_is_in_the_source():
    texts = texts_in(PACKAGE)
    quoted = quoted_on_the_page()
    assert len(quoted) > 90
    assert [q for q in quoted if not any(is_part_of(q, text) for text in texts)] == []


@pytest.mark.parametrize("module", MODULES)
def test_the_messages_of_a_module_are_found(module):
    quoted = quoted_on_the_page()
    missing = [
        message.replace(GAP, "...")
        for message in raised_in(PACKAGE / f"{module}.py")
        if message.strip(GAP) and not any(is_part_of(q, message) for q in quoted)
    ]
    assert [message for message in missing if not any(part in message for part in LEFT_OUT)] == []


def test_a_message_that_is_not_there_is_found():
    assert is_part_of("of ... cannot", "The part of \0 cannot be")
    assert not is_part_of("of ... can not", "The part of \0 cannot be")


def test_results_of_the_home_are_those_of_the_benchmarks():
    """With their setting and method, and those of the README as well."""
    measured = (ROOT / "docs" / "benchmarks.md").read_text()
    settings = {
        "some easy, many hopeless at first": "bimodal",
        "alike": "even",
        "half of them never rewarded": "even-0.5",
        "90 % of them never rewarded": "even-0.9",
        "97 % of them never rewarded": "even-0.97",
    }
    for page in (ROOT / "docs" / "index.md", ROOT / "README.md"):
        rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if "±" in line and "|" in line]
        assert [row[0] for row in rows] == list(settings)
        for name, *results in rows:
            for method, result in zip(("grpo", "shaped", "balanced"), results, strict=True):
                pattern = rf"^\| {re.escape(settings[name])} \| {method} \| [\d.]+ \| {re.escape(result)} \|"
                assert re.search(pattern, measured, re.MULTILINE), f"{page.name}: {name}, {method}: {result}"


def test_metrics_of_the_pages_exist():
    source = (PACKAGE / "metrics.py").read_text() + (PACKAGE / "selection.py").read_text()
    table = (ROOT / "docs" / "metrics.md").read_text()
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {name for page in pages for name in re.findall(r"`((?:replay|fresh)/\w+)`", page.read_text())}
    assert len(named) > 30
    assert [name for name in named if f'"{name}"' not in source and f"`{name}`" not in table] == []
