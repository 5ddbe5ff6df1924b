"""`exgrpo-trl report` on real runs, in a real browser: the page says what the buffer and the logs say."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from browser import launched, opened
from saved_runs import new_trainer
from test_commands import HOSTILE, hostile_buffer
from tokenizers import Tokenizer, decoders, models
from transformers import TrainerCallback

from exgrpo_trl import Experience, ExperienceBuffer, ExperienceBufferError, Question
from exgrpo_trl.replay_log import read_replay_log
from exgrpo_trl.report import write_report
from exgrpo_trl.report.shown import json_in_page

# What a log line has of replay by default.
SHORT = {
    "fresh/pass_rate", "fresh/frac_groups_without_signal", "replay/fraction", "replay/group_pass_rate",
    "replay/effective_sample_size", "replay/staleness_mean", "replay/questions", "replay/retired",
    "replay/tokens_saved", "replay/scoring_seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    with launched() as browser:
        yield browser


@pytest.fixture
def report(tmp_path):
    """Writes a report of a path; returns the file."""
    return lambda path, name="report.html", **options: write_report(path, tmp_path / name, **options)


def data_of(file):
    """The numbers in a page."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())[1])


def text_of(file):
    """All words of a page, scripts and styles aside."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", file.read_text(), flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", text)).split())


def said_in(file):
    """The sentences at the top."""
    return [unescape(said) for said in re.findall(r"<p>(.*?)</p>", file.read_text().split("<details")[0])]


def state_of(run):
    return json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())


def copy_of(run, folder, changed_lines=None):
    """A copy of a run; `changed_lines` makes other log lines of those of all checkpoints."""
    shutil.copytree(run, folder)
    for file in folder.glob("checkpoint-*/trainer_state.json") if changed_lines else ():
        state = json.loads(file.read_text())
        file.write_text(json.dumps(state | {"log_history": changed_lines(state["log_history"])}))
    return folder


def shortened(lines):
    """Log lines as they are by default."""
    ours = ("replay/", "fresh/")
    return [{name: line[name] for name in line if not name.startswith(ours) or name in SHORT} for line in lines]


def rows_of(page):
    """Cells of the table by question id."""
    cells = page.locator("#table tr.row").evaluate_all(
        "rows => rows.map(row => [row.querySelector('.id').textContent, "
        "...[...row.cells].slice(1).map(cell => cell.textContent)])"
    )
    return {row[0]: row[1:] for row in cells}


def js_number(value):
    """A number as the page shows it."""
    if value == int(value) or abs(value) >= 1000:
        return f"{math.floor(value + 0.5):,}"
    return f"{value:.3g}"


@pytest.mark.parametrize("kind", ["text", "chat", "tools", "images", "groups"])
def test_every_stored_completion_is_there(run_of, report, browser, kind):
    run = run_of(kind)
    buffer = ExperienceBuffer.load(run)
    decode = Tokenizer.from_file(str(run / "checkpoint-6" / "tokenizer.json")).decode
    ids = [question_id for ids in buffer.buckets().values() for question_id in ids]
    assert ids
    with opened(browser, report(run)) as page:
        rows = rows_of(page)
        assert set(rows) == set(ids)
        for question_id in ids:
            its = buffer.completions(question_id)
            bucket = next(bucket for bucket, ids in buffer.buckets().items() if question_id in ids)
            age = 6 - max(experience.policy_version for experience in its)
            assert rows[question_id] == [
                f"{bucket}/{buffer.group_size}",
                str(len(its)),
                f"{age} step{'' if age == 1 else 's'} ago",
                js_number(np.mean([experience.reward for experience in its])),
                f"{math.floor(np.mean([experience.num_tokens for experience in its]) + 0.5)}",
                str(sum(buffer.reuse(experience).num_replays for experience in its)),
            ]
        for question_id in ids[:4]:
            page.get_by_role("button", name=question_id, exact=True).click()
            its = buffer.completions(question_id)
            page.wait_for_selector(f"article.completion:nth-of-type({len(its)})")
            shown = page.locator("article.completion").all()
            assert len(shown) == len(its)
            for article, experience in zip(shown, its, strict=True):
                text = "".join(article.locator("pre").all_text_contents())
                runs = [
                    decode(experience.token_ids[run].tolist())
                    for run in np.split(
                        np.arange(experience.num_tokens), np.flatnonzero(np.diff(experience.is_model)) + 1
                    )
                ]
                own_prompt = article.locator("h4").count()
                assert text == "".join(runs) if not own_prompt else text.endswith("".join(runs))
                facts = article.locator(".facts").text_content()
                logps = experience.behavior_per_token_logps[experience.is_model]
                assert f"reward {js_number(experience.reward)} · {experience.num_tokens} token" in facts
                assert f"step {experience.policy_version} (" in facts
                assert float(re.search(r"log-prob (\S+)", facts)[1]) == pytest.approx(logps.mean(), rel=6e-3)
                assert float(re.search(r"entropy (\S+)", facts)[1]) == pytest.approx(experience.entropy, rel=6e-3)


def test_the_plots_show_what_was_logged(run_of, report):
    file = report(run_of("text"))
    lines = [line for line in state_of(run_of("text"))["log_history"] if "loss" in line]
    charts = data_of(file)["charts"]
    for key, name, metric in [
        ("pass_rate", "fresh, all questions", "fresh/pass_rate"),
        ("pass_rate", "fresh, replayed questions", "replay/group_pass_rate"),
        ("buffer", "in the buffer", "replay/questions"),
        ("buffer", "retired", "replay/retired"),
        ("buckets", "2 of 4", "replay/bucket_2"),
        ("fraction", "replayed", "replay/fraction"),
        ("tokens", "saved", "replay/tokens_saved"),
        ("staleness", "mean", "replay/staleness_mean"),
        ("ratios", "median", "replay/importance_ratio_q50"),
        ("effective_sample_size", "of replayed tokens", "replay/effective_sample_size"),
        ("entropy", "all", "entropy"),
        ("entropy", "replayed", "replay/entropy"),
        ("signal", "fresh alone", "fresh/frac_groups_without_signal"),
        ("signal", "as trained", "frac_reward_zero_std"),
    ]:
        shown = next(line for line in charts[key]["lines"] if line["name"] == name)
        expected = {line["step"]: line[metric] for line in lines if metric in line}
        assert expected
        assert dict(zip(shown["steps"], shown["values"], strict=True)) == pytest.approx(expected)
    scoring = sum(line["replay/scoring_seconds"] for line in lines if "replay/scoring_seconds" in line)
    spent = next(line for line in charts["seconds"]["lines"] if line["name"] == "spent on scoring")
    assert spent["values"][-1] == pytest.approx(scoring)
    saved = next(line for line in charts["seconds"]["lines"] if line["name"] == "saved, estimated")
    expected, before = 0.0, {"num_tokens": 0, "replay/tokens_saved": 0}
    for line in lines:
        tokens = line["replay/tokens_saved"] - before["replay/tokens_saved"]
        dealt_with = line["num_tokens"] - before["num_tokens"] - tokens
        expected += tokens * (line["step_time"] - line.get("replay/scoring_seconds", 0.0)) / dealt_with
        before = line
    assert saved["values"][-1] == pytest.approx(expected)
    assert charts.keys() == {
        "pass_rate", "buffer", "buckets", "fraction", "tokens", "seconds", "staleness", "ratios",
        "effective_sample_size", "entropy", "signal",
    }  # fmt: skip


def test_the_sentences_at_the_top(run_of, report, command):
    file = report(run_of("text"))
    log, last = read_replay_log(run_of("text")), state_of(run_of("text"))["log_history"][-1]
    steps = sorted(set(log.column("step").to_pylist()))
    happened, saved, warning = said_in(file)
    assert happened.startswith(
        f"Replay happened: {len(log)} stored completions came back in {len(steps)} batches, from step {steps[0]} to "
        f"step {steps[-1]}; 50% of the questions"
    )
    assert saved.startswith(f"It saved {last['replay/tokens_saved']:.0f} tokens of generation (")
    assert "an estimated" in saved
    assert "of scoring" in saved
    assert warning[:1] == "N" or re.match(r"\d warning signs?: ", warning)
    assert re.search(r"\(warns (below|above) ", warning)
    printed = command("report", run_of("text"), "-o", "page.html")
    assert [" ".join(line.split()) for line in printed.splitlines()[1:]] == [happened, saved, warning]


def test_the_default_log_lines_are_enough(run_of, report, tmp_path):
    run = run_of("text")
    short = report(copy_of(run, tmp_path / "short", shortened), "short.html")
    whole, charts = data_of(report(run))["charts"], data_of(short)["charts"]
    assert charts.keys() == whole.keys(), "nothing is missing: checkpoints and the replay log have the rest"
    assert charts["pass_rate"] == whole["pass_rate"]
    log = read_replay_log(run)
    by_step = defaultdict(list)
    for row in log.to_pylist():
        by_step[row["step"]].append(row)
    ages, oldest = charts["staleness"]["lines"]
    assert oldest["values"] == [max(row["age"] for row in by_step[step]) for step in oldest["steps"]]
    assert ages == whole["staleness"]["lines"][0]
    (ratios,) = charts["ratios"]["lines"]
    assert ratios["steps"] == sorted(by_step)
    for step, value in zip(ratios["steps"], ratios["values"], strict=True):
        assert value == pytest.approx(np.exp(np.median([row["mean_log_ratio"] for row in by_step[step]])))
    buckets = {
        line["name"]: dict(zip(line["steps"], line["values"], strict=True)) for line in charts["buckets"]["lines"]
    }
    for step in (3, 6):
        saved = ExperienceBuffer.load(run / f"checkpoint-{step}").buckets()
        assert {name: of[step] for name, of in buckets.items() if of[step]} == {
            f"{bucket} of 4": len(ids) for bucket, ids in saved.items()
        }


def test_whatever_is_missing_is_said(run_of, report, tmp_path):
    run = run_of("text")
    buffer = ExperienceBuffer.load(run)
    buffer.save(tmp_path / "buffer")
    text = text_of(report(tmp_path / "buffer", "1.html"))
    num_replays = sum(buffer.reuse(experience).num_replays for _, _, experience in buffer)
    assert (
        f"Replay happened: the {buffer.num_completions} completions in the buffer came back {num_replays} times"
        in text
    )
    assert f"It saved {buffer.replay_state['replayer']['tokens_saved']} tokens" in text
    assert "Whether there is a warning sign is unknown" in text
    assert "There are no log lines: no trainer_state.json was found." in text
    assert "There is no replay log" in text
    assert text.count("Nothing to show.") == 11
    assert "Token ids, as no" in text
    no_log = copy_of(run, tmp_path / "no_log", shortened)
    shutil.rmtree(no_log / "replay_log")
    text = text_of(report(no_log, "2.html"))
    assert "How many completions came back stands in the replay log, which is not there." in text
    assert 'Needs a replay log (replay_log=True) or log_replay="all"' in text
    assert text.count("Nothing to show.") == 1
    started = copy_of(run, tmp_path / "started")
    for checkpoint in started.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    text = text_of(report(started, "3.html"))
    assert "Replay happened: " in text
    assert "No buffer: " in text
    part = next((started / "replay_log").iterdir())
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(ExperienceBufferError, match="is not there"):
        report(started, "4.html")
    with pytest.raises(ExperienceBufferError, match="does not exist"):
        report(tmp_path / "none", "4.html")


def test_a_checkpoint_is_not_told_what_came_later(run_of, report):
    run = run_of("text")
    data = data_of(report(run / "checkpoint-3"))
    assert data == data_of(report(run / "checkpoint-3" / "experience_buffer", "of_buffer.html"))
    assert data["now"] == 3
    for chart in data["charts"].values():
        assert max(step for line in chart["lines"] for step in line["steps"]) == 3
    num_replayed = sum(step <= 3 for step in read_replay_log(run).column("step").to_pylist())
    assert said_in(report(run / "checkpoint-3"))[0].startswith(f"Replay happened: {num_replayed} stored completions")


def many_questions(folder, num_questions=60):
    """A buffer whose questions differ in everything that the table shows."""
    buffer = ExperienceBuffer()
    vocabulary = {"<unk>": 0, **{f"w{number} ": number + 1 for number in range(200)}}
    for number in range(num_questions):
        of_question = [
            Experience.create(
                [number % 7 + 1, 100 + number, *range(1, 2 + (number * 5) % 13), copy + 1],
                [-0.25] * (3 + 1 + (number * 5) % 13),
                policy_version=(number * 7) % 31,
                reward=1 + number / 100,
                entropy=0.5,
            )
            for copy in range(1 + number % 3)
        ]
        question = Question(
            f"q{number:02}", {"prompt": f"Question {number}, about {'an Odd' if number % 2 else 'even'}"}
        )
        buffer.collect(question, of_question, num_correct=1 + number % 7, group_size=8)
    buffer.save(folder / "experience_buffer")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return buffer


def test_search_filter_and_sort(report, browser, tmp_path):
    buffer = many_questions(tmp_path)
    facts = {
        question.question_id: (bucket, len(buffer.completions(question.question_id)))
        for question, bucket, _ in buffer.items()
    }
    columns = defaultdict(list)
    for question_id in facts:
        its = buffer.completions(question_id)
        for name, value in (
            ("id", question_id),
            ("bucket", facts[question_id][0]),
            ("stored", len(its)),
            ("updated", max(experience.policy_version for experience in its)),
            ("reward", np.mean([experience.reward for experience in its])),
            ("tokens", np.mean([experience.num_tokens for experience in its])),
        ):
            columns[name].append(value)
    with opened(browser, report(tmp_path)) as page:
        found = page.locator("#found")

        def say(text):
            found.filter(has_text=re.compile(f"^{text}")).wait_for()

        def all_ids():
            ids = list(rows_of(page))
            while page.locator("#on").is_visible() and page.locator("#on").is_enabled():
                page.locator("#on").click()
                ids += rows_of(page)
            return ids

        assert found.text_content() == f"60 of 60 questions, with {len(buffer)} completions."
        assert page.locator("#page").text_content() == "1 of 3"
        for name, values in columns.items():
            page.locator("#sort").select_option(name)
            value_of = dict(zip(columns["id"], values, strict=True))
            for is_descending in (name != "id", name == "id"):
                ids = all_ids()
                assert len(set(ids)) == 60
                shown = [value_of[question_id] for question_id in ids]
                assert shown == sorted(values, reverse=is_descending), name
                page.locator("#direction").click()
        page.get_by_role("columnheader", name="Stored").get_by_role("button").click()
        assert page.locator("th[aria-sort=descending]").text_content() == "Stored ↓"
        last = all_ids()[-1]
        assert rows_of(page)[last][1] == "1"

        page.locator("#bucket").select_option("3")
        ids = [question_id for question_id, (bucket, _) in facts.items() if bucket == 3]
        assert sorted(all_ids()) == sorted(ids)
        assert found.text_content().startswith(f"{len(ids)} of 60 questions")
        page.locator("#bucket").select_option("")

        page.locator("#query").fill("AN ODD")
        say("30 of 60")
        assert sorted(all_ids()) == [f"q{number:02}" for number in range(1, 60, 2)]
        assert page.locator("mark").first.text_content() == "an Odd"
        page.locator("#query").fill("q07")
        say("1 of 60")
        assert list(rows_of(page)) == ["q07"]
        page.locator("#query").fill("w130")
        say("0 of 60")
        assert page.locator("#table").is_hidden()
        page.locator("#deep").check()
        say("1 of 60")
        assert list(rows_of(page)) == ["q31"], "its completion alone has that word"
        page.locator(".id").click()
        assert page.locator(".completion mark").first.text_content() == "w130"
        page.locator(".id").click()
        assert page.locator(".completion").count() == 0
        page.locator("#query").fill("<b>nothing</b>")
        say("0 of 60")


HTML = (
    '</script><script>window.obeyed = 1</script><img src="https://example.org/x" onerror="window.obeyed = 1">&lt;<!--'
)


def html_buffer(folder):
    """A buffer with HTML and script wherever text is stored."""
    texts = {HTML: 1, f"{HOSTILE}]]>": 2, "\u2028 @@SCRIPT@@ javascript:window.obeyed=1 x": 3, "y" * 5_000: 4}
    folder.mkdir()
    Tokenizer(models.WordLevel({"<unk>": 0, **texts}, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    buffer = ExperienceBuffer()
    experience = Experience.create([1, 2, 3, 4], [-0.5] * 4, policy_version=1, reward=1.0)
    prompt = [{"role": HTML, "content": HTML + HOSTILE}]
    buffer.collect(Question(HTML, {"prompt": prompt, HTML: HTML}), [experience], num_correct=2, group_size=4)
    buffer.save(folder / "experience_buffer")
    return folder


def test_data_in_a_page_begins_and_ends_no_element():
    text = json_in_page({HTML: [HTML, "\u2028\u202e"]})
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == {HTML: [HTML, "\u2028\u202e"]}


def test_html_shows_as_text(report, browser, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    file = report(html_buffer(tmp_path / name))
    assert "\u202e" not in file.read_text()
    with opened(browser, file, viewport={"width": 360, "height": 740}) as page:
        assert page.locator("h1").text_content() == name
        assert list(rows_of(page)) == [HTML]
        page.locator(".id").click()
        page.wait_for_selector(".completion")
        text = page.locator(".completion pre").text_content()
        assert HTML in text
        assert r"\u202e" in text
        assert r"\x1b[31m" in text
        assert r"\u2028 @@SCRIPT@@ javascript:" in text
        page.get_by_role("button", name="Show all").first.click()
        assert page.evaluate("window.obeyed") is None
        assert page.locator("main img").count() == 0
        # What is in the file, and nothing that text has made.
        assert page.locator("script").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        ids = page.locator("[id]").evaluate_all("nodes => nodes.map(node => node.id)")
        assert len(set(ids)) == len(ids)
        # A search marks text, and stays text.
        page.locator("#query").fill("<script>")
        page.wait_for_selector("mark")
        assert page.evaluate("window.obeyed") is None


def test_hostile_text_of_every_kind(report, browser, tmp_path):
    with opened(browser, report(hostile_buffer(tmp_path))) as page:
        assert len(rows_of(page)) == 3
        for button in page.locator(".id").all():
            button.click()
            page.wait_for_selector(".completion")
            button.click()


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    brighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (brighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read_on_a_phone(run_of, report, browser, scheme):
    view = {"color_scheme": scheme, "viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with opened(browser, report(run_of("tools")), **view) as page:
        for button in page.locator("summary").all():
            button.click()
        page.locator(".id").first.click()
        page.wait_for_selector(".completion")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        seen = page.evaluate(
            """() => [...document.querySelectorAll('body *')].filter(
                 node => node.checkVisibility() && [...node.childNodes].some(c => c.nodeType === 3 && c.data.trim())
               ).map(node => {
                 const backgroundOf = one => getComputedStyle(one).backgroundColor;
                 let over = node;
                 while (backgroundOf(over) === 'rgba(0, 0, 0, 0)' && over.parentElement) over = over.parentElement;
                 const style = getComputedStyle(node);
                 const colour = node.closest('svg') ? style.fill : style.color;
                 return [node.outerHTML.slice(0, 80), colour, backgroundOf(over)];
               })"""
        )
        assert len(seen) > 100
        for node, *colours in seen:
            one, other = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
            assert contrast(one, other) >= 4.5, (node, colours)
        background = luminance(one := [int(part) for part in re.findall(r"\d+", seen[0][2])[:3]])
        assert (background > 0.8) == (scheme == "light"), one
        lines = page.locator(".plot path[style*='--c']").evaluate_all(
            "paths => paths.map(path => [getComputedStyle(path).stroke, "
            "getComputedStyle(path.closest('figure')).backgroundColor])"
        )
        assert lines
        for colours in lines:
            line, behind = ([int(part) for part in re.findall(r"\d+", colour)[:3]] for colour in colours)
            assert contrast(line, behind) >= 3


def test_plots_are_read_with_keys_and_fingers(run_of, report, browser):
    file = report(run_of("text"))
    shown = data_of(file)["charts"]["pass_rate"]["lines"][0]
    with opened(browser, file) as page:
        figure = page.locator("figure[data-chart=pass_rate]")
        plot, readout = figure.locator(".plot"), figure.locator(".readout")
        value, steps, values = figure.locator("[data-line='0']"), shown["steps"], shown["values"]
        assert plot.get_attribute("aria-label").startswith("Pass rate, share. fresh, all questions: ")
        box = plot.bounding_box()

        def reads(place, words="at step {}"):
            assert readout.text_content() == words.format(steps[place])
            assert value.text_content() == js_number(values[place])

        reads(-1, "at step {}, the newest")
        page.mouse.move(box["x"] + 1, box["y"] + 40)
        reads(0)
        page.mouse.move(0, 0)
        reads(-1, "at step {}, the newest")
        page.keyboard.press("Tab")
        plot.focus()
        page.keyboard.press("ArrowLeft")
        reads(0)  # one from where it was
        page.keyboard.press("ArrowRight")
        reads(1)
        figure.locator("summary").click()
        page.wait_for_selector(".numbers tr")
        rows = figure.locator(".numbers tr").all_text_contents()
        assert len(rows) == len(shown["steps"]) + 1


def test_a_reader_without_script_sees_the_rest(run_of, report, browser):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report(run_of("text")).as_uri())
    assert page.locator("#said p").count() == 3
    assert page.locator("figure svg text").count() > 50
    assert "needs JavaScript" in page.locator("noscript p").inner_text()
    context.close()


def test_a_page_that_would_be_too_large_says_so(report, browser, tmp_path, monkeypatch):
    from exgrpo_trl.report import questions

    many_questions(tmp_path)
    monkeypatch.setattr(questions, "CHUNK_CHARACTERS", 400)
    whole = report(tmp_path, "whole.html")
    monkeypatch.setattr("exgrpo_trl.report.writing.MOST_BYTES", 3_000)
    file = report(tmp_path)
    assert len(file.read_bytes()) < len(whole.read_bytes()) - 1_500
    number = int(re.search(r"The text of (\d+) completions is left out", text_of(file))[1])
    assert 0 < number < 120
    with opened(browser, file) as page:
        assert page.locator("#found").text_content().startswith("60 of 60 questions")
        page.locator(".id").first.click()
        page.wait_for_selector(".completion")
        page.locator("#direction").click()
        page.locator(".id").first.click()
        assert "is left out of this page" in page.locator("tr.detail").text_content()


def test_what_is_there_is_not_lost(run_of, report, tmp_path, command, monkeypatch):
    file = report(run_of("text"))
    first = file.read_text()
    assert report(run_of("chat")) == file
    assert file.read_text() != first, "an earlier report is replaced"
    kept = file.read_text()
    with pytest.raises(ExperienceBufferError, match="does not exist"):
        report(tmp_path / "none")
    assert file.read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    with monkeypatch.context() as patch:
        patch.setattr("exgrpo_trl.report.writing.page", lambda *parts: "half \ud800")
        with pytest.raises(UnicodeEncodeError):
            report(run_of("text"))
    assert file.read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    (tmp_path / "notes.html").write_text("mine")
    error = command("report", run_of("text"), "-o", tmp_path / "notes.html", code=1)
    assert "notes.html exists. Choose another path" in error
    assert (tmp_path / "notes.html").read_text() == "mine"
    command("report", run_of("text"), "-o", tmp_path / "notes.html", "--force")
    assert "is a directory. Name a file" in command("report", run_of("text"), "-o", tmp_path, "--force", code=1)


def test_a_run_that_goes_on(tmp_path, report):
    found = {}

    class Reporting(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            try:
                found[state.global_step] = data_of(report(tmp_path / "run"))
            except ExperienceBufferError as error:
                found[state.global_step] = str(error)

    options = {"save_steps": 2, "save_total_limit": 1, "callbacks": [Reporting()]}
    new_trainer(tmp_path / "run", "text", **options).train()
    assert "is not there: it has none of" in found[1], "nothing is saved yet"
    assert [found[step]["now"] for step in (3, 4, 5, 6)] == [2, 2, 4, 4]
    assert found[6]["charts"]["pass_rate"]["lines"][0]["steps"] == [1, 2, 3, 4]


def test_a_checkpoint_that_is_removed_while_it_is_read(run_of, report, tmp_path, monkeypatch):
    from exgrpo_trl.report import run as module

    run, opened_before = copy_of(run_of("text"), tmp_path / "run"), module.opened

    def removing(path):
        if (run / "checkpoint-6").exists():
            shutil.rmtree(run / "checkpoint-6")
            raise ExperienceBufferError("gone")
        return opened_before(path)

    monkeypatch.setattr(module, "opened", removing)
    assert data_of(report(run))["now"] == 3


def test_another_tokenizer(run_of, report, tmp_path):
    run = copy_of(run_of("text"), tmp_path / "run")
    (run / "checkpoint-6" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "Token ids, as no" in text_of(report(run))
    assert f"Text by {tmp_path / 'tokenizer.json'}" in text_of(report(run, tokenizer=tmp_path))


def test_without_matplotlib(run_of, tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None; from exgrpo_trl.cli import main; "
        f"sys.exit(main(['report', {str(run_of('text'))!r}, '-o', 'page.html']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert result.returncode == 1
    assert result.stderr.startswith("error: The report cannot be drawn without matplotlib")
    assert 'pip install "exgrpo-trl[report]"' in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_settings_of_matplotlib_stay(run_of, report):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    report(run_of("text"))
    assert dict(mpl.rcParams) == before


def test_the_same_run_makes_the_same_page(run_of, report):
    pages = [report(run_of("text"), name).read_text() for name in ("1.html", "2.html")]
    assert re.sub(r"Written .{20}", "", pages[0]) == re.sub(r"Written .{20}", "", pages[1])


def test_a_run_that_grows_is_thinned(report, run_of, tmp_path):
    def longer(lines):
        return [lines[0] | {"step": step, "fresh/pass_rate": (step % 100) / 100} for step in range(1, 5001)]

    file = report(copy_of(run_of("text"), tmp_path / "long", longer))
    (shown, *_) = data_of(file)["charts"]["pass_rate"]["lines"]
    assert len(shown["steps"]) == 1000
    assert shown["values"][0] == pytest.approx(np.mean([0.01, 0.02, 0.03, 0.04, 0.05]))
    assert Path(file).stat().st_size < 1_500_000
