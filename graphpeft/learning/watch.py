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
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils.weak import WeakTensorKeyDictionary

from graphpeft._torch import base_of, pytree
from graphpeft.graph.changed_weight import ChangedWeight, layer_of
from graphpeft.graph.dependencies import writes_by_method
from graphpeft.graph.guards import is_machinery
from graphpeft.graph.running_nodes import GENERATED, running_node
from graphpeft.graph.tags import TAG
from graphpeft.graph.template import LINE

_TORCH = os.path.dirname(torch.__file__)
_CHECK = os.path.join(os.path.dirname(__file__), "check.py")

_READS = frozenset(("item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"))
"""Functions that make something else than tensors of a tensor's values."""


class Cut(NamedTuple):
    """An operation whose result has no gradient, though its input has one.

    Attributes:
        function: The operation.
        line: The line of code.
        inputs: The inputs that have a gradient, each with the node of the graph of gradients that has made it.
        under_no_grad: Whether gradients were off there.
        is_number: Whether the result is of floating-point numbers.
        escapes: Whether the result is no tensor, and can't be followed.
        within: The `torch.autograd.Function` in whose forward it is; "" if that is an adapter's; None outside of any.
    """

    function: str
    line: str
    inputs: tuple[tuple[Tensor, Any], ...]
    under_no_grad: bool
    is_number: bool
    escapes: bool
    within: str | None

    def reaches(self, tensor: Tensor) -> bool:
        """Returns whether an input was computed from `tensor`, or is that itself."""
        return any(given is tensor or tensor in leaves_above(given, made_by) for given, made_by in self.inputs)


class Watch(TorchFunctionMode):
    """Watches a forward while its context is entered.

    Attributes:
        called: The line of code of the first call of each watched module, or of the first read of its weight, by path.
        empty: The paths of those that were given no rows in any call.
        cuts: The operations at which values leave the graph of gradients, in their order.
        silent: The functions whose backward gives no gradient; None before the loss is made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.called: dict[str, str] = {}
        self.empty: set[str] = set()
        self.cuts: list[Cut] = []
        self.silent: SilentFunctions | None = None
        self._loss: Tensor | None = None
        # the places of the cuts whose results a tensor was computed from
        self._behind: Any = WeakTensorKeyDictionary()
        self._escaped: set[int] = set()
        self._paths: dict[int, str] = {}

    @contextlib.contextmanager
    def of(self, modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Iterator[None]:
        """Watches calls of modules, and all operations, in the context."""
        self._paths = {id(modules[path]): path for path in paths}
        with contextlib.ExitStack() as stack:
            for path in self._paths.values():
                note = modules[path].register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: self._note_call(path, (args, kwargs)), with_kwargs=True
                )
                stack.callback(note.remove)
            stack.enter_context(self)
            yield

    def before_backward(self, loss: Tensor) -> None:
        """Notes the loss."""
        self._loss, self.silent = loss, SilentFunctions(loss)

    def cuts_of(self, tensor: Tensor) -> list[Cut]:
        """Returns the cuts through which a tensor has come to the loss, or to where that can't be seen."""
        behind = set() if self._loss is None else self._behind.get(self._loss, set())
        cuts = [(place, cut) for place, cut in enumerate(self.cuts) if cut.reaches(tensor)]
        arrived = [cut for place, cut in cuts if place in behind]
        found = arrived or [cut for place, cut in cuts if place in self._escaped or cut.escapes]
        # within a function's forward, gradients are off, whether it has a gradient or not
        return [cut for cut in found if cut.within is None] or found

    def _note_call(self, path: str, given: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)]
        is_empty = bool(tensors) and not tensors[0].numel()
        if path not in self.called:
            self.called[path] = line_of(sys._getframe(1))
            self.empty |= {path} if is_empty else set()
        elif not is_empty:
            self.empty.discard(path)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        read = _tensors(_read_by(name, args, kwargs))
        layers = [id(layer_of(tensor)) for tensor in read if type(tensor) is ChangedWeight]
        for path in [self._paths[layer] for layer in layers if layer in self._paths]:
            self.called.setdefault(path, line_of(sys._getframe(1)))
        # before the call, which may detach what it is given
        tracked = tuple((tensor, _made_by(tensor)) for tensor in read if tensor.requires_grad)
        result = func(*args, **kwargs)
        made = _tensors(args[:1] if name == "__setitem__" else result)
        behind = {place for tensor in read for place in self._behind.get(tensor, ())}
        is_off = bool(made) and not any(tensor.requires_grad for tensor in made)
        if tracked and (is_off or name in _READS):
            cut = _cut(func, name, tracked, any(tensor.is_floating_point() for tensor in made))
            if cut is not None:
                behind.add(len(self.cuts))
                self.cuts.append(cut)
        if behind:
            for tensor in (*made, *_written_whole(name, made)):
                self._behind[tensor] = self._behind.get(tensor, set()) | behind
            if name in _READS:
                self._escaped |= behind
        return result


def _made_by(tensor: Tensor) -> Any:
    try:
        return tensor.grad_fn
    except RuntimeError:  # of a view that was made without gradients, and whose base was written since
        return None


def _written_whole(name: str, made: list[Tensor]) -> list[Tensor]:
    """Returns the tensors of which a function has written a part."""
    bases = [base_of(tensor) for tensor in made] if writes_by_method(name) else []
    return [base for base in bases if base is not None]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _read_by(name: str, args: Any, kwargs: Any) -> Any:
    """Returns those of a function's arguments whose values it reads, and not the shape or the type alone."""
    if name.endswith("_like") or name.startswith("new_"):
        return args[1:]
    return args[:1] if name.endswith("_as") else (args, kwargs)


def _cut(func: Any, name: str, tracked: tuple[tuple[Tensor, Any], ...], is_number: bool) -> Cut | None:
    """Returns the cut that the running function makes; None if it is an adapter's own, which has its other ways."""
    frame, is_off = sys._getframe(2), not torch.is_grad_enabled()
    is_own, within = _surroundings(frame)
    if is_own and not is_off:
        return None
    told = resolve_name(func) or name or str(func)
    return Cut(told, line_of(frame), tracked, is_off, is_number, name in _READS, within if is_off else None)


def _surroundings(frame: FrameType | None) -> tuple[bool, str | None]:
    """Returns whether a node of an adapter runs in a frame, and the function whose forward runs, as `Cut` has it."""
    is_own, within, graphs = False, None, 0
    while frame is not None and frame.f_code.co_filename != _CHECK:
        first = frame.f_code.co_varnames[:1]
        if not within and first and isinstance(context := frame.f_locals.get(first[0]), FunctionCtx):
            within = type(context).__name__.removesuffix("Backward")
        if frame.f_code.co_filename.startswith(GENERATED):
            running = running_node(frame)
            graphs += 1
            if graphs == 1 and running is not None and TAG in running[1].meta:
                is_own, within = True, within and ""
        frame = frame.f_back
    return is_own, within


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


def leaves_above(tensor: Tensor, made_by: Any) -> set[Tensor]:
    """Returns the leaves from which a tensor was computed."""
    if made_by is not None:
        return {node.variable for node in _above(made_by) if hasattr(node, "variable")}
    # without gradients, a view has no node, though it requires a gradient as its base does
    base = base_of(tensor)
    if base is None:
        return {tensor}
    return {base} if base.is_leaf else leaves_above(base, base.grad_fn)


class SilentFunctions:
    """Notes each `torch.autograd.Function` whose backward gives no gradient."""

    def __init__(self, loss: Tensor) -> None:
        self._found: list[Any] = []
        for node in [node for node in _above(loss.grad_fn) if isinstance(node, BackwardCFunction)]:
            node.register_hook(lambda given, _, node=node: self._note(node, given))

    def _note(self, node: Any, given: tuple[Tensor | None, ...]) -> None:
        if all(each is None for each in given):
            self._found.append(node)

    def above(self, tensor: Tensor) -> str | None:
        """Returns the name of such a function through which a tensor has come to the loss; None without one."""
        for node in self._found:
            if any(getattr(above, "variable", None) is tensor for above in _above(node)):
                return type(node).__name__.removesuffix("Backward")
        return None


def _above(node: Any) -> Iterator[Any]:
    """Yields a node and all from which its value was computed."""
    seen: set[Any] = set()
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [source for source, _ in node.next_functions]
