"""Processes that save adapters again and again, to be killed; PyTorch is imported once for all of them.

Run as a script, it reads commands from its input: ``start <folder> <name> …`` forks a process that saves these adapters
in turn into the folder, and answers with its number when it has saved the last one; with ``cut:<n>`` as the first name,
it kills itself before it then moves its n-th file into place. ``wait <number>`` is answered when a process has ended.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import graphpeft


class Saved(NamedTuple):
    """An adapter: all its tensors have one value."""

    r: int
    alpha: int
    value: float


ADAPTERS = {"a": Saved(2, 3, 1.0), "b": Saved(2, 30, 2.0), "c": Saved(3, 5, 3.0)}


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).eval()


def adapted(name: str) -> Any:
    saved = ADAPTERS[name]
    config = graphpeft.LoraConfig(r=saved.r, lora_alpha=saved.alpha, target_modules=["0", "2"])
    model = graphpeft.get_peft_model(base(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.fill_(saved.value)
    return model


def found_in(folder: Path) -> str:
    """Loads what lies in a folder, and returns which adapter it is.

    Raises:
        AssertionError: If it is none.
    """
    model: Any = graphpeft.PeftModel.from_pretrained(base(), folder)
    config = model.peft_config["default"]
    values = {float(value) for t in graphpeft.get_peft_model_state_dict(model).values() for value in t.unique()}
    assert len(values) == 1, values
    found = Saved(config.r, config.lora_alpha, values.pop())
    names = [name for name, saved in ADAPTERS.items() if saved == found]
    assert names, found
    x = torch.ones(2, 6)
    with torch.no_grad():
        assert torch.equal(model(x), adapted(names[0])(x))
    return names[0]


class Writers:
    """The process that forks the writers."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, folder: Path, *names: str) -> int:
        """Starts a writer and returns its number, when it has saved once."""
        return int(self._answer(f"start {folder} {' '.join(names)}"))

    def wait(self, number: int) -> None:
        """Waits until a writer has ended."""
        self._answer(f"wait {number}")

    def _answer(self, command: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def kill(self, number: int) -> None:
        """Kills a writer where it is."""
        os.kill(number, signal.SIGKILL)
        self.wait(number)

    def end(self) -> None:
        """Ends the process."""
        self._process.communicate()


@contextlib.contextmanager
def writers() -> Iterator[Writers]:
    """Gives the process that forks writers."""
    process = Writers()
    try:
        yield process
    finally:
        process.end()


def _save_again_and_again(folder: str, names: list[str], begun: int) -> None:
    cut = int(names.pop(0).removeprefix("cut:")) if names[0].startswith("cut:") else None
    models = [_adapted_once(name) for name in names]
    models[-1].save_pretrained(folder)
    os.write(begun, b"!")
    if cut is not None:
        _kill_in_move(cut)
    while True:
        for model in models:
            model.save_pretrained(folder)


_adapted_once = functools.cache(adapted)


def _kill_in_move(number: int) -> None:
    replace, moves = os.replace, 0

    def replace_and_count(*arguments: Any) -> None:
        nonlocal moves
        moves += 1
        if moves == number:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)

    os.replace = replace_and_count


def _serve() -> None:
    print_to, children = os.dup(1), set()
    os.dup2(2, 1)  # what libraries print is no answer
    for name in ADAPTERS:
        _adapted_once(name)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "wait":
            os.waitpid(int(arguments[0]), 0)
            children.discard(int(arguments[0]))
            os.write(print_to, b"ended\n")
            continue
        ready, begun = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                _save_again_and_again(arguments[0], arguments[1:], begun)
            finally:
                os._exit(1)
        children.add(child)
        os.close(begun)
        os.read(ready, 1)
        os.close(ready)
        os.write(print_to, f"{child}\n".encode())
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    _serve()
