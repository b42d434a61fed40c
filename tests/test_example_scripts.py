"""The scripts in `examples/` run, learn what they say, and stand on the page of examples; notebooks are the scripts."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

PROJECT = Path(__file__).parent.parent
FOLDER = PROJECT / "examples"
PAGE = (PROJECT / "docs" / "examples.md").read_text(encoding="utf-8")
TOOLS = {"serve", "write_notebooks"}
"""Scripts that others run."""

SCRIPTS = sorted({path.stem for path in FOLDER.glob("*.py")} - TOOLS)
MOST_SECONDS = {"demo": 40}
"""The longest time of a script; 30 s if it isn't named."""


def load_script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"graphpeft_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # a dataclass looks for its module there
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def docstring(name: str) -> str:
    found = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
    assert found is not None
    return found


# what each shows


def test_the_demo_adapts_three_models_to_what_they_have_not_seen(monkeypatch, capsys):
    demo = load_script(monkeypatch, "demo")
    monkeypatch.setattr(demo, "tqdm", lambda steps, **_: steps)
    results = demo.main()
    assert len(results) == 3
    for result in results:
        assert result.after > result.before + 0.1, result
        assert result.after > 0.5, result
        assert result.trainable_share < 0.15, result
        assert 0 < result.file_size < 200 * 1024, result
        assert result.difference <= 1e-5, result
    assert capsys.readouterr().out.endswith(demo.table(results) + "\n")


def test_what_is_shipped_serves_each_adapter_with_one_session_that_knows_no_pytorch(monkeypatch):
    ship = load_script(monkeypatch, "ship")
    shipped = ship.main()
    base = shipped.accuracies["base"]
    assert base["upright"] > 0.7
    for task in ship.TURNED:
        assert shipped.accuracies[task][task] > base[task] + 0.2
    assert all(one.difference <= 1e-4 for one in shipped.report.checked)
    assert set(shipped.bytes) == {"digits.onnx", *(f"digits.{task}.onnx_adapter" for task in ship.TURNED)}
    assert ship.table(shipped).count("ms") == 3
    imported = re.findall(r"^(?:import|from) (\w+)", ship.SERVE.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(imported) == {"__future__", "json", "sys", "time", "typing", "numpy", "onnxruntime"}


def test_images_are_read_on_their_side_and_the_picture_has_the_figures(monkeypatch, tmp_path):
    result = load_script(monkeypatch, "images").main(tmp_path / "images.html")
    assert result.after > result.before + 0.3, result
    assert result.after > 0.7, result
    assert result.trainable < 0.2, result
    picture = result.picture.read_text(encoding="utf-8")
    assert '"change":' in picture
    assert '"gradient":' in picture


def test_pixels_are_labelled_on_dark_paper_also_when_the_adapter_is_merged(monkeypatch):
    result = load_script(monkeypatch, "segmentation").main()
    assert result.after > result.before + 0.3, result
    assert result.after > 0.6, result
    assert result.trainable < 0.4, result
    assert result.merged < 1e-3, result


def test_dead_layers_of_a_listener_are_found_and_the_others_learn(monkeypatch):
    result = load_script(monkeypatch, "audio").main()
    assert len(result.dead) == 3
    assert all("feature_extractor" in label for label in result.dead)
    assert "self.conv(hidden_states)" in result.line
    assert result.after > result.before + 0.3, result
    assert result.after > 0.6, result


def test_a_graph_network_reads_its_nodes_upside_down(monkeypatch):
    result = load_script(monkeypatch, "graphs").main()
    assert result.after > result.before + 0.4, result
    assert result.after > 0.8, result
    assert result.upright > 0.8, result


def test_all_experts_have_an_adapter_and_predict_python(monkeypatch):
    result = load_script(monkeypatch, "experts").main()
    assert result.experts == 8
    assert result.after > result.before + 0.1, result
    assert result.after > 0.45, result


def test_a_bert_in_4_bits_learns_the_rooms_of_docstrings(monkeypatch):
    result = load_script(monkeypatch, "quantised").main()
    assert result.before < 0.5, result
    assert result.after > max(0.55, result.before + 0.2), result
    assert result.base_bytes < 0.65 * result.full_bytes, result
    assert result.adapter_bytes < 0.1 * result.base_bytes, result


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore")
def test_a_llama_comes_to_prefer_capitals_against_itself(monkeypatch):
    pytest.importorskip("trl")
    result = load_script(monkeypatch, "preferences").main()
    assert result.before < 0.5, result
    assert result.after > 0.9, result
    assert result.first_loss == pytest.approx(math.log(2), abs=1e-6)
    assert result.adapters == ["default", "ref"]


# notebooks

NOTEBOOKS = sorted(path.stem for path in (FOLDER / "notebooks").glob("*.ipynb"))


def assert_quickstart(names: dict[str, Any]) -> None:
    assert names["after"] > names["before"] + 0.4
    assert names["after"] > 0.85
    assert names["disabled"] > 0.85
    assert names["learning"].dead == ()


def assert_comparing_methods(names: dict[str, Any]) -> None:
    results = names["results"]
    assert len(results) == 8
    for method, (trained, after, _) in results.items():
        assert after > names["before"] + 0.15, method
        assert trained < 0.5 * sum(p.numel() for p in names["base"].parameters()), method


def assert_own_rule(names: dict[str, Any]) -> None:
    assert names["verdict"].holds
    assert names["after"] > names["before"] + 0.4
    assert "slot0" in names["code_after"]
    assert "slot0" not in names["code_before"]
    torch.testing.assert_close(names["merged"], names["expected"], atol=1e-4, rtol=1e-4)


CHECKS = {
    "comparing_methods": assert_comparing_methods,
    "own_rule": assert_own_rule,
    "quickstart": assert_quickstart,
}


@pytest.fixture
def as_main(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.ModuleType]:
    """A module in the place of a script's, in a folder of its own."""
    threads = torch.get_num_threads()
    script = types.ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.chdir(tmp_path)
    yield script
    torch.set_num_threads(threads)


def cells(name: str) -> list[str]:
    content = json.loads((FOLDER / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def run_cell(source: str, script: types.ModuleType) -> Any:
    """Runs a cell as a notebook does, and returns the value of the expression at its end, if there is one."""
    tree = ast.parse(source)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None  # type: ignore[attr-defined]
    exec(compile(tree, "<cell>", "exec"), script.__dict__)
    return None if last is None else eval(compile(last, "<cell>", "eval"), script.__dict__)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_cell_to_cell_and_shows_its_results(name: str, as_main: types.ModuleType, capsys):
    values = [run_cell(source, as_main) for source in cells(name)]
    CHECKS[name](as_main.__dict__)
    shown = [value._repr_html_() for value in values if hasattr(value, "_repr_html_")]
    assert shown
    assert all(text.startswith("<") for text in shown)
    assert capsys.readouterr().out


def test_the_notebooks_are_those_that_the_scripts_give(monkeypatch):
    writer = load_script(monkeypatch, "write_notebooks")
    assert sorted(writer.SCRIPTS) == NOTEBOOKS == sorted(CHECKS)
    for name in writer.SCRIPTS:
        kept = (FOLDER / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8")
        assert kept == writer.notebook(name), f"call make notebooks: {name} has changed"


def test_notebooks_hold_no_outputs_and_all_code_of_their_scripts():
    for name in NOTEBOOKS:
        content = json.loads((FOLDER / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
        assert all(not cell.get("outputs") for cell in content["cells"])
        assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
        script = ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))
        statements = [ast.dump(node) for source in cells(name) for node in ast.parse(source).body]
        assert statements == [ast.dump(node) for node in script.body[1:]]


# the page


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_says_what_it_shows_and_how_long_it_takes(name: str):
    text = docstring(name)
    seconds = re.search(r"Takes about\s+(\d+)\s+s\s+on\s+one\s+core", text)
    assert seconds is not None
    assert int(seconds[1]) <= MOST_SECONDS.get(name, 30)
    assert re.search(rf"``python\s+examples/{name}\.py``|``make\s+{name}``|`make\s+{name}`", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_page_has_each_script_with_its_first_sentence_and_its_time(name: str):
    text = " ".join(docstring(name).split())
    sentence = text.partition(". ")[0]
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}.py` |")]
    assert f" {sentence} |" in row
    seconds = re.search(r"Takes about (\d+) s", text)
    assert seconds is not None
    assert f"| {seconds[1]} s |" in row
    assert (f"`{name}.ipynb`" in row) == (name in NOTEBOOKS)
