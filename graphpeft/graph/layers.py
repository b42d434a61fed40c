"""Hand-written graphs of PyTorch's linear layers, convolutions and embeddings, and of Transformers' Conv1D.

A layer with a patched forward has that as its one operation, see `ops/patched.py`.

Each graph calls one function of PyTorch. It reads the options from the module in each run, as the layer's own code
does, so one graph serves all layers of a class. Where that code branches on an option, each branch has a graph, and the
option is fixed while a module runs the graph, see `Template.fixed`.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import fx, nn

from graphpeft._torch import PADDING_OF_CONVOLUTION, computes_in_own_way
from graphpeft.graph import guards, in_place
from graphpeft.graph.computed_weights import computed_from
from graphpeft.graph.errors import TraceError
from graphpeft.graph.hosts.patched_forwards import name_of, patched_forward
from graphpeft.graph.ops.patched import first_given, is_known_function, others_given, patched_operation
from graphpeft.graph.replaceable import refuse_what_a_graph_cannot_replace
from graphpeft.graph.template import ABSENT, FIXED, SET_FORWARD, Template


def given(module: nn.Module) -> Template | None:
    """Returns the hand-written graph of a layer, or None for another module."""
    graph_of = _given_for(cast(Any, in_place.original_class(module)).forward)
    if graph_of is None or (module._parameters.get("weight") is None and computed_from(module, "weight") is None):
        return None
    refuse_what_a_graph_cannot_replace(module)
    template = graph_of(module)
    if template is not None and patched_forward(module) is not None:
        template = as_set_on(module, template)
    # an option can be fixed only where it is an attribute of the module itself, not of its class
    return template if template is not None and template.fixed.keys() <= vars(module).keys() else None


@functools.lru_cache(maxsize=256)
def _given_for(forward: Any) -> Callable[[Any], Template | None] | None:
    graph_of = _GRAPHS.get(forward) or _of_transformers(forward)
    return graph_of if graph_of is not None and _is_unpatched(forward) else None


def _is_unpatched(forward: Any) -> bool:
    """Returns whether a forward is PyTorch's or Transformers' own code, not a monkeypatch."""
    code = getattr(forward, "__code__", None)
    transformers = sys.modules.get("transformers")
    homes = [
        os.path.join(os.path.dirname(str(library.__file__)), "")
        for library in (torch, transformers)
        if library is not None
    ]
    return code is not None and code.co_filename.startswith(tuple(homes))


def _of_transformers(forward: Any) -> Callable[[Any], Template | None] | None:
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return _conv1d if pytorch_utils is not None and forward is pytorch_utils.Conv1D.forward else None


def _linear(module: Any) -> Template | None:
    return _linear_graph(module.bias is not None) if "bias" in module._parameters else None


def _convolution(function: Any, module: Any) -> Template | None:
    if computes_in_own_way(module) or "bias" not in module._parameters:
        return None
    return _convolution_graph(function, module.bias is not None, module.padding_mode)


def _transposed(function: Any, module: Any) -> Template | None:
    if computes_in_own_way(module) or "bias" not in module._parameters or module.padding_mode != "zeros":
        return None
    return _transposed_graph(function, module.bias is not None)


def _embedding(module: Any) -> Template:
    return _embedding_graph(module.max_norm is not None)


def _conv1d(module: Any) -> Template | None:
    return _conv1d_graph() if module._parameters.get("bias") is not None else None


_GRAPHS: dict[Any, Callable[[Any], Template | None]] = {
    nn.Linear.forward: _linear,
    nn.Embedding.forward: _embedding,
    nn.Conv1d.forward: functools.partial(_convolution, F.conv1d),
    nn.Conv2d.forward: functools.partial(_convolution, F.conv2d),
    nn.Conv3d.forward: functools.partial(_convolution, F.conv3d),
    nn.ConvTranspose1d.forward: functools.partial(_transposed, F.conv_transpose1d),
    nn.ConvTranspose2d.forward: functools.partial(_transposed, F.conv_transpose2d),
    nn.ConvTranspose3d.forward: functools.partial(_transposed, F.conv_transpose3d),
}
"""The functions that return a layer's graph, by the layer's forward."""


# graphs


def _attribute(graph: fx.Graph, name: str) -> fx.Node:
    return graph.create_node("get_attr", name)


def _tensors(graph: fx.Graph, has_bias: bool) -> tuple[fx.Node, fx.Node | None]:
    return _attribute(graph, "weight"), _attribute(graph, "bias") if has_bias else None


def _template(graph: fx.Graph, result: fx.Node, has_bias: bool = True, **fixed: Any) -> Template:
    graph.output(result)
    result.meta |= {FIXED: fixed, ABSENT: () if has_bias else ("bias",)}
    template = Template((graph,), shared=True)
    template.facts["is given"] = True
    return template


def is_given(template: Template) -> bool:
    """Returns whether a template is a hand-written one of a layer."""
    return "is given" in template.facts


@functools.cache
def _linear_graph(has_bias: bool) -> Template:
    graph = fx.Graph()
    x = graph.placeholder("input")
    return _template(graph, graph.call_function(F.linear, (x, *_tensors(graph, has_bias))), has_bias)


@functools.cache
def _convolution_graph(function: Any, has_bias: bool, padding_mode: str) -> Template:
    graph = fx.Graph()
    x = graph.placeholder("input")
    weight, bias = _tensors(graph, has_bias)
    stride, dilation, groups = (_attribute(graph, name) for name in ("stride", "dilation", "groups"))
    padding: Any = 0
    if padding_mode == "zeros":
        padding = _attribute(graph, "padding")
    else:
        x = graph.call_function(F.pad, (x, _attribute(graph, PADDING_OF_CONVOLUTION)), {"mode": padding_mode})
    y = graph.call_function(function, (x, weight, bias, stride, padding, dilation, groups))
    return _template(graph, y, has_bias, padding_mode=padding_mode)


@functools.cache
def _transposed_graph(function: Any, has_bias: bool) -> Template:
    graph = fx.Graph()
    x = graph.placeholder("input")
    output_size = graph.placeholder("output_size", default_value=None)
    # given an output_size, the layer would compute output_padding from it and the size of the input
    graph.call_function(guards.expect, (output_size, None, "the argument 'output_size'"))
    weight, bias = _tensors(graph, has_bias)
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    y = graph.call_function(function, (x, weight, bias, *(_attribute(graph, name) for name in names)))
    return _template(graph, y, has_bias, padding_mode="zeros")


@functools.cache
def _embedding_graph(shortens: bool) -> Template:
    graph = fx.Graph()
    x = graph.placeholder("input")
    names = ("padding_idx", "norm_type", "scale_grad_by_freq", "sparse", *(("max_norm",) if shortens else ()))
    options: dict[str, Any] = {name: _attribute(graph, name) for name in names}
    y = graph.call_function(F.embedding, (x, _attribute(graph, "weight")), options)
    return _template(graph, y, has_bias=True, **({} if shortens else {"max_norm": None}))


@functools.cache
def _conv1d_graph() -> Template:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight, bias = _tensors(graph, True)
    rows = graph.call_method("view", (x, -1, graph.call_method("size", (x, -1))))
    product = graph.call_function(torch.addmm, (bias, rows, weight))
    around = graph.call_function(operator.getitem, (graph.call_method("size", (x,)), slice(None, -1)))
    size = graph.call_function(operator.add, (around, (_attribute(graph, "nf"),)))
    return _template(graph, graph.call_method("view", (product, size)))


def as_set_on(module: nn.Module, template: Template) -> Template:
    """Returns the template of a layer with a patched forward."""
    if any(node.target is F.pad for graph in template.graphs for node in graph.nodes):
        raise TraceError(
            f"its forward was set on the instance ({name_of(patched_forward(module))}), and its padding_mode isn't "
            "'zeros', so an adapter of its convolution is given something else than that forward"
        )
    return _as_set(template, _first_argument(module))


def _first_argument(module: nn.Module) -> str:
    """Returns the name of the first argument of a module's patched forward."""
    try:
        parameters = list(inspect.signature(cast(Any, patched_forward(module))).parameters.values())
    except ValueError:  # a function in C
        parameters = []
    if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        return parameters[0].name
    # a function of ``*args, **kwargs`` hands on the names of the class's own forward
    own = list(inspect.signature(cast(Any, in_place.original_class(module)).forward).parameters)
    return own[1]


# cached, since equal layers share a template
@functools.lru_cache(maxsize=256)
def _as_set(template: Template, name: str) -> Template:
    (graph,) = template.copied_graphs()
    of_class = [*graph.nodes]
    operation = next(node for node in of_class if is_known_function(node.target))
    with graph.inserting_before(of_class[0]):
        given = [
            graph.create_node("placeholder", f"{stars}", name=stars.lstrip("*")) for stars in ("*args", "**kwargs")
        ]
        own_forward = graph.create_node("get_attr", SET_FORWARD, name="own_forward")
    with graph.inserting_before(operation.next):
        x = graph.call_function(first_given, (*given, name))
        result = patched_operation(graph, own_forward, operation, x, graph.call_function(others_given, (*given, name)))
    result.meta |= {FIXED: template.fixed, ABSENT: tuple(template.absent)}
    graph.output_node().args = (result,)
    for node in reversed(of_class):
        if not node.users and node.op != "output":
            graph.erase_node(node)
    graph.lint()
    return Template((graph,), shared=True)
