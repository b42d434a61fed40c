"""Finds the token sequence of a model, which a prompt can extend: the source of every attention's query.

In the dataflow graph these are the values that dominate all queries: no way leads from the inputs to an attention but
through them. A module that is given such a value, contains the attentions, and returns a sequence of the same shape is
the place. Each place has been tried on a copy of the graph.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from graphpeft._torch import pytree
from graphpeft.graph.calls import Call, calls_of
from graphpeft.graph.copied_graphs import copy_graph
from graphpeft.graph.errors import OUT_OF_MEMORY, TraceError
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.graph.ops.boundaries import boundary_of
from graphpeft.graph.template import VALUE, template_of
from graphpeft.graph.traced_model import stands_for
from graphpeft.methods.prompts.example_values import Ran, is_sequence, run
from graphpeft.methods.prompts.in_scope import InScope
from graphpeft.rules import rewrite
from graphpeft.rules.rule import BoundaryRule
from graphpeft.sites.attentions import LAYERS, attentions
from graphpeft.sites.dataflow import as_digraph
from graphpeft.tracing.trace import trace
from graphpeft.wording import joined


class TokenSequence(NamedTuple):
    """A place for virtual tokens.

    Attributes:
        prompt_scope: The modules whose sequence they extend, as an option of a config: one module, or a pattern for all
            modules that need tokens of their own (deep prompts).
        token_dim: The number of values of a token.
        length: The number of tokens for the example inputs.

    Examples:
        >>> found = TokenSequence("blocks", token_dim=64, length=101)
        >>> config = PromptTuningConfig(
        ...     num_virtual_tokens=4, prompt_scope=found.prompt_scope, token_dim=found.token_dim
        ... )
    """

    prompt_scope: str
    token_dim: int
    length: int


def find_token_sequence(model: nn.Module, example_inputs: ExampleInputs) -> TokenSequence:
    """Proposes where a prompt goes in any model, by its dataflow.

    Args:
        model: Any model that can be traced, or a traced one. It isn't changed.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.

    Returns:
        The place, whose `prompt_scope` and `token_dim` are options of a `PromptTuningConfig`.

    Raises:
        TraceError: If the model can't be traced, has no attention, or no module takes virtual tokens there.

    Examples:
        >>> import timm
        >>> model = timm.create_model("test_vit").eval()
        >>> find_token_sequence(model, (torch.randn(1, 3, 160, 160),))
        TokenSequence(prompt_scope='blocks', token_dim=64, length=101)
    """
    worn = template_of(model)
    traced = model if worn is not None and not worn.calls_own_forward else trace(model, example_inputs)
    template = template_of(traced)
    assert template is not None
    graph = template.graphs[template.index(traced)]
    _refuse_hidden_attentions(traced, graph)
    ran = run(traced, graph, example_inputs)
    queries = {attention.node: attention.query for attention in attentions(traced, graph, ran.values)}
    dominating = dominating_nodes(ran, queries)
    if isinstance(model, fx.GraphModule) and not any(map(calls_of, graph.nodes)):
        reason = "the graph doesn't tell which of its nodes belong to which module, as one by graphpeft.trace does"
        raise TraceError(f"{reason}; trace the model that it was made of")
    if not dominating:
        reason = f"no attention reads what a {stands_for(model).__name__} is given"
        raise TraceError(f"{reason}; name a module in prompt_scope yourself")
    failed: list[str] = []
    for calls in _candidates(ran, dominating):
        paths = list(dict.fromkeys(call.path for call in calls))
        error = error_with_a_token(ran, calls, example_inputs)
        if error is None:
            _, length, dim = ran.given(calls[0]).shape
            return TokenSequence(_pattern(paths, traced), dim, length)
        failed.append(f"{joined(paths)}: {error}")
    tried = f"; tried were {joined(failed, separator='; ')}" if failed else ""
    raise TraceError(
        f"no module around the attentions takes more tokens and returns as many{tried}; name one in prompt_scope "
        "yourself, or, for a Transformers model that embeds tokens, leave prompt_scope out"
    )


def _refuse_hidden_attentions(root: nn.Module, graph: fx.Graph) -> None:
    """Raises TraceError if a module that the trace has kept whole is given a sequence."""
    kept: Mapping[str, str] = getattr(root, "kept", {})
    for node in graph.nodes:
        if node.op != "call_module" or node.target not in kept:
            continue
        if isinstance(root.get_submodule(str(node.target)), LAYERS):
            continue
        if any(is_sequence(given.meta.get(VALUE)) for given in node.all_input_nodes):
            raise TraceError(
                f"{node.target} may hold an attention, but stays one call, since {kept[str(node.target)]}; name a "
                "module in prompt_scope yourself"
            )


def _candidates(ran: Ran, dominating: Mapping[fx.Node, set[str]]) -> Iterator[list[Call]]:
    """Yields calls that could take virtual tokens.

    First single calls around most of the attentions, whose argument dominates all queries; of calls around equally
    many, the innermost first. Then all outermost calls around attentions together.
    """
    common = set.intersection(*dominating.values())
    around = [[call for call in calls_of(node) if _keeps_sequence(ran, call)] for node in dominating]
    counted = Counter(call for calls in around for call in reversed(calls))
    for call, count in counted.most_common():
        if 2 * count > len(around) and next(iter(call.arguments.values())) in common:
            yield [call]
    outermost = list(dict.fromkeys(calls[0] for calls in around if calls))
    if all(around) and len(outermost) > 1:
        yield outermost


def _keeps_sequence(ran: Ran, call: Call) -> bool:
    """Returns whether a call maps a token sequence to one of the same shape."""
    given, returned = ran.given(call), ran.returned(call)
    return is_sequence(given) and is_sequence(returned) and given.shape == returned.shape


def _pattern(paths: list[str], root: nn.Module) -> str:
    """Returns a pattern that matches these modules and no others, with numbers left open where that does."""
    open_numbers = re.sub(r"\d+(?=\.|$)", lambda _: r"\d+", paths[0]).replace(".", r"\.")
    for pattern in (paths[0], open_numbers):
        if [path for path, _ in root.named_modules() if re.fullmatch(pattern, path)] == paths:
            return pattern
    return "|".join(map(re.escape, paths))


def dominating_nodes(ran: Ran, queries: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, set[str]]:
    """Returns for each attention the names of the nodes that are on each way of tensors from the inputs to its query.

    An attention whose query doesn't depend on the inputs is left out, such as a pooling by a parameter.
    """
    import networkx as nx

    flow = as_digraph(ran.graph)
    # a parameter that is read, or a shape that is asked for, brings no tokens
    flow.remove_nodes_from([n for n in ran.graph.nodes if n.op == "get_attr" or not _has_tensors(ran.values[n.name])])
    inputs = "the inputs"
    flow.add_edges_from((inputs, node) for node in list(flow) if node.op == "placeholder")
    immediate = nx.immediate_dominators(flow, inputs)

    def chain(node: Any) -> Iterator[str]:
        while node != inputs:
            yield node.name
            node = immediate[node]

    return {attention: set(chain(query)) for attention, query in queries.items() if query in immediate}


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


@dataclass(frozen=True)
class _OneToken(BoundaryRule):
    """The rule that puts one virtual token of zeros into a scope."""

    scope: InScope
    dim: int

    def parameters(self, site: Any, config: Any) -> dict[str, Any]:
        return {}

    def initialise(self, parameters: Mapping[str, Tensor], site: Any, config: Any, module: nn.Module) -> None:
        return None

    def enter(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return self.scope.enter(inputs[self.scope.sequence].new_zeros(1, self.dim), inputs, None, None)

    def leave(self, output: Any, inputs: Mapping[str, Any], entered: Mapping[str, Any]) -> Any:
        return self.scope.leave(output, inputs, entered)


def error_with_a_token(ran: Ran, calls: list[Call], example_inputs: ExampleInputs) -> str | None:
    """Returns why a model can't run with another token in each of some modules, or None."""
    sizes = sorted({ran.given(call).shape[2] for call in calls})
    if len(sizes) > 1:
        return f"their tokens have several sizes: {', '.join(map(str, sizes))}"
    graph = copy_graph(ran.graph)
    try:
        for call in calls:
            rule = _OneToken(InScope(1, "before", next(iter(call.arguments))), sizes[0])
            rewrite.insert(graph, boundary_of(graph, call.name), rule, {}, slot=0, method="trial")
        found = run(ran.root, graph, example_inputs)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        # whatever the model's code raises
        return str(error).strip().partition("\n")[0]
    return None if _shapes(found) == _shapes(ran) else "the model returns values of other shapes"


def _shapes(ran: Ran) -> list[Any]:
    returned = ran.values[ran.graph.output_node().name]
    return [leaf.shape if isinstance(leaf, Tensor) else None for leaf in pytree.tree_leaves(returned)]
