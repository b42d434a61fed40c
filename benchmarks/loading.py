"""Loading and choosing one adapter of many, on a model of 224 linear modules."""

from __future__ import annotations

import functools
import gc
import tempfile
import warnings
from pathlib import Path
from statistics import median
from typing import Any

from cases import Cases
from models import LIBRARIES, adapt, nest
from rows import Row, Target
from timing import Effort, Ratio, calls, clock, measure
from tqdm import tqdm

MANY = {"PEFT": 20, "graphpeft": 100}
"""How many adapters are loaded: of PEFT fewer, since the time of each grows with their number."""

_EDGE = 5
"""How many of the first, and of the last ones, are compared."""


def loading_time(effort: Effort) -> Cases:
    """Loads many adapters one after the other, and then lets one or the other act."""
    return {"loading": functools.partial(_rows, effort)}


def _rows(effort: Effort) -> list[Row]:
    many = {library: effort.of(count, _EDGE + 2) for library, count in MANY.items()}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on names
        models = {library: adapt(nest(effort.of(32, 1)), library) for library in LIBRARIES}
        models["graphpeft"].save_pretrained(folder)
        times = {library: _load(model, folder, library, many[library]) for library, model in models.items()}
        switches = {library: calls(_switch(model, many[library])) for library, model in models.items()}
        samples = measure("set_adapter", switches, effort)
    peft, ours = times["PEFT"], times["graphpeft"]
    late = _extrapolated(peft, many["graphpeft"])
    early, latest = ours[:_EDGE], ours[-_EDGE:]
    choice = median(samples["PEFT"]) * many["graphpeft"] / many["PEFT"]
    return [
        Row(
            f"load_adapter, 224 targets, the 100th (PEFT's extrapolated from {MANY['PEFT']})",
            None,
            late,
            median(latest),
            "PEFT",
            Ratio.of(latest, [late] * _EDGE),
            Target.at_most(0.01),
        ),
        Row(
            "load_adapter, the 99th to the 2nd",
            None,
            None,
            None,
            "itself",
            Ratio.of(sorted(latest), sorted(early)),
            Target.at_most(1.05),
        ),
        Row(
            f"set_adapter, 100 loaded (PEFT's extrapolated from {MANY['PEFT']}, as if in proportion)",
            None,
            choice,
            median(samples["graphpeft"]),
            "PEFT",
            Ratio.of(samples["graphpeft"], [choice] * effort.rounds),
            Target.at_most(0.015),
        ),
    ]


def _load(model: Any, folder: str, library: str, count: int) -> list[float]:
    """Loads adapters beside the first, and returns the seconds of each."""
    assert Path(folder, "adapter_config.json").exists()
    times = []
    for index in tqdm(range(1, count), desc=f"load_adapter, {library}", leave=False):
        gc.collect()
        start = clock()
        model.load_adapter(folder, f"a{index}")
        times.append(clock() - start)
    return times


def _extrapolated(times: list[float], number: int) -> float:
    """Returns what the adapter `number` would take, if each takes longer than the one before by the same amount."""
    first, last = median(times[:_EDGE]), median(times[-_EDGE:])
    growth = (last - first) / (len(times) - _EDGE)
    return last + growth * (number - 1 - (len(times) - _EDGE / 2))


def _switch(model: Any, count: int) -> Any:
    turn = 0

    def switch() -> None:
        nonlocal turn
        turn = turn % (count - 1) + 1
        model.set_adapter(f"a{turn}")

    return switch
