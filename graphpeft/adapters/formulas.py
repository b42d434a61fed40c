"""The computation of a layer's tensor with the changes of adapters, by the code of their rules."""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.fx as fx
from torch import Tensor, nn
from torch.fx.proxy import TraceError as ProxyError

from graphpeft._torch import is_recorded_by_jit, is_transformed
from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.autocast import without_autocast
from graphpeft.graph.changed_weight import Computation, RefusedWeight, changed_weight, note_read
from graphpeft.graph.compiling import compiled
from graphpeft.graph.ops import Weight
from graphpeft.graph.own_tensors import base_tensor, is_traced_by_fx, own_in_fx_graph, own_tensor
from graphpeft.graph.scaled_sum import is_captured
from graphpeft.graph.tags import Tag
from graphpeft.rules import rewrite
from graphpeft.rules.arguments import asked_by
from graphpeft.rules.code_in_graphs import RuleError
from graphpeft.rules.rule import OperationRule, changes_bias


class Changes(NamedTuple):
    """The changes of one tensor of a module.

    Attributes:
        weight: The name of the weight that adapters change.
        bias: The name of the bias beside it, if that is the tensor; None if the weight is.
        tags: The effects of adapters on the weight, in the order in which they act.
    """

    weight: str
    bias: str | None
    tags: tuple[Tag, ...]


class Formula:
    """Computes a tensor of a module with the changes of adapters."""

    def __init__(self, name: str, changes: Changes) -> None:
        self.name, self._changes = name, changes
        self._refusal = _refusal(name, changes)
        of_reason = {"reason": self._refusal}
        self._refused = type("RefusedWeight", (RefusedWeight,), of_reason) if self._refusal is not None else None
        # worked out before a compiler looks on
        self._steps = [] if self._refusal is not None else [_Step.of(tag, changes.bias) for tag in changes.tags]

    def without(self, slots: Iterable[int]) -> Changes:
        """Returns the changes but those by the adapters in these slots."""
        slots = {*slots}
        return self._changes._replace(tags=tuple([tag for tag in self._changes.tags if tag.slot not in slots]))

    def changed(self, module: nn.Module, own: Tensor) -> Tensor:
        """Returns the changed tensor, computed when its numbers are asked for."""
        if not self._changes.tags:
            return own
        run, getters = self._run
        try:
            values = (own, *[get(module) for get in getters])
        except AttributeError as error:
            raise self._failing(error) from error
        if self._refusal is None and (is_captured() or is_transformed() or is_recorded_by_jit()):
            note_read(module, self.name)
            return without_autocast(own.device.type, run, *values)
        return changed_weight(own, computation_of(run, values, module, self.name))

    def check(self, own: Tensor, path: str) -> None:
        """Runs the rules' code, as graphs do when they get it; raises AdaptError if that fails."""
        try:
            _ = self._run
        except (RuleError, ProxyError, rewrite.NoChangeError) as error:
            raise AdaptError(f"{path or 'the model'} can't be adapted: {error}") from error

    def captured(self, module: nn.Module) -> Tensor:
        """Returns the changed tensor by the rules' own code, which a compiler, and ``fx.symbolic_trace``, follows.

        One without changed numbers answers questions about its kind alone.
        """
        if self._refused is not None:
            return own_tensor(module, self.name).as_subclass(self._refused)
        try:
            return without_autocast(base_tensor(module, self._changes.weight).device.type, self._by_rules, module)
        except AttributeError as error:
            raise self._failing(error) from error

    def _by_rules(self, module: nn.Module) -> Tensor:
        read = functools.partial(own_in_fx_graph if is_traced_by_fx() else own_tensor, module)
        weight = base = read(self._changes.weight)
        bias: Any = None if self._changes.bias is None else read(self._changes.bias)
        base_bias = bias
        for rule, of_weight, of_bias, of_dropout in self._steps:
            there = {"weight": weight, "base": base, "bias": bias, "base_bias": base_bias}
            given = _given(module, there, of_weight)
            if of_bias is not None:
                change_of_bias = rule.bias_change(_given(module, there, of_bias))
                bias = bias if change_of_bias is None else bias + change_of_bias.to(bias.dtype)
            if of_dropout:
                weight = rule.changed_weight(weight, given, **_given(module, there, of_dropout))
            else:
                weight = weight + rule.change(given).to(weight.dtype)
        return weight if self._changes.bias is None else bias

    def _failing(self, error: AttributeError) -> RuntimeError:
        # Python would take an AttributeError of a property for a sign that there is none, and read the base's tensor
        return RuntimeError(f"{self.name} with the changes of adapters can't be computed: {error}")

    @functools.cached_property
    def _run(self) -> _Run:
        if self._refusal is not None:
            return functools.partial(refuse, self._refusal), []
        weight, bias, tags = self._changes
        graph = fx.Graph()
        if bias is not None:
            with torch.enable_grad():
                graph.output(rewrite.changed_bias(graph, weight, bias, tags))
        else:
            read = graph.create_node("get_attr", weight)
            graph.output(read)
            for tag in tags:
                attributes: Any = {
                    **dict(tag.attributes),
                    **({} if _drops_where_read(tag.rule) else {"training": None}),
                }
                rewrite.insert(graph, Weight(read, weight), tag.rule, attributes, tag.slot, tag.method)
        return _of_values(graph, self.name, (weight, bias), self)


def computation_of(run: Callable[..., Tensor], values: tuple[Any, ...], module: nn.Module, name: str) -> Computation:
    """Returns the computation of a tensor of a module, now."""
    return Computation(run, values, weakref.ref(module), name, type(module))


class _Step(NamedTuple):
    """The change that one adapter makes of a weight and the bias beside it.

    Attributes:
        rule: Its rule.
        of_weight: The arguments of the rule's change of the weight, each with its path in the module; None for tensors
            of the module itself.
        of_bias: Likewise of its change of the bias; None without one.
        of_dropout: Likewise of the dropout of what is multiplied by the weight, beside those.
    """

    rule: Any
    of_weight: list[tuple[str, str | None]]
    of_bias: list[tuple[str, str | None]] | None
    of_dropout: list[tuple[str, str | None]]

    @classmethod
    def of(cls, tag: Tag, bias: str | None) -> _Step:
        """Returns what an adapter does whose nodes have this tag."""
        rule, paths = tag.rule, dict(tag.attributes)
        of_bias = _arguments(rule.bias_delta, paths) if bias is not None and changes_bias(rule) else None
        of_use: list[tuple[str, str | None]] = [
            (name, paths[name]) for name in asked_by(rule.changed_weight).names if name in paths
        ]
        of_dropout = of_use if "training" in dict(of_use) and _drops_where_read(rule) else []
        return cls(rule, _arguments(rule.delta, paths), of_bias, of_dropout)


def _drops_where_read(rule: Any) -> bool:
    """Returns whether dropout acts on what code multiplies by the weight; beside an operation, it acts there alone."""
    return not isinstance(rule, OperationRule)


def _arguments(function: Callable[..., Any], paths: Mapping[str, str]) -> list[tuple[str, str | None]]:
    return [(name, paths.get(name)) for name in asked_by(function).among((*_OF_MODULE, *paths))]


def _given(module: nn.Module, there: Mapping[str, Any], arguments: list[tuple[str, str | None]]) -> dict[str, Any]:
    return {name: there[name] if path is None else _at(module, path) for name, path in arguments}


_OF_MODULE = ("weight", "base", "bias", "base_bias")


def _refusal(name: str, changes: Changes) -> str | None:
    """Returns why the effects of adapters are no change of a tensor that others could read, or None."""
    for tag in changes.tags:
        if not tag.is_change:
            reason = f"what an adapter of {tag.method} does there is no change of its {changes.weight}"
        elif tag.of_one_call:
            reason = f"an adapter of {tag.method} acts in one of the uses of its {changes.weight} alone"
        else:
            continue
        return (
            f"{name} of a layer is read by code beside the operation that is adapted, and {reason}; leave the layer "
            "out of the adapter's targets, or read graphpeft.own_weight(layer) there"
        )
    return None


_Run = tuple[Callable[..., Any], list[Callable[[nn.Module], Any]]]
"""A function of values, the first of which is the tensor without changes, and the getters of the others."""


def refuse(reason: str, *_: Any) -> Tensor:
    """Raises AdaptError with the reason, in the place of a computation."""
    raise AdaptError(reason)


def _at(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


def _of_values(graph: fx.Graph, first: str, own: Collection[str | None], owner: object) -> _Run:
    """Returns a graph as a function of the values of the attributes that it reads, and their getters."""
    paths = dict.fromkeys([first, *(str(node.target) for node in graph.nodes if node.op == "get_attr")])
    made = fx.Graph()
    inputs = {path: made.placeholder(f"value{number}") for number, path in enumerate(paths)}
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copies[node] = inputs[node.target] if node.op == "get_attr" else made.node_copy(node, copies.__getitem__)
    code = made.python_code(root_module="self")
    getters = [
        functools.partial(own_tensor, name=path) if path in own else operator.attrgetter(path)
        for path in paths
        if path != first
    ]
    return functools.partial(compiled(owner, made, code.src, code.globals), None), getters
