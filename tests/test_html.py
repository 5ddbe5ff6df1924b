"""What a notebook shows of a buffer, a question and a completion: what counts, bounded, nothing that is obeyed."""

import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from exgrpo_trl import Experience, ExperienceBuffer, Question, RolloutDetails
from exgrpo_trl.html import experience_html

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\"'&amp;\x1b[31m\u202e\ud800"


class Page(HTMLParser):
    """Text, tags and attributes of HTML; refuses tags that are not closed."""

    def __init__(self, html):
        super().__init__()
        html.encode()  # a notebook writes it in UTF-8
        self.parts, self.tags, self.styles, self.titles, self.rows, self._open = [], set(), [], [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert {name for name, _ in attrs} <= {"style", "title"}, attrs
        self.styles += [value for name, value in attrs if name == "style"]
        self.titles += [value for name, value in attrs if name == "title"]
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.parts.append(data)
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return "".join(self.parts)


def shown(thing):
    page = Page(thing._repr_html_() if hasattr(thing, "_repr_html_") else thing)
    assert page.tags <= {"div", "span", "table", "tr", "td", "th", "b"}
    for style in page.styles:
        # Text has the colour of the page; what is behind it lets the page through, or is a bar without text.
        assert not re.search(r"(?<![-\w])color:(?!inherit)|url\(|#", style), style
        assert all(" / " in colour for colour in re.findall(r"rgb\([^)]*\)", style)), style
    return page


def experience(tokens=3, version=4, reward=1.0, **options):
    return Experience.create(range(tokens), [-0.5] * tokens, policy_version=version, reward=reward, **options)


def test_a_buffer():
    buffer = ExperienceBuffer(capacity=50)
    for number, (num_correct, versions) in enumerate([(1, [3]), (3, [4, 9]), (3, [5]), (7, [6])]):
        question = Question(f"id{number}", {"prompt": [{"role": "user", "content": f"what is {number}?"}]})
        for version in versions:
            buffer.collect(question, [experience(version, version)], num_correct=num_correct, group_size=8)
    buffer.retire("other")
    page = shown(buffer)
    facts = {row[0]: row[1] for row in page.rows if len(row) == 2}
    assert facts["questions"] == "4"
    assert facts["completions"] == "5"
    assert facts["tokens"] == str(3 + 4 + 9 + 5 + 6)
    assert facts["retired questions"] == "1"
    assert facts["capacity"] == "at most 50 completions"
    assert facts["oldest completion"] == "of step 3"
    bars = {row[0]: row[1] for row in page.rows if len(row) == 3}
    assert bars == {f"{bucket}/8": str({1: 1, 3: 2, 7: 1}.get(bucket, 0)) for bucket in range(1, 8)}
    widths = [int(width) for style in page.styles for width in re.findall(r"width:(\d+)px", style)]
    assert widths == [100, 0, 200, 0, 0, 0, 100]
    rows = [row for row in page.rows if len(row) == 8]
    assert rows[0] == ["question", "correct", "stored", "of steps", "reward", "tokens", "replays", "prompt"]
    assert rows[1:] == [
        ["id0", "1/8", "1", "3", "1", "3", "0", "what is 0?"],
        ["id1", "3/8", "2", "4-9", "1", "6", "0", "what is 1?"],
        ["id2", "3/8", "1", "5", "1", "5", "0", "what is 2?"],
        ["id3", "7/8", "1", "6", "1", "6", "0", "what is 3?"],
    ]


@pytest.mark.parametrize("unit", ["completion", "group"])
def test_an_empty_buffer(unit):
    assert "Experience buffer" in shown(ExperienceBuffer(unit=unit)).text


def test_whole_groups():
    buffer = ExperienceBuffer(unit="group")
    group = [experience(2, reward=reward) for reward in (1.0, 0.0)]
    buffer.collect(Question("q", {"prompt": "a"}), group, num_correct=1, group_size=2)
    page = shown(buffer)
    assert ["completions", "2 in whole groups"] in page.rows
    assert ["q", "1/2", "2", "4", "0.5", "2", "0", "a"] in page.rows


@pytest.fixture(scope="module")
def large():
    """50,000 completions of groups of 1,000, in every bucket."""
    buffer = ExperienceBuffer()
    for number in range(12_500):
        own = [Experience.create([number, i], [-0.1] * 2, policy_version=i, reward=1.0) for i in range(4)]
        question = Question(f"q{number}", {"prompt": "x" * 2000})
        buffer.collect(question, own, num_correct=1 + number % 999, group_size=1000)
    return buffer


def test_a_large_buffer_is_shown_in_a_moment(large):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        html = large._repr_html_()
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05
    page = shown(html)
    assert len(html) < 30_000
    assert "12,492 more questions" in page.text
    bars = [row for row in page.rows if len(row) == 3]
    assert bars[0][0] == "0-31/1000"
    assert bars[-1][0] == "992-1000/1000"
    assert sum(int(row[1].replace(",", "")) for row in bars) == 12_500


def test_a_question():
    question = Question("id", {"prompt": "a\nb", "answer": 4, "long": "y" * 5000, "many": list(range(10_000))})
    page = shown(question)
    assert "Question id" in page.text
    assert "a\nb" in page.text
    assert ["answer", "4"] in page.rows
    assert len(page.text) < 3000
    conversation = Question("id", {"prompt": [{"role": "user", "content": "hello"}] * 50, "uid": 1})
    page = shown(conversation)
    assert page.text.count("user: hello") == 20
    assert "30 more messages" in page.text
    assert "Question id" in shown(Question("id", {"prompt": None})).text
    assert "80 more columns" in shown(Question("id", {"prompt": "", **{f"c{i}": i for i in range(100)}})).text


def test_an_experience():
    logps = np.log([1.0, 0.1, 0.001, 1e-9])
    stored = Experience.create([5, 6, 7, 8], logps, policy_version=12, reward=0.75, entropy=0.4321)
    page = shown(stored)
    facts = {row[0]: row[1] for row in page.rows}
    assert facts == {
        "tokens": "4",
        "reward": "0.75",
        "entropy": "0.432 nats a token",
        "log-probability": f"{np.mean(logps):.3g} nats a token",
        "generated": "at step 12",
    }
    assert "5 6 7 8 " in page.text
    shades = [int(shade) for style in page.styles for shade in re.findall(r"255 120 0 / (\d+)%", style)]
    assert shades[-4:] == [0, 20, 60, 60], "the less likely a token was, the stronger; no more than so strong"
    assert page.titles[1] == "id 6, log-probability -2.3, probability 0.1"

    class Letters:
        def decode(self, ids):
            return "".join(chr(ord("a") + token) for token in ids)

    page = shown(experience_html(stored, Letters(), now=20))
    assert "fghi" in page.text
    assert ["generated", "at step 12, 8 steps ago"] in page.rows


def test_an_experience_of_several_turns():
    messages = [{"role": "assistant", "content": "call"}, {"role": "tool", "content": "answer"}]
    details = RolloutDetails.create(is_model=[1, 0, 1], messages=messages)
    page = shown(experience(details=details, is_scored=True))
    assert ["tokens", "3, 2 of the model"] in page.rows
    assert ["scored", "at step 4"] in page.rows
    assert ["entropy", "unknown"] in page.rows
    assert "tool: answer" in page.text
    assert page.titles[1] == "id 1, not of the model"


def test_a_long_experience():
    page = shown(experience(30_000))
    assert "29,700 more tokens" in page.text
    assert len(page.titles) == 300


def test_nothing_that_is_stored_is_obeyed():
    prompt = [{"role": HOSTILE, "content": HOSTILE}]
    question = Question(HOSTILE, {"prompt": prompt, HOSTILE: HOSTILE})
    details = RolloutDetails.create(messages=[{"role": HOSTILE, "content": HOSTILE}])
    stored = experience(details=details)
    buffer = ExperienceBuffer()
    buffer.collect(question, [stored], num_correct=1, group_size=2)

    class Hostile:
        def decode(self, ids):
            return HOSTILE

    for html in (buffer._repr_html_(), question._repr_html_(), experience_html(stored, Hostile())):
        assert "<script>alert(1)</script>" in shown(html).text
        assert not set(html) & set("\x1b\u202e\ud800")
