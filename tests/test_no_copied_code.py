"""Promise 3: no TRL method is copied. Six consecutive lines of code that are TRL's own are a copy."""

import importlib.util
import io
import tokenize
from pathlib import Path

SOURCES = Path(__file__).parents[1] / "src"
WINDOW = 6


def code_lines(source: str) -> list[tuple[int, str]]:
    """Line numbers and lines without comments, surplus white space and blank lines."""
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.start[1]
    lines = []
    for number, line in enumerate(source.splitlines(), start=1):
        code = " ".join(line[: comments.get(number, len(line))].split())
        if code:
            lines.append((number, code))
    return lines


def windows(source: str) -> dict[tuple[str, ...], int]:
    lines = code_lines(source)
    return {
        tuple(code for _, code in lines[start : start + WINDOW]): lines[start][0]
        for start in range(len(lines) - WINDOW + 1)
    }


def trl_windows() -> dict[tuple[str, ...], str]:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return {
        window: f"{path.relative_to(folder)}:{line}"
        for path in folder.rglob("*.py")
        for window, line in windows(path.read_text()).items()
    }


def test_no_six_lines_are_trls() -> None:
    theirs = trl_windows()
    assert len(theirs) > 10_000
    copies = [
        f"{path.name}:{line} is trl's {theirs[window]}"
        for path in sorted(SOURCES.rglob("*.py"))
        for window, line in windows(path.read_text()).items()
        if window in theirs
    ]
    assert not copies


def test_a_copy_is_found() -> None:
    spec = importlib.util.find_spec("trl.trainer.grpo_config")
    assert spec is not None
    assert spec.origin is not None
    lines = code_lines(Path(spec.origin).read_text())[200:207]
    assert {tuple(code for _, code in lines[:WINDOW])} & trl_windows().keys()


def test_five_lines_are_not_a_copy() -> None:
    assert windows("a = 1\nb = 2\nc = 3\nd = 4\ne = 5  # five\n") == {}
    assert list(windows("a = 1\n\nb = 2\nc = 3  # three\n# none\nd = 4\ne = 5\n  f = 6\n")) == [
        ("a = 1", "b = 2", "c = 3", "d = 4", "e = 5", "f = 6")
    ]
