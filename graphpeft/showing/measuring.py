"""The costs of a forward: bytes that autograd keeps for the backward, by node and by module, and time by module.

Beside that, the shapes of the nodes' values.

A batch runs twice: once with autograd telling of each tensor that it saves, and once to be timed. The model, the
batch and the generators are as before afterwards.
"""

from __future__ import annotations

import collections
import contextlib
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from graphpeft._torch import pytree
from graphpeft.graph.inputs import ExampleInputs, split_inputs
from graphpeft.graph.running_nodes import running_node
from graphpeft.graph.template import worn_template
from graphpeft.learning.undone_runs import WritesUndone, batch_kept, undone, weights_cast_anew
from graphpeft.progress import steps
from graphpeft.showing.nodes import shape_of
from graphpeft.transaction import remember


class Costs(NamedTuple):
    """The costs of one forward.

    Attributes:
        kept: The bytes that are kept for the backward, by the path of each called module, with what is inside.
        kept_by_node: The same by the path of the module whose graph has a node, and the node's name.
        seconds: The time, by the path of each called module, with what is inside.
        shapes: The shapes and dtypes of values as text, by the path of the module whose graph has a node, and the
            node's name.
    """

    kept: Mapping[str, int]
    kept_by_node: Mapping[str, Mapping[str, int]]
    seconds: Mapping[str, float]
    shapes: Mapping[str, Mapping[str, str]]


def measured(model: nn.Module, modules: Mapping[str, nn.Module], batch: ExampleInputs) -> Costs:
    """Returns what a forward of a model costs, in the mode in which the model is."""
    args, kwargs = given = split_inputs(batch)

    def run() -> Any:
        with torch.enable_grad():
            return model(*args or (), **kwargs)

    keeping, timing, writes, shapes = _Keeping(modules), _Timing(), WritesUndone(model), NodeShapes(modules)
    # in inference mode nothing is kept
    with torch.inference_mode(False), undone(model), steps(2) as step:
        step("measuring what is kept")
        with batch_kept(model, given), weights_cast_anew(), keeping.watch.of(modules), writes:
            with torch.autograd.graph.saved_tensors_hooks(keeping.save, _Saved.load), shapes.noted():
                result = run()
            kept, by_node = keeping.sums(_own_memory(model, given))
            del result  # it has held the graph
        # the second run is not watched, which would take time, and writes into the same
        for parameter in writes.written:
            remember(parameter)
        step("measuring the time")
        with batch_kept(model, given), weights_cast_anew(), _watched(modules, timing.begin, timing.end):
            run()
    return Costs(kept, by_node, timing.seconds, shapes.found)


class _Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def load(self) -> Tensor:
        return self.tensor


class _Inside:
    """The modules whose calls run now."""

    def __init__(self) -> None:
        self.paths: list[str] = []

    @contextlib.contextmanager
    def of(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Follows calls of modules in the context."""
        with _watched(modules, self.paths.append, lambda _: self.paths.pop()):
            yield


class _Keeping:
    """Notes where tensors are saved; those that are kept at the end are counted."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.watch = _Inside()
        self._paths = {id(module): path for path, module in modules.items()}
        self._saved: list[tuple[weakref.ref[_Saved], tuple[str, ...], tuple[str, str] | None]] = []

    def save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        self._saved.append((weakref.ref(saved), tuple(self.watch.paths), self._place(sys._getframe(1))))
        return saved

    def _place(self, frame: FrameType | None) -> tuple[str, str] | None:
        """Returns the innermost node that is computed in a frame or around it, with the path of its graph's module."""
        while frame is not None:
            running = running_node(frame)
            if running is not None and id(running[0]) in self._paths:
                return self._paths[id(running[0])], running[1].name
            frame = frame.f_back
        return None

    def sums(self, counted: set[Any]) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
        """Returns the bytes by module and by node; of several tensors in one memory, the first is counted."""
        by_module: collections.Counter[str] = collections.Counter()
        by_node: dict[str, dict[str, int]] = {}
        for reference, paths, place in self._saved:
            saved = reference()
            if saved is None:
                continue
            memory, size = _memory(saved.tensor)
            if memory in counted:
                continue
            counted.add(memory)
            for path in dict.fromkeys(paths):
                by_module[path] += size
            if place is not None:
                nodes = by_node.setdefault(place[0], {})
                nodes[place[1]] = nodes.get(place[1], 0) + size
        return dict(by_module), by_node


class _Timing:
    """Adds up the time between the beginning and the end of each module's calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began: list[float] = []

    def begin(self, path: str) -> None:
        self._began.append(_now())

    def end(self, path: str) -> None:
        self.seconds[path] = self.seconds.get(path, 0.0) + _now() - self._began.pop()


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextlib.contextmanager
def _watched(
    modules: Mapping[str, nn.Module], begin: Callable[[str], object], end: Callable[[str], object]
) -> Iterator[None]:
    """Calls functions with a module's path when a call of it begins, and when it ends."""
    with contextlib.ExitStack() as stack:
        for path, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks
            before = module.register_forward_pre_hook(lambda *_, path=path: _none(begin(path)))
            stack.callback(before.remove)
            after = module.register_forward_hook(lambda *_, path=path: _none(end(path)), always_call=True)
            stack.callback(after.remove)
        yield


def _none(_: object) -> None:
    # what a hook returns would be the module's arguments or its result
    return None


def _own_memory(model: nn.Module, batch: Any) -> set[Any]:
    """Returns the memory that is there anyway: that of the model's tensors and of the batch."""
    given = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
    return {_memory(tensor)[0] for tensor in (*model.parameters(), *model.buffers(), *given)}


def _memory(tensor: Tensor) -> tuple[Any, int]:
    """Returns what is equal for tensors in one memory, and the bytes of that."""
    try:
        storage = tensor.untyped_storage()
        return (tensor.device, storage.data_ptr()), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a sparse tensor has no storage
        return id(tensor), tensor.numel() * tensor.element_size()


class NodeShapes(TorchFunctionMode):
    """Notes shapes while models run in its context.

    Attributes:
        found: Shapes and dtypes as text, by the path of a graph's module and a node's name.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.found: dict[str, dict[str, str]] = {}
        self._modules = {path: module for path, module in modules.items() if worn_template(module) is not None}
        self._paths = {id(module): path for path, module in self._modules.items()}

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Notes shapes in the context."""
        with contextlib.ExitStack() as stack:
            for path, module in self._modules.items():
                stack.callback(module.register_forward_hook(self._returns(path)).remove)
            stack.enter_context(self)
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Notes what the node that calls a function takes, and calls it."""
        self._note_taken(sys._getframe(1))
        return func(*args, **(kwargs or {}))

    def _note_taken(self, frame: FrameType | None) -> None:
        while frame is not None:
            running = running_node(frame)
            if running is not None:
                module, node = running
                if id(module) in self._paths:
                    for source in node.all_input_nodes:
                        self._note(self._paths[id(module)], source, frame.f_locals.get(source.name))
                return
            frame = frame.f_back

    def _returns(self, path: str) -> Callable[..., None]:
        def note(module: nn.Module, _: Any, output: Any) -> None:
            template = worn_template(module)
            if template is not None:
                end = next(iter(reversed(template.graphs[template.index(module)].nodes)))
                if isinstance(end.args[0], fx.Node):
                    self._note(path, end.args[0], output)

        return note

    def _note(self, path: str, node: fx.Node, value: Any) -> None:
        if shape := shape_of(value):
            self.found.setdefault(path, {})[node.name] = shape
