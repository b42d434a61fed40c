"""The examples in docstrings of what tests are made of run as they stand."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import graphpeft.testing

FILES = [info.name for info in pkgutil.iter_modules(graphpeft.testing.__path__, "graphpeft.testing.")]
EXAMPLES = [
    found
    for file in FILES
    for found in doctest.DocTestFinder().find(importlib.import_module(file), file)
    if found.examples
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_gives_what_it_says(example: doctest.DocTest):
    told: list[str] = []
    results = doctest.DocTestRunner().run(example, out=told.append)
    assert results.attempted
    assert not results.failed, "".join(told)


def test_there_are_examples_of_what_is_exported():
    exported = {example.name.rpartition(".")[2] for example in EXAMPLES} & set(graphpeft.testing.__all__)
    assert {"verify", "verify_rewrite"} <= exported
