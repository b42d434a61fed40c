"""Each cell of the table of quantised weights in ``docs/lora.md`` is what the libraries do."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchao.quantization as torchao
from oracle import Case, assert_close, assert_files_go_both_ways, assert_trains_alike, outputs, perturb, tensors
from quantised import CASES, ours_of, theirs_of

import graphpeft
from graphpeft import ExportError

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).parent.parent / "docs" / "lora.md"
HEAD = ["weight", "adapts", "trains", "merges", "merges, `dequantize=True`", "exports, `merged`", "exports, `baked`"]

NAMES = {
    "bitsandbytes nf4": "bitsandbytes nf4",
    "bitsandbytes fp4": "bitsandbytes fp4",
    "bitsandbytes int8": "bitsandbytes int8",
    "torchao `Int8WeightOnlyConfig`": "torchao int8",
    "torchao `Int8DynamicActivationInt8WeightConfig`": "torchao int8 of inputs, too",
    "torchao `Float8WeightOnlyConfig`": "torchao float8",
    "torchao `IntxWeightOnlyConfig`": "torchao intx",
    "torchao `Int8DynamicActivationIntxWeightConfig`": "torchao intx of inputs, too",
}
"""The cases of the rows that are run."""


def table() -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    assert rows.count(HEAD) == 1
    found: dict[str, list[str]] = {}
    for name, *cells in rows[rows.index(HEAD) + 2 :]:
        if not cells:
            return found
        found[name] = cells
    raise AssertionError("the page ends in the table")


ROWS = table()
CELLS = [
    pytest.param(next(case for case in CASES if case.name == NAMES[name]), column, cell, id=f"{name}-{column}")
    for name, cells in ROWS.items()
    if name in NAMES
    for column, cell in zip(HEAD[1:], cells, strict=True)
]


def second_inputs(case: Case) -> Case:
    """Returns a case with the numbers that are drawn next; the first are at an edge of two codes on some processors."""

    def drawn() -> tuple[torch.Tensor]:
        (first,) = case.make_inputs()
        return (torch.randn_like(first),)

    return case._replace(make_inputs=drawn)


def adapts(case: Case, folder: Path) -> str:
    ours, theirs = ours_of(case), theirs_of(case)
    graphpeft.set_peft_model_state_dict(ours, tensors(theirs))
    assert_close(outputs(ours, case), outputs(theirs, case), 1e-6)
    # where the last bit of a sum differs, an input is rounded to another code
    assert_files_go_both_ways(ours, theirs, case, folder, 1e-3 if "of inputs" in case.name else 1e-6)
    return "same"


def trains(case: Case, _: Path) -> str:
    assert_trains_alike(ours_of(case, lora_dropout=0.3), theirs_of(case, lora_dropout=0.3), case)
    return "same"


def merges(case: Case, _: Path) -> str:
    merged = ours_of(case).merge_and_unload()
    assert torch.equal(outputs(merged, case), outputs(theirs_of(case).merge_and_unload(), case))
    return "same"


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


def merges_numbers(case: Case, _: Path) -> str:
    model = ours_of(case)
    adapted = outputs(model, case)
    apart = distance(outputs(model.merge_and_unload(dequantize=True), case), adapted)
    return "exact" if apart < 1e-6 else "rounds" if apart < 2e-2 else "differs"


def exports(adapters: str) -> Callable[[Case, Path], str]:
    def export(case: Case, folder: Path) -> str:
        model: Any = ours_of(case)
        adapted, file = outputs(model, case), folder / "model.pt2"
        try:
            graphpeft.export(model, case.inputs(), file, adapters=adapters)
        except ExportError as error:
            # without what is said of the base
            if "torch.export can't export the model" in str(error).partition(". The base without its adapters")[0]:
                return "no"
            if "check=False exports it all the same" not in str(error):
                raise
            graphpeft.export(model, case.inputs(), file, adapters=adapters, check=False)
        assert torch.equal(outputs(model, case), adapted)
        apart = distance(torch.export.load(file).module()(*case.inputs()), adapted)
        return "exact" if apart < 1e-5 else "rounds" if apart < 2e-2 else "differs"

    return export


COLUMNS: dict[str, Callable[[Case, Path], str]] = dict(
    zip(HEAD[1:], (adapts, trains, merges, merges_numbers, exports("merged"), exports("baked")), strict=True)
)


@pytest.mark.parametrize(("case", "column", "cell"), CELLS)
def test_a_cell_is_what_the_libraries_do(case: Case, column: str, cell: str, tmp_path: Path) -> None:
    assert COLUMNS[column](second_inputs(case), tmp_path) == cell


def test_what_is_not_run_here_cannot_be() -> None:
    others = [name for name in ROWS if name not in NAMES]
    assert others == ["torchao `Int4WeightOnlyConfig`", "HQQ", "GPTQ", "AWQ"]
    assert all(set(ROWS[name]) == {"not run here"} for name in others)
    packages = {"HQQ": ["hqq"], "GPTQ": ["gptqmodel", "auto_gptq"], "AWQ": ["awq", "gptqmodel"]}
    assert not any(importlib.util.find_spec(package) for of_name in packages.values() for package in of_name)
    if not torch.cuda.is_available():
        with pytest.raises(ImportError):
            torchao.quantize_(torch.nn.Linear(128, 128), torchao.Int4WeightOnlyConfig())


def test_a_shaken_adapter_is_not_the_base() -> None:
    for case in CASES:
        model = ours_of(case)
        perturb(model)
        assert distance(outputs(model, case), outputs(case.build(), case)) > 0.05
