"""The documentation's site: all pages are found, and what its pages draw and include is of today."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from graphpeft.graph.tags import TAG
from graphpeft.graph.template import template_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Settings(yaml.SafeLoader):
    """Reads mkdocs.yml, with values of the environment as None."""


Settings.add_constructor("!ENV", lambda *_: None)


def script(path: str) -> ModuleType:
    """Returns a script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def leaves(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inside in entry.values() if isinstance(entry, dict) else entry:
            yield from leaves(inside)


def test_the_navigation_lists_every_page_once():
    settings = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Settings)
    pages = {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")}
    made = {"files.md"}  # by docs/hooks/package_files.py
    assert sorted(leaves(settings["nav"])) == sorted(pages | made)


def test_the_table_of_howtos_lists_every_howto_once():
    listed = re.findall(r"\]\((\w+\.md)\)", (DOCS / "howto" / "index.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(page.name for page in (DOCS / "howto").glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("page", sorted((DOCS / "howto").glob("[!i]*.md")), ids=lambda page: page.stem)
def test_a_howto_has_an_example_and_tells_what_can_go_wrong(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "```python\n" in text
    assert "\n## What can go wrong\n" in text


def test_the_install_page_tells_of_each_extra():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = project.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = re.findall(r"^([\w-]+) = \[", table, re.MULTILINE)
    told = (DOCS / "install.md").read_text(encoding="utf-8")
    assert extras
    assert [extra for extra in extras if f"`{extra}`" not in told] == []


def test_the_bars_are_those_of_the_benchmarks_table():
    for path, content in script("benchmarks/picture.py").pictures().items():
        assert path.read_text(encoding="utf-8") == content, "run benchmarks/picture.py"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_picture_of_a_rule_has_the_nodes_of_todays_graph(scheme: str):
    pictures = script("evidence/pictures.py")
    template = template_of(pictures.graph())
    assert template is not None
    nodes = template.plain.graphs[0].nodes
    text = (pictures.PICTURES / f"rule-{scheme}.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r'data-name="([^"]+)"', text))
    assert {node.name for node in nodes if TAG in node.meta} <= drawn, "run evidence/pictures.py"
    # checks of arguments aren't drawn
    assert drawn <= {node.name for node in nodes}, "run evidence/pictures.py"


@pytest.mark.parametrize(
    "symptom",
    [
        "Target module … is not supported",
        "the loss doesn't move",
        "element 0 of tensors does not require grad",
        "ONNX export of a PEFT model fails",
        "GuardError",
    ],
)
def test_troubleshooting_has_what_people_search_for_with_a_thread(symptom: str):
    rows = (DOCS / "troubleshooting.md").read_text(encoding="utf-8").splitlines()
    [row] = [row for row in rows if row.startswith("|") and symptom in row.split(" | ")[0]]
    assert "](https://github.com/" in row
