"""Public names document their arguments, results and errors, and have an example that runs as it stands.

Docstrings are in Google's style, which lets the section `Returns` be left out where the first word says it.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphpeft
from graphpeft import rewrites

NAMES = {name: getattr(home, name) for home in (graphpeft, rewrites) for name in home.__all__}
PUBLIC = {name: value for name, value in NAMES.items() if not isinstance(value, ModuleType | Mapping)}
CLASSES = {name: value for name, value in PUBLIC.items() if isinstance(value, type)}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Examples")


def own(cls: type) -> Iterator[type]:
    """Yields the classes of the package from which a class inherits, and itself."""
    return (base for base in cls.__mro__ if base.__module__.partition(".")[0] == "graphpeft")


def methods(cls: type) -> dict[str, Any]:
    """Returns the public methods and properties of a class by name, each from the class that introduces it."""
    found: dict[str, Any] = {}
    for base in own(cls):
        for name, value in vars(base).items():
            if isinstance(value, FunctionType | classmethod | staticmethod | property):
                found[name] = value  # an override means the same as the method that it overrides
    return {name: value for name, value in found.items() if not name.startswith("_") or name == "__call__"}


FUNCTIONS = {name: value for name, value in PUBLIC.items() if isinstance(value, FunctionType)} | {
    f"{cls.__name__}.{name}": method
    for public in CLASSES.values()
    for cls in reversed(list(own(public)))
    for name, method in methods(public).items()
    if vars(cls).get(name) is method
}
"""Functions, methods and properties, by their names."""


def sections(docstring: str) -> dict[str, str]:
    """Returns the text of a docstring's sections, by their titles; the text before the first one is that of ``""``."""
    title, found = "", {"": ""}
    for line in inspect.cleandoc(docstring).splitlines():
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            title = line[:-1]
        found[title] = f"{found.get(title, '')}{line}\n"
    return found


def entries(section: str) -> set[str]:
    """Returns the names that a section describes, as of arguments, without stars."""
    # one name a line: the reference takes "a, b:" for a name with a type
    described = re.findall(r"^    (\*{0,2}\w+):", section, flags=re.MULTILINE)
    return {name.lstrip("*") for name in described}


def statements(function: Callable[..., Any]) -> list[ast.AST]:
    """Returns the nodes of a function's code, without those of functions inside."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(definition, ast.FunctionDef)
    found: list[ast.AST] = []
    todo: list[ast.AST] = list(definition.body)
    while todo:
        node = todo.pop()
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            found.append(node)
            todo.extend(ast.iter_child_nodes(node))
    return found


def raised(function: Callable[..., Any]) -> set[str]:
    """Returns the names of the errors that a function's own code raises."""
    calls = [node.exc for node in statements(function) if isinstance(node, ast.Raise)]
    named = [call.func.id for call in calls if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)]
    return {name for name in named if name.endswith("Error") and name != "NotImplementedError"}


def returns(function: Callable[..., Any]) -> bool:
    """Returns whether a function returns a value, by its annotation, or by its code where that has none."""
    annotation = inspect.signature(function).return_annotation
    if annotation is not inspect.Signature.empty:
        return annotation not in (None, "None")
    return any(isinstance(node, ast.Return) and node.value is not None for node in statements(function))


def problems_of_function(documented: Any) -> list[str]:
    """Returns what the docstring of a function, a method or a property lacks."""
    is_property = isinstance(documented, property)
    function: Any = documented.fget if is_property else getattr(documented, "__func__", documented)
    found = sections(function.__doc__ or "")
    arguments = [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
    if "arguments can be" in found[""]:  # the functions of rules, which choose among these
        arguments = [name for name in arguments if name not in ("args", "kwargs")]
    described = entries(found.get("Args", ""))
    problems = problems_of_text(found)
    problems += [f"the argument {name} isn't described" for name in arguments if name not in described]
    problems += [f"there is no argument {name}" for name in sorted(described - set(arguments))]
    says_result = is_property or found[""].startswith(("Returns ", "Yields "))
    if returns(inspect.unwrap(function)) and not says_result and not found.keys() & {"Returns", "Yields"}:
        problems.append("the result isn't described")
    for name in sorted(raised(inspect.unwrap(function))):
        if name not in entries(found.get("Raises", "")) and not found[""].startswith(f"Raises {name}"):
            problems.append(f"{name} isn't described")
    return problems


def problems_of_class(cls: type) -> list[str]:
    """Returns what the docstring of a class lacks; what a base describes, its own doesn't repeat."""
    texts = [sections(base.__doc__ or "") for base in own(cls)]
    described = {name for text in texts for title in ("Args", "Attributes") for name in entries(text.get(title, ""))}
    if dataclasses.is_dataclass(cls):
        fields = [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]
    else:
        fields = list(getattr(cls, "_fields", ()))
    return problems_of_text(texts[0]) + [
        f"the field {name} isn't described" for name in fields if name not in described
    ]


def problems_of_text(found: dict[str, str]) -> list[str]:
    """Returns what is wrong in any docstring: none, or a reference to another one in place of a description."""
    if not found[""].strip():
        return ["there is no docstring"]
    text = "\n".join(found.values())
    return [
        f"{match[0]!r} says nothing here"
        for match in re.finditer(r"\b([Aa]s for `|[Aa]s there\b|[Ss]ee there\b)", text)
    ]


def problems_of_example(name: str, documented: Any) -> list[str]:
    """Runs the example in a docstring, and returns what it prints otherwise than the docstring says."""
    known = {**PUBLIC, "torch": torch, "nn": nn, "F": F}  # as after imports of PyTorch and of the names
    [example] = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(documented, name, globs=known)
    problems: list[str] = [] if example.examples else ["there is no example"]
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(example, out=problems.append)
    return problems


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_describes_its_arguments_result_and_errors(name: str):
    assert problems_of_function(FUNCTIONS[name]) == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_public_class_describes_its_fields(name: str):
    assert problems_of_class(CLASSES[name]) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    registry = sys.modules[graphpeft.register.__module__]
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # what an example registers is gone afterwards
    assert problems_of_example(name, PUBLIC[name]) == []


# the checks see what they are for


def undocumented(first, second):
    """Adds two numbers.

    Args:
        first: As for `second`.
        third: There is none.
    """
    if second is None:
        raise ValueError("None can't be added")
    return first + second


def documented(first: int, second: int) -> int:
    """Adds two numbers.

    Args:
        first: A number.
        second: A number.

    Returns:
        The sum.

    Raises:
        ValueError: If the second number is 0.
    """
    if not second:
        raise ValueError("0 can't be added")
    return first + second


@dataclasses.dataclass
class Undocumented:
    """A number.

    Attributes:
        digits: The digits.
    """

    digits: str
    base: int


Undocumented.__module__ = "graphpeft.numbers"


def wrong_example():
    """Adds numbers.

    Examples:
        >>> 1 + 1
        3
    """


def test_a_wrong_example_and_none_are_seen():
    assert "Expected:\n    3\nGot:\n    2" in "".join(problems_of_example("wrong_example", wrong_example))
    assert problems_of_example("documented", documented) == ["there is no example"]


def test_a_function_without_descriptions_is_seen():
    assert problems_of_function(documented) == []
    assert problems_of_function(undocumented) == [
        "'As for `' says nothing here",
        "the argument second isn't described",
        "there is no argument third",
        "the result isn't described",
        "ValueError isn't described",
    ]


def test_a_class_without_descriptions_is_seen():
    assert problems_of_class(Undocumented) == ["the field base isn't described"]


VAGUE = re.compile(r"(?:^|[.!?:;]\s+|\n\n)\s*(?:What|Those|That of|The ones?)\b")
"""A sentence whose subject is no noun."""


def vague_sentences(source: str) -> list[str]:
    """Returns the sentences of code's docstrings, also of those of attributes, that name no thing."""
    strings = [
        node.value.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return [text[match.start() : match.start() + 80] for text in strings for match in VAGUE.finditer(text)]


def test_sentences_of_docstrings_name_the_thing_that_they_are_about():
    files = Path(graphpeft.__file__).parent.rglob("*.py")
    found = {str(file): vague_sentences(file.read_text(encoding="utf-8")) for file in files}
    assert {file: sentences for file, sentences in found.items() if sentences} == {}


@pytest.mark.parametrize(
    "planted", ["What a rule does.", "A site.\n\n    Those that act come first.", "plan: That of a model."]
)
def test_a_planted_sentence_without_a_noun_is_seen(planted: str):
    assert vague_sentences(f'def f():\n    """{planted}"""')
