"""Adapts models of many packages with PEFT and with graphpeft, compares, and writes docs/third_party.md.

    python evidence/third_party/run.py [names of packages or of models]

What was measured is kept in build/third_party.jsonl, and not measured again; delete that file to begin anew. Packages
that aren't installed are told, and left out: their rows remain as they were measured last.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("PYTORCH_TCN_ALLOW_DROP_IN", "1")  # PEFT makes a convolution of the layer's own class

import torch
from case import Case
from tqdm import tqdm

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "build" / "third_party.jsonl"
PAGE = ROOT / "docs" / "third_party.md"
MODULES = ("graph_nets", "vision", "language", "audio", "tables_and_series", "generative")


def main(wanted: list[str]) -> None:
    """Measures what wasn't yet, and writes the page of all."""
    _load_torchaudio()
    # only now, since Transformers loads torchaudio
    from measure import measure
    from page import page

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.touch()
    every = {case.key: case for case in _cases()}
    done = {row["case"] for row in _rows()}
    left = [case for key, case in every.items() if key not in done and _is_wanted(case, wanted)]
    for case in (progress := tqdm(left, unit="model")):
        progress.set_description(case.key)
        with MEASURED.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(sys.stderr):
            row = {**measure(case), "version": metadata.version(case.package)}
            for check, lines in row.pop("traces", {}).items():
                tqdm.write(f"{case.key}, {check}: {lines}", file=sys.stderr)
            print(json.dumps(row), file=file)
    rows = sorted((row for row in _rows()), key=lambda row: row["case"].lower())
    PAGE.write_text(page(rows, {key: case.note for key, case in every.items()}), encoding="utf-8")
    tqdm.write(f"wrote {PAGE.relative_to(ROOT)}")


def _load_torchaudio() -> None:
    """Loads torchaudio, which refuses a PyTorch of another CUDA even where no device is used."""
    if importlib.util.find_spec("torchaudio") is not None:
        version, torch.version.cuda = torch.version.cuda, None
        try:
            importlib.import_module("torchaudio")
        finally:
            torch.version.cuda = version


def _cases() -> Iterator[Case]:
    for module in MODULES:
        for of_package in importlib.import_module(module).PACKAGES:
            try:
                yield from of_package()
            except ImportError as error:
                tqdm.write(f"without {of_package.__name__}: {error}")


def _rows() -> list[dict]:
    return [json.loads(line) for line in MEASURED.read_text(encoding="utf-8").splitlines()]


def _is_wanted(case: Case, wanted: list[str]) -> bool:
    return not wanted or case.package in wanted or case.name in wanted


if __name__ == "__main__":
    main(sys.argv[1:])
