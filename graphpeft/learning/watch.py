"""Watches one forward: which modules are called, from which line, and where values leave the graph of gradients."""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from graphpeft._torch import pytree
from graphpeft.graph.guards import is_machinery
from graphpeft.graph.running_nodes import GENERATED, running_node
from graphpeft.graph.template import LINE

_TORCH = os.path.dirname(torch.__file__)
_CHECK = os.path.join(os.path.dirname(__file__), "check.py")


class Cut(NamedTuple):
    """An operation whose result has no gradient, though its input has one.

    Attributes:
        function: The operation.
        line: The line of code.
        inputs: The inputs that have a gradient.
        under_no_grad: Whether gradients were off there.
        is_number: Whether the result is of floating-point numbers.
    """

    function: str
    line: str
    inputs: tuple[Tensor, ...]
    under_no_grad: bool
    is_number: bool

    def reaches(self, tensor: Tensor) -> bool:
        """Returns whether an input was computed from `tensor`, or is that itself."""
        return any(given is tensor or tensor in leaves_above(given) for given in self.inputs)


class Watch(TorchFunctionMode):
    """Watches a forward while its context is entered.

    Attributes:
        called: The line of code of the first call of each watched module, by path.
        cuts: The operations at which values leave the graph of gradients, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, str] = {}
        self.cuts: list[Cut] = []

    @contextlib.contextmanager
    def of(self, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Iterator[None]:
        """Watches calls of modules, and all operations, in the context."""
        with contextlib.ExitStack() as stack:
            for path in paths:
                note = modules[path].register_forward_pre_hook(lambda *_, path=path: self._note_call(path))
                stack.callback(note.remove)
            stack.enter_context(self)
            yield

    def _note_call(self, path: str) -> None:
        if path not in self.called:
            self.called[path] = line_of(sys._getframe(1))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tracked = [tensor for tensor in given if tensor.requires_grad]
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if tracked and made and not any(tensor.requires_grad for tensor in made):
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            line, is_number = line_of(sys._getframe(1)), any(tensor.is_floating_point() for tensor in made)
            self.cuts.append(Cut(name, line, tuple(tracked), not torch.is_grad_enabled(), is_number))
        return result


def leaves_above(tensor: Tensor) -> set[Tensor]:
    """Returns the leaves of the graph of gradients from which a tensor was computed."""
    found: set[Tensor] = set()
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        waiting += [source for source, _ in node.next_functions]
    return found


def line_of(frame: FrameType | None) -> str:
    """Returns the innermost line of the model's code that runs in a frame or around it.

    It is "" if there is none, as in a `Sequential` of PyTorch's own layers.

    Of a graph's code it is the line from which the node was recorded.
    """
    # what is around the check is no code of the model
    while frame is not None and frame.f_code.co_filename != _CHECK:
        file, number = frame.f_code.co_filename, frame.f_lineno
        if file.startswith(GENERATED):
            recorded = _recorded_line(frame)
            if recorded is not None:
                return _shown(*recorded)
        elif not is_machinery(file) and not file.startswith(_TORCH):
            return _shown(file, number)
        frame = frame.f_back
    return ""


def _recorded_line(frame: FrameType) -> tuple[str, int] | None:
    running = running_node(frame)
    return None if running is None else running[1].meta.get(LINE)


def _shown(file: str, number: int) -> str:
    return f"`{linecache.getline(file, number).strip()}` ({os.path.basename(file)}:{number})"
