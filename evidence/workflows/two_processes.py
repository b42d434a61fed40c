"""Workflows that run in two processes at once, which talk by gloo; the two are started once for all of a module.

A part of a workflow, as training that goes on from a checkpoint, can have two new processes.
"""

from __future__ import annotations

import functools
import importlib
import os
import queue
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing
from workflow import Script, Values

WORLD = 2
SECONDS = 15  # that a process waits for the other in a collective
IMPORTS = timedelta(minutes=2)  # that it waits for the other to have its imports


def in_two_processes(check: Script) -> Script:
    """Returns a workflow that runs a function in two processes, and returns what the first of them does."""

    @functools.wraps(check)
    def run(peft: ModuleType, folder: Path) -> Values:
        return _pair(peft.__name__)(_Task(check.__module__, check.__name__, str(folder)))

    return run


def in_two_new_processes(check: Script) -> Script:
    """Returns what runs a function of `in_two_processes` in two processes of its own, which end with it."""

    @functools.wraps(check)
    def run(peft: ModuleType, folder: Path) -> Values:
        call = _started(peft.__name__)
        try:
            return call(_Task(check.__module__, check.__name__, str(folder)))
        finally:
            call(None)

    return run


class _Task(NamedTuple):
    module: str
    check: str
    folder: str


@functools.cache
def _pair(library: str) -> Callable[[_Task | None], Values]:
    return _started(library)


def _started(library: str) -> Callable[[_Task | None], Values]:
    """Starts two processes, and returns what gives them a task, or ends them."""
    spawned = torch.multiprocessing.get_context("spawn")
    tasks, answers = [spawned.SimpleQueue() for _ in range(WORLD)], spawned.Queue()
    for rank, own in enumerate(tasks):
        spawned.Process(target=_serve, args=(library, rank, own, answers), daemon=True).start()

    def call(task: _Task | None) -> Values:
        for each in tasks:
            each.put(task)
        if task is None:
            return {}
        found: dict[int, Any] = {}
        while len(found) < WORLD:
            try:
                rank, found[rank] = answers.get(timeout=IMPORTS.total_seconds() + 60)
            except queue.Empty:
                _pair.cache_clear()  # those that hang are left, and end with this process
                raise TimeoutError(f"only {sorted(found)} of {WORLD} processes have answered") from None
        if errors := [f"process {rank}: {answer}" for rank, answer in found.items() if isinstance(answer, str)]:
            raise RuntimeError("; ".join(errors))
        return found[0]

    return call


def _serve(library: str, rank: int, tasks: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    package = importlib.import_module(library)
    while (task := tasks.get()) is not None:
        try:
            answers.put((rank, _run(package, rank, task)))
        except Exception as error:
            traceback.print_exc()
            answers.put((rank, f"{type(error).__name__}: {error}"))


def _run(package: ModuleType, rank: int, task: _Task) -> Values:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29499"}  # looked for, and not used
    check = getattr(importlib.import_module(task.module), task.check).__wrapped__
    os.chdir(task.folder)
    store = dist.FileStore(f"{task.folder}/store", WORLD)
    store.set(f"ready {rank}", "")
    store.wait([f"ready {each}" for each in range(WORLD)], IMPORTS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=SECONDS))
    try:
        torch.manual_seed(0)
        return check(package, Path(task.folder))
    finally:
        dist.destroy_process_group()
