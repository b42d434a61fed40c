"""Exported models: their time and their size beside those of the base's export, in the same runtime."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import onnxruntime
import torch
from models import adapted, llama
from safetensors.torch import load_file
from timing import Ratio, Row, Target, calls, measure, size

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
WAYS = ("base", "base again", "merged", "baked", "inputs")


def export_time(rounds: int) -> list[Row]:
    """Times exports of one forward, and compares the sizes of files."""
    with tempfile.TemporaryDirectory() as folder:
        return [row for case in CASES for format in SUFFIXES for row in _rows(case, format, Path(folder), rounds)]


def _rows(case: Case, format: str, folder: Path, rounds: int) -> list[Row]:
    base = llama(case.hidden, case.layers)
    example = {"input_ids": torch.randint(0, 256, (1, 1)), "use_cache": False}
    model = adapted(base, "graphpeft")
    paths = {way: folder / f"{case.hidden} {way}{SUFFIXES[format]}" for way in WAYS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a compiler's options
        for way, path in paths.items():
            is_base = way.startswith("base")
            graphpeft.export(base if is_base else model, example, path, format, "merged" if is_base else way)
    with torch.no_grad():
        candidates = {way: calls(_run(format, path, example, way)) for way, path in paths.items()}
        samples = measure(f"{format}, {case.name}", candidates, rounds)
    bytes_of = {way: paths[way].stat().st_size for way in WAYS}
    what = f"{case.name}: {format}"
    targets = {"base again": None, "merged": Target.equal(), "baked": None, "inputs": case.inputs}
    rows = [
        Row(
            f"{what}, {way}",
            median(samples["base"]),
            None,
            median(samples[way]),
            "base",
            Ratio.of(samples[way], samples["base"]),
            target,
        )
        for way, target in targets.items()
    ]
    share = bytes_of["merged"] / bytes_of["base"]
    sizes = (bytes_of["base"], None, bytes_of["merged"])
    rows.append(Row(f"{what}, bytes merged", *sizes, "base", Ratio(share, share, share), Target.equal(), size))
    return rows


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
