"""The modules of a model and their graphs; each graph is recorded once."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from graphpeft.graph import in_place
from graphpeft.graph.errors import NeedsInputsError, TraceError
from graphpeft.graph.hosts.patched_forwards import name_of, newly_patched_forward
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.layers import given
from graphpeft.graph.paths import join, modules_by_path, within
from graphpeft.graph.template import Template, runs_graph, template_of
from graphpeft.sites import example_runs
from graphpeft.sites.weight_uses import WeightUses, weight_uses
from graphpeft.tracing.module_graphs import Recordings


class Lifted(NamedTuple):
    """A region as it was when its first adapter came.

    Attributes:
        template: Its graph, without any adapter.
        module: The module.
        cls: The module's class.
    """

    template: Template
    module: nn.Module
    cls: type

    def __reduce__(self) -> tuple[Any, ...]:
        # a class that is made in a function can't be pickled, and its instance may be
        return _lifted, (self.template, self.module)


def _lifted(template: Template, module: nn.Module) -> Lifted:
    return Lifted(template, module, in_place.original_class(module))


class Regions:
    """The modules of one model that can have graphs; the model stays unchanged.

    Attributes:
        all_modules: The modules of the model, by path.
        modules: The modules that may have sites.
        scripted: The reason why a module of ``torch.jit`` can't have sites, by path.
        graphs: The paths of modules that run a graph without any adapter.
        recordings: The recordings of this call.
        templates: The graphs of the regions recorded so far, by path.
        renewed: The paths of regions that aren't the known modules any more.
        errors: The reason why a region can't have a graph, by path.
        flows: The tensors that get gradients in calls of layers, by kind of layer, see `gradient_flow`.
    """

    def __init__(self, model: nn.Module, known: Mapping[str, Lifted], example_inputs: ExampleInputs | None) -> None:
        modules = modules_by_path(model)
        self.scripted = _scripted(modules)
        self.all_modules = modules
        self.modules = {path: modules[path] for path in modules if path not in self.scripted}
        # a model has many modules, and few classes
        kinds = {kind for kind in set(map(type, self.modules.values())) if issubclass(kind, fx.GraphModule)}
        graphs = {path for path, module in self.modules.items() if type(module) in kinds and runs_graph(module)}
        # where an adapter of this model, or of one around or inside, has brought the graph, the next one's sites are to
        # be in the regions that they would be in without it: a layer's own graph runs before that of the module around
        self.graphs = {path for path in graphs - known.keys() if not _is_brought(self.modules[path])}
        self.known = known
        self.example_inputs = example_inputs
        self.recordings = Recordings()
        self.templates: dict[str, Template] = {}
        self.renewed: set[str] = set()
        self.errors: dict[str, TraceError] = {}
        self.flows: dict[Hashable, Any] = {}

    def template(self, path: str) -> Template | None:
        """Returns the graph of the module at `path`, or None if it can't have one; `errors` says why."""
        if path in self.errors:
            return None
        found = self.templates.get(path)
        if found is not None:
            return found
        try:
            found = self.present(path) or self._lift(path)
            if found.calls_own_forward:
                raise TraceError(
                    "an adapter changes what it is given, so that its graph only calls its code; unload that "
                    "adapter, put this one on first, and then that one"
                )
        except TraceError as error:
            self.errors[path] = error
            return None
        self.templates[path] = found
        return found

    def present(self, path: str) -> Template | None:
        """Returns the graph of the module at `path`, or the known one if the module is still the same; or None.

        If it is another module, `renewed` gets the path.
        """
        module = self.modules[path]
        worn, known = template_of(module), self.known.get(path)
        if worn is not None or known is None:
            return worn
        if known.module is module and in_place.original_class(module) is known.cls:
            return known.template
        self.renewed.add(path)
        return None

    def _lift(self, path: str) -> Template:
        module, model = self.modules[path], self.modules[""]
        if self.is_set_on_model(path):
            if "_orig_mod" in model._modules:
                raise TraceError(
                    "torch.compile has set its forward; adapt model._orig_mod, and compile that afterwards"
                )
            name = name_of(newly_patched_forward(model))
            raise TraceError(
                f"its forward was set on the instance ({name}), which may be what others call with arguments of their "
                "own; put that forward into a class, or into a module around this one"
            )
        try:
            template = given(module) or self.recordings.lift(module)
        except NeedsInputsError:
            # a PyTorch layer may choose in each call how it computes, as an attention its fast path, and a recording
            # would fix one way, so the layer runs its own code
            is_of_pytorch = (in_place.original_class(module).forward.__module__ or "").startswith("torch.nn.")
            if self.example_inputs is None or is_of_pytorch:
                raise
            template = None
        if template is not None and (self.example_inputs is None or not example_runs.defaults(module.forward)):
            return template
        assert self.example_inputs is not None
        # without inputs, the graph has the defaults of arguments that the model itself passes
        ways = self.ways.get(path, [])
        if len(ways) > 1:
            names = sorted({name for way in ways for name, _ in way})
            raise TraceError(f"the model calls it both with and without {', '.join(names)}")
        if template is not None and not any(ways):
            return template
        return self.recordings.lift(module, example_runs.inputs_of(model, module, self.example_inputs))

    @functools.cached_property
    def ways(self) -> dict[str, list[example_runs.Way]]:
        """The ways in which the model calls its modules in a run on the example inputs."""
        assert self.example_inputs is not None
        called = {path: module for path, module in self.modules.items() if self.is_called(path)}
        return example_runs.ways_of_calling(self.modules[""], called, self.example_inputs)

    def uses(self, region: str, owner: str, attribute: str) -> WeightUses | None:
        """Returns the uses of a weight in the graph of a region, or None."""
        found = weight_uses(self.templates[region], self.modules[region])
        return found.get(attribute if owner == region else join(within(owner, region), attribute))

    def is_set_on_model(self, path: str) -> bool:
        """Returns whether `path` is that of the model, whose forward is patched; see `model/patched_forwards.py`."""
        return not path and newly_patched_forward(self.modules[""]) is not None

    def is_called(self, path: str) -> bool:
        """Returns whether a module has a forward, which a container such as ``nn.ModuleList`` lacks."""
        return type(self.modules[path]).forward is not nn.Module.forward

    def around(self, path: str) -> tuple[str | None, str]:
        """Returns the path of the innermost module with a forward around `path`, and `path` relative to it."""
        outer, inside = path, ""
        while outer:
            outer, _, name = outer.rpartition(".")
            inside = join(name, inside)
            if self.is_called(outer):
                return outer, inside
        return None, inside

    def inputs_of(self, path: str) -> ExampleInputs | None:
        """Returns the inputs that the model's example inputs give the module at `path`; None without example inputs."""
        if self.example_inputs is None:
            return None
        return example_runs.inputs_of(self.modules[""], self.modules[path], self.example_inputs)


def _is_brought(module: nn.Module) -> bool:
    """Returns whether an adapter has brought the graph of a module, which nobody has edited since."""
    template = template_of(module)
    return template is not None and template.shared and not issubclass(in_place.original_class(module), fx.GraphModule)


def _scripted(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns why scripted modules, and modules inside them, can't be adapted, by path."""
    kinds = {kind for kind in set(map(type, modules.values())) if issubclass(kind, torch.jit.ScriptModule)}
    found: dict[str, str] = {}
    for root in [path for path, module in modules.items() if type(module) in kinds] if kinds else ():
        reason = (
            f"{root or 'the model'} is a ScriptModule, which can't be changed any more; put the module that it was "
            "made from in its place, and adapt that"
        )
        for path in modules:
            if path == root or not root or path.startswith(f"{root}."):
                found.setdefault(path, reason)
    return found
