"""Where numbers come from: machine, versions, commit and day."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from pathlib import Path

import peft
import torch
import transformers


def source() -> str:
    """Describes it in a line."""
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (torch, transformers, peft))
    return (
        f"{_processor()}, {os.cpu_count()} cores, torch on {torch.get_num_threads()}; "
        f"Python {platform.python_version()}, {versions}; graphpeft at {commit()}; {time.strftime('%Y-%m-%d')}"
    )


def commit() -> str:
    """Returns the commit of the working tree, with a plus sign if files have changed since."""
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return _git("rev-parse", "--short=7", "HEAD") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(
        command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True
    ).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
