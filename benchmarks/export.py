"""Exported models: their time and their size beside those of the base's export, in the same runtime."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import onnxruntime
import torch
from cases import Cases
from models import adapted, llama
from rows import Row, Target, size
from safetensors.torch import load_file
from timing import Effort, Ratio, calls, measure

import graphpeft


class Case(NamedTuple):
    """A model with the number of its tokens, and what adapters as inputs may cost there."""

    name: str
    hidden: int
    layers: int
    inputs: Target


CASES = (
    Case("Llama 64 × 4, 1 token", 64, 4, Target.at_most(1.15)),
    Case("Llama 512 × 8, 1 token", 512, 8, Target.at_most(1.15)),
)
SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2", "aoti": ".pt2"}
ADAPTERS = {"base": "merged", "base again": "merged", "merged": "merged", "baked": "baked", "inputs": "inputs"}
"""How adapters are written, by files; the base has none, so it is the same for any."""


def export_time(effort: Effort) -> Cases:
    """Times exports of one forward, and compares the sizes of files."""
    folder = tempfile.TemporaryDirectory()  # removed with the cases
    exported = functools.cache(functools.partial(_exported, folder, effort))
    return {
        f"{format}, {case.name}": functools.partial(_rows, case, format, exported, effort)
        for case in CASES
        for format in SUFFIXES
    }


def _exported(
    folder: tempfile.TemporaryDirectory[str], effort: Effort, format: str, hidden: int, layers: int
) -> dict[str, Path]:
    """Returns the files; a quick run, whose time goes into compiling, has the first of the base as its second, too."""
    base = llama(hidden, layers)
    model = adapted(base, "graphpeft")
    paths = {way: Path(folder.name, f"{hidden} {format} {way}{SUFFIXES[format]}") for way in ADAPTERS}
    if effort.quick:
        paths["base again"] = paths["base"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a compiler's options
        for path, way in {path: way for way, path in paths.items()}.items():
            graphpeft.export(base if way.startswith("base") else model, _example(), path, format, ADAPTERS[way])
    return paths


def _example() -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 256, (1, 1)), "use_cache": False}


def _rows(
    case: Case, format: str, exported: Callable[[str, int, int], Mapping[str, Path]], effort: Effort
) -> list[Row]:
    paths = exported(format, effort.of(case.hidden, 64), effort.of(case.layers, 1))
    example = _example()
    with torch.no_grad():
        candidates = {way: calls(_run(format, path, example, way)) for way, path in paths.items()}
        samples = measure(f"{format}, {case.name}", candidates, effort)
    what = f"{case.name}: {format}"
    targets = {"base again": None, "merged": Target.equal(), "baked": None, "inputs": case.inputs}
    base = median(samples["base"])
    rows = [
        Row(
            f"{what}, {way}",
            base,
            None,
            median(samples[way]),
            "base",
            Ratio.of(samples[way], samples["base"]),
            target,
            noise=way == "base again",
        )
        for way, target in targets.items()
    ]
    before, merged = (paths[way].stat().st_size for way in ("base", "merged"))
    share = Ratio.exactly(merged / before)
    return [*rows, Row(f"{what}, bytes merged", before, None, merged, "base", share, Target.equal(), size)]


def _run(format: str, path: Path, example: dict[str, Any], way: str) -> Callable[[], object]:
    if format == "onnx":
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 3
        settings.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, settings)
        # the active adapter is the default of the adapter's inputs
        return functools.partial(session.run, None, {"input_ids": example["input_ids"].numpy()})
    loaded: Any = torch.export.load(path).module() if format == "pt2" else torch._inductor.aoti_load_package(str(path))
    given = {"adapters": dict(sorted(load_file(_adapter(path)).items()))} if way == "inputs" else {}
    return functools.partial(loaded, **example, **given)


def _adapter(path: Path) -> Path:
    return path.with_name(f"{path.stem}.default.safetensors")
