"""Each public name has its place in the reference, and only one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import graphpeft
from graphpeft import rewrites

PAGES = Path(__file__).parent.parent / "docs" / "reference"


@pytest.mark.quick("__main__")
def test_each_public_name_is_on_one_page_of_the_reference():
    told = [
        name
        for page in PAGES.glob("*.md")
        for name in re.findall(r"^::: graphpeft\.(\w+)$", page.read_text(), re.MULTILINE)
    ]
    assert sorted(told) == sorted(graphpeft.__all__)


def test_each_name_for_rewrites_is_on_their_page_of_the_reference():
    told = re.findall(r"^::: graphpeft\.rewrites\.(\w+)$", (PAGES / "rewrites.md").read_text(), re.MULTILINE)
    assert sorted(told) == sorted(rewrites.__all__)
