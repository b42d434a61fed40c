"""The quick tests leave out no room of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from rooms import ROOMS

pytestmark = pytest.mark.quick

HERE = Path(__file__)
TESTS = {path.name: path.read_text(encoding="utf-8") for path in HERE.parent.glob("test_*.py") if path != HERE}


def rooms_named(source: str) -> set[str]:
    """Returns the rooms that the marks of quick tests name in a file of tests."""
    marks = re.findall(r"pytest\.mark\.quick\(([^)]*)\)", source)
    return {room for mark in marks for room in re.findall(r'"(\w+)"', mark)}


def test_quick_tests_are_about_every_room_and_about_nothing_else():
    assert set().union(*map(rooms_named, TESTS.values())) == set(ROOMS)


@pytest.mark.parametrize("file", [file for file, source in TESTS.items() if "mark.quick" in source])
def test_each_mark_names_a_room(file: str):
    assert TESTS[file].count("mark.quick") == len(re.findall(r'pytest\.mark\.quick\("\w+"', TESTS[file]))


def test_a_mark_names_the_rooms_between_its_brackets():
    marks = (
        '@pytest.mark.quick("sites", "code")\n@pytest.mark.parametrize("room")\npytestmark = pytest.mark.quick("auto")'
    )
    assert rooms_named(marks) == {"sites", "code", "auto"}
