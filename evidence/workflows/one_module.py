"""Runs a module's workflows with each library, in processes that don't see the other; writes a line of JSON for each.

The libraries that the module imports are imported once, and a process is forked for either library.

python evidence/workflows/one_module.py with_trl_sft folder peft graphpeft
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from workflow import Workflow, workflows


def main(module: str, folder: Path, libraries: Sequence[str]) -> None:
    """Runs them in order, one library after the other, with what they print in a log beside the lines."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    scripts = workflows(module)
    for library in libraries:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        log = os.open(folder / f"{module}-{library}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, sys.stdout.fileno())
        os.dup2(log, sys.stderr.fileno())
        try:
            _run(scripts, library, folder / f"{module}-{library}.jsonl")
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            # not by sys.exit: at its end, a library may wait for threads that the fork hasn't copied
            os._exit(0)


def _run(scripts: Sequence[Workflow], library: str, lines: Path) -> None:
    """Runs workflows with one library; a line is written as soon as its workflow has ended."""
    package = importlib.import_module(library)
    with lines.open("w", encoding="utf-8") as file:
        for each in scripts:
            print(json.dumps({"workflow": each.name, **_outcome(each, package)}), file=file, flush=True)


def _outcome(each: Workflow, package: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)  # where some tools write
            with contextlib.redirect_stdout(sys.stderr):
                return {"values": each.script(package, Path(folder))}
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
