"""Rewrites by example: which spellings meet a pattern, what stops one, and what a model in place remains."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager

from graphpeft import GuardError, LoraConfig, get_peft_model, trace
from graphpeft.rewrites import Rewrite, RewriteError, either, held, layer, undo_rewrites
from graphpeft.showing.reading import picture_of
from graphpeft.testing import verify_rewrite

pytestmark = pytest.mark.quick("rewrites")

SIZE = 8


def model_of(forward, **layers: nn.Module) -> Any:
    """Returns a module with this forward, in a class of its own, with a matrix, a bias, a scale and layers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(SIZE, SIZE)), nn.Parameter(torch.randn(SIZE))
            self.scale = 3.0
            for name, each in layers.items():
                self.add_module(name, each)

    Model.forward = forward
    return Model()


def inputs(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes or (3,), SIZE)


def nothing(x):
    return torch.zeros_like(x)


gelu_to_tanh = Rewrite(lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh"), name="gelu_to_tanh")


# spellings


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.gelu(x),
        lambda self, x: F.gelu(x, approximate="none"),
        lambda self, x: F.gelu(input=x),
        lambda self, x: torch.ops.aten.gelu(x),
        lambda self, x: torch.ops.aten.gelu.default(x),
        lambda self, x: torch.ops.aten.gelu.default(x, approximate="none"),
    ],
)
def test_a_function_is_met_as_a_function_and_as_an_operator_with_and_without_its_defaults(forward):
    for model in (model_of(forward), trace(model_of(forward), (inputs(),))):
        gelu_to_tanh(model, expects=1)
        x = inputs()
        assert torch.equal(model(x), F.gelu(x, approximate="tanh"))


def test_a_layer_is_met_in_its_own_forward_and_as_a_call_of_a_trace():
    def model():
        return model_of(lambda self, x: self.gelu(x + 1), gelu=nn.GELU())

    for rewritten, module in ((model(), "gelu"), (trace(model(), (inputs(),)), "")):
        report = gelu_to_tanh(rewritten, expects=1)
        assert [matched.module for matched in report.matches] == [module]
        x = inputs()
        assert torch.equal(rewritten(x), F.gelu(x + 1, approximate="tanh"))


LINEAR = {
    "F.linear": lambda self, x: F.linear(x, self.w, self.b),
    "by name": lambda self, x: F.linear(bias=self.b, weight=self.w, input=x),
    "x @ w.T + b": lambda self, x: x @ self.w.T + self.b,
    "b + x @ w.T": lambda self, x: self.b + x.matmul(self.w.t()),
    "x @ w.mT + b": lambda self, x: torch.add(torch.matmul(x, self.w.mT), self.b),
    "transpose": lambda self, x: x @ self.w.transpose(0, 1) + self.b,
    "permute": lambda self, x: x @ self.w.permute(1, 0) + self.b,
    "addmm": lambda self, x: torch.addmm(self.b, x, self.w.T),
    "einsum": lambda self, x: torch.einsum("ni,oi->no", x, self.w) + self.b,
    "aten": lambda self, x: torch.ops.aten.linear.default(x, self.w, self.b),
}


@pytest.mark.parametrize("pattern", [lambda x, w, b: F.linear(x, w, b), lambda x, w, b: x @ w.T + b])
@pytest.mark.parametrize("spelling", LINEAR)
def test_a_linear_operation_is_met_in_every_spelling_by_every_spelling_of_the_pattern(spelling, pattern):
    model = model_of(LINEAR[spelling])
    doubled = Rewrite(pattern, lambda x, w, b: F.linear(x, 2 * w, 3 * b))
    x = inputs()
    expected = F.linear(x, 2 * model.w, 3 * model.b)
    doubled(model, expects=1)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("pattern", [lambda x, w, b: F.linear(x, w, b), lambda x, w, b: b + x @ w.T])
def test_a_layer_in_its_own_forward_and_where_a_larger_pattern_has_it_is_a_linear_operation(pattern):
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.ReLU())
    x = inputs()
    expected = F.relu(F.linear(x, model[0].weight) - model[0].bias)
    Rewrite(lambda x, w, b: F.relu(pattern(x, w, b)), lambda x, w, b: F.relu(F.linear(x, w) - b))(model, expects=1)
    torch.testing.assert_close(model(x), expected)


def test_a_bias_that_is_absent_is_none_in_the_replacement():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False))
    seen = []
    Rewrite(lambda x, w, b: F.linear(x, w, b), lambda x, w, b: (seen.append(b), F.linear(x, 2 * w))[1])(model)
    assert seen == [None]


PRODUCTS = {
    "q @ k.mT": lambda self, q: q @ q.mT,
    "transpose of the last two": lambda self, q: q @ q.transpose(-1, -2),
    "transpose by number": lambda self, q: torch.bmm(q, q.transpose(1, 2)),
    "permute": lambda self, q: q.matmul(q.permute(0, 2, 1)),
    "einsum": lambda self, q: torch.einsum("bqd,bkd->bqk", q, q),
}


@pytest.mark.parametrize("spelling", PRODUCTS)
def test_a_batched_product_is_met_in_every_spelling_where_the_number_of_dimensions_is_known(spelling):
    model, x = model_of(PRODUCTS[spelling]), inputs(2, 3)
    Rewrite(lambda q, k: q @ k.transpose(-2, -1), lambda q, k: 2 * (q @ k.mT))(model, expects=1, example_inputs=(x,))
    torch.testing.assert_close(model(x), 2 * x @ x.mT)


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: (x * 2.0 + 1).sum(-1, keepdim=True),
        lambda self, x: torch.sum(torch.add(1, x.mul(2)), dim=(-1,), keepdim=True),
        lambda self, x: (1.0 + torch.multiply(x, 2)).sum(dim=[-1], keepdim=True),
    ],
)
def test_operands_that_commute_change_places_and_equal_constants_are_one(forward):
    model = model_of(forward)
    Rewrite(lambda x: (2 * x + 1).sum(-1, keepdim=True), lambda x: x.mean(-1))(model, expects=1)


def test_operands_that_do_not_commute_keep_their_places():
    reversed_difference = model_of(lambda self, x: 1 - x)
    report = Rewrite(lambda x: x - 1, nothing).find(reversed_difference)
    assert not report.matches
    assert [miss.reason for miss in report.misses] == ["has x as other, where the pattern has 1"]


def test_numbers_of_other_types_are_two_where_that_decides_on_the_dtype():
    traced = trace(model_of(lambda self, x: x * 2), (torch.ones(3, dtype=torch.int64),))
    assert not Rewrite(lambda x: x * 2.0, nothing).find(traced).matches
    assert Rewrite(lambda x: x * 2, nothing).find(traced).matches


@pytest.mark.parametrize("forward", [lambda self, x: x * x, lambda self, x: x**2, lambda self, x: torch.square(x)])
def test_a_square_is_met_in_three_spellings(forward):
    Rewrite(lambda x: x.pow(2), nothing)(model_of(forward), expects=1)


def test_the_first_alternative_that_is_met_counts_also_inside_a_pattern():
    activation = either(lambda x: F.relu(x), lambda x: F.gelu(x))
    model = model_of(lambda self, x: 2 * F.relu(x) + 2 * F.gelu(x))
    rewrite = Rewrite(lambda x: 2 * activation(x), lambda x: 3 * x)
    assert rewrite.alternatives == 2
    rewrite(model, expects=2)
    x = inputs()
    torch.testing.assert_close(model(x), 6 * x)


def test_an_argument_of_one_alternative_alone_has_its_default_in_the_replacement():
    rewrite = Rewrite(
        either(lambda x, *, factor: x * factor, lambda x, *, divisor: x / divisor),
        lambda x, factor=None, divisor=None: x - (factor if divisor is None else 10 * divisor),
    )
    x = inputs()
    for forward, expected in ((lambda self, x: x * 2, x - 2), (lambda self, x: x / 3, x - 30)):
        model = model_of(forward)
        rewrite(model, expects=1)
        torch.testing.assert_close(model(x), expected)


# which calls are the same

NOT_MET = {
    "a mean over a dimension": (lambda x: x.mean(), lambda self, x: x.mean(-1)),
    "a sum over a dimension": (lambda x: x.sum(), lambda self, x: x.sum(dim=-1)),
    "a maximum over a dimension": (lambda x: x.max(), lambda self, x: x.max(-1)),
    "amax over a dimension": (lambda x: x.amax(), lambda self, x: x.amax(-1)),
    "a product over a dimension": (lambda x: x.prod(), lambda self, x: x.prod(-1)),
    "any over a dimension": (lambda x: x.any(), lambda self, x: x.any(-1)),
    "a variance over a dimension": (lambda x: x.var(), lambda self, x: x.var(dim=0)),
    "a variance without correction": (lambda x: x.var(), lambda self, x: x.var(correction=0)),
    "squeezing one dimension": (lambda x: x.squeeze(), lambda self, x: x.squeeze(0)),
    "the minimum of two": (lambda x: torch.min(x), lambda self, x: torch.min(x, x)),
    "a rounded quotient": (lambda x: torch.div(x, 2), lambda self, x: torch.div(x, 2, rounding_mode="floor")),
    "decimals": (lambda x: torch.round(x), lambda self, x: torch.round(x, decimals=1)),
    "two indices": (lambda x: x[0], lambda self, x: x[0, 0]),
    "an index of a tuple": (lambda x: x[0], lambda self, x: x[(0, 0),]),
    "an index of a list": (lambda x: x[0, 1], lambda self, x: x[[0, 1]]),
    "two repeats": (lambda x: x.repeat(2), lambda self, x: x.repeat(2, 2)),
    "two tiles": (lambda x: x.tile(2), lambda self, x: x.tile(2, 2)),
    "two sizes": (lambda x: x.expand(4), lambda self, x: x.expand(4, 4)),
    "two sizes of a shape": (lambda x: x.reshape(2), lambda self, x: x.reshape(2, 2)),
    "another dimension of a list": (lambda x: torch.cat([x, x], -1), lambda self, x: torch.cat([x, x], 0)),
    "another order of a list": (lambda x: torch.cat([x, x * 2]), lambda self, x: torch.cat([x * 2, x])),
    "a sum of shapes in another order": (
        lambda x: x.reshape(x.shape + (1,)),  # noqa: RUF005 - a sum
        lambda self, x: x.reshape((1,) + x.shape),  # noqa: RUF005 - a sum
    ),
    "a transpose that may not be of a matrix": (lambda x, y: x @ y.t(), lambda self, x: x @ (2 * x).mT),
    "a transpose that may have three dimensions": (lambda x, y: x @ y.T, lambda self, x: x @ (2 * x).mT),
    "all dimensions reversed": (lambda x, y: x @ y.mT, lambda self, x: x @ self.cube.T),
    "as many operands of a list": (lambda x: torch.stack([x, x]), lambda self, x: torch.stack([x, x, x])),
}


@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors")
@pytest.mark.parametrize("case", NOT_MET)
def test_a_call_with_other_arguments_is_another_one(case):
    pattern, forward = NOT_MET[case]
    model = model_of(forward)
    model.cube = nn.Parameter(torch.randn(3, 3, 3))
    report = Rewrite(pattern, nothing).find(model)
    assert not report.matches
    assert not report.left


MET = {
    "a function and a method": (lambda x: x.mean(), lambda self, x: torch.mean(x)),
    "one dimension as a tuple": (lambda x: x.mean(-1), lambda self, x: x.mean(dim=(-1,), keepdim=False)),
    "dimensions as a list": (lambda x: x.sum((0, 1)), lambda self, x: x.sum([0, 1])),
    "an argument that one spelling lacks": (
        lambda x: F.dropout(x),
        lambda self, x: torch.ops.aten.dropout.default(x, 0.5, True),
    ),
    "a quotient as an operator": (lambda x: torch.div(x, 2), lambda self, x: x / 2),
    "a quotient as a function": (lambda x: x / 2, lambda self, x: torch.true_divide(x, 2)),
    "sizes one by one": (lambda x: x.view(2, -1), lambda self, x: x.reshape((2, -1))),
    "one size": (lambda x: x.repeat(2), lambda self, x: x.repeat((2,))),
    "two indices": (lambda x: x[0, 1], lambda self, x: x[(0, 1)]),
    "an index of a list": (lambda x: x[[0, 1]], lambda self, x: x[[0, 1]]),
    "one number for each side": (lambda x: F.avg_pool2d(x, 2), lambda self, x: F.avg_pool2d(x, (2, 2))),
    "a transpose of a matrix": (lambda x, y: x @ y.mT, lambda self, x: x @ (2 * x).t()),
    "a transpose of any value": (lambda x, y: x @ y.T, lambda self, x: x @ (2 * x).T),
    "dimensions in another order": (lambda x, y: x @ y.mT, lambda self, x: x @ x.permute(0, 2, 1)),
    "sizes of a shape": (lambda x, n: x.reshape(1 + n), lambda self, x: x.reshape(x.shape[0] + 1)),
    "a list": (lambda x: torch.cat([x, x], -1), lambda self, x: torch.cat((x, x), dim=-1)),
    "a list of what is computed": (lambda x: torch.stack((x, 2 * x)), lambda self, x: torch.stack([x, x * 2])),
}


@pytest.mark.parametrize("case", MET)
def test_a_call_with_the_same_arguments_is_met_in_every_spelling(case):
    pattern, forward = MET[case]
    assert len(Rewrite(pattern, nothing).find(model_of(forward)).matches) == 1


def test_one_number_of_a_layer_stands_for_each_side():
    pooled = Rewrite(lambda x: F.avg_pool2d(x, (2, 2), (2, 2)), nothing)
    assert pooled.find(nn.AvgPool2d(2)).matches
    assert not pooled.find(nn.AvgPool2d(3)).matches


def test_a_list_is_an_argument_of_the_pattern():
    model, x = model_of(lambda self, x: torch.cat([x, 2 * x], -1)), inputs()
    Rewrite(lambda parts: torch.cat(parts, -1), lambda parts: torch.cat(parts, 0))(model, expects=1)
    assert torch.equal(model(x), torch.cat([x, 2 * x]))


# what arguments stand for


def test_an_argument_that_occurs_twice_is_one_value():
    same = model_of(lambda self, x: torch.sin(x) + torch.cos(x))
    others = model_of(lambda self, x: torch.sin(x) + torch.cos(2 * x))
    rewrite = Rewrite(lambda x: torch.sin(x) + torch.cos(x), nothing)
    rewrite(same, expects=1)
    report = rewrite.find(others)
    assert not report.matches
    assert "where x of the pattern is x" in report.misses[0].reason


def test_a_number_that_a_module_holds_is_given_and_read_in_each_run():
    model = model_of(lambda self, x: x * self.scale)
    Rewrite(lambda x, *, scale: x * scale, lambda x, scale: x * (scale + 1))(model, expects=1)
    x = inputs()
    torch.testing.assert_close(model(x), 4 * x)
    model.scale = 10.0
    torch.testing.assert_close(model(x), 11 * x)


def test_an_argument_for_constants_is_no_tensor():
    report = Rewrite(lambda x, *, scale: x * scale, nothing).find(model_of(lambda self, x: x * self.b))
    assert not report.matches
    assert report.misses[0].reason == "uses b, which is a tensor or may be one, where scale is none"


def test_an_option_of_a_layer_on_which_a_match_has_decided_is_checked_in_each_run():
    model: Any = nn.Sequential(nn.Dropout(0.0))
    Rewrite(lambda x, *, training: F.dropout(x, 0.0, training), lambda x: x)(model, expects=1)
    x = inputs()
    assert model(x) is x
    model[0].p = 0.5
    with pytest.raises(GuardError, match=r"^p, on which the rewrite rewrite depends: that was 0\.0"):
        model(x)


@pytest.mark.parametrize("prepared", [lambda model: model, lambda model: trace(model, (inputs(),))])
@pytest.mark.parametrize(
    "rewrite",
    [
        Rewrite(lambda x, *, s: x * s, lambda x: 3 * x, where=lambda match: None if match["s"] == 3 else "no 3"),
        Rewrite(lambda x: x * 3, lambda x: 3 * x),
    ],
    ids=["where", "pattern"],
)
def test_a_number_of_a_module_on_which_a_match_has_decided_is_checked_in_each_run(rewrite, prepared):
    model = prepared(model_of(lambda self, x: x * self.scale))
    rewrite(model, expects=1)
    model(inputs())
    model.scale = 4.0
    with pytest.raises(GuardError, match=r"^scale, on which"):
        model(inputs())


# what stops a match


def test_another_reading_is_tried_where_the_first_one_is_refused():
    def forward(self, x):
        h = torch.exp(x)
        return h * torch.exp(2 * x), h

    model, x = model_of(forward), inputs()
    expected = model(x)
    Rewrite(lambda x, y: torch.exp(y) * x, lambda x, y: x * torch.exp(y))(model, expects=1)
    torch.testing.assert_close(model(x), expected)

    chosen = Rewrite(lambda x, b: x + b, nothing, where=lambda match: None if match.path("x") == "b" else "no bias")
    assert chosen.find(model_of(lambda self, x: x + self.b)).matches


def test_a_condition_says_why_a_match_does_not_count():
    model: Any = nn.Sequential(nn.Linear(SIZE, 2), nn.Linear(2, SIZE))
    rewrite = Rewrite(
        lambda x, w, b: F.linear(x, w, b),
        lambda x, w, b: F.linear(x, w, b),
        where=lambda match: None if match["w"].shape[0] > 2 else f"{match.path('w')} is small",
    )
    report = rewrite(model, expects=1)
    assert [matched.module for matched in report.matches] == ["1"]
    assert [(miss.module, miss.reason) for miss in report.misses if miss.module] == [("0", "0.weight is small")]


def test_a_value_that_others_use_is_not_swallowed():
    def forward(self, x):
        h = torch.exp(x)
        return torch.log(h) + h

    report = Rewrite(lambda x: torch.log(torch.exp(x)), lambda x: x).find(model_of(forward))
    assert not report.matches
    [miss] = report.misses
    assert (miss.stopped_at, miss.reason) == ("exp", "is used by add, too")


def test_a_write_amid_the_operations_stops_a_match():
    def forward(self, x):
        h = torch.exp(x)
        x.add_(1)
        return torch.log(h) * x

    report = Rewrite(lambda x: torch.log(torch.exp(x)), lambda x: x.clone()).find(model_of(forward))
    assert not report.matches
    assert report.misses[0].stopped_at == "add_"


def _adds(self, h):
    h.add_(1)


WRITES = {
    "by a method": _adds,
    "by a function": lambda self, h: F.relu(h, inplace=True),
    "by a function, by place": lambda self, h: F.relu(h, True),
    "into out": lambda self, h: torch.add(h, 1, out=h),
    "by a layer": lambda self, h: self.act(h),
    "by a layer inside another": lambda self, h: self.several(h),
    "by a module of another class": lambda self, h: self.own(h),
}

SHARING = {
    "an argument": lambda x: x,
    "a view": lambda x: x.view(-1, SIZE),
    "dropout that does nothing": lambda x: F.dropout(x, 0.5, False),
    "einsum": lambda x: torch.einsum("ij->ij", x),
    "an operator": lambda x: torch.ops.aten.alias.default(x),
    "an attribute": lambda x: x.mT.mT,
}


@pytest.mark.parametrize("replacement", SHARING)
@pytest.mark.parametrize("write", WRITES)
def test_a_replacement_that_shares_memory_is_copied_where_a_write_follows(write, replacement):
    def forward(self, x):
        h = x.neg().neg()
        WRITES[write](self, h)
        return h + x

    layers = {"act": nn.ReLU(inplace=True), "several": nn.Sequential(nn.ReLU(inplace=True)), "own": model_of(_adds)}
    model, x = model_of(forward, **layers), inputs()
    expected = model(x.clone())
    Rewrite(lambda x: x.neg().neg(), SHARING[replacement])(model, inside=[""], expects=1)
    assert torch.equal(model(x), expected)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "transpose": lambda x: x.transpose(-1, -2),
    "view": lambda x: x.view(-1),
    "reshape": lambda x: x.reshape(-1),
    "contiguous": lambda x: x.contiguous(),
    "to": lambda x: x.to(torch.float32),
    "index": lambda x: x[0],
}


@pytest.mark.parametrize("writes_base", [True, False], ids=["into the base", "into the view"])
@pytest.mark.parametrize("view", VIEWS)
def test_a_view_whose_memory_is_written_afterwards_is_not_replaced(view, writes_base):
    def forward(self, x):
        y = x.sin()
        z = VIEWS[view](y)
        (y if writes_base else z).add_(1)
        return (z if writes_base else y) * 1

    model, x = model_of(forward), inputs()
    expected = model(x)
    with pytest.raises(RewriteError, match="may be a view of another tensor, and add_ writes to that memory in place"):
        Rewrite(VIEWS[view], VIEWS[view])(model, expects=1)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("replacement", SHARING)
def test_a_replacement_that_shares_memory_is_copied_where_other_modules_have_its_value(replacement):
    def forward(self, x):
        h = self.inner(x)
        h.add_(1)
        return h + x

    model, x = model_of(forward, inner=model_of(lambda self, x: x.neg().neg().view(-1, SIZE))), inputs()
    expected = model(x.clone())
    Rewrite(lambda x: x.neg().neg(), SHARING[replacement])(model, expects=1)
    assert torch.equal(model(x), expected)


def test_a_replacement_is_not_copied_where_nothing_can_write_to_it():
    model, x = model_of(lambda self, x: x.neg().neg()), inputs()
    Rewrite(lambda x: x.neg().neg(), lambda x: x)(model, expects=1)
    assert model(x) is x
    inner = nn.Sequential(nn.Dropout(0.5))
    Rewrite(lambda x, *, p: F.dropout(x, p, training=False), lambda x: x)(inner)
    assert inner.eval()(x) is x


def test_several_views_are_refused_where_a_write_follows():
    def forward(self, x):
        parts = torch.tensor_split(x.cos(), 2)
        parts[0].add_(1)
        return parts[0] + x

    model = model_of(forward)
    with pytest.raises(RewriteError, match=r"add_ writes to that memory in place afterwards"):
        Rewrite(lambda x: torch.tensor_split(x.cos(), 2), lambda x: torch.chunk(x, 2))(model)
    assert not isinstance(model, fx.GraphModule)


def test_an_operation_in_place_is_another_one():
    report = Rewrite(lambda x: F.relu(x), nothing).find(nn.Sequential(nn.ReLU(inplace=True)))
    assert not report.matches
    assert report.misses[0].reason == "has True as inplace, where the pattern has False"


def test_a_layer_with_hooks_is_swallowed_by_no_match():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    model[0].register_forward_hook(lambda *_: None)
    report = Rewrite(lambda x, w, b: F.gelu(F.linear(x, w, b)), nothing).find(model)
    assert not report.matches
    assert "0 has hooks" in str(report)


def test_the_report_names_the_nearest_miss_first_with_what_stopped_it_and_its_line():
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3)))

    rewrite = Rewrite(
        lambda x, *, root: 0.5 * x * (1 + torch.tanh(root * (x + 0.044715 * x**3))), nothing, name="tanh_gelu"
    )
    report = rewrite.find(model_of(forward))
    assert not report.matches
    miss = report.misses[0]
    assert miss.reason == "has 0.05 as input, where the pattern has 0.044715" or "0.044715" in miss.reason
    assert miss.matched >= 7
    assert "torch.tanh(math.sqrt(2 / math.pi)" in miss.line
    assert "of 8 operations are met" in str(report)


def test_a_pattern_that_is_met_but_for_its_last_operation_is_a_near_miss():
    rewrite = Rewrite(lambda x, w, b: F.gelu(F.linear(x, w, b)), nothing, name="gelu_of_linear")
    report = rewrite.find(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    [miss] = report.misses
    assert (miss.matched, miss.size, miss.stopped_at) == (1, 2, "_1")
    assert miss.reason == "is relu, where the pattern has gelu"
    both = rewrite.find(nn.Sequential(nn.Linear(4, 4), nn.GELU()))
    assert len(both.matches) == 1
    assert not both.misses


def test_of_matches_that_share_operations_the_last_counts():
    model = model_of(lambda self, x: torch.sin(torch.sin(torch.sin(x))))
    Rewrite(lambda x: torch.sin(torch.sin(x)), lambda x: 2 * x)(model, expects=1)
    x = inputs()
    torch.testing.assert_close(model(x), 2 * torch.sin(x))


def test_matches_in_a_chain_are_all_replaced():
    model = model_of(lambda self, x: torch.sin(torch.sin(torch.sin(x))))
    Rewrite(lambda x: torch.sin(x), lambda x: 2 * x)(model, expects=3)
    x = inputs()
    torch.testing.assert_close(model(x), 8 * x)


# refusals


def test_another_number_of_matches_is_refused_with_the_near_misses_and_the_model_stays_as_it_is():
    model: Any = nn.Sequential(nn.GELU(), nn.GELU("tanh"))
    for expects, words in ((2, "1 match, and not 2"), (range(5, 7), "1 match, and not range")):
        with pytest.raises(RewriteError, match=words) as caught:
            gelu_to_tanh(model, expects=expects)
        assert "has 'tanh' as approximate, where the pattern has 'none'" in str(caught.value)
    with pytest.raises(RewriteError, match="0 matches, and not at least one"):
        Rewrite(lambda x: F.silu(x), nothing)(model)
    assert type(model[0]) is nn.GELU
    gelu_to_tanh(model, expects=range(1, 3))


def test_a_pattern_that_says_nothing_is_refused():
    own = torch.ones(3)
    for pattern, words in (
        (lambda x: x, "returns an argument"),
        (lambda x: 3, "returns a int"),
        (lambda x, y: F.relu(x), "doesn't use its argument y"),
        (lambda *x: F.relu(x[0]), r"can't have \*args"),
        (lambda x: x + own, "tensor of shape"),
        (lambda x: F.relu(x) if x.sum() > 0 else x, "the pattern can't be read"),
        (lambda x: F.relu(x) * len(x), "the pattern can't be read"),
    ):
        with pytest.raises(RewriteError, match=words):
            Rewrite(pattern, nothing)


def test_wrong_types_are_refused_with_what_is_wanted():
    gelu: Any = gelu_to_tanh
    for call, words in (
        (lambda: gelu(3), "a rewrite takes a module, and not a int"),
        (lambda: gelu.find("model"), "a rewrite takes a module, and not a str"),
        (lambda: undo_rewrites(None), "a rewrite takes a module, and not a NoneType"),  # pyright: ignore
        (lambda: gelu(nn.GELU(), expects="1"), "expects is a number of matches"),
        (lambda: gelu(nn.GELU(), expects=True), "expects is a number of matches"),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_a_condition_returns_a_reason_or_none():
    where: Any = lambda match: match["x"] is None  # noqa: E731
    with pytest.raises(TypeError, match="where of nothing returns True; it returns why a match doesn't count"):
        Rewrite(lambda x: F.gelu(x), nothing, where=where).find(nn.GELU())


def test_a_condition_that_asks_for_what_the_pattern_lacks_is_told_what_there_is():
    other = layer(nn.Linear)
    for where, words in (
        (lambda match: match["scale"], "no argument scale; its arguments are x"),
        (lambda match: match.path("scale"), "no argument scale; its arguments are x"),
        (lambda match: match.called(other), r"doesn't call this layer\(Linear\)"),
    ):
        with pytest.raises(KeyError, match=words):
            Rewrite(lambda x: F.gelu(x), nothing, where=where).find(nn.GELU())


def test_a_replacement_that_cannot_stand_in_a_graph_is_refused_and_the_model_stays_as_it_is():
    unmet = layer(nn.Linear)
    for replacement, words in (
        (lambda y: y, "asks for y, and the pattern's arguments are x"),
        (lambda x: None, "returns a NoneType"),
        (lambda x: x + torch.ones(3), "tensor of shape"),
        (lambda x: unmet(x), "calls layer"),
        (lambda x: x * held("scale.weight"), r"held\('scale.weight'\), and GELU has no scale.weight"),
    ):
        model: Any = nn.Sequential(nn.GELU())
        with pytest.raises(RewriteError, match=words):
            Rewrite(lambda x: F.gelu(x), replacement)(model)
        assert type(model[0]) is nn.GELU


def test_a_replacement_that_fails_on_the_example_is_refused():
    model = model_of(lambda self, x: torch.exp(x) @ self.w)
    with pytest.raises(RewriteError, match="fails on the example"):
        Rewrite(lambda x: torch.exp(x), lambda x: x @ x)(trace(model, (inputs(),)))


def test_a_model_with_adapters_is_neither_rewritten_nor_are_its_rewrites_undone():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    gelu_to_tanh(model)
    get_peft_model(model, LoraConfig(target_modules=["0"]))
    for call in (gelu_to_tanh, undo_rewrites):
        with pytest.raises(RewriteError, match="has adapters"):
            call(model)


# in place


def test_a_rewritten_model_is_the_object_with_the_classes_hooks_and_tensors_that_it_was():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    called = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    before, layers = model.state_dict(keep_vars=True), list(model)
    report = gelu_to_tanh(model, expects=1)
    assert report.graph_module is model
    assert list(model) == layers
    assert isinstance(model[1], nn.GELU)
    assert all(now is before[name] for name, now in model.state_dict(keep_vars=True).items())
    model(inputs())
    assert called


def test_undoing_gives_the_classes_back_also_of_copies_and_of_several_rewrites():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Dropout(0.1))
    x = inputs()
    model.eval()
    expected = model(x)
    gelu_to_tanh(model)
    Rewrite(lambda x: F.gelu(x, approximate="tanh"), lambda x: F.relu(x))(model)
    Rewrite(lambda x: F.dropout(x, 0.1, training=False), lambda x: x)(model)
    for rewritten in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert not torch.equal(rewritten(x), expected)
        undo_rewrites(rewritten)
        assert [type(each) for each in rewritten] == [nn.Linear, nn.GELU, nn.Dropout]
        assert torch.equal(rewritten(x), expected)


def test_undone_copies_have_graphs_of_their_own():
    traced = trace(nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU()), (inputs(),))
    gelu_to_tanh(traced)
    copied = copy.deepcopy(traced)
    for each in (traced, copied):
        undo_rewrites(each)
    assert copied.graph is not traced.graph


def test_undoing_gives_a_trace_its_graph_back():
    traced = trace(nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU()), (inputs(),))
    code = traced.code
    gelu_to_tanh(traced)
    assert traced.code != code
    undo_rewrites(traced)
    assert traced.code == code


def test_undoing_gives_a_graph_of_fx_its_class_back_and_takes_later_edits_along():
    traced = fx.symbolic_trace(nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU()))
    code, cls = traced.code, type(traced)
    for _ in range(2):
        report = Rewrite(lambda x: F.gelu(x), lambda x: F.gelu(x, approximate="tanh") + F.gelu(x))(traced, expects=1)
        assert [matched.module for matched in report.matches] == [""]
    traced.graph.eliminate_dead_code()
    traced.recompile()
    undo_rewrites(traced)
    assert type(traced) is cls
    assert traced.code == code


def test_equal_modules_that_share_a_graph_are_rewritten_one_by_one():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(SIZE, SIZE))

        def forward(self, x):
            return F.gelu(x @ self.w)

    model: Any = nn.Sequential(Block(), Block())
    gelu_to_tanh(model, inside=["1"], expects=1)
    assert type(model[0]) is Block
    x = inputs()
    torch.testing.assert_close(
        model(x), F.gelu(F.gelu(x @ model[0].w) @ model[1].w, approximate="tanh"), rtol=0, atol=0
    )


def test_each_mode_is_rewritten_by_itself():
    model: Any = nn.Sequential(nn.Dropout(0.5))
    report = Rewrite(lambda x, *, p: F.dropout(x, p, training=False), lambda x: x)(model)
    assert [matched.modes for matched in report.matches] == ["evaluation"]
    x = torch.ones(100)
    assert model.eval()(x) is x
    assert (model.train()(x) == 0).any()


def test_both_graphs_of_a_forward_that_decides_on_its_mode_are_rewritten():
    model = model_of(lambda self, x: F.gelu(x) * 2 if self.training else F.gelu(x))
    report = gelu_to_tanh(model)
    assert {matched.modes for matched in report.matches} == {"both"}
    x = inputs()
    assert torch.equal(model.train()(x), 2 * F.gelu(x, approximate="tanh"))
    assert torch.equal(model.eval()(x), F.gelu(x, approximate="tanh"))


def test_a_layer_in_another_mode_than_the_match_has_seen_raises():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Dropout(0.5)).eval()
    Rewrite(lambda x, w, b, *, p: F.dropout(F.linear(x, w, b), p, training=False), lambda x, w, b: F.linear(x, w, b))(
        model
    )
    model(inputs())
    model[1].train()
    with pytest.raises(GuardError, match=r"^1\.training, on which"):
        model(inputs())


def test_a_hook_that_a_swallowed_layer_gets_later_raises():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    Rewrite(lambda x, w, b: F.gelu(F.linear(x, w, b)), lambda x, w, b: F.relu(F.linear(x, w, b)))(model, expects=1)
    x = inputs()
    expected = model(x)
    for rewritten in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), trace(model, (x,))):
        assert torch.equal(rewritten(x), expected)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    hook = model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(GuardError, match=r"^0\._forward_hooks, on which"):
        model(x)
    hook.remove()
    assert torch.equal(model(x), expected)


def test_a_weight_that_a_norm_gets_later_is_refused():
    model: Any = nn.Sequential(nn.Conv1d(2, 2, 1), nn.BatchNorm1d(2, affine=False)).eval()
    Rewrite(
        lambda x, mean, variance, w, b, *, eps: F.batch_norm(x, mean, variance, w, b, False, 0.1, eps),
        lambda x, mean, variance, eps: F.batch_norm(x, mean, variance, eps=eps),
    )(model, inside=[""], expects=1)
    model(torch.randn(2, 2, 3))
    model[1].weight = nn.Parameter(torch.ones(2))
    with pytest.raises(GuardError, match=r"^1\.weight, on which"):
        model(torch.randn(2, 2, 3))


def test_an_option_that_a_layer_can_no_longer_have_is_refused():
    model: Any = nn.Sequential(nn.Conv1d(2, 2, 3))
    Rewrite(lambda x, w, b: F.conv1d(x, w, b), lambda x, w, b: F.conv1d(x, 2 * w, b))(model, expects=1)
    with pytest.raises(GuardError, match="padding_mode"):
        model[0].padding_mode = "circular"


def test_the_forward_of_a_module_around_is_read_with_its_layers_as_calls():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    fused = Rewrite(lambda x, w, b: F.gelu(F.linear(x, w, b)), lambda x, w, b: F.relu(F.linear(x, w, b)))
    report = fused(model, expects=1)
    assert [(matched.module, matched.node) for matched in report.matches] == [("", "_1")]


def test_a_layer_of_a_pattern_is_the_module_that_the_replacement_calls():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch, self.other = nn.Linear(SIZE, SIZE), nn.GELU()

        def forward(self, x):
            return self.branch(x) + x + self.other(x)

    branch = layer(nn.Linear)
    model, x = Residual(), inputs()
    Rewrite(lambda x: x + branch(x), lambda x: x + 0.5 * branch(x))(model, expects=1)
    called = []
    model.branch.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(model(x), x + 0.5 * F.linear(x, model.branch.weight, model.branch.bias) + F.gelu(x))
    assert called


def test_rewrites_in_several_threads_have_graphs_of_their_own():
    waiting = threading.Barrier(2, timeout=60)

    def replacement(x):
        waiting.wait()
        value = x + held("b")
        waiting.wait()
        return value

    def rewritten(number: int) -> bool:
        model, x = model_of(lambda self, x: torch.exp(x)), torch.ones(SIZE)
        # the modes of a model with one graph have one replacement
        Rewrite(lambda x: torch.exp(x), replacement)(model, expects=1)
        return torch.equal(model(x), x + model.b)

    with ThreadPoolExecutor(2) as threads:
        assert all(threads.map(rewritten, range(2)))


def test_alternatives_in_several_threads_are_chosen_by_themselves():
    waiting = threading.Barrier(2, timeout=60)
    choice = either(lambda x: x.sin(), lambda x: x.cos())

    def pattern(x):
        waiting.wait()
        return choice(x) * choice(x)

    with ThreadPoolExecutor(2) as threads:
        rewrites = list(threads.map(lambda _: Rewrite(pattern, nothing), range(2)))
    assert [rewrite.alternatives for rewrite in rewrites] == [4, 4]


def test_a_replacement_reads_what_the_module_holds():
    model = model_of(lambda self, x: torch.exp(x))
    Rewrite(lambda x: torch.exp(x), lambda x: x + held("b"))(model)
    x = inputs()
    torch.testing.assert_close(model(x), x + model.b)
    with pytest.raises(RuntimeError, match="in replacements"):
        held("b")


def test_a_layer_whose_weight_is_read_past_its_forward_is_left():
    model = nn.TransformerEncoderLayer(SIZE, 2, 16, batch_first=True)
    report = Rewrite(lambda x, w, b: F.linear(x, w, b), nothing).find(model)
    assert not report.matches
    assert report.left["linear1"] == "its weight is read by the model, which needn't call it"
    assert report.left["self_attn.out_proj"] == "its weight is read by self_attn, which needn't call it"


def test_a_value_that_is_drawn_once_is_not_drawn_twice():
    twice = Rewrite(lambda x: F.dropout(x) + F.dropout(x), nothing)
    twice(model_of(lambda self, x: F.dropout(x) + F.dropout(x)), expects=1)

    def once(self, x):
        h = F.dropout(x)
        return h + h

    report = twice.find(model_of(once))
    assert not report.matches
    assert report.misses[0].reason == "draws once, where the pattern draws twice by dropout"


def test_a_sum_of_any_values_is_no_layer_with_a_bias():
    assert not Rewrite(lambda x, y: x + y, nothing).find(nn.Sequential(nn.Linear(SIZE, SIZE))).matches


def test_a_forward_that_cannot_be_read_is_named_and_others_are_rewritten():
    class Decides(nn.Module):
        def forward(self, x):
            return F.gelu(x) if x.sum() > 0 else x

    model: Any = nn.Sequential(Decides(), nn.GELU())
    report = gelu_to_tanh(model, expects=1)
    assert list(report.left) == ["0"]
    assert "couldn't be read, such as 0" in str(report)


def test_an_example_does_not_fix_one_of_several_ways_in_which_a_module_is_called():
    class Scaled(nn.Module):
        def forward(self, x, by=None):
            return F.gelu(x) if by is None else F.gelu(x) * by

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled, self.gelu = Scaled(), nn.GELU()

        def forward(self, x):
            return self.scaled(x) + self.scaled(x, by=2) + self.gelu(x)

    model, x = Both(), inputs()
    report = gelu_to_tanh(model, example_inputs=(x,))
    assert [matched.module for matched in report.matches] == ["gelu"]
    assert "both with and without by" in report.left["scaled"]
    torch.testing.assert_close(model(x), 3 * F.gelu(x) + F.gelu(x, approximate="tanh"))


# afterwards


def test_adapters_come_after_rewrites_and_leave_them_when_they_go():
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Linear(SIZE, SIZE))
    doubled = Rewrite(lambda x, w, b: F.linear(x, w, b), lambda x, w, b: F.linear(x, 2 * w, b))
    doubled(model, expects=2)
    gelu_to_tanh(model, expects=1)
    x = inputs()
    expected = model(x)
    get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    adapted = model(x)
    assert not torch.allclose(adapted, expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)
    merged = copy.deepcopy(model)
    merged.merge_and_unload()
    torch.testing.assert_close(merged(x), adapted)
    model.unload()
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0], nn.Linear)
    undo_rewrites(model)
    assert type(model[0]) is nn.Linear


def test_a_rewritten_trace_is_adapted_at_the_boundaries_of_its_modules():
    from graphpeft.graph.ops.boundaries import boundaries_inside, boundary_of

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model_of(lambda self, x: F.gelu(x + 1))

        def forward(self, x):
            return self.inner(torch.exp(x)) * 2

    traced = trace(Around(), (inputs(),))
    gelu_to_tanh(traced)
    Rewrite(lambda x: torch.exp(x), lambda x: torch.cos(x))(traced)
    [name] = boundaries_inside(traced.graph, "inner")
    boundary = boundary_of(traced.graph, name)
    assert boundary.output.target is F.gelu
    assert [node.target for node in boundary.inputs.values()] == [torch.cos]


def test_a_rewritten_model_is_exported_and_traced():
    x = inputs()
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU()).eval()
    gelu_to_tanh(model)
    expected = model(x)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.testing.assert_close(trace(model, (x,))(x), expected)


def test_a_rewrite_is_a_pass_of_fx():
    traced = trace(nn.Sequential(nn.GELU()), (inputs(),))
    passes: Any = [gelu_to_tanh]
    result = PassManager(passes=passes)(traced)
    assert result.modified
    assert result.graph_module is traced


def test_an_interrupted_rewrite_leaves_the_model_as_it_was(monkeypatch):
    from graphpeft.rewrites import rewrite

    model, calls = nn.Sequential(nn.GELU(), nn.GELU()), []
    wear = rewrite.wear_template

    def interrupted(module, template):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        wear(module, template)

    monkeypatch.setattr(rewrite, "wear_template", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gelu_to_tanh(model)
    assert [type(each) for each in model] == [nn.GELU, nn.GELU]


def test_a_picture_has_the_graphs_before_and_after_also_where_an_adapter_acts():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Dropout(0.1))
    gelu_to_tanh(model)
    Rewrite(lambda x, *, p: F.dropout(x, p, training=False), lambda x: x, name="no_dropout")(model)
    Rewrite(lambda x, w, b: F.linear(x, w, b), lambda x, w, b: x @ w.T + b, name="spelled_out")(model)
    get_peft_model(model, LoraConfig(target_modules=["0"]))
    picture = picture_of(model)
    linear, gelu, dropout = (
        picture.graphs[module.graphs] for module in picture.model.inside if module.graphs is not None
    )
    assert [(node.label, node.rewrite) for node in gelu[0].after if node.op == "call_function"] == [
        ("gelu", "gelu_to_tanh")
    ]
    assert "none" in str(gelu[0].before)
    assert not any(node.rewrite for node in gelu[0].before)
    assert [drawn.mode for drawn in dropout] == ["evaluation", "training"]
    assert [len(drawn.after) < len(drawn.before) for drawn in dropout] == [True, False]
    assert {node.rewrite for node in linear[0].after if node.slot is None and node.op != "placeholder"} >= {
        "spelled_out"
    }
    assert any(node.slot == 0 for node in linear[0].after)


def test_finding_changes_nothing():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU())
    assert len(gelu_to_tanh.find(model).matches) == 1
    assert [type(each) for each in model] == [nn.Linear, nn.GELU]


def test_the_laws_of_rewrites_hold_and_undoing_is_exact():
    model: Any = nn.Sequential(nn.Linear(SIZE, SIZE), nn.GELU(), nn.Dropout(0.2))
    same = Rewrite(lambda x, w, b: F.linear(x, w, b), lambda x, w, b: x @ w.T + b)
    found = verify_rewrite(
        model, same, (inputs(),), (inputs(2, 5),), undo=undo_rewrites, tolerance=1e-6, progress=False, quiet=True
    )
    assert found.holds, found


def test_a_part_of_an_adapted_model_is_not_rewritten():
    model = get_peft_model(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.GELU())), LoraConfig(target_modules=["0.0"]))
    for act in (Rewrite(lambda x: F.gelu(x), lambda x: F.relu(x)), undo_rewrites):
        with pytest.raises(RewriteError, match="has adapters"):
            act(model[0])
