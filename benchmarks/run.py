"""Compares graphpeft's speed with PEFT's, both in one process for each benchmark, and prints tables.

python benchmarks/run.py                       everything
python benchmarks/run.py import forward        some of it
python benchmarks/run.py injection --rounds 3  faster and noisier
python benchmarks/run.py --quick               every row once, with small models, to see that it runs
python benchmarks/run.py --write               everything, into README.md and records.json
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a model hub

import page
import records
import torch
from cases import Cases, measured
from experts import experts_time
from export import export_time
from injection import injection_time
from llama import forward_time, training_time
from loading import loading_time
from methods import methods_injection, methods_kept, methods_time
from mixed import mixed_time
from passes import compiled_time, kept_for_backward, passes_time
from processes import first_model, import_time
from rows import Row, table
from source import commit, source
from timing import Effort

BENCHMARKS: dict[str, tuple[Callable[[Effort], Cases], int]] = {
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
    """Runs the chosen benchmarks, prints a table of each as soon as it is measured, and the failures at the end."""
    options = parse()
    torch.set_num_threads(options.threads)  # source() prints their number
    where = source(), commit()  # before anything changes while this runs
    print(where[0])
    start = time.perf_counter()
    rows, failed = run(options)
    print(f"\n{NOTES}\nIt took {time.perf_counter() - start:.0f} s.")
    if options.quick and options.names == "all":
        failed |= records.unmatched({row.name for row in rows}, records.read())
    if options.write and not failed:
        write(rows, *where)
    for what, reason in failed.items():
        print(f"\nFAILED: {what}\n{reason}")
    sys.exit(bool(failed))


NOTES = """\
Times are medians: wall time for import, processor time for the rest (wall time too with --threads above 1). A ratio is
the median, over the rounds, of graphpeft's time by the other's in the same round, ± half of its 95 % confidence
interval; "?" marks a verdict whose limit lies inside that interval. Garbage is collected before every round and every
adaptation, and its collector stays on. Every adaptation records its graphs anew; only "the first in a process" reads
source files and compiles the generated forwards."""


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Compares graphpeft's speed with PEFT's.")
    names = [*BENCHMARKS, "all"]
    parser.add_argument("names", nargs="*", choices=names, default="all", metavar="NAME", help=" | ".join(names))
    parser.add_argument("--rounds", type=int, help="how often everything is measured (default: as steady medians need)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default: 1)")
    parser.add_argument("--quick", action="store_true", help="every row once, with small models, to see that it runs")
    parser.add_argument("--write", action="store_true", help="write the table of README.md, and records.json")
    options = parser.parse_args()
    if "all" in options.names:
        options.names = "all"
    if options.write and (options.quick or options.rounds or options.threads > 1 or options.names != "all"):
        parser.error("--write writes one table of everything, as it is measured by default: it takes no other option")
    return options


def run(options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of the chosen benchmarks, and the tracebacks of what failed."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    # a process each, or what an earlier one left on the heap would slow a later one; in a quick run, nothing is timed
    runs = ProcessPoolExecutor(
        1, multiprocessing.get_context("spawn"), prepare, (options,), max_tasks_per_child=None if options.quick else 1
    )
    with runs:
        for name in BENCHMARKS if options.names == "all" else options.names:
            start = time.perf_counter()
            found, errors = runs.submit(run_one, name, options).result()
            print(f"\n{table(found)}\n{name} took {time.perf_counter() - start:.0f} s.", flush=True)
            rows += found
            failed |= {f"{name}, {case}": error for case, error in errors.items()}
    return rows, failed


def prepare(options: argparse.Namespace) -> None:
    """Prepares a process that runs benchmarks."""
    # PEFT asks transformers for this attribute by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    random.seed(0)
    torch.set_num_threads(options.threads)
    if options.quick:
        gc.freeze()  # or looking through what was imported takes most of the time


def run_one(name: str, options: argparse.Namespace) -> tuple[list[Row], dict[str, str]]:
    """Returns the rows of a benchmark, and the tracebacks of what failed."""
    benchmark, rounds = BENCHMARKS[name]
    return measured(benchmark(Effort(options.rounds or (1 if options.quick else rounds), options.quick)))


def write(rows: Sequence[Row], source: str, commit: str) -> None:
    """Writes README.md's table, and the records with what this run improved."""
    recorded = records.updated(records.read(), rows, commit)
    records.write(recorded)
    text = page.README.read_text(encoding="utf-8")
    page.README.write_text(page.page(text, source, rows, recorded), encoding="utf-8")


if __name__ == "__main__":
    main()
