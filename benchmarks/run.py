"""Compares graphpeft's speed with PEFT's, both in one process, and prints tables.

python benchmarks/run.py                       everything
python benchmarks/run.py import forward        some of it
python benchmarks/run.py injection --rounds 3  faster and noisier
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a model hub

import peft
import torch
import transformers
from experts import experts_time
from export import export_time
from injection import injection_time
from llama import forward_time, training_time
from loading import loading_time
from methods import methods_injection, methods_kept, methods_time
from mixed import mixed_time
from passes import compiled_time, kept_for_backward, passes_time
from processes import first_model, import_time
from timing import Row, table

BENCHMARKS: dict[str, tuple[Callable[[int], list[Row]], int]] = {
    "import": (import_time, 10),
    "first": (first_model, 5),
    "injection": (injection_time, 10),
    "forward": (forward_time, 100),
    "training": (training_time, 50),
    "methods": (methods_time, 10),
    "methods-kept": (methods_kept, 1),
    "methods-injection": (methods_injection, 10),
    "experts": (experts_time, 30),
    "loading": (loading_time, 20),
    "mixed": (mixed_time, 50),
    "passes": (passes_time, 50),
    "kept": (kept_for_backward, 1),
    "compiled": (compiled_time, 30),
    "export": (export_time, 30),
}
"""The benchmarks by name, each with the number of rounds that gives steady medians."""


def main() -> None:
    """Runs the chosen benchmarks and prints a table of each, as soon as it is measured."""
    options = parse()
    # PEFT asks transformers for this attribute by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    random.seed(0)
    torch.set_num_threads(options.threads)
    print(machine())
    start = time.perf_counter()
    for name in BENCHMARKS if "all" in options.names else options.names:
        benchmark, rounds = BENCHMARKS[name]
        print(f"\n{table(benchmark(options.rounds or rounds))}", flush=True)
    print(f"\n{NOTES}\nIt took {time.perf_counter() - start:.0f} s.")


NOTES = """\
Times are medians: wall time for import, processor time for the rest (wall time too with --threads above 1). A ratio is
the median, over the rounds, of graphpeft's time by the other's in the same round, ± half of its 95 % confidence
interval; "?" marks a verdict whose limit lies inside that interval. Garbage is collected before every round and every
adaptation, and its collector stays on. Only "the first in a process" has to trace and compile; the other adaptations
find the graph of nn.Linear in graphpeft's cache."""


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compares graphpeft's speed with PEFT's.")
    names = [*BENCHMARKS, "all"]
    parser.add_argument("names", nargs="*", choices=names, default="all", metavar="NAME", help=" | ".join(names))
    parser.add_argument("--rounds", type=int, help="how often everything is measured (default: as steady medians need)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    return parser.parse_args()


def machine() -> str:
    """Describes where the numbers come from."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft))
    return (
        f"{processor()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()}; "
        f"Python {platform.python_version()}, {versions}; {time.strftime('%Y-%m-%d')}"
    )


def processor() -> str:
    """Returns the processor's name as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


if __name__ == "__main__":
    main()
