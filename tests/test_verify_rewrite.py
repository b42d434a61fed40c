"""Laws for rewrites that are no adapters: passes of PyTorch keep them, and planted faults are told with their node."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.const_fold import split_const_subgraphs
from torch.fx.experimental.optimization import fuse, remove_dropout
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from graphpeft import trace
from graphpeft.testing import verify_rewrite
from graphpeft.testing.snapshots import require_unchanged, snapshot

IMAGES = [(torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)),) for batch in (2, 5)]
ROWS = [(torch.randn(batch, 6, generator=torch.Generator().manual_seed(batch)),) for batch in (2, 5)]


class Network(nn.Module):
    """Convolutions with normalisation, as `fuse` wants them, a dropout and a product with a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x))).mean((2, 3))))


class Functions(nn.Module):
    """Two layers, with arithmetic between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) - x
        return self.last(y * (self.scale + 1)) + y


def network() -> nn.Module:
    torch.manual_seed(0)
    model = Network()
    nn.init.normal_(model.norm.running_mean)  # type: ignore[arg-type]
    return model.eval()


def functions() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Functions())


def verified(model: nn.Module, rewrite: Any, inputs: Any = ROWS, **options: Any) -> Any:
    return verify_rewrite(model, rewrite, *inputs, progress=False, quiet=True, **options)


def outcomes(found: Any) -> list[str]:
    return [verdict.outcome for verdict in found.verdicts]


# right ones


def test_pytorchs_fusion_of_convolutions_keeps_all_laws_in_evaluation_and_leaves_the_original():
    model = network()
    before = snapshot(model)
    found = verified(model, fuse, IMAGES, tolerance=1e-5, modes=(False,))
    require_unchanged(model, before, "verify_rewrite")
    assert outcomes(found) == ["holds", "holds", "holds", "holds", "doesn't apply", "doesn't apply"], found
    assert found.verdicts[4].why == "no undo is given"
    assert "the model has no graph whose nodes could be counted; trace it first" in found.verdicts[5].why


def test_pytorchs_fusion_is_no_identity_bit_for_bit_which_names_the_layer_behind():
    found = verified(network(), fuse, IMAGES, modes=(False,))
    assert [verdict.law[0] for verdict in found.failures] == ["1", "2"]
    assert "the first value that differs is that of" in found.failures[0].why


def test_pytorchs_removal_of_dropout_holds_in_evaluation_and_fails_in_training_with_the_layer_behind_it():
    assert verified(network(), remove_dropout, IMAGES, modes=(False,)).holds
    found = verified(network(), remove_dropout, IMAGES)
    assert [verdict.law[0] for verdict in found.failures] == ["1", "2"]
    why = found.failures[0].why
    assert why.startswith("rewritten with training=False, run with training=True, on inputs 0, it computes something")
    assert "that of head, behind these nodes\n" in why
    assert why.endswith("    mean = relu.mean((2, 3))\n    head = self.head(mean)")


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # by PyTorch's pass, before it has the tensor
def test_pytorchs_folding_of_constants_holds_since_it_trains_a_parameter_in_place_of_the_folded_one():
    found = verified(functions(), split_const_subgraphs, modes=(False,))
    assert found.holds, found


class Renaming(PassBase):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        copied = copy.deepcopy(graph_module)
        for node in copied.graph.nodes:
            if node.op == "call_function":
                node.name = f"{node.name}_renamed"
        copied.recompile()
        return PassResult(copied, True)


@pytest.mark.parametrize("model", [functions, lambda: trace(Functions(), ROWS[0])], ids=["torch.fx", "graphpeft"])
def test_a_pass_that_returns_a_result_keeps_all_laws(model: Callable[[], nn.Module]):
    assert verified(model(), Renaming()).holds


def one(model: Any, target: Any) -> fx.Node:
    return next(node for node in model.graph.nodes if node.target in (target, getattr(target, "__name__", target)))


def negated(model: Any) -> None:
    """Writes a - b as a + (-b), which are the same bits."""
    node = one(model, operator.sub)
    a, b = node.args
    with model.graph.inserting_before(node):
        node.args = (a, model.graph.call_function(operator.neg, (b,)))
    node.target = operator.add
    model.recompile()


def not_negated(model: Any) -> None:
    node = one(model, operator.neg)
    [user] = node.users
    user.args, user.target = (user.args[0], node.args[0]), operator.sub
    model.graph.erase_node(node)
    model.recompile()


def test_an_edit_in_place_that_can_be_undone_keeps_all_laws_that_speak_of_it():
    found = verified(functions(), negated, undo=not_negated, expects=2)
    assert outcomes(found) == ["holds", "holds", "holds", "doesn't apply", "holds", "holds"], found
    assert found.verdicts[3].why == "the rewrite edits the model itself"


# planted faults


def swaps_operands(model: Any) -> None:
    node = one(model, operator.sub)
    node.args = node.args[::-1]
    model.recompile()


def changes_a_weight(model: Any) -> Any:
    model = copy.deepcopy(model)
    model.get_parameter("last.weight").data[0, 0] += 1
    return model


def changes_the_originals_weight(model: Any) -> Any:
    rewritten = copy.deepcopy(model)
    model.get_parameter("last.weight").data[0, 0] += 1
    return rewritten


def edits_the_originals_graph(model: Any) -> Any:
    rewritten = copy.deepcopy(model)
    negated(model)
    return rewritten


def holds_the_size_of_the_example(model: Any) -> None:
    node = one(model, torch.tanh)
    with model.graph.inserting_after(node):
        sized = model.graph.call_method("expand", (node, 2, 6))
    node.replace_all_uses_with(sized)
    sized.args = (node, 2, 6)
    model.recompile()


def acts_in_training_alone(model: Any) -> None:
    node = one(model, torch.tanh)
    model.add_submodule("dropout", nn.Dropout(0.5).train(model.training))
    with model.graph.inserting_after(node):
        dropped = model.graph.call_module("dropout", (node,))
    node.replace_all_uses_with(dropped)
    dropped.args = (node,)
    model.recompile()


def stops_a_gradient(model: Any) -> None:
    node = one(model, torch.tanh)
    with model.graph.inserting_after(node):
        stopped = model.graph.call_method("detach", (node,))
    node.replace_all_uses_with(stopped)
    stopped.args = (node,)
    model.recompile()


def forgets_to_recompile(model: Any) -> None:
    one(model, operator.sub).target = operator.add


FAULTS: dict[Any, tuple[str, str]] = {
    swaps_operands: ("1", "first value that differs is that of sub, behind these nodes\n    sub = x - tanh"),
    changes_a_weight: ("1", "first value that differs is that of last, behind these nodes\n    last = self.last(mul)"),
    holds_the_size_of_the_example: ("1", "on inputs 1, it fails"),
    acts_in_training_alone: ("1", "run with training=True"),
    stops_a_gradient: ("2", "it has other gradients, at ['"),
    forgets_to_recompile: ("3", "call recompile() after the last edit"),
    changes_the_originals_weight: ("4", "the rewrite changes the tensor last.weight"),
    edits_the_originals_graph: ("4", "the rewrite changes the graph of the original:\n    - sub = "),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_is_told_by_the_law_that_it_breaks_with_its_node(fault: Any):
    number, what = FAULTS[fault]
    failures = {verdict.law[0]: verdict.why for verdict in verified(functions(), fault).failures}
    assert number in failures
    assert what in failures[number]


def test_the_node_that_fails_is_named():
    found = verified(functions(), holds_the_size_of_the_example)
    assert re.search(
        r"the node expand fails: RuntimeError: .*\n    expand = tanh\.expand\(2, 6\)", found.failures[0].why
    )


def test_what_differs_without_effect_is_not_blamed():
    def moves_a_factor(model: Any) -> None:
        # tanh is doubled and halved again, beside the fault
        node = one(model, torch.tanh)
        with model.graph.inserting_before(node):
            doubled = model.graph.call_function(operator.mul, (node.args[0], 2))
        with model.graph.inserting_before(node):
            halved = model.graph.call_function(operator.mul, (doubled, 0.5))
        node.args = (halved,)
        swaps_operands(model)

    why = verified(functions(), moves_a_factor).failures[0].why
    assert why.endswith("that of sub, behind these nodes\n    sub = x - tanh")


UNDOES: dict[str, tuple[Any, str]] = {
    "leaves a node": (lambda model: None, "undone, the code is another one:\n    - sub = "),
    "makes new tensors": (
        lambda model: (not_negated(model), setattr(model, "scale", nn.Parameter(model.scale.detach().clone())))[0],
        "undone, scale is another object",
    ),
    "changes a value": (
        lambda model: (not_negated(model), model.scale.data.add_(1))[0],
        "undone, scale differs: by 1",
    ),
    "freezes": (
        lambda model: (not_negated(model), model.scale.requires_grad_(False))[0],
        "undone, requires_grad of scale is False",
    ),
    "leaves a tensor": (
        lambda model: (not_negated(model), model.register_buffer("more", torch.ones(1)))[0],
        "undone, there are other tensors: ['more']",
    ),
}


@pytest.mark.parametrize("kind", UNDOES)
def test_an_undo_that_is_not_exact_is_told_with_what_it_leaves(kind: str):
    undo, what = UNDOES[kind]
    found = verified(functions(), negated, undo=undo)
    assert [verdict.law[0] for verdict in found.failures] == ["5"]
    assert what in found.failures[0].why


# what is trained afterwards


def folds(make: Callable[[Tensor], Any], deletes: bool = False) -> Callable[[Any], None]:
    """Returns a pass that reads scale + 1 from a tensor of its own; a scale that is left has no effect then."""

    def pass_(model: Any) -> None:
        node = one(model, operator.add)
        setattr(model, "factor", make(model.scale.detach() + 1))  # noqa: B010
        with model.graph.inserting_before(node):
            node.replace_all_uses_with(model.graph.get_attr("factor"))
        model.graph.eliminate_dead_code()
        if deletes:
            del model.scale
        model.recompile()

    return pass_


@pytest.mark.parametrize("deletes", [False, True])
def test_a_parameter_that_is_folded_into_another_one_needs_no_gradient(deletes: bool):
    found = verified(functions(), folds(nn.Parameter, deletes))
    assert found.holds, found


@pytest.mark.parametrize("deletes", [False, True])
def test_a_parameter_that_is_folded_into_a_constant_is_no_longer_trained_which_fails(deletes: bool):
    found = verified(functions(), folds(nn.Buffer, deletes))
    [failure] = found.failures
    assert failure.law == "2 its gradients are the same"
    assert "scale no longer trained, and no parameter in place; for a pass that is for inference alone" in failure.why
    assert verified(functions().requires_grad_(False), folds(nn.Buffer, deletes)).holds


class TimesZero(Functions):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.scale * 0


def test_a_gradient_of_zeros_is_none():
    def without_zeros(model: Any) -> None:
        node = one(model, operator.add)
        node.replace_all_uses_with(node.all_input_nodes[0])
        model.graph.eliminate_dead_code()
        model.recompile()

    assert verified(fx.symbolic_trace(TimesZero()), without_zeros, expects=3).holds


# how many nodes change


def only_renamed(model: Any) -> None:
    one(model, operator.sub).name = "other"
    model.recompile()


def matches_nothing(model: Any) -> Any:
    """A pass that looks for a function of another name than the traced one's."""
    for node in model.graph.nodes:
        if node.target is torch.Tensor.tanh:
            node.target = torch.Tensor.sinh
    model.recompile()


class Calls(nn.Module):
    """A module without a graph that calls one with a graph."""

    def __init__(self, parts: nn.ModuleDict) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["inner"](x)


@pytest.mark.parametrize(
    ("rewrite", "changes", "number"),
    [
        (matches_nothing, "no node", 0),
        (changes_a_weight, "no node", 0),
        (swaps_operands, "1 node: 1 edited (sub)", 1),
        (negated, "2 nodes: 1 added (neg), 1 edited (sub)", 2),
        (acts_in_training_alone, "1 node: 1 added (dropout)", 1),
        (only_renamed, "2 nodes: 1 removed (sub), 1 added (other)", 2),
    ],
)
def test_the_number_of_changed_nodes_is_told_and_held_to_what_is_expected(rewrite: Any, changes: str, number: int):
    told = verified(functions(), rewrite).verdicts[5]
    assert (told.outcome, told.why) == ("doesn't apply", f"no number is expected; it changes {changes}")
    right, wrong = (verified(functions(), rewrite, expects=each).verdicts[5] for each in (number, 3))
    assert (right.outcome, right.why) == ("holds", f"it changes {changes}")
    assert (wrong.outcome, wrong.why) == ("fails", f"it changes {changes}; expected are 3")


def test_a_users_argument_is_no_change_where_it_only_follows_a_removed_node():
    found = verified(trace(network(), IMAGES[0]), remove_dropout, IMAGES, modes=(False,), expects=1)
    assert found.verdicts[5].why == "it changes 1 node: 1 removed (dropout)", found


def test_nodes_of_graph_modules_inside_are_counted_under_their_paths():
    def inside(model: Any) -> None:
        negated(model.parts["inner"])

    model = Calls(nn.ModuleDict({"inner": functions()}))
    verdict = verified(model, inside, expects=2).verdicts[5]
    assert verdict.why == "it changes 2 nodes: 1 added (parts.inner.neg), 1 edited (parts.inner.sub)"


def test_an_expected_number_needs_a_graph():
    with pytest.raises(ValueError, match="no graph whose nodes could be counted; trace it first"):
        verified(network(), fuse, IMAGES, expects=1)


def test_every_law_of_rewrites_is_broken_by_something_wrong():
    broken = {number for number, _ in FAULTS.values()} | {"5", "6"}
    assert broken == {verdict.law[0] for verdict in verified(functions(), negated).verdicts}


@pytest.mark.filterwarnings("ignore:`isinstance:FutureWarning")  # by PyTorch, where such a module is copied
def test_an_exported_module_is_rewritten_in_the_mode_that_it_has():
    model = torch.export.export(Functions().eval(), ROWS[0]).module()
    found = verify_rewrite(model, Renaming(), ROWS[0], modes=(model.training,), progress=False, quiet=True)
    assert found.holds, found


def test_a_rewrite_that_returns_no_module_is_refused():
    with pytest.raises(TypeError, match="the rewrite returned a str; it returns a module, a PassResult, or None"):
        verify_rewrite(Functions(), lambda module: "rewritten", ROWS[0], progress=False, quiet=True)
