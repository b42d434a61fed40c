"""The architecture's list of files is complete, and imports go up it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import graphpeft

PACKAGE = Path(graphpeft.__file__).parent
DOCUMENT = Path(__file__).parent.parent / "docs" / "architecture.md"

LISTED = re.findall(r"^\| `([\w/]+(?:\.py|/))` \|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)


def entry(file: str) -> str:
    """Returns the line of the list that a file is in: its own, or that of its folder."""
    folder = f"{file.partition('/')[0]}/"
    return folder if folder in LISTED else file


def imports(path: Path) -> Iterator[str]:
    """Yields the package's files that a file imports, beside those of names of types."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {id(inner) for node in tree.body if isinstance(node, ast.If) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in for_types or not (node.module or "").startswith("graph"):
            continue
        module = (node.module or "").removeprefix("graphpeft").lstrip(".").replace(".", "/")
        for name in [f"{module}/{alias.name}".lstrip("/") for alias in node.names] + [module]:
            if (PACKAGE / f"{name}.py").exists():
                yield f"{name}.py"
                break


FILES = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]


def test_every_file_is_listed():
    assert {entry(file) for file in FILES} == set(LISTED)


def test_imports_go_up_the_list():
    wrong = [
        f"{file} imports {other}"
        for file in FILES
        for other in imports(PACKAGE / file)
        if LISTED.index(entry(other)) > LISTED.index(entry(file))
    ]
    assert wrong == []
