"""The modules of a model and their graphs, each recorded once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphpeft.graph import in_place
from graphpeft.graph.errors import NeedsInputsError, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.layers import given
from graphpeft.graph.paths import join, modules_by_path, within
from graphpeft.graph.template import Template, runs_graph, template_of
from graphpeft.sites import example_runs
from graphpeft.sites.weight_uses import WeightUses, weight_uses
from graphpeft.tracing.lift import lift


class Regions:
    """The modules of one model that can have graphs; the model stays as it is.

    Args:
        model: The model.
        known: Graphs of regions that were recorded before, by path.
        example_inputs: Inputs of the model, for modules whose forward decides on theirs.

    Attributes:
        modules: The modules in which there may be sites, by path.
        scripted: Why there can't be any in the others, by path: those of ``torch.jit``.
        graphs: The paths of modules that run a graph already.
        templates: The graphs of the regions that were looked into, by path.
        errors: Why others can't have a graph, by path.
        flows: Where gradients go in calls of layers, by their kind, see `gradient_flow`.
    """

    def __init__(self, model: nn.Module, known: Mapping[str, Template], example_inputs: ExampleInputs | None) -> None:
        modules = modules_by_path(model)
        self.scripted = _scripted(modules)
        self.modules = {path: modules[path] for path in modules if path not in self.scripted}
        # a model has many modules, and few classes
        kinds = {kind for kind in set(map(type, self.modules.values())) if issubclass(kind, fx.GraphModule)}
        self.graphs = {path for path, module in self.modules.items() if type(module) in kinds and runs_graph(module)}
        self.known = known
        self.example_inputs = example_inputs
        self.templates: dict[str, Template] = {}
        self.errors: dict[str, TraceError] = {}
        self.flows: dict[Hashable, Any] = {}

    def template(self, path: str) -> Template | None:
        """Returns the graph of the module at `path`, or None if it can't have one; `errors` says why."""
        found = self.templates.get(path)
        if found is not None or path in self.errors:
            return found
        module = self.modules[path]
        try:
            found = template_of(module) or self.known.get(path) or self._lift(module)
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

    def _lift(self, module: nn.Module) -> Template:
        try:
            template = given(module) or lift(module)
        except NeedsInputsError:
            # a layer of PyTorch's decides in each call how it computes, as an attention on its fast path, of which a
            # recording would have one way: it runs its own code
            is_of_pytorch = in_place.original_class(module).forward.__module__.startswith("torch.nn.")
            if self.example_inputs is None or is_of_pytorch:
                raise
            return lift(module, example_runs.inputs_of(self.modules[""], module, self.example_inputs))
        if self.example_inputs is None:
            return template
        # the graph has the defaults of what the model itself gives
        inputs = example_runs.inputs_beyond_defaults(self.modules[""], module, self.example_inputs)
        return template if inputs is None else lift(module, inputs)

    def uses(self, region: str, owner: str, attribute: str) -> WeightUses | None:
        """Returns what the graph of a region does with a weight, or None if it doesn't use it.

        Args:
            region: The path of the region, whose graph is in `templates`.
            owner: The path of the module that owns the weight.
            attribute: The weight's name in it.
        """
        found = weight_uses(self.templates[region], self.modules[region])
        return found.get(attribute if owner == region else join(within(owner, region), attribute))

    def is_called(self, path: str) -> bool:
        """Returns whether a module has a forward, which a container has not."""
        return type(self.modules[path]).forward is not nn.Module.forward

    def around(self, path: str) -> tuple[str | None, str]:
        """Returns the path of the innermost module with a forward around `path`, and `path` as seen from there."""
        outer, inside = path, ""
        while outer:
            outer, _, name = outer.rpartition(".")
            inside = join(name, inside)
            if self.is_called(outer):
                return outer, inside
        return None, inside

    def inputs_of(self, path: str) -> ExampleInputs | None:
        """Returns what the example inputs of the model give the module at `path`; None without example inputs.

        Raises:
            TraceError: If they don't reach it.
        """
        if self.example_inputs is None:
            return None
        return example_runs.inputs_of(self.modules[""], self.modules[path], self.example_inputs)


def _scripted(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Returns the paths of scripted modules and of modules inside them, with the reason why they can't be adapted."""
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
