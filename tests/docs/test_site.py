"""The site: it builds without a warning, links lead somewhere, and phones and readers without a server are served."""

import dataclasses
import inspect
import re

import pytest
from chromium import BROKEN_NAMES, TOO_WIDE, WIDE_TABLES, browser
from pages import ROOT
from site_build import Html, build, dead_links
from trl import GRPOConfig

import exgrpo_trl
from exgrpo_trl import ExGRPOConfig, buffer, strategies
from exgrpo_trl.buffer import report

pytest.importorskip("material", reason="the site is built with the extra `docs`, which `dev` includes")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    assert "WARNING" not in build(folder)
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Html(path) for path in sorted(site.glob("*.html"))}


def test_all_pages_are_there(pages):
    sources = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert {path.stem for path in pages} - {"404"} == sources


def test_links_lead_somewhere(pages):
    assert sum(len(page.links) for page in pages.values()) > 1000
    assert dead_links({path: page for path, page in pages.items() if path.stem != "404"}) == []


def test_a_dead_link_is_found(site, tmp_path):
    page = tmp_path / "index.html"
    page.write_text(
        '<article id="here"><a href="#here">a</a><a href="#there">b</a><a href="gone.html">c</a></article>'
    )
    assert dead_links({page: Html(page)}) == ["index.html: #there", "index.html: gone.html"]


def test_links_of_the_other_pages_lead_somewhere():
    """Those of the README and other files that are read in the repository, with their anchors."""
    for path in (*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")):
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", path.read_text()):
            name, _, anchor = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
                slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
                assert anchor in slugs, f"{path.name}: {link}"


def test_nothing_is_fetched_from_elsewhere(pages, site):
    for path, page in pages.items():
        assert [link for link in page.fetched if re.match(r"(https?:)?//", link)] == [], path.name
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", style.read_text()), style


# The page of the API


@pytest.fixture(scope="module")
def api(site):
    return Html(site / "api.html")


def test_no_markup_is_left(api):
    assert not re.findall(r"\[?`|~\w+\.\w+|\{:|\*optional\*|^ *:::", api.text)
    assert "table" not in api.tags, "a table is wider than its column on a phone"


def test_all_public_names_are_there(api):
    names = {*exgrpo_trl.__all__, *buffer.__all__, *strategies.__all__, "read_replay_log"} - {"__version__"}
    names |= {name for name, of in vars(report).items() if inspect.isclass(of) and of.__module__ == report.__name__}
    tables = [getattr(strategies, name) for name in strategies.__all__ if name.isupper()]
    names |= {strategy.__name__ for table in tables for strategy in table.values()}
    shown = {identifier.rpartition(".")[2] for identifier in api.ids if identifier.startswith("exgrpo_trl.")}
    assert sorted(names - shown) == []
    assert len(names) > 40


def test_all_methods_of_the_buffer_and_fields_of_the_configuration_are_there(api):
    methods = {name for name in vars(exgrpo_trl.ExperienceBuffer) if not name.startswith("_")}
    shown = {i.rpartition(".")[2] for i in api.ids if i.startswith("exgrpo_trl.buffer.ExperienceBuffer.")}
    assert methods == shown
    own, of_trl = ({f.name for f in dataclasses.fields(of)} for of in (ExGRPOConfig, GRPOConfig))
    entries = set(re.findall(r"^(\w+) \(", api.text, re.MULTILINE))
    assert sorted(own - of_trl - entries) == []


def test_signatures_are_there(site):
    html = (site / "api.html").read_text()
    signatures = re.findall(r'<div class="doc-signature.*?</div>', html, re.DOTALL)
    text = [re.sub(r"<[^>]+>", "", signature) for signature in signatures]
    [trainer] = [signature for signature in text if signature.startswith("ExGRPOTrainer(")]
    assert "question_sampler: Callable[..., Any] | str | None = None" in trainer
    assert len(text) > 100


# In a browser


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


def test_pages_fit_a_phone(chromium, pages, site):
    page = chromium.new_page(viewport={"width": 360, "height": 740})
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    found: dict[str, object] = {}
    for path in pages:
        page.goto(path.as_uri())
        width = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        found[path.name] = (width, *(page.evaluate(script) for script in (TOO_WIDE, WIDE_TABLES, BROKEN_NAMES)))
    assert {name: what for name, what in found.items() if what != (360, [], [], [])} == {}
    page.goto((site / "guide.html").as_uri())
    assert page.locator("table[data-stacked]").count() > 1
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == []


def test_a_page_that_does_not_fit_is_found(chromium, tmp_path):
    (tmp_path / "page.html").write_text(
        '<meta name="viewport" content="width=device-width"><article><table><tr><td style="min-width: 400px">x</table>'
        '<p style="word-break: break-all; width: 99px"><code>a_long_name_that_breaks</code></article>'
    )
    page = chromium.new_page(viewport={"width": 360, "height": 740})
    page.goto((tmp_path / "page.html").as_uri())
    assert "TABLE x" in page.evaluate(TOO_WIDE)
    assert page.evaluate(BROKEN_NAMES) == ["a_long_name_that_breaks: a_long_name_that_breaks"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_of_the_home(chromium, site, scheme):
    """A title, a description, letters that a phone shows in 10 pixels or more, and the colours of the theme."""
    page = chromium.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page.goto((site / "index.html").as_uri())
    picture = page.locator("article .flow svg")
    assert picture.get_attribute("role") == "img"
    named = [page.locator(f"#{name}").text_content() for name in picture.get_attribute("aria-labelledby").split()]
    assert len(named) == 2
    assert all(named)
    scale = picture.bounding_box()["width"] / 360
    sizes = page.evaluate(
        "[...document.querySelectorAll('.flow text')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) * scale >= 10
    color = "e => getComputedStyle(e).fill"
    ink, box = (page.locator(f".flow {kind}").first.evaluate(color) for kind in ("text:not([class])", ".box"))
    lightness = [sum(map(int, re.findall(r"\d+", value)[:3])) / 3 for value in (ink, box)]
    assert lightness[0] < 120 < 200 < lightness[1] if scheme == "light" else lightness[1] < 80 < 150 < lightness[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_search_works_without_a_server(chromium, site, scheme):
    page = chromium.new_page(color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((site / "guide.html").as_uri())
    page.click(".md-search__input")
    page.keyboard.type("max_staleness", delay=5)
    first = page.locator(".md-search-result__link").first
    first.wait_for(timeout=10_000)
    links = page.locator(".md-search-result__link").evaluate_all("links => links.map(link => link.href)")
    assert all(link.startswith(site.as_uri()) for link in links)
    assert "max_staleness" in page.locator(".md-search-result__list").inner_text()
    first.click()
    page.wait_for_url("**/*.html*")
    assert errors == []
