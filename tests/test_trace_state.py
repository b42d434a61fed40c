"""What a forward leaves on its modules: a graph does without it, or the module stays a call; never a wrong answer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_modules import X, module_of
from torch import nn

from graphpeft import GuardError, TraceError, trace
from graphpeft.testing import laws


def traced_inside(model, *inputs) -> Any:
    """Returns the trace of `model` in a container, so that what can't be inlined can stay a call."""
    return trace(nn.Sequential(model), inputs or (X,))


def assert_history_is_that_of(model, traced, *calls) -> None:
    """Checks that both give the same answers in a row of calls."""
    fresh = copy.deepcopy(nn.Sequential(model))
    for x in calls:
        laws.require_equal(traced(x), fresh(x), "the traced model")


# what is of no use to the next call


def test_what_is_set_before_it_is_read_is_a_value_of_the_graph():
    def forward(self, x):
        self.pooled = x.mean(1)
        self.steps = 1
        for _ in range(2):
            self.steps *= 2
        return x + self.pooled[:, None] * self.steps

    model = module_of(forward)
    traced = traced_inside(model)
    assert traced.kept == {}
    assert traced.report.not_kept == ("0.pooled", "0.steps")
    assert "set by the model and not by the graph: 0.pooled, 0.steps" in str(traced.report)
    assert not hasattr(model, "pooled")
    assert_history_is_that_of(model, traced, X, 2 * X, X[:1])


def test_a_module_may_read_what_another_one_has_set():
    def forward(self, x):
        self.inner.factor = x.sum(-1, keepdim=True)
        return self.inner(x)

    inner = module_of(lambda self, x: x * self.factor)
    model = module_of(forward, inner=inner)
    assert traced_inside(model).kept == {}
    assert_history_is_that_of(model, traced_inside(model), X, X[:1])


def test_a_list_that_is_made_anew_in_each_call_is_no_state():
    def forward(self, x):
        self.pyramid = [x]
        for _ in range(2):
            self.pyramid.append(self.pyramid[-1][:, ::2])
        return torch.cat(self.pyramid, 1)

    model = module_of(forward, pyramid=[torch.zeros(())])
    assert traced_inside(model).kept == {}
    assert_history_is_that_of(model, traced_inside(model), X, X[:, :4])


# caches


class Positions(nn.Module):
    """Keeps positions of its last length, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.positions.shape[0] != x.shape[1]:
            self.positions = torch.arange(x.shape[1]) * 1.0
        return x + self.positions[:, None]


def test_a_cache_of_what_follows_from_sizes_is_computed_in_each_run():
    model = Positions()
    traced = traced_inside(model)
    assert traced.kept == {}
    assert model.positions.shape == (1,)
    assert_history_is_that_of(model, traced, X, X[:, :3], X)


def test_a_cache_that_is_filled_already_is_read_and_its_use_is_checked():
    model = Positions()
    model(X)
    traced = traced_inside(model)
    assert traced.report.not_kept == ()
    assert torch.equal(traced(X), model(X))
    with pytest.raises(GuardError, match=r"self\.positions\.shape\[0\] != x\.shape\[1\]"):
        traced(X[:, :3])


def test_a_cache_of_parameters_follows_the_parameters():
    def forward(self, x):
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = self.w[: x.shape[1]] * 2
        return x + self.cache[x.shape[1]][:, None]

    model = module_of(forward, w=nn.Parameter(torch.randn(9)), cache={})
    traced: Any = trace(model, (X,))
    with torch.no_grad():
        model.w.zero_()
    assert torch.equal(traced(X), X)
    assert model.cache == {}


def test_a_cache_beside_a_tensor_that_is_made_in_each_call_is_computed_in_each_run():
    def forward(self, x):
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.arange(x.shape[1]) * 1.0
        written, other = torch.Tensor([1, 2, 3, 4, 5]), torch.Tensor([1, 2, 3, 4, 5])
        written += 1
        return x + (self.cache[x.shape[1]] * written + other)[:, None]

    model = module_of(forward, cache={})
    traced = traced_inside(model)
    assert traced.kept == {}
    assert_history_is_that_of(model, traced, X, X[:1], X)


def test_values_that_come_from_a_cache_may_be_compared_with_others():
    def forward(self, x):
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.arange(x.shape[1]) * 1.0
        y = x + self.cache[x.shape[1]][:, None]
        z = torch.where(y > 1, y, -y)
        parts = torch.split(z * 2 if z.is_floating_point() else z, 2, dim=-1)
        return torch.cat(parts, -1) if len(parts) > 1 else z  # asks nothing of their values

    model = module_of(forward, cache={})
    traced = traced_inside(model)
    assert traced.kept == {}
    assert_history_is_that_of(model, traced, X, X[:1], X)


# what the next call depends on


def counting(self, x):
    self.count = self.count + 1
    return x * self.count


def remembering(self, x):
    y = x if self.last is None else x + self.last
    self.last = x.mean()
    return y


def collecting(self, x):
    self.seen.append(x.mean())
    return x * len(self.seen)


def averaging(self, x):
    self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
    return x - self.mean


def logging(self, x):
    self.seen.append(x.detach())
    return x + 1


def once(self, x):
    if self.first:
        self.first = False
        return x * 100
    return x


def initialising(self, x):
    if not self.done:
        with torch.no_grad():
            self.scale.copy_(1 / x.std())
        self.done = True
    return x * self.scale


def deleting(self, x):
    if hasattr(self, "start"):
        x = x + self.start
        del self.start
    return x


def growing(self, x):
    if x.shape[1] > self.most:
        self.most = x.shape[1]
    return x * self.most


def remembering_a_weight(self, x):
    if self.start is None:
        self.start = self.w * 1
    return x + (self.w - self.start)


def remembering_what_was_written(self, x):
    made = torch.zeros(8)
    made[:4] = x.mean((0, 1))[:4]
    if self.start is None:
        self.start = made
    return x + self.start


class Counter:
    """An object of a user's class, which is no module."""

    def __init__(self):
        self.n = 0


def counting_elsewhere(self, x):
    self.counter.n += 1
    return x * self.counter.n


@pytest.mark.every
@pytest.mark.parametrize(
    ("forward", "members", "name"),
    [
        (once, {"first": True}, "first"),
        (initialising, {"done": False, "scale": torch.ones(())}, "done"),
        (deleting, {"start": 5.0}, "start"),
        (growing, {"most": 0}, "most"),
        (remembering_a_weight, {"start": None, "w": nn.Parameter(torch.ones(8))}, "start"),
        (remembering_what_was_written, {"start": None}, "start"),
        (counting, {"count": 0}, "count"),
        (counting, {"count": torch.zeros(())}, "count"),
        (remembering, {"last": None}, "last"),
        (collecting, {"seen": []}, "seen"),
        (averaging, {"mean": torch.zeros(8)}, "mean"),
        (logging, {"seen": []}, "seen"),
    ],
    ids=[
        "a first time",
        "first values",
        "a deletion",
        "a largest size",
        "a weight of once",
        "what was written once",
        "a number",
        "a buffer",
        "a value",
        "a list",
        "an average",
        "a list that is only filled",
    ],
)
def test_what_changes_with_each_call_keeps_the_module_a_call(forward, members, name):
    model = module_of(forward, **members)
    before = laws.snapshot(model)
    traced = traced_inside(copy.deepcopy(model))
    assert f"self.{name} for its next call, which a graph can't hold" in traced.kept["0"]
    assert_history_is_that_of(model, traced, X, 2 * X, X)
    with pytest.raises(TraceError, match=rf"self\.{name} for its next call"):
        trace(model, (X,))
    laws.require_unchanged(model, before, "a failed trace")


def test_a_count_that_no_output_uses_still_counts():
    def forward(self, x):
        self.counter.steps = self.counter.steps + 1
        return x * 2

    counter: Any = Counter()
    counter.steps = torch.zeros(())
    traced = traced_inside(module_of(forward, counter=counter))
    assert "changes its Counter.steps for its next call" in traced.kept["0"]
    for _ in range(2):
        traced(X)
    assert traced.get_submodule("0").counter.steps == 2


def remembering_in_an_attribute(self, x):
    if self.table is None:
        self.table = self.embed(self.ids)
    return x + self.table


def remembering_in_a_dictionary(self, x):
    if x.shape[1] not in self.table:
        self.table[x.shape[1]] = self.embed(self.ids)
    return x + self.table[x.shape[1]]


@pytest.mark.parametrize(("forward", "empty"), [(remembering_in_an_attribute, None), (remembering_in_a_dictionary, {})])
def test_a_layers_output_of_once_is_not_computed_anew(forward, empty):
    model = module_of(forward, table=empty, embed=nn.Embedding(5, 8), ids=torch.arange(5))
    traced, fresh = traced_inside(copy.deepcopy(model)), copy.deepcopy(nn.Sequential(model))
    assert "self.table for its next call" in traced.kept["0"]
    for each in (traced, fresh):
        each(X)
        with torch.no_grad():
            for parameter in each.parameters():
                parameter.zero_()
    laws.require_equal(traced(X), fresh(X), "the traced model")


def test_an_object_that_changes_with_each_call_keeps_the_module_a_call():
    model = module_of(counting_elsewhere, counter=Counter())
    traced = traced_inside(copy.deepcopy(model))
    assert "changes its Counter.n for its next call" in traced.kept["0"]
    assert_history_is_that_of(model, traced, X, 2 * X, X)
    with pytest.raises(TraceError, match=r"its Counter\.n"):
        trace(model, (X,))
    assert model.counter.n == 0


def test_a_cache_on_an_object_holds_nothing_of_a_trace():
    def forward(self, x):
        if x.shape[1] not in self.counter.cache:
            self.counter.cache[x.shape[1]] = torch.arange(x.shape[1])[:, None] * 1.0
        return x + self.counter.cache[x.shape[1]]

    counter: Any = Counter()
    counter.cache = {}
    model = module_of(forward, counter=counter)
    traced = traced_inside(model)
    assert traced.kept == {}
    assert counter.cache == {}
    assert_history_is_that_of(model, traced, X, X[:1], X)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_decision_on_a_buffer_changes_no_buffer(in_place):
    def forward(self, x):
        if in_place:
            self.steps.add_(1)
        else:
            self.steps += 1
        return x * 5 if self.steps > 4 else x

    model = module_of(forward, steps=torch.tensor(2))
    with pytest.raises(TraceError, match="values of a tensor"):
        trace(model, (X,))
    traced = traced_inside(model)
    assert model.steps == 2
    assert "values of a tensor" in traced.kept["0"]
    assert_history_is_that_of(model, traced_inside(copy.deepcopy(model)), X, X, X, X)


def test_what_one_module_sets_on_another_keeps_both_in_one_call():
    def forward(self, x):
        if self.inner.last is None:
            self.inner.last = x.mean()
        return self.inner(x)

    model = module_of(forward, inner=module_of(lambda self, x: x + self.last, last=None))
    traced = traced_inside(model)
    assert list(traced.kept) == ["0"]
    assert_history_is_that_of(model, traced, X, 2 * X)


def test_what_is_set_on_a_layer_keeps_the_module_a_call():
    def forward(self, x):
        self.dropout.p = x.shape[1] / 10
        return self.dropout(x)

    model = module_of(forward, dropout=nn.Dropout(0.1))
    traced = traced_inside(model)
    assert "assigns self.p" in traced.kept["0"]
    assert torch.equal(laws.run(traced.train(), (X,)), laws.run(nn.Sequential(model).train(), (X,)))


def test_what_is_set_on_a_module_that_stays_a_call_keeps_the_one_around_it_too():
    inner = module_of(lambda self, x: x * self.factor if x.sum() > 0 else x, factor=1)

    def forward(self, x):
        self.inner.factor = 3
        return self.inner(x)

    model = module_of(forward, inner=inner)
    traced = traced_inside(model)
    assert list(traced.kept) == ["0"]
    assert_history_is_that_of(model, traced, X, -X)


def test_a_layer_that_a_forward_assigns_anew_or_converts_keeps_the_module_a_call():
    def assigning(self, x):
        self.linear = self.other
        return self.linear(x)

    def converting(self, x):
        return self.linear.double()(x.double())

    def keeping(self, x):
        self.linear = self.linear.to(torch.float32)
        return self.linear(x)

    for forward, reason in ((assigning, "assigns self.linear"), (converting, "a Linear is converted in a forward")):
        assert reason in traced_inside(module_of(forward, linear=nn.Linear(8, 8), other=nn.Linear(8, 8))).kept["0"]
    model = module_of(keeping, linear=nn.Linear(8, 8))
    assert traced_inside(model).kept == {}
    assert_history_is_that_of(model, traced_inside(model), X)


# decisions on whole numbers


def masked(self, x, mask):
    if mask.any().item():
        x = x.masked_fill(mask[..., None], 0.0)
    return x + 1


def test_a_decision_on_a_mask_is_checked_in_each_run():
    none, some = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool).tril()
    model = module_of(masked)
    for given, other in ((none, some), (some, none)):
        traced: Any = trace(module_of(lambda self, x, mask: self.inner(x, mask), inner=model), (X, given))
        assert traced.kept == {}
        assert torch.equal(traced(X, given), model(X, given))
        with pytest.raises(GuardError, match=r"mask\.any\(\)\.item\(\)"):
            traced(X, other)


def test_a_decision_on_a_mask_sees_what_was_written_into_it():
    def forward(self, x, mask):
        lengths = mask.long()
        lengths[:, 0] = 7
        return x * 2 if lengths.max() > 3 else x

    model = module_of(forward)
    mask = torch.zeros(2, 5)
    traced: Any = trace(model, (X, mask.long()))
    assert torch.equal(traced(X, mask.long()), X * 2)
    assert torch.equal(mask, torch.zeros(2, 5))


@torch.library.custom_op("graphpeft_tests::lessen", mutates_args=["x"])
def lessen(x: torch.Tensor) -> None:
    x.sub_(1)


def _lessened(x: torch.Tensor) -> torch.Tensor:
    return x.sub_(1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # PyTorch's, that this is deprecated
    lessen_by_script = torch.jit.script(_lessened)

WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "into the value": lambda counts, left: left.sub_(1),
    "into the base of a view": lambda counts, left: counts.sub_(1),
    "by out": lambda counts, left: torch.sub(counts, 1, out=counts),
    "by an operator's out": lambda counts, left: torch.ops.aten.sub.out(counts, torch.ones_like(counts), out=counts),
    "by an operator": lambda counts, left: torch.ops.aten.sub_.Tensor(left, torch.ones_like(left)),
    "by an operator of one's own": lambda counts, left: lessen(left),
    "by a script": lambda counts, left: lessen_by_script(left),
}
"""Ways to write into the first element of a tensor, given both."""


@pytest.mark.parametrize("way", WRITES)
def test_a_question_is_asked_again_after_a_write(way):
    write = WRITES[way]

    def forward(self, x, counts):
        counts = counts.clone()
        left = counts[0]
        if left:
            x = x * 2
        write(counts, left)
        return x * 3 if left else x

    two, one, model = torch.tensor([2, 2]), torch.tensor([1, 2]), module_of(forward)
    traced: Any = trace(model, (X, two))
    assert torch.equal(traced(X, two), model(X, two))
    with pytest.raises(GuardError):
        traced(X, one)


def test_sizes_that_follow_from_ids_stay_dynamic_where_nothing_is_decided_on_them():
    def forward(self, x, ids):
        return x[:, ids.nonzero().flatten()]

    model = module_of(forward)
    traced: Any = trace(model, (X, torch.tensor([0, 1, 1, 0, 1])))
    for ids in ([1, 0, 0, 0, 0], [1, 1, 1, 1, 1]):
        assert torch.equal(traced(X, torch.tensor(ids)), model(X, torch.tensor(ids)))
