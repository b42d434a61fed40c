"""What a trace of one module has found out so far, for the parts of the tracer to read and to add to."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import nn

from graphpeft.code.namespaces import Attribute
from graphpeft.graph.paths import join
from graphpeft.tracing.constants import Constants
from graphpeft.tracing.iterators import draws_error
from graphpeft.tracing.snapshot import Snapshot


class Recording(NamedTuple):
    """A recording that goes on.

    Attributes:
        before: What all that the forward can reach was before it, and is put back to.
        drawing: The modules whose code names an iterator, with what it is to the code.
        set_aside: What a call that isn't recorded runs under, so that it doesn't go through the costliest exchanges.
        outside: What code runs under that is no part of the trace: as it would without one.
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
    """Ends a recording that has to begin again; no code of a model's may take it for an error."""


class Session:
    """A trace of one module, by one or several recordings.

    Args:
        keeps_whole: Tells of a submodule whether its call stays one node of the graph.

    Attributes:
        root: The module.
        modules: The modules of the root, by their paths.
        modes: Whether modules are recorded as in training; those that aren't among them are as they are.
        gradients: Whether it is recorded as with gradients.
        kept: The modules that could not be inlined, with the reason.
        not_kept: The paths of attributes that the forward sets, of which a later call makes no use.
        constants: Objects of the user's that the graph reads as attributes of its root.
        reads: The names of the attributes that are read from the root.
        lines_of_reads: Where the numbers, flags and other plain values were read that modules have, by their paths.
        looked_up: The parameter that was looked up last in a module, with its path there.
        read_once: The containers and objects that are read from modules, by their paths, and names that lack there.
        stateful: The paths of modules that have to stay calls since they change what their next call sees, with why.
        watches_draws: Whether each module that is inlined must not draw from Python's or NumPy's generator.
        has_hashed: Whether code has asked for the hash of a traced value, as caches do.
        specialised: Whether the graph holds what other instances need not share, such as a shape of the root's tensors.
        recording: The recording that goes on, if one does.
        assigners: In it, the modules whose code has assigned to attributes, by their paths.
        called: In it, how often modules were called that were inlined, by their paths.
        left: In a second recording, the nodes that stand for what the first one has left on modules.
    """

    root: nn.Module

    def __init__(self, keeps_whole: Callable[[nn.Module], bool]) -> None:
        self.keeps_whole = keeps_whole
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
        """Forgets what belongs to one recording."""
        self.assigners: dict[Attribute, list[str]] = {}
        self.called: collections.Counter[str] = collections.Counter()
        self.left: dict[fx.Node, fx.Node] | None = None
        self.constants.begin()

    def name_of(self, tensor: torch.Tensor) -> str | None:
        """Returns the path of a parameter, a buffer or another attribute of the root's modules, or None."""
        return self._names.get(id(tensor))

    def mode_of(self, module: nn.Module) -> bool:
        """Returns whether a module is recorded as one in training."""
        if module in self.modes:
            return self.modes[module]
        own = module.__dict__
        # a scripted module keeps it where its code does
        return bool(own["training"] if "training" in own else type(module).__getattr__(module, "training"))

    def is_made_anew(self, value: Any) -> bool:
        """Returns whether `value` is a tensor that the forward has made itself."""
        return isinstance(value, torch.Tensor) and (self.recording is None or not self.recording.before.holds(value))


def _named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in root.named_modules():
        for name, value in (*module._parameters.items(), *module._buffers.items(), *module.__dict__.items()):
            if isinstance(value, torch.Tensor):
                yield join(path, name), value
