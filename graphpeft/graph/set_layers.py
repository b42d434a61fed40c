"""The graphs of layers on which a forward was set, which is their operation, see `ops/set_forwards.py`."""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

import torch.nn.functional as F
from torch import nn

from graphpeft.graph import in_place
from graphpeft.graph.errors import TraceError
from graphpeft.graph.kept_forwards import name_of, set_forward
from graphpeft.graph.ops.set_forwards import first_given, is_known_function, others_given, set_operation
from graphpeft.graph.template import ABSENT, FIXED, SET_FORWARD, Template


def as_set_on(module: nn.Module, template: Template) -> Template:
    """Returns the template of a layer on which a forward was set.

    Args:
        module: The layer.
        template: The template of the forward of its class.

    Raises:
        TraceError: If the class computes more than one operation on its input.
    """
    if any(node.target is F.pad for graph in template.graphs for node in graph.nodes):
        raise TraceError(
            f"its forward was set on the instance ({name_of(set_forward(module))}), and its padding_mode isn't "
            "'zeros', so an adapter of its convolution is given something else than that forward"
        )
    return _as_set(template, _first_argument(module))


def _first_argument(module: nn.Module) -> str:
    """Returns the name of the first argument of the forward that was set on a module."""
    try:
        parameters = list(inspect.signature(cast(Any, set_forward(module))).parameters.values())
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
        result = set_operation(graph, own_forward, operation, x, graph.call_function(others_given, (*given, name)))
    result.meta |= {FIXED: template.fixed, ABSENT: tuple(template.absent)}
    graph.output_node().args = (result,)
    for node in reversed(of_class):
        if not node.users and node.op != "output":
            graph.erase_node(node)
    graph.lint()
    return Template((graph,), shared=True)
