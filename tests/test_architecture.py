"""Rooms know what the architecture's table says, no imports go in a circle, one file knows PyTorch's private names."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import networkx
import pytest
import torch
from rooms import ROOMS
from torch import fx, nn

import graphpeft

pytestmark = pytest.mark.quick("_torch")

PACKAGE = Path(graphpeft.__file__).parent

SOURCES = {
    path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
    for path in PACKAGE.rglob("*.py")
    if path.parent != PACKAGE or path.name != "__init__.py"
}
FILES = [file for file in SOURCES if not file.endswith("__init__.py")]


def room_of(file: str) -> str:
    return file.partition("/")[0].removesuffix(".py")


@functools.cache
def imported(source: str) -> list[str]:
    """Returns the paths of what code imports of the package, anywhere in it, and for the names of types, too."""
    nodes = list(ast.walk(ast.parse(source)))
    paths = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    paths += [f"{n.module}.{alias.name}" for n in nodes if isinstance(n, ast.ImportFrom) for alias in n.names]
    return [path for path in paths if path.startswith("graphpeft.")]


def imports(file: str, source: str, files: Mapping[str, str]) -> Iterator[str]:
    """Yields the package's files that a file imports."""
    for path in imported(source):
        parts = path.split(".")
        # the path is that of a file, or of what a file or a package has
        names = ("/".join(parts[1:end]) for end in (len(parts), len(parts) - 1))
        possible = (f"{name}{ending}" for name in names for ending in (".py", "/__init__.py"))
        yield from next(([one] for one in possible if one in files and one != file), [])


def known(files: Mapping[str, str]) -> dict[str, set[str]]:
    """Returns the rooms from which each room imports."""
    found: dict[str, set[str]] = {room_of(file): set() for file in files}
    for file, source in files.items():
        found[room_of(file)] |= {room_of(other) for other in imports(file, source, files)} - {room_of(file)}
    return found


def circles(files: Mapping[str, str]) -> list[set[str]]:
    """Returns files that import each other, around some circle."""
    graph = networkx.DiGraph((file, other) for file, source in files.items() for other in imports(file, source, files))
    return [files for files in networkx.strongly_connected_components(graph) if len(files) > 1]


def test_rooms_know_the_rooms_below_that_the_table_says():
    assert known(SOURCES) == {room: set(below) for room, below in ROOMS.items()}
    names = list(ROOMS)
    assert all(names.index(below) < names.index(room) for room, all_below in ROOMS.items() for below in all_below)


def test_the_way_of_the_data_names_files_and_rooms_that_there_are():
    pages = [*(PACKAGE.parent / "docs").glob("data-way.svg"), PACKAGE.parent / "docs" / "architecture.md"]
    named = {name for page in pages for name in re.findall(r"[>`](\w+/(?:\w+/)*(?:\w+\.py)?)[<`,]", page.read_text())}
    assert {"rules/rewrite.py", "tracing/"} <= named
    assert [name for name in sorted(named) if not (PACKAGE / name).exists()] == []


def test_no_imports_go_in_a_circle():
    assert circles(SOURCES) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from graphpeft.methods.lora import LoraConfig",
        "from graphpeft.methods.cpt import CPTConfig",
        "from graphpeft import exporting",
        "import graphpeft.exporting",
        "if TYPE_CHECKING:\n    from graphpeft.methods.lora.config import LoraConfig",
        "def later():\n    from graphpeft.exporting import export",
    ],
)
def test_a_planted_import_is_seen(planted: str):
    files = {**SOURCES, "rules/report.py": f"{SOURCES['rules/report.py']}\n{planted}\n"}
    assert known(files)["rules"] - set(ROOMS["rules"])


def test_a_planted_circle_is_seen():
    planted = "if TYPE_CHECKING:\n    from graphpeft.tracing.tracer import ValueTracer\n"
    assert circles({**SOURCES, "tracing/proxy.py": SOURCES["tracing/proxy.py"] + planted})


# sizes


def too_long(files: Mapping[str, str]) -> list[str]:
    """Returns the files with more lines than a reader takes in: 250 of a method, 450 of anything else."""
    lengths = {file: source.count("\n") for file, source in files.items()}
    return [file for file, length in lengths.items() if length > (250 if room_of(file) == "methods" else 450)]


def test_no_file_is_longer_than_a_reader_takes_in():
    assert too_long(SOURCES) == []


@pytest.mark.parametrize(
    ("file", "most"), [("methods/hra.py", 250), ("methods/lora/config.py", 250), ("rules/rule.py", 450)]
)
def test_a_file_that_is_too_long_is_seen(file: str, most: int):
    assert too_long({file: "pass\n" * most}) == []
    assert too_long({file: "pass\n" * (most + 1)}) == [file]


# options of methods

CONFIG = re.compile(r"(^|\.)((active_)?peft_)?config$")
OF_A_MODEL = re.compile(r"\bmodel\.config$")


def options_by_name(source: str) -> list[str]:
    """Returns where code reads or sets an option of an adapter's config by its name, which only some methods have.

    The names of all of a config's fields, as in ``getattr(config, field.name)``, are those of no method.
    """
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > 1]
    named = [call for call in calls if ast.unparse(call.func) in ("getattr", "hasattr", "setattr")]
    texts = [(ast.unparse(call.args[0]), call) for call in named if not ast.unparse(call.args[1]).endswith(".name")]
    return [ast.unparse(call) for text, call in texts if CONFIG.search(text) and not OF_A_MODEL.search(text)]


def test_no_option_of_a_method_is_read_by_name_outside_of_methods():
    found = {file: options_by_name(source) for file, source in SOURCES.items() if room_of(file) != "methods"}
    assert {file: reads for file, reads in found.items() if reads} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "getattr(config, 'bias', 'none')",
        "getattr(plan.config, 'ensure_weight_tying', False)",
        "hasattr(self.peft_config, 'target_parameters')",
        "setattr(adapter.config, 'rank_pattern', {})",
        "[getattr(config, option, None) for option in ('rank_pattern', 'alpha_pattern')]",
    ],
)
def test_a_planted_option_is_seen(planted: str):
    assert options_by_name(planted)
    assert not options_by_name("getattr(model.config, 'vocab_size', None), getattr(config, field.name)")


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
    found = {file: private_names(SOURCES[file]) for file in FILES}
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


# files

WRITERS = {"save_file", "save_model", "torch.save", "torch.export.save"}
"""Functions that write the file that they are given."""

STAGED = re.compile(r"\bstag(ed|ing)\b")


def writes_elsewhere(source: str) -> list[str]:
    """Returns where code writes a file that is in no staging folder, and so could be seen half written."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        method = function.rpartition(".")[2]
        texts = [
            each.value for each in (*node.args, *(k.value for k in node.keywords)) if isinstance(each, ast.Constant)
        ]
        if method in ("write_text", "write_bytes") or (method == "open" and {"w", "wb", "x", "xb"} & {*texts}):
            place = function if function != "open" else ast.unparse(node.args[0])
        elif function in WRITERS:
            place = ast.unparse(node.args[1])
        else:
            continue
        # a buffer in memory is no file
        if not STAGED.search(place) and place != "buffer":
            found.append(ast.unparse(node))
    return found


def test_files_are_written_by_way_of_a_staging_folder():
    found = {file: writes_elsewhere(source) for file, source in SOURCES.items() if file != "files/atomic_files.py"}
    assert {file: writes for file, writes in found.items() if writes} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "save_file(tensors, folder / 'adapter_model.safetensors')",
        "torch.save(tensors, path)",
        "Path(folder, 'config.json').write_text('{}')",
        "with path.open('wb') as out: out.write(b'')",
        "with path.open(mode='w') as out: out.write('')",
        "with open(path, 'wb') as out: out.write(b'')",
        "torch.save(saved, file)",
    ],
)
def test_a_planted_write_is_seen(planted: str):
    assert writes_elsewhere(planted)
    assert not writes_elsewhere(
        "save_file(tensors, staging.folder / 'a')\n(staged / 'b').write_text('{}')\nopen(weights)"
    )
