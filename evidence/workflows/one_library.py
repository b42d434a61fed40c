"""Runs workflows with one library, in a process that never sees the other, and writes a line of JSON for each.

python evidence/workflows/one_library.py graphpeft with_trl file.jsonl
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
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from workflow import Workflow, workflows


def main(library: str, module: str, lines: str) -> None:
    """Runs them in order; a line is written as soon as its workflow has ended."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    package = importlib.import_module(library)
    with Path(lines).open("a", encoding="utf-8") as file:
        for each in workflows(module):
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
    main(*sys.argv[1:])
