"""Models of other libraries are exported as the table of docs/export.md says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exported_models", ROOT / "evidence" / "exported_models.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # its dataclass asks for its module
    spec.loader.exec_module(found)
    return found


MODELS = script()
ROWS: dict[str, list[str]] = MODELS.rows_of(MODELS.PAGE.read_text(encoding="utf-8"))


def test_no_refusal_of_the_table_is_the_adapters_alone() -> None:
    assert len(ROWS) >= 7
    assert ROWS.keys() <= MODELS.MODELS.keys()
    assert {cell for _, merged, inputs, _ in ROWS.values() for cell in (merged, inputs)} <= {"yes", "nor is the base"}


# SymPy takes four minutes for the sizes of its windows
LONG = ("Swin2SR",)


@pytest.mark.integrations
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in ROWS]
)
def test_a_model_is_exported_as_its_row_says(name: str) -> None:
    library = pytest.importorskip(MODELS.MODELS[name].library)
    assert MODELS.cells(name, library) == ROWS[name]
