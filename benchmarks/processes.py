"""What only a fresh process can show: importing, and adapting the first model."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from cases import Cases
from rows import Row, Target
from timing import Effort, Ratio, Sampler, measure

_HERE = Path(__file__).parent

_IMPORT = """
import time
start = time.perf_counter()
import {package}
print(time.perf_counter() - start)
"""

_FIRST_MODEL = """
import torch
from models import adapt, nest
from timing import clock
torch.set_num_threads(1)
model = nest(layers=25)
start = clock()
adapt(model, {library!r})
print(clock() - start)
"""


def import_time(effort: Effort) -> Cases:
    """Imports each library, and torch alone, in processes of their own; starting Python isn't counted."""
    return {"import": functools.partial(_import_rows, effort)}


def first_model(effort: Effort) -> Cases:
    """Adapts one model of 175 targets in a process that has adapted nothing before."""
    return {"first": functools.partial(_first_rows, effort)}


def _import_rows(effort: Effort) -> list[Row]:
    packages = {"torch": "torch", "PEFT": "peft", "graphpeft": "graphpeft"}
    candidates = {name: in_process(_IMPORT.format(package=package)) for name, package in packages.items()}
    torch, peft, ours = measure("import", candidates, effort).values()
    times = median(torch), median(peft), median(ours)
    return [Row("import (base: torch alone)", *times, "PEFT", Ratio.of(ours, peft), Target.at_most(0.33))]


def _first_rows(effort: Effort) -> list[Row]:
    candidates = {library: in_process(_FIRST_MODEL.format(library=library)) for library in ("PEFT", "graphpeft")}
    peft, ours = measure("first model", candidates, effort).values()
    what = "get_peft_model, 175 targets, the first in a process"
    return [Row(what, None, median(peft), median(ours), "PEFT", Ratio.of(ours, peft))]


def in_process(code: str) -> Sampler:
    """Runs `code` in a fresh process, which prints the seconds."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(_HERE), *filter(None, [os.getenv("PYTHONPATH")])])}
    # installed packages have bytecode, and a library that had to be compiled each time would be slower by half
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def sample() -> float:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return float(done.stdout.split()[-1])

    return sample
