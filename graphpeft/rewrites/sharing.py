"""Tells where a replacement's value shares memory that is written in place later, and must be copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from graphpeft._torch import pytree, schemas_of
from graphpeft.graph.dependencies import separates, value_inputs
from graphpeft.graph.settings import CHECKS, is_number
from graphpeft.graph.template import VALUE
from graphpeft.rewrites.matching import Occurrence
from graphpeft.rewrites.pattern import RewriteError
from graphpeft.rewrites.reading import Reader
from graphpeft.rewrites.spellings import bound
from graphpeft.rewrites.values import same

_UNMARKED = frozenset(
    ("alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "chain_matmul", "dropout",
     "einsum", "feature_alpha_dropout", "feature_dropout", "getattr", "getitem", "meshgrid", "rrelu", "to", "type_as")
)  # fmt: skip
"""Functions that may return an argument or a view of it, though no schema says so."""


def needs_copy(
    occurrence: Occurrence,
    new: fx.Node,
    nodes: Mapping[fx.Node, fx.Node],
    added: Collection[fx.Node],
    reader: Reader,
    is_root: bool,
) -> bool:
    """Returns whether a new value must be a copy, since it may share memory that is written in place later.

    The old value must have owned its memory, or been a dropout that does nothing, where memory that it may share is
    written in place later. Writes may come later in the graph, or in the code that calls the module.
    """
    result = nodes[occurrence.result]
    inert = _owners_of_old(occurrence, nodes, reader)
    shared = {owner for owner in _owners(new) if owner not in added} - inert
    graph_nodes = list(result.graph.nodes)
    later = graph_nodes[graph_nodes.index(result) + 1 :]
    is_function = result.op in ("call_function", "call_method")
    if not inert and is_function and _may_share(result) and _is_tensor(result, reader):
        _refuse_written(result, later, reader)
    if not shared or not _is_tensor(new, reader):
        return False
    writer = next((node for node in later if _may_write(node, reader.root or nn.Module())), None)
    if writer is None and (is_root or not _reaches_output(result)):
        return False
    if _is_several(new):
        by = f"{writer.name} writes" if writer is not None else "the code that calls the module may write"
        raise RewriteError(
            f"the replacement's values at {result.name} are views, and {by} to tensors in place afterwards, which "
            "could change both; return copies, as x.clone() is"
        )
    return True


def _refuse_written(result: fx.Node, later: list[fx.Node], reader: Reader) -> None:
    """Raises RewriteError if memory that an old value may share is written in place while it is read."""
    owners = _owners(result)
    for writer in later:
        written = value_inputs(writer) if _may_write(writer, reader.root or nn.Module()) else []
        if any(each is result or not owners.isdisjoint(_owners(each)) for each in written):
            raise RewriteError(
                f"{result.name} may be a view of another tensor, and {writer.name} writes to that memory in place "
                "afterwards; whether the replacement's value is the same view isn't known, so the rewrite isn't made "
                "there: give it a condition that leaves this place out"
            )


def _owners(node: fx.Node) -> set[Any]:
    """Returns the nodes and the paths of the attributes whose memory a value may share."""
    found: set[Any] = set()
    waiting, seen = [node], {node}
    while waiting:
        each = waiting.pop()
        sources = [source for source in value_inputs(each) if source not in seen] if _may_share(each) else []
        if each.op == "get_attr" or not _may_share(each):
            found.add(each.target if each.op == "get_attr" else each)
        waiting += sources
        seen.update(sources)
    return found


def _owners_of_old(occurrence: Occurrence, nodes: Mapping[fx.Node, fx.Node], reader: Reader) -> set[Any]:
    """Returns the nodes and the paths of the attributes whose memory the old value shares in every run."""
    for form in reader.forms(occurrence.result):
        is_inert = reader.constant(form.given("training")) is False or same(reader.constant(form.given("p")), 0)
        if form.function == "dropout" and is_inert:
            value = form.given("input")
            return _owners(nodes[value]) if isinstance(value, fx.Node) else {getattr(value, "path", None)}
    return set()


def _may_share(node: fx.Node) -> bool:
    """Returns whether a value may be one of its inputs, or a view of one; also if that isn't known."""
    if node.op in ("placeholder", "get_attr"):
        return False
    if node.op not in ("call_function", "call_method"):
        return True
    function = bound(node).function
    schemas = schemas_of(function) if isinstance(function, str) else []
    return not schemas or function in _UNMARKED or any(_is_aliased(given) for each in schemas for given in each.returns)


def _is_aliased(value: Any) -> bool:
    return value.alias_info is not None


def _is_tensor(node: fx.Node, reader: Reader) -> bool:
    """Returns whether a value is a tensor, or several, or may be; numbers are computed from shapes alone."""
    if node.op == "get_attr":
        return isinstance(reader.read(str(node.target)), torch.Tensor)
    if VALUE in node.meta:
        return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(node.meta[VALUE]))
    if is_number(node):
        return False
    return node.op in ("placeholder", "call_module") or any(_is_tensor(each, reader) for each in value_inputs(node))


def _is_several(node: fx.Node) -> bool:
    function = bound(node).function if node.op in ("call_function", "call_method") else None
    schemas = schemas_of(function) if isinstance(function, str) else []
    return isinstance(node.meta.get(VALUE), list | tuple) or any(
        len(each.returns) > 1 or "List[" in str(each.returns[0].type) for each in schemas if each.returns
    )


def _may_write(node: fx.Node, root: nn.Module) -> bool:
    if separates(node, root):
        return True
    if node.op != "call_function" or node.target in CHECKS:
        return False
    call = bound(node)
    return not isinstance(call.function, str) or call.arguments.get("inplace", False) is not False


def _reaches_output(node: fx.Node) -> bool:
    """Returns whether a value, or one that may share its memory, is returned."""
    waiting, seen = [node], {node}
    while waiting:
        users = [user for user in waiting.pop().users if user not in seen]
        if any(user.op == "output" for user in users):
            return True
        waiting += [user for user in users if _may_share(user)]
        seen.update(users)
    return False
