"""A traced model equals the model or raises; each trap of tracing is a test."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
import pickle
import re
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
import torch.utils._pytree as pytree
from made_modules import X, module_of
from models import EXAMPLES, LLAMA, MLP, UNTRACED, VIT, Example
from torch import nn
from torch.utils.checkpoint import checkpoint

from graphpeft import (
    GuardError,
    LoraConfig,
    NeedsInputsError,
    TraceError,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    trace,
)
from graphpeft.graph.template import GraphForward
from graphpeft.testing import laws
from graphpeft.tracing.examples import Examples


def code_of(module, *inputs) -> str:
    return trace(module, inputs or None).code


# whole models


every_example = pytest.mark.parametrize("example", [e for e in EXAMPLES if e not in UNTRACED], ids=str)


def smaller(inputs, batch: int, length: int):
    """Returns the inputs for fewer rows, and fewer tokens where they are tokens."""

    def cut(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value[:batch] if value.is_floating_point() else value[:batch, :length]

    return pytree.tree_map(cut, inputs)


@every_example
def test_whole_models_become_one_flat_graph_that_equals_them(example: Example):
    inputs = example.inputs()
    laws.assert_traced_is_the_model(example.build, inputs, example.inputs(1), smaller(inputs, batch=1, length=4))
    assert trace(example.build(), inputs).kept == {}


@pytest.mark.parametrize("example", [LLAMA, MLP, VIT], ids=str)
def test_smaller_inputs_need_no_other_trace(example: Example):
    model, inputs = example.build(), smaller(example.inputs(), batch=1, length=4)
    traced: Any = trace(model, example.inputs())
    laws.require_equal(laws.run(traced, inputs), laws.run(model, inputs), "the traced model")


def test_the_result_is_a_graph_module_that_shares_the_parameters():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    traced: Any = trace(model)
    assert isinstance(traced, fx.GraphModule)
    assert dict(traced.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert all(a is b for a, b in zip(traced.parameters(), model.parameters(), strict=True))


def test_editing_the_result_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    before = laws.snapshot(model)
    traced: Any = trace(model)
    relu = next(node for node in traced.graph.nodes if node.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    traced.graph.erase_node(relu)
    traced.recompile()
    traced.get_submodule("0").extra = nn.Parameter(torch.ones(1))
    laws.require_unchanged(model, before, "editing the traced model")
    assert torch.equal(traced(X), model[0](X))


def test_a_copy_of_a_traced_model_has_a_graph_of_its_own():
    traced: Any = trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    copied = copy.deepcopy(traced)
    expected = traced(X)
    relu = next(node for node in copied.graph.nodes if node.target == "1")
    relu.replace_all_uses_with(relu.args[0])
    copied.recompile()
    assert torch.equal(traced(X), expected)
    assert not torch.equal(copied(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(traced))(X), expected)


# values that Python code asks for


def test_shapes_stay_dynamic():
    model = module_of(lambda self, x: x.view(x.shape[0], -1, 2).reshape(*x.shape[:-1], -1) + x.size(1))
    laws.assert_traced_is_the_model(lambda: model, (X,), (X[:1, :3],))


def test_a_decision_on_a_shape_is_followed_and_checked():
    model = module_of(lambda self, x: x * 2 if x.shape[1] % 5 == 0 else x)
    traced: Any = trace(model, (X,))
    assert torch.equal(traced(X.repeat(1, 2, 1)), model(X.repeat(1, 2, 1)))
    with pytest.raises(GuardError, match=r"x\.shape\[1\] % 5 == 0.*test_tracing\.py.*was True .* and is False now"):
        traced(X[:, :3])


def test_a_number_that_leaves_the_graph_is_checked():
    def forward(self, x):
        return sum(x[:, i] for i in range(x.shape[1]))

    traced: Any = trace(module_of(forward), (X,))
    assert torch.equal(traced(X), module_of(forward)(X))
    with pytest.raises(GuardError, match="was 5 when the graph was recorded and is 3 now"):
        traced(X[:, :3])


def test_equal_decisions_on_different_values_are_all_checked():
    def forward(self, x, y):
        if x.shape[1] == 5:
            x = x + 1
        if y.shape[1] == 5:
            y = y + 2
        return x.sum() + y.sum()

    traced: Any = trace(module_of(forward), (X, X))
    with pytest.raises(GuardError):
        traced(X, X[:, :3])


def test_dtype_and_device_follow_the_inputs():
    model = module_of(lambda self, x: x + torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None])
    laws.assert_traced_is_the_model(lambda: model, (X,), (X.double(),))


def test_a_decision_on_a_dtype_is_checked():
    model = module_of(lambda self, x: x.float() if x.dtype == torch.float16 else x + torch.finfo(x.dtype).eps)
    laws.assert_traced_is_the_model(lambda: model, (X,), (X.double(),))
    with pytest.raises(GuardError, match=r"x\.dtype == torch\.float16"):
        trace(model, (X,))(X.half())


def test_isinstance_len_and_iteration_are_answered_from_the_value():
    def forward(self, x):
        assert isinstance(x, torch.Tensor)
        assert not isinstance(x, tuple)
        first, second = x.split(4, dim=-1)
        assert len(x.shape) == 3
        return first - second if len((first, second)) == 2 else x

    laws.assert_traced_is_the_model(lambda: module_of(forward), (X,), (X[:1],))


def test_the_text_of_a_shape_or_a_dtype_is_a_decision():
    def forward(self, x):
        y = x * 2 if str(x.dtype) == "torch.float32" else x
        return y * {"5 tokens": 3, "(5, 8)": 5}[f"{x.shape[1]} tokens"] + len(f"{x.shape[1]:>4}{tuple(x.shape)!r}")

    model = module_of(forward)
    laws.assert_traced_is_the_model(lambda: model, (X,), (2 * X,))
    for other, line in ((X.double(), "str"), (X[:, :3], "tokens")):
        with pytest.raises(GuardError, match=line):
            trace(model, (X,))(other)


def test_dtypes_can_be_compared_by_identity():
    model = module_of(lambda self, x: x * 2 if x.dtype is torch.float32 else x)
    assert torch.equal(trace(model, (X,))(X), 2 * X)
    with pytest.raises(GuardError, match=r"x\.dtype is torch\.float32"):
        trace(model, (X,))(X.double())


def test_shapes_are_broadcast():
    model = module_of(lambda self, x: x.expand(torch.broadcast_shapes(x.shape, (x.shape[0], 1, 8))))
    laws.assert_traced_is_the_model(lambda: model, (X,), (X[:1, :3],))


def test_a_message_that_tells_of_a_shape_decides_nothing():
    def forward(self, x):
        torch._assert(
            x.dim() == 3,
            f"expected (batch, tokens, features), got {x.shape}",
        )
        logging.getLogger("graphpeft").warning("a batch of %s", x.shape[0])
        return x * 2

    laws.assert_traced_is_the_model(lambda: module_of(forward), (X,), (X[:1, :3],))


def test_python_rounds_divides_and_reverses_values():
    def forward(self, x):
        half, rest = divmod(x.shape[1], 2)
        flipped: Any = reversed(x)
        return flipped.mul(round(x.shape[0] / 3, 1)) + half + divmod(9, half)[1] * rest + len(list(reversed(x.shape)))

    laws.assert_traced_is_the_model(lambda: module_of(forward), (X,), (X[:1, :4],))


@pytest.mark.parametrize("inputs", [(X,), None], ids=["with inputs", "without"])
def test_numbers_and_tuples_that_are_counted_up_leave_their_other_names_alone(inputs):
    def forward(self, x):
        n = x.shape[1]
        following, shape = n, x.shape
        following += 1
        longer = shape
        longer += (1,)
        y = name = x * 1
        y += following
        y @= self.w
        return y + n, name.reshape(longer), name.reshape(shape)

    model = module_of(forward, w=torch.randn(8, 8))
    traced: Any = trace(model, inputs)
    for given in (X, X[:, :3]):
        laws.require_equal(traced(given), model(given), "the traced model")


def test_a_decision_on_tensor_values_keeps_the_module_that_takes_it_as_a_call():
    decides = module_of(lambda self, x: x if x.sum() > 0 else -x)
    model = nn.Sequential(nn.Linear(8, 8), decides)
    traced: Any = trace(model, (X,))
    assert list(traced.kept) == ["1"]
    assert "depends on the values of a tensor" in traced.kept["1"]
    for x in (X, -X):
        assert torch.equal(traced(x), model(x))
    with pytest.raises(TraceError, match="values of a tensor"):
        trace(decides, (X,))


def test_a_report_lists_decisions_with_their_lines_and_what_was_kept():
    decides = module_of(lambda self, x: x if x.sum() > 0 else -x)
    shaped = module_of(lambda self, x: x * 2 if x.shape[1] % 5 == 0 else x)
    traced: Any = trace(nn.Sequential(decides, shaped), (X,))
    lines = str(traced.report).splitlines()
    assert re.match(r"\d+ nodes, 1 module kept as a call", lines[0])
    assert "0: " in lines[1]
    assert "depends on the values of a tensor" in lines[1]
    assert any("x.shape[1] % 5 == 0" in line and line.endswith("): True") for line in lines)
    with pytest.raises(TraceError, match=r"not all of the model becomes a graph: 0: .*values of a tensor"):
        trace(nn.Sequential(decides, shaped), (X,), strict=True)
    assert trace(nn.Sequential(shaped), (X,), strict=True)


def test_without_example_inputs_a_decision_asks_for_them():
    model = module_of(lambda self, x: x * 2 if x.shape[1] > 3 else x)
    with pytest.raises(NeedsInputsError, match=r"x\.shape\[1\] > 3.*pass example_inputs"):
        trace(model)
    assert "mul" in code_of(model, X)


def test_inputs_must_be_a_tuple_or_a_dict():
    with pytest.raises(TypeError, match=r"pass a tuple of positional arguments, such as \(x,\)"):
        trace(nn.Linear(8, 8), X)  # type: ignore[arg-type]


# arguments and outputs


def test_absent_optional_arguments_stay_absent():
    def forward(self, x, mask=None, *, scale=1.0, flag=False):
        y = x if mask is None else x * mask
        return -y * scale if flag else y * scale

    traced: Any = trace(module_of(forward), (X,))
    assert torch.equal(traced(X), X)
    assert torch.equal(traced(X, scale=1.0), X)
    with pytest.raises(GuardError, match="the argument 'mask'"):
        traced(X, X)
    with pytest.raises(GuardError, match="the argument 'flag'"):
        traced(X, flag=True)
    given = trace(module_of(forward), {"x": X, "mask": X, "scale": 2.0, "flag": True})
    assert torch.equal(given(X, X, scale=3.0, flag=True), module_of(forward)(X, X, scale=3.0, flag=True))


def test_nested_inputs_varied_arguments_and_structured_outputs():
    @dataclasses.dataclass
    class Out:
        y: torch.Tensor
        rest: list

    def forward(self, batch, *more, **options):
        y = batch["x"] + batch["pair"][0] - batch["pair"][1]
        for other in more:
            y = y + other
        return Out(y * options["factor"], [y, (y, None, 3)])

    model, inputs = module_of(forward), {"x": X, "pair": (X, 2 * X)}
    positional = module_of(lambda self, batch, *more: forward(self, batch, *more, factor=2))
    found, expected = trace(positional, (inputs, X, X))(inputs, X, X), positional(inputs, X, X)
    assert isinstance(found, Out)
    laws.require_equal((found.y, found.rest), (expected.y, expected.rest), "the output")
    traced: Any = trace(model, {"batch": inputs, "factor": 2})
    assert torch.equal(traced(batch=inputs, factor=3).y, model(inputs, factor=3).y)


def test_a_mapping_keeps_its_type_and_order():
    def forward(self, x):
        return OrderedDict([("b", x + 1), ("a", {"x": x, "inner": OrderedDict(c=x)})])

    found = trace(module_of(forward), (X,))(X)
    assert type(found) is OrderedDict
    assert list(found) == ["b", "a"]
    assert type(found["a"]["inner"]) is OrderedDict
    with pytest.raises(TraceError, match="a defaultdict goes through the graph"):
        trace(module_of(lambda self, x: defaultdict(list, a=x)), (X,))


# state and effects


@pytest.mark.parametrize("training", [True, False])
def test_training_stays_an_input_of_the_graph(training):
    inner = module_of(lambda self, x: F.dropout(x, 0.5, self.training))
    model = nn.Sequential(nn.Dropout(0.2), inner, nn.BatchNorm1d(5))
    laws.assert_traced_is_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))
    traced: Any = trace(model.train(training), (X,))
    traced.get_submodule("1").train(not training)
    model[1].train(not training)
    assert torch.equal(laws.run(traced, (X,)), laws.run(copy.deepcopy(model), (X,)))


@pytest.mark.parametrize("training", [True, False])
def test_a_branch_on_training_gives_a_graph_for_each_mode(training):
    def forward(self, x):
        y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)
        return F.linear(y, self.w) * 2 if self.training else F.linear(y, self.w)

    model = nn.Sequential(module_of(forward, w=nn.Parameter(torch.randn(8, 8)))).train(training)
    laws.assert_traced_is_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))
    traced: Any = trace(model, (X,))
    evaluation, other = traced.graphs
    assert "mul" in str(other)
    assert "mul" not in str(evaluation)
    assert traced.graph is traced.graphs[training]
    assert traced.train(not training).graph is traced.graphs[not training]
    assert f"{0.0 if training else 0.3}" in traced.code


@pytest.mark.parametrize("training", [True, False])
def test_a_value_that_a_write_gives_another_shape_has_its_first_shape_in_the_other_mode_too(training):
    def forward(self, x):
        y = self.fc(x)
        rows = y.shape[0]
        y.unsqueeze_(0)
        return y * rows if self.training else y.sum(0) + y.dim()

    module = module_of(forward, fc=nn.Linear(8, 8)).train(training)
    traced = trace(module, (X,))
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(X), module.train(mode)(X))


def test_the_other_mode_computes_anew_only_what_differs(monkeypatch):
    ran = []
    run = Examples._run

    def counted(self, node, args, kwargs):
        ran.append(node.target)
        return run(self, node, args, kwargs)

    monkeypatch.setattr(Examples, "_run", counted)
    module = module_of(lambda self, x: self.fc(x).cos() if self.training else self.fc(x).sin(), fc=nn.Linear(8, 8))
    trace(module, (X,))
    assert ran.count("fc") == 1
    assert {"sin", "cos"} <= set(ran)


@pytest.mark.parametrize("training", [True, False])
def test_calls_that_are_the_same_give_each_a_tensor_of_its_own_in_both_modes(training):
    def forward(self, x):
        a, b = x.relu(), x.relu()
        a.add_(1)
        return a * b if self.training else a - b

    module = module_of(forward).train(training)
    traced = trace(module, (X,))
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(X), module.train(mode)(X))


def test_editing_a_graph_acts_in_its_mode():
    traced: Any = trace(module_of(lambda self, x: x * 2 if self.training else x).eval(), (X,))
    output = traced.graph.output_node()
    with traced.graph.inserting_before(output):
        output.args = (traced.graph.call_function(torch.neg, output.args),)
    traced.recompile()
    assert torch.equal(traced(X), -X)
    assert torch.equal(traced.train()(X), 2 * X)
    assert torch.equal(copy.deepcopy(traced).eval()(X), -X)


def test_passes_of_fx_work_on_a_graph_for_each_mode():
    def forward(self, x):
        self.unused(x)
        return self.trained(x) if self.training else self.evaluated(x)

    layers = {name: nn.Linear(8, 8) for name in ("trained", "evaluated", "unused")}
    model = module_of(forward, **layers)
    traced: Any = trace(model, (X,))
    for graph in traced.graphs:
        assert graph.eliminate_dead_code()
    traced.recompile()
    traced.delete_all_unused_submodules()
    traced.meta["seen"] = True
    assert traced.meta == {"seen": True}
    assert [name for name, _ in traced.named_children()] == ["trained", "evaluated"]
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(X), model.train(mode)(X))


def test_a_mode_that_cannot_be_recorded_is_refused_when_it_is_run():
    model = module_of(lambda self, x: x * 2 if self.training and x.sum() > 0 else x)
    traced: Any = trace(model.eval(), (X,))
    assert torch.equal(traced(X), X)
    assert "if self.training" in traced.other_mode_error
    assert "depends on the values of a tensor" in traced.other_mode_error
    with pytest.raises(GuardError, match=r"if self\.training"):
        traced.train()(X)


def test_operations_in_place_and_item_assignments_are_kept():
    def forward(self, x):
        y = x.clone()
        y[:, 0] = 7
        y.mul_(2)
        z = torch.zeros(x.shape[0], 8)
        z[:] = y[:, 1]
        z.add_(1)
        return z

    model = module_of(forward)
    traced: Any = trace(model, (X,))
    first = traced(X)
    assert torch.equal(first, model(X))
    assert torch.equal(traced(2 * X), model(2 * X))
    assert torch.equal(first, model(X))  # a new tensor in each run


def test_constants_made_in_the_forward_are_made_anew_in_each_run():
    model = module_of(lambda self, x: x + torch.rand(8) + torch.arange(8))
    traced: Any = trace(model, (X,))
    assert torch.equal(laws.run(traced, (X,)), laws.run(model, (X,)))
    assert not torch.equal(traced(X), traced(X))


def test_arithmetic_on_buffers_follows_the_buffers():
    model = module_of(lambda self, x: x * (self.scale + 1), scale=torch.ones(8))
    traced: Any = trace(model, (X,))
    traced.scale.fill_(3)
    assert torch.equal(traced(X), X * 4)


def test_a_forward_that_changes_its_module_stays_a_call():
    def forward(self, x):
        self.count = self.count + 1
        return x * self.count

    model = nn.Sequential(module_of(forward, count=torch.zeros(())), nn.Linear(8, 8))
    before = laws.snapshot(model)
    traced: Any = trace(model, (X,))
    laws.require_unchanged(model, before, "tracing")
    assert "assigns self.count" in traced.kept["0"]
    assert torch.equal(traced(X), copy.deepcopy(model)(X))


def test_tensors_that_a_forward_finds_by_itself_are_inputs_of_the_graph():
    def forward(self, x):
        for name, parameter in self.linear.named_parameters():
            x = x + parameter.abs().mean() * len(name)
        return x * next(self.parameters()).sum() + self._buffers["scale"].exp() + self.plain.exp() * self.plain.shape[0]

    members = {"linear": nn.Linear(8, 8), "scale": torch.ones(8), "plain": None}
    model = module_of(forward, **members)
    model.plain = torch.ones(8)
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))
    traced: Any = trace(model, (X,))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers(), model.plain):
            tensor.add_(1)
    assert torch.equal(traced(X), model(X))


@pytest.mark.parametrize("is_kept", [False, True])
def test_tensors_that_a_module_holds_anywhere_are_written_in_each_run(is_kept):
    def forward(self, x):
        self._buffers["scale"].add_(1)
        self.held["a"][0].mul_(2)
        self.held["b"][1:] += 1
        if is_kept and x.sum() > 1e6:
            x = x + 1
        return x * self.scale + self.held["a"][0] + self.held["b"]

    held = {"a": [torch.ones(8)], "b": torch.ones(8)}
    model = nn.Sequential(module_of(forward, scale=torch.ones(8), held=held))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))


def test_a_forward_that_caches_tensors_leaves_no_trace_in_the_model():
    def forward(self, x):
        if x.shape[1] not in self.cache:
            self.cache[x.shape[1]] = torch.arange(x.shape[1])
        return x + self.cache[x.shape[1]][:, None]

    model = module_of(forward, cache={})
    trace(model, (X,))
    assert model.cache == {}


def in_half(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = self.linear(x)
        with torch.autocast("cpu", enabled=False):
            z = self.linear(x) @ x.mT
        assert x.shape[1] == 5
    return y, z, self.linear(x)


def test_regions_under_autocast_are_nodes():
    model = nn.Sequential(module_of(in_half, linear=nn.Linear(8, 8)))
    traced: Any = trace(model, (X,))
    assert traced.kept == {}
    for outside in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            found, expected = traced(X), model(X)
        laws.require_equal(found, expected, "the traced model")
        assert [y.dtype == torch.bfloat16 for y in found] == [True, False, outside]
    traced.graph.eliminate_dead_code()
    traced.recompile()
    laws.require_equal(traced(X), model(X), "without dead code")
    get_peft_model(traced, LoraConfig(target_modules=["linear"], init_lora_weights=False))
    assert [y.dtype == torch.bfloat16 for y in traced(X)] == [True, False, False]


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."), reason="PyTorch 2.10 can't compile a region under autocast in a graph"
)
def test_regions_under_autocast_are_compiled():
    model = nn.Sequential(module_of(in_half, linear=nn.Linear(8, 8)))
    compiled: Any = torch.compile(trace(model, (X,)), fullgraph=True, backend="eager")
    laws.require_equal(compiled(X), model(X), "compiled")


def test_the_graph_of_a_model_takes_the_arguments_of_its_forward():
    def by_mode(self, ids, scale=2):
        return self.linear(ids) * scale if self.training else self.linear(ids) / scale

    def in_region(self, ids, scale=2):
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(ids) * scale

    for forward in (by_mode, in_region):
        model = module_of(forward, linear=nn.Linear(8, 8))
        traced: Any = trace(model, (X, 3))
        # a Trainer takes the columns of data by these names
        assert [*inspect.signature(traced.forward).parameters] == ["ids", "scale"]


def test_a_run_that_raises_leaves_no_autocast_behind():
    traced: Any = trace(module_of(in_half, linear=nn.Linear(8, 8)), (X,))
    with pytest.raises(GuardError):
        traced(X[:, :3])
    assert not torch.is_autocast_enabled("cpu")
    laws.require_equal(traced(X), traced(X), "the traced model")


def test_regions_under_autocast_share_no_casts_of_weights():
    def forward(self, x):
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                x = self.linear(x).float() / 3
        return x

    model = module_of(forward, linear=nn.Linear(8, 8))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))


def test_no_gradient_goes_through_a_region_under_no_grad():
    def forward(self, x):
        with torch.no_grad():
            scale, first = self.linear(x).softmax(-1), self.w * 2
        return self.linear(x) * scale + first

    model = module_of(forward, linear=nn.Linear(8, 8), w=nn.Parameter(torch.ones(8)))
    traced: Any = trace(model, (X,))
    gradients = []
    for module in (model, traced):
        module.zero_grad()
        module(X).sum().backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    laws.require_equal(traced(X), model(X), "the traced model")
    laws.require_equal(gradients[1], gradients[0], "its gradients")
    assert traced.w.grad is None


def test_no_gradient_goes_through_complex_numbers_under_no_grad():
    def forward(self, x):
        with torch.no_grad():
            z = self.w * 2
        return (z * x * self.w).abs()

    model = module_of(forward, w=nn.Parameter(torch.randn(8, dtype=torch.complex64)))
    traced: Any = trace(model, (X,))
    for module in (model, traced):
        module(X).sum().backward()
    expected, model.w.grad = model.w.grad.clone(), None
    traced(X).sum().backward()
    assert model.w.grad is not None
    assert torch.allclose(torch.add(model.w.grad, model.w.grad), expected)


def test_what_is_handed_on_under_no_grad_keeps_its_gradient():
    def forward(self, x):
        with torch.no_grad():
            y, z = F.dropout(self.linear(x).float(), 0.5, self.training), x.float()
            w, a = self.idle(x), {"x": x}["x"].contiguous()
        return self.linear(x) + y * z * w * a

    model = module_of(forward, linear=nn.Linear(8, 8), idle=nn.Sequential(nn.Dropout(0.2), nn.Identity()))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))


def test_the_gradient_mode_can_follow_the_mode_of_a_module():
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            y = self.linear(x)
        return y * self.linear(x)

    model = module_of(forward, linear=nn.Linear(8, 8))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))
    trace(model.eval(), (X,))(X)
    assert torch.is_grad_enabled()


def test_buffers_are_written_under_no_grad():
    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(x.mean((0, 1)), alpha=0.1)
                self.mean[0] = x[0, 0, 0]
                self.mean[1:3].copy_(x[0, 0, 1:3])
                torch.mul(x[0, 0], 2, out=self.last)
        return self.linear(x) - self.mean + self.last

    model = module_of(forward, linear=nn.Linear(8, 8), mean=torch.zeros(8), last=torch.zeros(8))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))
    model.mean.requires_grad_()
    with pytest.raises(TraceError, match=r"writes under torch\.no_grad\(\)"):
        trace(model, (X,))


def test_what_is_written_into_a_buffer_under_no_grad_hands_on_no_gradient():
    def forward(self, x):
        y = self.linear(x).mean((0, 1))
        with torch.no_grad():
            self.last.copy_(y)
        return self.linear(x) * self.last

    model = module_of(forward, linear=nn.Linear(8, 8), last=torch.zeros(8))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))


def test_what_was_computed_before_the_model_can_be_written_into():
    model = module_of(lambda self, x: self.linear(x.mul_(2)), linear=nn.Linear(8, 8))
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,), (X[:1],))


def test_a_write_under_no_grad_keeps_the_module_a_call():
    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            y[:, 0] = 0
        return y

    model = nn.Sequential(module_of(forward, linear=nn.Linear(8, 8)))
    traced: Any = trace(model, (X,))
    assert "writes under torch.no_grad()" in traced.kept["0"]
    assert torch.equal(traced(X), model(X))


@pytest.mark.parametrize(
    "write", [lambda y: F.leaky_relu(y, 0.1, True), nn.ELU(inplace=True)], ids=["function", "layer"]
)
def test_a_write_by_an_option_under_no_grad_keeps_the_module_a_call(write):
    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            self.write(y)
        return y

    model = nn.Sequential(module_of(forward, linear=nn.Linear(8, 8), write=write))
    traced: Any = trace(model, (X,))
    assert "writes under torch.no_grad()" in traced.kept["0"]
    laws.assert_traced_trains_as_the_model(lambda: copy.deepcopy(model), (X,))


def test_the_gradient_mode_within_a_region_is_the_regions_own():
    def forward(self, x):
        with torch.no_grad():
            y = x * 2 if torch.is_grad_enabled() else x * 3
        return x + y

    laws.assert_traced_trains_as_the_model(lambda: module_of(forward), (X,))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any, **_: Any) -> Any:
        x, ctx.factor = args
        return x * ctx.factor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0] * 10 * ctx.factor, None


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x) -> Any:
        return Doubled.apply(self.linear(x), 2)


def test_a_forward_with_its_own_gradient_keeps_it():
    model: Any = Doubling()
    traced: Any = trace(model, (X,))
    assert any(node.name.startswith("doubled_apply") for node in traced.graph.nodes)
    copies = [traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))]
    model(X).sum().backward()
    expected = model.linear.weight.grad.clone()
    for module in copies:
        module.zero_grad()
        module(X).sum().backward()
        assert torch.equal(module.get_parameter("linear.weight").grad, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_function_that_recomputes_others_keeps_the_module_a_call(use_reentrant):
    def forward(self, x):
        return checkpoint(lambda y: self.linear(y) * 2, x, use_reentrant=use_reentrant)

    model = nn.Sequential(module_of(forward, linear=nn.Linear(8, 8)))
    x = X.clone().requires_grad_()
    traced: Any = trace(model, (x,))
    assert "is computed again for gradients" in traced.kept["0"]
    assert torch.equal(traced(x), model(x))


def test_numbers_of_numpy_are_numbers():
    model = module_of(lambda self, x: x * np.float64(0.1) + np.log(3.0))
    assert torch.equal(trace(model, (X,))(X), model(X))


@functools.lru_cache
def _steps(length) -> Any:
    return torch.arange(length)[:, None] * 1.0


def test_a_function_with_a_cache_keeps_nothing_of_a_trace():
    model = module_of(lambda self, x: x + _steps(x.shape[1]))
    traced: Any = trace(model, (X,))
    assert _steps.cache_info().currsize == 0
    assert torch.equal(model(X), traced(X))
    assert torch.equal(traced(X[:, :3]), model(X[:, :3]))


def test_sets_of_the_model_keep_their_order():
    names = {f"layer {i}" for i in range(50)}
    model = module_of(lambda self, x: x, names=names)
    before = list(names)
    trace(model, (X,))
    assert list(names) == before


def test_a_trace_under_no_grad_gives_a_graph_that_trains():
    with torch.no_grad():
        traced: Any = trace(nn.Linear(8, 8), (X,))
    assert traced(X).requires_grad


def test_tied_weights_and_shared_modules_stay_tied():
    embedding = nn.Embedding(9, 8)
    linear = nn.Linear(8, 8)

    def forward(self, ids):
        h = self.linear(self.linear(self.embedding(ids)))
        return F.linear(h, self.embedding.weight)

    model = module_of(forward, embedding=embedding, linear=linear)
    ids = torch.randint(0, 9, (2, 4))
    traced: Any = trace(model, (ids,))
    assert torch.equal(traced(ids), model(ids))
    assert [name for name, _ in traced.named_parameters()] == [name for name, _ in model.named_parameters()]


def test_parameters_in_containers_and_properties():
    def forward(self, x):
        for weight in self.weights:
            x = F.linear(x, weight)
        return x * self.named["scale"]

    weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(2)])
    model = module_of(forward, weights=weights, named=nn.ParameterDict({"scale": nn.Parameter(torch.ones(8))}))
    laws.assert_traced_is_the_model(lambda: model, (X,), (X[:1],))


def test_a_parametrised_layer_is_computed_from_its_originals():
    linear: Any = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    traced: Any = trace(nn.Sequential(linear), (X,))
    assert torch.equal(traced(X), linear(X))
    traced(X).sum().backward()
    assert linear.parametrizations.weight.original0.grad is not None


def test_a_config_object_keeps_its_identity_in_the_graph():
    @dataclasses.dataclass
    class Config:
        factor: int = 3

    config = Config()
    scaled = module_of(lambda self, x: _scale(x, self.config), config=config)
    traced: Any = trace(scaled, (X,))
    config.factor = 5
    assert torch.equal(traced(X), X * 5)


@fx.wrap
def _scale(x, config):
    return x * config.factor


def test_a_function_that_fx_wraps_is_no_state_of_a_module_that_stays_a_call():
    def forward(self, x):
        return x * 2 if x.sum() > 0 else _scale(x, self.config)

    config = dataclasses.make_dataclass("Config", [("factor", int)])(3)
    model = nn.Sequential(module_of(forward, config=config))
    traced: Any = trace(model, (X,))
    assert list(traced.kept) == ["0"]
    assert "depends on the values of a tensor" in traced.kept["0"]
    for x in (X, -X.abs()):
        assert torch.equal(traced(x), model(x))


def calls_in(module: Any) -> list[str]:
    return [str(node.target) for graph in module.graphs for node in graph.nodes if node.op == "call_module"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.l(x) + x @ self.l.weight,
        lambda self, x: F.linear(x, self.l.weight) if self.training else self.l(x),
    ],
    ids=["in one graph", "in another mode"],
)
def test_a_layer_whose_weight_is_used_beside_its_calls_is_inlined(forward):
    model = module_of(forward, l=nn.Linear(8, 8), other=nn.Linear(8, 8))
    traced: Any = trace(model, (X,))
    assert calls_in(traced) == []
    for is_training in (True, False):
        assert torch.equal(traced.train(is_training)(X), model.train(is_training)(X))
    x = traced(X)
    get_peft_model(traced, LoraConfig(target_modules=["l"], init_lora_weights=False))
    adapted = traced(X)
    assert not torch.allclose(adapted, x)
    torch.testing.assert_close(traced.merge_and_unload()(X), adapted)


def test_a_layer_that_is_only_asked_about_stays_a_call():
    traced = trace(module_of(lambda self, x: self.l(x.to(self.l.weight.dtype)), l=nn.Linear(8, 8)), (X,))
    assert calls_in(traced) == ["l"]


def test_hooks_of_inlined_modules_and_of_layers_act():
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.ReLU()))
    factor: Any = 2  # which type checkers would take for the output

    model[0].register_forward_hook(lambda module, args, out: factor * out)
    model[1].register_forward_hook(lambda module, args, out: factor * out)
    assert torch.equal(trace(model, (X,))(X), model(X))


def test_an_instance_forward_is_the_one_that_is_traced():
    model = module_of(lambda self, x: x)
    model.forward = lambda x: x * 3
    assert torch.equal(trace(model, (X,))(X), X * 3)


def test_patches_are_taken_back_after_a_failure():
    before = (isinstance, torch.zeros, nn.Module.__setattr__, nn.Module.__dict__.get("training"))
    with pytest.raises(TraceError, match="ZeroDivisionError"):
        trace(module_of(lambda self, x: x / (1 // 0)), (X,))
    assert before == (isinstance, torch.zeros, nn.Module.__setattr__, nn.Module.__dict__.get("training"))
    assert nn.Linear(2, 2).training


# what PyTorch does with the result


@pytest.mark.parametrize("example", [LLAMA, MLP, VIT], ids=str)
def test_compile_accepts_the_result_as_one_graph(example: Example):
    traced, inputs = trace(example.build(), example.inputs()), example.inputs()
    compiled: Any = torch.compile(traced, fullgraph=True, backend="eager")
    laws.require_equal(laws.run(compiled, inputs), laws.run(traced, inputs), "compiled")


def test_a_graph_module_is_traced_again_to_the_same_code():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    once = trace(model, (X,))
    assert isinstance(once, GraphForward)
    assert torch.equal(trace(once, (X,))(X), model(X))


# what can be traced


@pytest.mark.parametrize("example", [LLAMA, VIT], ids=str)
def test_a_model_in_half_precision_is_traced(example: Example):
    def build():
        return example.build().bfloat16()

    inputs = pytree.tree_map_only(
        torch.Tensor, lambda t: t.bfloat16() if t.is_floating_point() else t, example.inputs()
    )
    laws.assert_traced_is_the_model(build, inputs)


def computations(traced: Any) -> list[str]:
    """Returns the lines of a graph's code, without numbers of names, but for those on the kind of device."""
    lines = traced.code.replace("'cpu'", "'meta'").splitlines()
    asks = ("_expect(", "is_autocast_enabled")
    return [re.sub(r"_\d+\b", "", line) for line in lines if not any(ask in line for ask in asks)]


@pytest.mark.parametrize("example", [LLAMA, VIT], ids=str)
def test_a_model_without_data_is_traced(example: Example):
    model = example.build().to("meta")
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), example.inputs())
    traced: Any = trace(model, inputs)
    assert traced.kept == {}
    assert computations(traced) == computations(trace(example.build(), example.inputs()))
    assert {parameter.device.type for parameter in traced.parameters()} == {"meta"}


def test_graph_modules_inside_a_model_are_inlined():
    inner = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
    model = nn.Sequential(inner, nn.Linear(8, 8))
    laws.assert_traced_is_the_model(lambda: model, (X,), (X[:1],))
    assert "0.0" in [node.target for node in trace(model, (X,)).graph.nodes]


@pytest.mark.parametrize("example", [LLAMA, VIT], ids=str)
def test_a_traced_adapted_model_has_the_adapters_nodes(example: Example):
    adapted = get_peft_model(example.build().eval(), LoraConfig(init_lora_weights=False, **example.lora))
    traced: Any = trace(adapted, example.inputs())
    assert "default.lora_A" in traced.code
    laws.require_equal(laws.run(traced, example.inputs()), laws.run(adapted, example.inputs()), "the traced model")


@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
@pytest.mark.parametrize("example", [LLAMA, VIT], ids=str)
def test_the_module_of_an_exported_program_is_adapted_as_the_model_is(example: Example):
    inputs = example.inputs()
    args, kwargs = ((), {**inputs, "use_cache": False}) if isinstance(inputs, dict) else (inputs, {})
    config = LoraConfig(init_lora_weights=False, **example.lora)
    model = get_peft_model(example.build().eval(), config)
    exported: Any = torch.export.export(example.build().eval(), args, kwargs).module()
    get_peft_model(exported, config)
    set_peft_model_state_dict(exported, get_peft_model_state_dict(model))
    found, expected = (pytree.tree_leaves(module(*args, **kwargs)) for module in (exported, model))
    laws.require_close(found, expected, 1e-6, "the adapted program")
