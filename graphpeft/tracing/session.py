"""The findings of a trace of one module, shared by the parts of the tracer."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn

from graphpeft.code.namespaces import Attribute
from graphpeft.graph.changed_weight import RefusedWeight
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_code import class_of_forward
from graphpeft.graph.paths import join
from graphpeft.tracing.iterators import draws_error
from graphpeft.tracing.snapshot import Snapshot


class Recording(NamedTuple):
    """A recording in progress.

    Attributes:
        before: A snapshot of all state that the forward can reach, taken before the recording and restored after it.
        drawing: The modules whose code names an iterator, with the iterator's name in code.
        set_aside: Makes a context without the slowest patches, for calls that aren't recorded.
        outside: Makes a context that runs code outside the trace.
    """

    before: Snapshot
    drawing: Mapping[nn.Module, str]
    set_aside: Callable[[], AbstractContextManager[None]]
    outside: Callable[[], AbstractContextManager[None]]

    def refuse_iterators(self, module: nn.Module) -> None:
        """Raises TraceError if the code of `module` can draw from an iterator."""
        if module in self.drawing:
            raise draws_error(self.drawing[module])


class RecordAgain(BaseException):
    """Ends a recording that must start again; a BaseException, so that the model's code doesn't catch it."""


class Session:
    """A trace of one module, made by one or several recordings.

    Attributes:
        root: The module.
        modules: The modules of the root, by path.
        modes: Whether each module is recorded as in training; modules without an entry keep their present mode.
        gradients: Whether the recording assumes gradients.
        kept: The paths of modules that couldn't be inlined, with the reason.
        not_kept: The names of state that the forward sets and that later calls don't need.
        constants: The constants of the graph, stored as attributes of its root.
        reads: The names of the root's attributes that the forward reads.
        lines_of_reads: The source line that reads each plain attribute of a module, by attribute path.
        looked_up: The parameter looked up last in a module, with its path in this module.
        read_once: The containers, objects and missing attributes (`ABSENT`) that code reads from modules, by path.
        stateful: The paths of modules that must stay calls, since they change state for their next call, with reasons.
        watches_draws: Whether each inlined module is watched for draws from Python's and NumPy's generators.
        has_hashed: Whether code has hashed a traced value, as caches do.
        specialised: Whether the graph depends on facts that equal modules may not share, such as the shape of a
            parameter.
        recording: The recording in progress, or None.
        assigners: In this recording, the paths of the modules whose code assigns each attribute.
        called: In this recording, the number of calls of each inlined module, by path.
        left: In a second recording, the nodes for state that the first recording has set, by the first one's nodes.
    """

    root: nn.Module

    def __init__(self, keeps_whole: Callable[[nn.Module], bool], one_more: Callable[[], object] | None = None) -> None:
        self.keeps_whole, self.one_more = keeps_whole, one_more
        self.modules: dict[str, nn.Module] = {}
        self.modes: Mapping[nn.Module, bool] = {}
        self.gradients = True
        self.kept: dict[str, str] = {}
        self.not_kept: dict[str, None] = {}
        self.constants = Constants()
        self.reads: set[str] = set()
        self.lines_of_reads: dict[str, str] = {}
        self.looked_up: tuple[torch.Tensor, str] | None = None
        self.read_once: dict[str, Any] = {}
        self.stateful: dict[str, str] = {}
        self.watches_draws = False
        self.has_hashed = False
        self.specialised = False
        self.recording: Recording | None = None
        self._names: dict[int, str] = {}
        self.begin_recording()

    def begin(self, root: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
        """Begins the trace of a module."""
        self.root, self.modes, self.gradients = root, modes, torch.is_grad_enabled()
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self._names = {}
        for name, tensor in _named_tensors(root):
            self._names.setdefault(id(tensor), name)

    def begin_recording(self) -> None:
        """Resets the attributes that belong to one recording."""
        self.assigners: dict[Attribute, list[str]] = {}
        self.called: collections.Counter[str] = collections.Counter()
        self.left: dict[fx.Node, fx.Node] | None = None
        self.constants.begin()

    def followed_classes(self) -> set[type]:
        """Returns the classes of the root and of the modules whose code is recorded with it."""
        modules = set(self.modules.values())
        return {class_of_forward(module) for module in modules if module is self.root or not self.keeps_whole(module)}

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Returns the path of a parameter, a buffer or another attribute of the root's modules, or None."""
        return self._names.get(id(tensor))

    def own_tensor(self, node: fx.Node) -> torch.Tensor | None:
        """Returns the tensor of a module that a node reads, of which its example is a copy without attributes."""
        path, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or path not in self.modules:
            return None
        held = self.modules[path]
        return held._parameters.get(name, held._buffers.get(name))

    def mode_of(self, module: nn.Module) -> bool:
        """Returns whether a module is recorded as one in training."""
        if module in self.modes:
            return self.modes[module]
        own = module.__dict__
        # a scripted module stores its mode outside __dict__
        return bool(own["training"] if "training" in own else type(module).__getattr__(module, "training"))

    def is_made_anew(self, value: Any) -> bool:
        """Returns whether `value` is a tensor that the forward has made."""
        return isinstance(value, torch.Tensor) and (self.recording is None or not self.recording.before.holds(value))


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in root.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, torch.Tensor):
                yield join(path, name), value


class Constants:
    """The constants of one tracer's graphs.

    Attributes:
        values: The constants by name, stored as attributes of the graph's root.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self._made: dict[str, Any] = {}

    def begin(self) -> None:
        """Starts a recording: forgets the names of the last recording's constants."""
        self._made = {}

    def name_of(self, value: Any, is_made_anew: Callable[[Any], bool]) -> str:
        """Returns the name of a constant. A tensor that each recording makes again keeps its name of the last one."""
        if isinstance(value, RefusedWeight):
            raise TraceError(value.reason)
        names = [name for name, constant in self.values.items() if constant is value]
        names += [name for name, made in self._made.items() if made is value]
        if not names and is_made_anew(value):
            earlier = [name for name in self.values if name not in self._made and is_made_anew(self.values[name])]
            names = [name for name in earlier if _is_equal(value, self.values[name])]
        name = names[0] if names else f"_constant_{len(self.values)}"
        self.values.setdefault(name, value)
        self._made[name] = value
        return name


def _is_equal(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    if (tensor.dtype, tensor.device) != (other.dtype, other.device):
        return False
    return not tensor.is_meta and not tensor.requires_grad and not other.requires_grad and torch.equal(tensor, other)
