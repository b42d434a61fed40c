"""The laws of rewrites that change how a graph computes, not what it computes, as checks that raise.

A rewrite is any pass over a model: of `torch.fx`, of an exporter, or a user's own. It takes a module and returns
another one, or a `PassResult`, or edits the module in place and returns None.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import fx, nn
from torch.fx.node import map_arg

from graphpeft.graph.inputs import ExampleInputs
from graphpeft.testing.blame import Build
from graphpeft.testing.comparing import LawError, require_close, require_equal
from graphpeft.testing.first_difference import first_difference, graph_of
from graphpeft.testing.gradients import require_same_gradients
from graphpeft.testing.runs import run
from graphpeft.testing.snapshots import require_unchanged, snapshot
from graphpeft.testing.verdicts import Law, Verification, verified
from graphpeft.wording import joined, number_of

Rewrite = Callable[[Any], Any]
"""Takes a module; returns the rewritten module, an object with it as `graph_module`, or None after an in-place edit."""


def verify_rewrite(
    model: nn.Module,
    rewrite: Rewrite,
    example_inputs: ExampleInputs,
    *others: ExampleInputs,
    undo: Rewrite | None = None,
    expects: int | None = None,
    tolerance: float = 0.0,
    modes: Sequence[bool] = (False, True),
    progress: bool = True,
    quiet: bool = False,
) -> Verification:
    """Checks the laws of rewrites on copies of `model`, which stays unchanged, and prints a table of the results.

    Args:
        model: Any module that can be copied, such as a result of `torch.fx.symbolic_trace` or `graphpeft.trace`.
        rewrite: The rewrite.
        example_inputs: A tuple of positional or a dict of keyword arguments of the model.
        others: Other inputs, such as other batch sizes, for which the laws must hold, too.
        undo: Undoes the rewrite: takes its result, and returns the original model or edits the result in place.
        expects: The number of nodes that the rewrite changes: those that it removes, adds and edits. A rewrite that
            matches nothing changes none, and keeps all other laws. None only reports the number.
        tolerance: The allowed difference, relative to the largest element; 0 for bit for bit.
        modes: The modes to check: evaluation (False), training (True) or both.
        progress: Whether to show a progress bar.
        quiet: Whether not to print the table.

    Returns:
        The table; its `holds` is True if no law fails.

    Raises:
        TypeError: If the rewrite returns no module.
        ValueError: If `expects` is given, and the model has no graph.
        Exception: If the rewrite itself raises.

    >>> import torch
    >>> traced = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    >>> def cleaned(module):
    ...     module.graph.eliminate_dead_code()
    ...     module.recompile()
    >>> verify_rewrite(traced, cleaned, (torch.ones(2, 4),), expects=0, progress=False, quiet=True).holds
    True
    """

    def build() -> nn.Module:
        return copy.deepcopy(model)

    def undone() -> None:
        assert undo is not None
        assert_rewrite_is_undone(build, rewrite, undo, example_inputs)

    def as_expected() -> str:
        assert expects is not None
        assert_rewrite_changes_nodes(build, rewrite, expects)
        return changed

    before = nodes_of(build())
    if expects is not None and not before:
        raise ValueError(_NO_GRAPH)
    rewritten = _rewritten(rewrite, probe := build())
    changed = f"it changes {changed_nodes(before, nodes_of(rewritten))}" if before else _NO_GRAPH
    inputs = (example_inputs, *others)
    found = (
        Law(
            "1 the rewritten model computes the same",
            lambda: assert_rewritten_computes_the_same(build, rewrite, *inputs, tolerance=tolerance, modes=modes),
        ),
        Law(
            "2 its gradients are the same",
            lambda: assert_rewritten_has_the_same_gradients(build, rewrite, *inputs, tolerance=tolerance, modes=modes),
        ),
        Law("3 its code is that of its graph", lambda: assert_rewritten_is_compiled(build, rewrite)),
        Law(
            "4 the original stays as it is",
            lambda: assert_rewrite_leaves_the_original(build, rewrite),
            silent="the rewrite edits the model itself" if rewritten is probe else "",
        ),
        Law("5 undone is as before", undone, silent="no undo is given" if undo is None else ""),
        Law(
            "6 it changes the expected number of nodes",
            as_expected,
            silent=f"no number is expected; {changed}" if expects is None else "",
        ),
    )
    name = getattr(rewrite, "__name__", type(rewrite).__name__)
    return verified(f"{type(model).__name__} with {name}", found, progress, quiet)


def assert_rewritten_computes_the_same(
    build: Build,
    rewrite: Rewrite,
    *inputs: ExampleInputs,
    tolerance: float = 0.0,
    modes: Sequence[bool] = (False, True),
) -> None:
    """Raises unless the rewritten model has the outputs of the model, in each mode and for all inputs.

    The model is rewritten in each of the modes, and each result runs in each of the modes.

    Args:
        build: Builds the model, equal at each call.
        rewrite: The rewrite.
        inputs: Inputs of the model, of several sizes.
        tolerance: The allowed difference, as for `require_close`.
        modes: Evaluation (False), training (True) or both.

    Raises:
        LawError: If an output differs; with the first node whose value differs.
    """

    def check(model: nn.Module, rewritten: nn.Module, given: ExampleInputs, law: str) -> None:
        found = _of_rewritten(lambda: run(rewritten, given), law)
        require_close(found, run(model, given), tolerance, f"{law}, it computes something else")

    _in_all_ways(build, rewrite, inputs, tolerance, modes, check)


def assert_rewritten_has_the_same_gradients(
    build: Build,
    rewrite: Rewrite,
    *inputs: ExampleInputs,
    tolerance: float = 0.0,
    modes: Sequence[bool] = (False, True),
) -> None:
    """Raises unless the rewritten model has the same gradients of its inputs and of its kept parameters.

    A parameter is kept if both models have it under the same name, with equal values, and the rewritten model's output
    depends on it. A parameter that had a gradient and isn't kept was folded into another one: the rewritten model must
    train a parameter that the model doesn't have. If none takes its place, as where a pass folds parameters into
    constants, training does something else. Freeze the model's parameters before if the pass is for inference alone.

    A gradient of zeros is none.

    Args:
        build: Builds the model, equal at each call.
        rewrite: The rewrite.
        inputs: Inputs of the model, of several sizes.
        tolerance: The allowed difference of gradients, as for `require_close`.
        modes: Evaluation (False), training (True) or both.

    Raises:
        LawError: If a gradient differs, or a parameter is no longer trained.
    """

    def check(model: nn.Module, rewritten: nn.Module, given: ExampleInputs, law: str) -> None:
        require_same_gradients(model, rewritten, given, tolerance, law)

    _in_all_ways(build, rewrite, inputs, tolerance, modes, check)


def assert_rewritten_is_compiled(build: Build, rewrite: Rewrite) -> None:
    """Raises unless the rewritten model's graph is well-formed, and its code is this graph's code.

    Args:
        build: Builds the model.
        rewrite: The rewrite.

    Raises:
        LawError: With the defect of the graph, or that `recompile` is missing.
    """
    rewritten = _rewritten(rewrite, build())
    if not isinstance(rewritten, fx.GraphModule):
        return
    try:
        rewritten.graph.lint()
    except Exception as error:
        raise LawError(f"the rewritten graph is malformed: {error}") from error
    if rewritten.code != rewritten.graph.python_code("self").src:
        raise LawError("the rewritten model runs code of an earlier graph; call recompile() after the last edit")


def assert_rewrite_leaves_the_original(build: Build, rewrite: Rewrite) -> None:
    """Raises unless a rewrite leaves its input model unchanged: its graph, tensors, classes and attributes.

    Args:
        build: Builds the model.
        rewrite: The rewrite, which returns another model.

    Raises:
        LawError: With the first change.
    """
    model = build()
    before, source = snapshot(model), _source(model)
    if _rewritten(rewrite, model) is model:
        raise LawError("the rewrite edits the model itself")
    if _source(model) != source:
        raise LawError(f"the rewrite changes the graph of the original:\n{_changed_lines(source, _source(model))}")
    require_unchanged(model, before, "the rewrite")


def assert_rewrite_is_undone(build: Build, rewrite: Rewrite, undo: Rewrite, inputs: ExampleInputs) -> None:
    """Raises unless undoing a rewrite restores the model: its graph's code, tensors and outputs.

    If both edit the model in place, its tensors must be the same objects.

    Args:
        build: Builds the model, equal at each call.
        rewrite: The rewrite.
        undo: Undoes the rewrite.
        inputs: Inputs of the model.

    Raises:
        LawError: With the first difference.
    """
    model, untouched = build(), build()
    tensors = model.state_dict(keep_vars=True)
    restored = _rewritten(undo, _rewritten(rewrite, model))
    if _source(restored) != _source(untouched):
        raise LawError(f"undone, the code is another one:\n{_changed_lines(_source(untouched), _source(restored))}")
    expected, found = (each.state_dict(keep_vars=True) for each in (untouched, restored))
    if expected.keys() != found.keys():
        raise LawError(f"undone, there are other tensors: {sorted(expected.keys() ^ found.keys())}")
    for name, tensor in expected.items():
        require_equal(found[name], tensor, f"undone, {name} differs")
        if found[name].requires_grad != tensor.requires_grad:
            raise LawError(f"undone, requires_grad of {name} is {found[name].requires_grad}")
        if restored is model and found[name] is not tensors[name]:
            raise LawError(f"undone, {name} is another object, which an optimizer wouldn't know")
    require_equal(run(restored, inputs), run(untouched, inputs), "undone, it computes something else")


def assert_rewrite_changes_nodes(build: Build, rewrite: Rewrite, expects: int) -> None:
    """Raises unless a rewrite changes as many nodes as expected: removed, added and edited ones together.

    Nodes are compared by their names. A node that only reads the replacement of a removed node isn't edited.

    Args:
        build: Builds the model, equal at each call.
        rewrite: The rewrite.
        expects: The number of nodes.

    Raises:
        LawError: With the nodes that it changes.
        ValueError: If the model has no graph.

    >>> assert_rewrite_changes_nodes(lambda: fx.symbolic_trace(nn.ReLU()), lambda module: module, expects=0)
    """
    before = nodes_of(build())
    if not before:
        raise ValueError(_NO_GRAPH)
    changed = changed_nodes(before, nodes_of(_rewritten(rewrite, build())))
    if changed.number != expects:
        raise LawError(f"it changes {changed}; expected are {expects}")


_NO_GRAPH = "the model has no graph whose nodes could be counted; trace it first, as by torch.fx.symbolic_trace"

Check = Callable[[nn.Module, nn.Module, ExampleInputs, str], None]
"""Compares a model with the rewritten one on inputs; its error begins with the given text."""


def _in_all_ways(
    build: Build,
    rewrite: Rewrite,
    inputs: Sequence[ExampleInputs],
    tolerance: float,
    modes: Sequence[bool],
    check: Check,
) -> None:
    """Checks a rewrite in each mode, run in each mode, on all inputs; errors name the first node that differs."""
    for training, mode in itertools.product(modes, modes):
        model = _in_mode(build(), training)
        rewritten = _in_mode(_rewritten(rewrite, _in_mode(build(), training)), mode)
        _in_mode(model, mode)
        for number, given in enumerate(inputs):
            law = f"rewritten with training={training}, run with training={mode}, on inputs {number}"
            try:
                check(model, rewritten, given, law)
            except LawError as error:
                failure = error
            else:
                continue
            # not while the error is handled, for hypothesis, as in blame.py
            fresh = _in_mode(_rewritten(rewrite, _in_mode(build(), training)), mode)
            where = first_difference(_in_mode(build(), mode), fresh, given, tolerance)
            raise LawError(f"{failure}\n{where}") from failure


def _rewritten(rewrite: Rewrite, model: nn.Module) -> nn.Module:
    result = rewrite(model)
    if result is None:
        return model
    rewritten = getattr(result, "graph_module", result)
    if not isinstance(rewritten, nn.Module):
        raise TypeError(f"the rewrite returned a {type(result).__name__}; it returns a module, a PassResult, or None")
    return rewritten


def _in_mode(model: nn.Module, training: bool) -> nn.Module:
    # an exported module has one mode, and train() and eval() raise
    return model if model.training == training else model.train(training)


def _of_rewritten(compute: Callable[[], Any], law: str) -> Any:
    try:
        return compute()
    except Exception as error:
        raise LawError(f"{law}, it fails: {type(error).__name__}: {error}") from error


def _source(model: nn.Module) -> str:
    """Returns the code of a model's graph; of a model without a graph, an empty string."""
    graph = graph_of(model)
    return "" if graph is None else graph.python_code("self").src


def _changed_lines(before: str, after: str) -> str:
    old, new = before.splitlines(), after.splitlines()
    return "\n".join(
        [f"    - {line.strip()}" for line in old if line not in new]
        + [f"    + {line.strip()}" for line in new if line not in old]
    )


Nodes = dict[tuple[str, str], fx.Node]
"""Nodes by the path of the module whose graph has them, and by their names."""


class ChangedNodes(NamedTuple):
    """The nodes that a rewrite has changed, by path and name.

    Attributes:
        removed: Nodes that only the model has.
        added: Nodes that only the rewritten model has.
        edited: Nodes of both whose operation or arguments differ. A user of a removed node that reads the node's
            replacement is not edited, and neither is one that reads an added node in front of it.
    """

    removed: tuple[str, ...]
    added: tuple[str, ...]
    edited: tuple[str, ...]

    @property
    def number(self) -> int:
        """The number of all of them."""
        return sum(map(len, self))

    def __str__(self) -> str:
        if not self.number:
            return "no node"
        kinds = zip(("removed", "added", "edited"), self, strict=True)
        parts = [f"{len(names)} {kind} ({joined(names)})" for kind, names in kinds if names]
        return f"{number_of(self.number, 'node')}: {', '.join(parts)}"


def nodes_of(model: nn.Module) -> Nodes:
    """Returns the nodes of all graphs in a model, also those of graph modules inside."""
    graphs = {path: graph_of(module) for path, module in model.named_modules()}
    return {(path, node.name): node for path, graph in graphs.items() if graph is not None for node in graph.nodes}


def changed_nodes(before: Nodes, after: Nodes) -> ChangedNodes:
    """Compares the nodes of a model with those of the rewritten model."""
    return ChangedNodes(
        tuple(_label(*key) for key in before if key not in after),
        tuple(_label(*key) for key in after if key not in before),
        tuple(_label(*key) for key in before if key in after and _is_edited(key, before, after)),
    )


def _is_edited(key: tuple[str, str], before: Nodes, after: Nodes) -> bool:
    old, new = before[key], after[key]
    (old_form, old_inputs), (new_form, new_inputs) = _parts(old), _parts(new)
    if (old.op, old.target, old_form) != (new.op, new.target, new_form):
        return True
    return any(
        a.name != b.name and (key[0], a.name) in after and (key[0], b.name) in before
        for a, b in zip(old_inputs, new_inputs, strict=True)
    )


def _parts(node: fx.Node) -> tuple[Any, list[fx.Node]]:
    """Returns a node's arguments with a mark in the place of each node, and these nodes in their order."""
    inputs: list[fx.Node] = []

    def mark(argument: fx.Node) -> Any:
        inputs.append(argument)
        return ...

    return map_arg((node.args, dict(node.kwargs)), mark), inputs


def _label(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
