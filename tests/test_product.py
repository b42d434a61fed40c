"""Each cell of the tables of features and kinds in ``docs/lora.md`` is what the libraries do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from measuring import let_peft_round_on_the_cpu
from product import FEATURES, LAYERS, MODELS, Feature, Kind, Seen, assert_alike, assert_loads, compare, trained

import graphpeft
from graphpeft.testing import laws

# what PEFT and bitsandbytes warn of is theirs
pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = Path(__file__).parent.parent / "docs" / "lora.md"


class Note(NamedTuple):
    """Why a cell isn't "same".

    Attributes:
        ours: What our refusal says, as a regular expression; None where we do it.
        pefts: What PEFT's error says; None where PEFT computes something else, or does it without effect.
    """

    ours: str | None
    pefts: str | None


_LINEAR_ALONE = "is for linear weights, and it is an?|names no linear layer|is measured on linear layers"
_ONE_OF_SEVERAL = "is for layers, and it is one of several weights of a module"

NOTES = {
    "1": Note(None, r"ParamWrapper does not (work with|support)|does not support targeting nn\.Parameter"),
    "2": Note(None, "has no attribute 'weight'|unsupported variant"),
    "3": Note(None, "shapes cannot be multiplied"),
    "4": Note(None, "only 2d and 3d are supported"),
    "5": Note(None, None),
    "6": Note(None, r"size mismatch|diag\(\): Supports 1D or 2D"),
    "7": Note(None, "no attribute 'scaling'"),
    "8": Note(None, None),
    "9": Note(None, "MultiheadAttention does not support mixed adapter batches"),
    "a": Note("drops elements of an operation's input, and the use of its in_proj_weight has none", None),
    "b": Note("init_lora_weights='eva' is measured on linear layers", None),
    "c": Note("lora_bias=True is for the outputs of linear layers and convolutions", "lora_bias=True"),
    "d": Note(f"lora_bias=True {_ONE_OF_SEVERAL}", None),
    "e": Note(
        _ONE_OF_SEVERAL,
        "does not support DoRA|has no attribute 'weight'|unsupported variant|list index out of range|`eigens`",
    ),
    "f": Note(
        _LINEAR_ALONE,
        "Unknown initialization|unsupported variant|missing 1 required positional argument: 'config'|"
        "scalar types: Long|must match the size|has no attribute 'weight'|No supported layers found|`eigens`",
    ),
    "g": Note(_LINEAR_ALONE, None),
    "h": Note("layer_replication: an? .* has no list of layers", "Could not locate the layers"),
    "i": Note("has no get_input_embeddings to tell which they are", None),
}


def table(kinds: list[Kind]) -> dict[tuple[str, str], str]:
    """Returns the cells of the table that has these kinds, by feature and kind."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    head = ["feature", *(kind.name for kind in kinds)]
    assert rows.count(head) == 1, head
    found: dict[tuple[str, str], str] = {}
    for feature, *cells in rows[rows.index(head) + 2 :]:
        if not cells:
            return found
        assert not any((feature, kind.name) in found for kind in kinds), f"{feature} has two rows"
        found |= {(feature, kind.name): cell for kind, cell in zip(kinds, cells, strict=True)}
    raise AssertionError("the page ends in the table")


CELLS = table(LAYERS) | table(MODELS)


def cells(*says: str) -> pytest.MarkDecorator:
    """Parametrises over the cells that say this, or that have this note."""
    chosen = [
        pytest.param(feature, kind, CELLS[feature.name, kind.name], id=f"{feature}-{kind}".replace("`", ""))
        for feature in FEATURES
        for kind in (*LAYERS, *MODELS)
        if not set(says).isdisjoint(CELLS[feature.name, kind.name].split())
    ]
    return pytest.mark.parametrize(("feature", "kind", "cell"), chosen)


@pytest.fixture(autouse=True)
def _like_pefts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets PEFT round on the CPU, write no cards, and have its adapters act in attention."""
    let_peft_round_on_the_cpu(monkeypatch)
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *_: None)
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(was)


def test_the_tables_are_the_product() -> None:
    names = [feature.name for feature in FEATURES]
    for kinds in (LAYERS, MODELS):
        found = list(table(kinds))
        assert found == [(name, kind.name) for name in names for kind in kinds]


def test_every_note_is_explained_and_meant() -> None:
    text = PAGE.read_text()
    assert re.findall(r"^- \*\*(\w)\*\*", text, re.MULTILINE) == list(NOTES)
    assert {cell.split()[-1] for cell in CELLS.values()} == {"same", "none", *NOTES}


@cells("none")
def test_what_does_not_apply_has_nothing_to_do_with_the_kind(feature: Feature, kind: Kind, cell: str) -> None:
    assert not feature.applies(kind)


@cells("same")
def test_both_libraries_do_the_same(feature: Feature, kind: Kind, cell: str, tmp_path: Path) -> None:
    assert feature.applies(kind)
    assert_alike(feature, kind, tmp_path)


@cells("better")
def test_what_is_better_is_right_and_isnt_what_peft_does(
    feature: Feature, kind: Kind, cell: str, tmp_path: Path
) -> None:
    note = NOTES[cell.split()[1]]
    assert note.ours is None
    ours = feature.observe(graphpeft, feature, kind, tmp_path / "ours")
    if feature.observe is trained:
        assert_loads(graphpeft, feature, kind, tmp_path / "ours", ours)
    theirs = attempted(note, feature, kind, tmp_path / "theirs")
    if theirs is not None:
        with pytest.raises(AssertionError):
            compare(ours, theirs, feature.tolerance)


@cells("refused")
def test_what_is_refused_has_its_reason_and_leaves_the_model_alone(
    feature: Feature, kind: Kind, cell: str, tmp_path: Path
) -> None:
    note = NOTES[cell.split()[1]]
    model: Any = feature.base(kind)
    before = laws.snapshot(model)
    with pytest.raises(ValueError, match=note.ours):
        feature.observe(graphpeft, feature, dataclasses.replace(kind, make=lambda: model), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    if isinstance(model, graphpeft.PeftModel):
        model.unload()
    laws.require_unchanged(model, before, "what is refused")
    attempted(note, feature, kind, tmp_path / "theirs")


IN_VAIN = {"a": "plain", "g": "plain"}
"""Notes of what PEFT takes and ignores, with the feature that is the same without it."""


@cells(*IN_VAIN)
def test_what_peft_takes_in_vain_changes_nothing_there(feature: Feature, kind: Kind, cell: str, tmp_path: Path) -> None:
    [other] = [feature for feature in FEATURES if feature.name == IN_VAIN[cell.split()[1]]]
    theirs, without = (each.observe(peft, each, kind, tmp_path / each.name) for each in (feature, other))
    compare(theirs, without, 1e-6)


def attempted(note: Note, feature: Feature, kind: Kind, folder: Path) -> Seen | None:
    """Returns what PEFT makes of a cell, or None if it fails as the note says."""
    if note.pefts is None:
        return feature.observe(peft, feature, kind, folder)
    # PEFT's errors are of many kinds, and once there is none, compare with it
    with pytest.raises(Exception, match=note.pefts):
        feature.observe(peft, feature, kind, folder)
    return None
