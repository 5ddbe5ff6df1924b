"""Messages of the package, as templates: what is inserted into them is a gap."""

import ast
import re
from pathlib import Path

from pages import ROOT

GAP = "\0"


def template_of(node: ast.expr) -> str:
    """Text of an expression, with a gap for each part that is not in the source."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template_of(node.left) + template_of(node.right)
    return GAP


def raised_in(path: Path) -> list[str]:
    """Messages of the errors and warnings of a module, in the order of the source."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "warning":
            call = node
        else:
            continue
        found += [template_of(call.args[0])] if call.args else []
    return found


def texts_in(folder: Path) -> list[str]:
    """All text in the source of a package, docstrings aside."""
    found = []
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = (node for node in ast.walk(tree) if isinstance(node, ast.JoinedStr | ast.Constant | ast.BinOp))
        found += [template_of(node) for node in texts if id(node) not in docstrings]
    return [text for text in found if " " in text]


def is_part_of(quoted: str, template: str) -> bool:
    """Whether a template holds what is quoted of it, with three dots for gaps and for what is left out."""
    pieces = [" ".join(piece.split()) for piece in quoted.split("...")]
    pattern = ".*?".join(re.escape(piece.strip()) for piece in pieces)
    plain = template.replace("`", "").replace("'", '"')
    return re.search(pattern.replace("'", '"'), plain, re.DOTALL) is not None


def quoted_on_the_page() -> list[str]:
    """What the page of troubleshooting quotes."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    section = page[page.index("<!-- messages -->") : page.index("<!-- /messages -->")]
    return re.findall(r"^`(.+)`$", section, re.MULTILINE)
