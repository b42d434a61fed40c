"""Computes the inputs of branches again in the backward, if this is cheap.

    x = silu(g) ∘ u,  x Aᵀ    saves g and u, but neither silu(g) nor x

Autograd saves x for the gradient of A only, since the frozen weight needs no gradient. The values from which x is
computed are mostly saved anyway: activations, norms and attention save their inputs. So the backward computes x, and
the values in between, again from saved values. If x itself is saved anyway, there is nothing to gain.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from graphpeft.graph.dependencies import reads_metadata_only, separates
from graphpeft.graph.tags import TAG
from graphpeft.passes.outcome import Outcome
from graphpeft.passes.products import product, products
from graphpeft.passes.reading import FirstProduct, first_products, put_in_place_of
from graphpeft.passes.recipes import FUNCTIONS, KEEP_THEIR_INPUTS, LAYERS, METHODS, recipe, run

_METHODS_THAT_KEEP_THEIR_INPUTS = frozenset(("bmm", "matmul", "mul", "pow"))
_KEEP_THEIR_RESULTS = frozenset(
    (F.scaled_dot_product_attention, F.relu, F.softmax, torch.exp, torch.relu, torch.rsqrt, torch.sigmoid, torch.tanh)
)
_NAMES: dict[Any, str] = {torch.mul: "mul", **{each: name for name, each in FUNCTIONS.items() if name != "layer"}}
_FUNCTIONS_THAT_KEEP_THEIR_INPUTS = frozenset(
    (operator.matmul, torch.bmm, torch.matmul, *(each for each, name in _NAMES.items() if name in KEEP_THEIR_INPUTS))
)


def recomputed_inputs(graph: fx.Graph, root: nn.Module) -> list[Outcome]:
    """Makes the products of branches save recipes instead of their inputs."""
    outcomes = []
    for x, readers in _readers(graph, root).items():
        reason = _recomputed(graph, x, readers, root)
        outcomes += [Outcome(site, reason) for reader in readers for site in reader.sites]
    return outcomes


def _recomputed(graph: fx.Graph, x: fx.Node, readers: Sequence[_Reader], root: nn.Module) -> str | None:
    """Makes the readers of `x` save its recipe, or returns the reason to leave them."""
    steps = _steps(x, root)
    if not steps:
        return "its input isn't computed from tensors that other operations save"
    nodes = list(graph.nodes)
    last = max(nodes.index(reader.node) for reader in readers)
    between = nodes[min(map(nodes.index, steps)) : last]
    if any(separates(node, root) for node in between):
        return "a node in between may write into its input"
    source = _write_recipes([node for node in nodes if node in steps], root)
    for reader in readers:
        reader.keep(source)
    return None


class _Reader(NamedTuple):
    """A single or grouped product of branches with their input.

    Attributes:
        node: The node of the product.
        sites: The names of the adapted operations.
        keep: Makes the product save a recipe, given by its node, instead of the input.
    """

    node: fx.Node
    sites: Sequence[str]
    keep: Callable[[fx.Node], None]


def _readers(graph: fx.Graph, root: nn.Module) -> dict[fx.Node, list[_Reader]]:
    """Returns the products of branches by the tensors that they save."""
    readers: dict[fx.Node, list[_Reader]] = {}
    for found in first_products(graph, root):
        if found.dropped is None:
            keep = functools.partial(_let_one_keep, found)
            readers.setdefault(found.kept, []).append(_Reader(found.node, [found.site], keep))
    for node in graph.nodes:
        if node.target is products:
            sites = [user.meta[TAG].site for user in node.users]
            readers.setdefault(node.args[0], []).append(
                _Reader(node, sites, functools.partial(_let_several_keep, node))
            )
    return readers


def _let_one_keep(found: FirstProduct, source: fx.Node) -> None:
    factor = found.factor(found.node)
    with found.node.graph.inserting_before(found.node):
        args = (found.kept, found.h, factor, *(found.dropout or (0.0, False)), source)
        put_in_place_of(found.node, found.node.graph.call_function(product, args))


def _let_several_keep(together: fx.Node, source: fx.Node) -> None:
    together.update_arg(2, source)


# recomputation


def _steps(x: fx.Node, root: nn.Module) -> set[fx.Node]:
    """Returns the nodes that compute `x` from saved values; none if there are no such nodes, or `x` itself is saved."""
    steps: set[fx.Node] = set()
    return steps if not _is_kept(x, root) and _follow(x, steps, root) else set()


def _follow(node: fx.Node, steps: set[fx.Node], root: nn.Module) -> bool:
    """Adds the nodes that compute a value to `steps`, and returns whether they start from saved values."""
    if _step(node, root) is None or not all(user in steps or reads_metadata_only(user) for user in node.users if steps):
        return _is_kept(node, root)
    steps.add(node)
    if node.op == "call_module":
        return True  # the layer saves its input
    return all(_follow(source, steps, root) for source in node.all_input_nodes if not _is_no_tensor(source))


def _step(node: fx.Node, root: nn.Module) -> str | None:
    """Returns the name of a node as a step of a recipe, or None if it can't be one."""
    if TAG in node.meta or node.kwargs.get("inplace") or "out" in node.kwargs:
        return None
    if node.op == "call_module":
        return "layer" if type(root.get_submodule(str(node.target))) in LAYERS else None
    if node.op == "call_method":
        return f".{node.target}" if node.target in METHODS else None
    return _NAMES.get(node.target) if node.op == "call_function" else None


def _is_no_tensor(node: fx.Node) -> bool:
    """Returns whether a node's value is metadata, such as a size or a dtype, or is computed from metadata."""
    sources = node.all_input_nodes if node.op == "call_function" else []
    return reads_metadata_only(node) or (bool(sources) and all(map(_is_no_tensor, sources)))


def _is_kept(node: fx.Node, root: nn.Module) -> bool:
    """Returns whether a value stays in memory for the backward even without branches."""
    if node.op in ("get_attr", "placeholder") or node.target in _KEEP_THEIR_RESULTS:
        return True
    return any(_keeps_input(user, node, root) for user in node.users)


def _keeps_input(user: fx.Node, value: fx.Node, root: nn.Module) -> bool:
    if user.op == "call_module":
        return type(root.get_submodule(str(user.target))) in LAYERS
    if user.op == "call_method":
        return user.target in _METHODS_THAT_KEEP_THEIR_INPUTS
    # a product with a frozen weight saves only the weight
    others = [node for node in user.all_input_nodes if node is not value]
    return user.target in _FUNCTIONS_THAT_KEEP_THEIR_INPUTS and not (
        others and all(node.op == "get_attr" for node in others)
    )


def _write_recipes(steps: Sequence[fx.Node], root: nn.Module) -> fx.Node:
    """Inserts the recipe of each step, and makes the steps save recipes, too; returns the last step's recipe."""
    recipes: dict[fx.Node, fx.Node] = {}
    for node in steps:
        recipes[node] = _write_recipe(node, recipes, root)
    return recipes[steps[-1]]


def _write_recipe(node: fx.Node, recipes: dict[fx.Node, fx.Node], root: nn.Module) -> fx.Node:
    """Inserts the recipe of a step, and makes the step save `recipes` instead of inputs that have some."""
    name, options = _step(node, root), dict(node.kwargs)
    with node.graph.inserting_before(node):
        layer = [node.graph.create_node("get_attr", str(node.target))] if node.op == "call_module" else []
        args = fx.map_arg(tuple(node.args), lambda argument: recipes.get(argument, argument))
        source = node.graph.call_function(recipe, (name, options, *layer, *args))
    if name in KEEP_THEIR_INPUTS and any(argument in recipes for argument in node.all_input_nodes):
        node.args, node.kwargs = (source, name, options, *node.args), {}
        node.op, node.target = "call_function", run
    return source
