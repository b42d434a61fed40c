"""The code in the README and in the documentation runs as it stands."""

import contextlib
import io
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

PROJECT = Path(__file__).parent.parent
PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/**/*.md"))]

# a block of Python and, if a block of text comes right behind it, what the Python prints
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\n\n^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL)


class Example(NamedTuple):
    page: Path
    line: int
    code: str
    output: str | None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(PROJECT)}:{self.line + 1}"


def examples(page: Path) -> list[Example]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        found.append(Example(page, line, match["code"], match["output"]))
    return found


EXAMPLES = [example for page in PAGES for example in examples(page)]

# what only the extra `integrations` brings
OF_INTEGRATIONS = re.compile(r"^(?:import|from) (?:datasets|diffusers|trl)\b", re.MULTILINE)


def as_parameter(example: Example) -> Any:
    of_integrations = OF_INTEGRATIONS.search(example.code)
    marks = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")] if of_integrations else []
    return pytest.param(example, id=example.place, marks=marks)


# a Trainer asks for pinned memory wherever it runs
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
@pytest.mark.parametrize("example", [as_parameter(example) for example in EXAMPLES])
def test_an_example_runs_by_itself_and_prints_what_the_page_says(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # the empty lines make a traceback name the line of the page
    code = compile("\n" * example.line + example.code, str(example.page), "exec")
    # what an example defines can be pickled, as in a script
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, script.__dict__)
    if example.output is not None:
        assert printed.getvalue() == example.output


@pytest.mark.integrations
def test_the_script_of_the_page_on_processes_trains_in_two_as_in_one(tmp_path):
    [example] = examples(PROJECT / "docs" / "howto" / "processes.md")
    script = tmp_path / "train.py"
    script.write_text(example.code, encoding="utf-8")
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), str(script)]
        subprocess.run(command, check=True, cwd=folder, timeout=120)
        found.append(load_file(folder / "by-fsdp" / "adapter_model.safetensors"))
    torch.testing.assert_close(found[1], found[0])


def test_every_example_of_the_readme_fits_on_a_screen():
    in_readme = examples(PROJECT / "README.md")
    assert len(in_readme) >= 3
    for example in in_readme:
        assert len([line for line in example.code.splitlines() if line]) <= 15, example.place
