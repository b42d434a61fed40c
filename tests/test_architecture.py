"""The architecture's list of files is complete, imports go up it, and one file knows PyTorch's private names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import fx, nn

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


# private names of PyTorch

PRIVATE = re.compile(r"_(?!_)")
INTERFACE = {name for name in vars(nn.Module()) if PRIVATE.match(name)} | {
    "_apply",
    "_load_from_state_dict",
    "_save_to_state_dict",
    "_replicate_for_data_parallel",
    "_orig_mod",
    "_graph",
    "_code",
    "_lineno_map",
}
"""The names that `_torch.py` says all files may use."""

OF_OBJECTS = {
    name
    for thing in (
        torch.empty(0),
        torch.empty(0).untyped_storage(),
        torch.autocast("cpu"),
        fx.Graph(),
        fx.Graph().placeholder("x"),
        fx.Graph().python_code("self"),
        nn.Conv1d(1, 1, 1),
        torch.autograd.Function,
    )
    for name in dir(thing)
    if PRIVATE.match(name)
} - INTERFACE
"""Private attributes that objects of PyTorch have."""


def private_names(source: str) -> list[str]:
    """Returns PyTorch's private names in a file: those that it imports, of what it imports, and of objects."""
    tree = ast.parse(source)
    imported, found = set(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = {alias.name: alias.asname or "torch" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            paths = {f"{node.module}.{alias.name}": alias.asname or alias.name for alias in node.names}
        else:
            continue
        for path, name in paths.items():
            if path.split(".")[0] == "torch":
                imported.add(name)
                found += [path] if any(map(PRIVATE.match, path.split("."))) else []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not PRIVATE.match(node.attr) or node.attr in INTERFACE:
            continue
        base = node.value
        while isinstance(base, ast.Attribute):
            base = base.value
        name = base.id if isinstance(base, ast.Name) else ""
        if name in imported or (name not in ("self", "cls") and node.attr in OF_OBJECTS):
            found.append(ast.unparse(node))
    return found


def test_only_one_file_uses_private_names_of_pytorch():
    found = {file: private_names((PACKAGE / file).read_text(encoding="utf-8")) for file in FILES}
    assert found.pop("_torch.py")
    assert {file: names for file, names in found.items() if names} == {}


def test_private_names_of_pytorch_are_found_however_they_are_used():
    for source in (
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
        "from torch.utils import _pytree",
        "from torch._C import DisableTorchFunction",
        "import torch\nwith torch._C.DisableTorchFunction(): ...",
        "from torch.overrides import _pop_mode_temporarily",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "def count(tensor):\n    return tensor._version",
        "graph.copied._codegen",
    ):
        assert private_names(source), source
    assert private_names("import torch\nclass C:\n    def f(self): return self._version, x._own, m._parameters") == []
