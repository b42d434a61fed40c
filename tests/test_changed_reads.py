"""Whoever reads the weight of an adapted layer gets the changed weight; writes go into the layer's own, or raise."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.exc import Unsupported
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import (
    AdaptError,
    LilyConfig,
    LoraConfig,
    LoraPerCallConfig,
    TraceError,
    TrainableTokensConfig,
    get_peft_model,
    own_weight,
)
from graphpeft._torch import DisableTorchFunctionSubclass
from graphpeft.graph import changed_weight

pytestmark = pytest.mark.quick("graph", "adapters")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


class Reading(nn.Module):
    """Computes with the weight of a layer, which it doesn't call."""

    def __init__(self, read: Callable[[Any], Tensor] = lambda layer: layer.weight) -> None:
        super().__init__()
        self.inner, self.read = nn.Linear(4, 4), read

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.read(self.inner), self.inner.bias)


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "init_lora_weights": False} | options, target_modules=list(targets))


def adapted(model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(Reading() if model is None else model, lora("inner", **options))


def change(model: Any, name: str = "default") -> Tensor:
    branch = getattr(model.inner, name)
    return 3 / branch.lora_A.shape[0] * branch.lora_B @ branch.lora_A


# what is read


CALLS: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "eager": lambda model: model,
    "compiled": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "strictly exported": lambda model: torch.export.export(model, (X,), strict=True).module(),
    "exported": lambda model: torch.export.export(model, (X,), strict=False).module(),
    "traced by fx": lambda model: fx.symbolic_trace(model),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_a_reader_computes_as_with_the_merged_weight(call: str, options: dict[str, Any]):
    model = adapted(**options)
    if "lora_bias" in options:
        nn.init.ones_(model.inner.default.lora_bias)
    found = CALLS[call](model)(X)
    assert not torch.allclose(found, F.linear(X, own_weight(model.inner), model.inner.bias))
    torch.testing.assert_close(found, copy.deepcopy(model).merge_and_unload()(X))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 6),
    "Conv1D": lambda: Conv1D(6, 4),
    "convolution": lambda: nn.Conv2d(4, 6, 3),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "table": lambda: nn.Embedding(6, 4),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_weight_of_each_kind_of_layer_is_read_as_it_is_merged(kind: str):
    model: Any = get_peft_model(nn.Sequential(LAYERS[kind]()), lora("0"))
    found = model[0].weight
    torch.testing.assert_close(found + 0, model.merge_and_unload()[0].weight)


def test_adapters_are_read_in_the_order_in_which_they_act():
    model = adapted()
    model.add_adapter("dora", lora("inner", use_dora=True))
    for order in (["default", "dora"], ["dora", "default"]):
        model.set_adapter(order)
        torch.testing.assert_close(model.inner.weight + 0, copy.deepcopy(model).merge_and_unload().inner.weight)


def test_a_layer_has_its_own_weight_where_no_adapter_acts():
    model = adapted()
    own = dict(model.named_parameters())["inner.weight"]
    assert own_weight(model.inner) is own
    assert model.inner.weight is not own
    with model.disable_adapter():
        assert model.inner.weight is own
    assert model.unload().inner.weight is own


def test_shapes_and_dtypes_cost_no_sum(monkeypatch: pytest.MonkeyPatch):
    model = adapted()
    monkeypatch.setattr(changed_weight.Computation, "result", None)
    read = model.inner.weight
    assert (read.shape, read.dtype, read.device, read.ndim) == ((4, 4), torch.float32, torch.device("cpu"), 2)
    assert (read.T.shape, read[1:].stride(), read.detach().numel()) == ((4, 4), (4, 1), 16)


def test_a_tensor_that_was_read_follows_what_is_trained():
    model = adapted()
    read = model.inner.weight
    before = read + 0
    with torch.no_grad():
        model.inner.default.lora_B.mul_(2)
        own_weight(model.inner).add_(1)
        torch.testing.assert_close(read + 0, own_weight(model.inner) + change(model))
    assert not torch.allclose(read + 0, before)


CHANGING: dict[str, Callable[[Any], Any]] = {
    "merge": lambda model: model.merge_adapter(),
    "disable": lambda model: model.disable_adapter().__enter__(),
    "other": lambda model: model.set_adapter("other"),
    "unload": lambda model: model.unload(),
}


@pytest.mark.parametrize("change", CHANGING)
@pytest.mark.parametrize("view", [lambda weight: weight, lambda weight: weight.T])
def test_a_tensor_that_was_read_is_an_error_when_other_adapters_act(change: str, view: Callable[[Tensor], Tensor]):
    model = adapted()
    model.add_adapter("other", lora("inner"))
    read = view(model.inner.weight)
    CHANGING[change](model)
    with pytest.raises(RuntimeError, match="weight of a Linear was read while other adapters acted; read it from the"):
        read + 0


def test_a_region_of_autocast_leaves_the_sum_as_precise_as_the_weight():
    model = adapted()
    with torch.autocast("cpu", torch.bfloat16):
        found = model.inner.weight + 0
    torch.testing.assert_close(found, own_weight(model.inner) + change(model))


def test_a_cast_of_the_model_is_one_of_what_is_read():
    assert adapted().double().inner.weight.dtype == torch.float64


@pytest.mark.parametrize("made", [copy.deepcopy, lambda read: pickle.loads(pickle.dumps(read))])
def test_a_copy_of_what_was_read_is_a_plain_tensor(made: Callable[[Tensor], Tensor]):
    model = adapted()
    copied = made(model.inner.weight)
    assert type(copied) is Tensor
    torch.testing.assert_close(copied, (own_weight(model.inner) + change(model)).detach())


def test_get_parameter_gives_the_own_weight_and_in_a_forward_the_changed_one():
    model = adapted(Reading(lambda layer: layer.get_parameter("weight")))
    assert model.inner.get_parameter("weight") is own_weight(model.inner)
    torch.testing.assert_close(model(X), copy.deepcopy(model).merge_and_unload()(X))


def test_a_walk_over_the_graph_of_a_layer_reads_its_own_weight():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), lora("0"))
    layer: Any = model[0]
    torch.testing.assert_close(fx.Interpreter(layer).run(X), layer(X))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.inner = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ self.w) + F.linear(x, self.inner.weight)


def test_a_functional_weight_is_exported_with_one_change():
    model: Any = get_peft_model(Functional(), lora("w"))
    torch.testing.assert_close(torch.export.export(model, (X,), strict=False).module()(X), model(X))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_a_layer_that_is_called_and_read_is_traced_by_fx_with_one_change():
    model: Any = get_peft_model(Functional(), lora("w", "inner"))
    torch.testing.assert_close(fx.symbolic_trace(model)(X), model(X))
    traced: Any = torch.jit.trace(model, (X,))
    torch.testing.assert_close(traced(X), model(X))


COMPUTED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a parameter": lambda layer: layer,
    "parametrized": parametrizations.weight_norm,
    "set by a hook": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("trace", [fx.symbolic_trace, lambda model: graphpeft.trace(model, (X,))], ids=["fx", "flat"])
def test_a_weight_that_is_read_is_traced_with_one_change_however_it_is_computed(trace: Any, computed: str):
    model = Functional()
    model.inner = COMPUTED[computed](model.inner)  # pyright: ignore[reportAttributeAccessIssue]
    model = adapted(model)
    torch.testing.assert_close(trace(model)(X), model(X))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("computed", COMPUTED)
def test_a_region_is_recorded_without_the_changes_of_what_it_reads(computed: str):
    model: Any = Functional()
    model.inner = COMPUTED[computed](model.inner)
    model = get_peft_model(model, lora("inner"), "called")
    model.add_adapter("functional", lora("w"))
    model.set_adapter("functional")
    inner, tensors = model.inner, dict(model.named_parameters())
    w = tensors["w"] + 3 / 2 * tensors["functional.w_lora_B"] @ tensors["functional.w_lora_A"]
    base, x = own_weight(inner), X @ w
    torch.testing.assert_close(model(X), F.linear(x, base, inner.bias) + F.linear(X, base))
    model.set_adapter(["called", "functional"])
    weight = base + change(model, "called")
    torch.testing.assert_close(model(X), F.linear(x, weight, inner.bias) + F.linear(X, weight))


class Counting(nn.Module):
    """Stays a call in a trace, since it counts its calls and decides on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) if x.sum() > -1e9 else x


class Whole(Counting):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.mark.parametrize("cls", [Whole, Counting], ids=["inlined", "kept"])
def test_a_layer_that_a_hook_reads_is_traced_with_one_change(cls: type[Counting]):
    inside, last = cls(), nn.Linear(4, 4)
    layer = inside.layer
    last.register_forward_pre_hook(lambda _, args: (F.linear(args[0], layer.weight),))  # pyright: ignore[reportArgumentType]
    model = get_peft_model(nn.Sequential(inside, last), lora("layer"))
    traced = graphpeft.trace(model, (X,))
    torch.testing.assert_close(traced(X), model(X))
    torch.testing.assert_close(fx.GraphModule(traced, traced.graph)(X), model(X))


class BesideLast(Functional):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


def frozen() -> Any:
    return adapted(Functional(), init_lora_weights="pissa")


def saved() -> Any:
    model = adapted(BesideLast())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["last"], modules_to_save=["inner"]))
    nn.init.ones_(dict(model.named_parameters())["inner.other.weight"])
    return model


def with_rows() -> Any:
    table = nn.Sequential(nn.Embedding(6, 4), Shared())
    table[1].table = table[0]  # pyright: ignore[reportAttributeAccessIssue]
    model: Any = get_peft_model(table, lora("0"))
    model.add_adapter("other", TrainableTokensConfig(target_modules=["0"], token_indices=[1, 3]))
    nn.init.ones_(next(tensor for name, tensor in model.named_parameters() if "other" in name))
    return model


class Shared(nn.Module):
    table: nn.Embedding

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.table.weight)


@pytest.mark.parametrize("make", [frozen, saved, with_rows])
@pytest.mark.parametrize("trace", [graphpeft.trace, lambda model, _: fx.symbolic_trace(model)], ids=["flat", "fx"])
def test_what_an_adapter_reads_in_a_weights_place_is_traced_with_the_changes(make: Callable[[], Any], trace: Any):
    model = make()
    model.set_adapter([*model.peft_config])
    inputs = (torch.tensor([1, 4]) if make is with_rows else X,)
    torch.testing.assert_close(trace(model, inputs)(*inputs), model(*inputs))


def test_a_learning_check_names_no_layer_that_is_read():
    assert graphpeft.check_learning(adapted(), (X,)).dead == ()


class Deciding(nn.Module):
    """Decides on values, so that its own code computes with changed weights."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w, self.inner = nn.Parameter(torch.eye(4)), nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.v if x.sum() > -1e9 else x
        return F.linear(x @ self.w, self.inner.weight) + self.inner(x)


def test_models_in_models_keep_their_changes_when_the_others_adapters_come_and_go():
    torch.manual_seed(0)
    outer: Any = nn.Sequential(Deciding(), nn.Linear(4, 4))
    base = outer(X)
    get_peft_model(outer[0], lora("w", "inner"), "in it")
    inside = outer(X)
    get_peft_model(outer, lora("0.v", "0.inner", "1"), "around")
    both = outer(X)
    assert not any(torch.allclose(one, other) for one, other in ((base, inside), (inside, both)))
    with outer.disable_adapter():
        torch.testing.assert_close(outer(X), inside)
    with outer[0].disable_adapter():
        assert not torch.allclose(outer(X), both)
    outer.merge_adapter()
    torch.testing.assert_close(outer(X), both)
    outer.unload()
    torch.testing.assert_close(outer(X), inside)
    outer[0].unload()
    assert torch.equal(outer(X), base)
    assert type(outer[0]) is Deciding


# gradients


class Doubled(torch.autograd.Function):
    """A product with a gradient of its own, as fused losses have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return 2 * x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return 2 * gradients[0] @ weight, 2 * gradients[0].T @ x


USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "function of autograd": Doubled.apply,
    "linear": F.linear,
    "product with its transpose": lambda x, w: x @ w.T,
    "part": lambda x, w: x @ w[1:].T,
    "halves": lambda x, w: torch.cat([x @ half.T for half in w.chunk(2)], -1),
    "function of a part": lambda x, w: Doubled.apply(x, w[1:]),
    "cast": lambda x, w: x.double() @ w.double().T,
    "einsum": lambda x, w: torch.einsum("bi,oi->bo", x, w),
    "normed": lambda x, w: F.linear(x, F.normalize(w)),
    "twice": lambda x, w: F.linear(F.linear(x, w), w),
}


@pytest.mark.parametrize("use", USES)
def test_gradients_are_those_of_the_sum(use: str):
    model = adapted()
    trained = [model.inner.default.lora_A, model.inner.default.lora_B]
    expected = torch.autograd.grad(USES[use](X, own_weight(model.inner) + change(model)).square().sum(), trained)
    found = torch.autograd.grad(USES[use](X, model.inner.weight).square().sum(), trained)
    torch.testing.assert_close(found, expected)


def test_second_derivatives_are_those_of_the_sum():
    model, found = adapted(), []
    B = model.inner.default.lora_B
    for weight in (model.inner.weight, own_weight(model.inner) + change(model)):
        (first,) = torch.autograd.grad(F.linear(X, weight).pow(3).sum(), [B], create_graph=True)
        found += torch.autograd.grad(first.square().sum(), [B])
    torch.testing.assert_close(*found)


def test_transforms_of_torch_func_see_the_changed_weight():
    model = adapted()
    parameters = dict(model.named_parameters())

    def loss(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, given, (x,)).square().sum()

    by_row = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, X[:, None])
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(by_row[name].sum(0), parameter.grad)


# writes


def fill_rows(weight: Tensor) -> None:
    weight[1:].fill_(2)


def of_many(weight: Tensor) -> None:
    vars(torch)["_foreach_mul_"]([weight], 2)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "init": nn.init.zeros_,
    "init of kaiming": lambda w: nn.init.kaiming_uniform_(w, generator=torch.Generator().manual_seed(0)),
    "fill": lambda w: w.fill_(3),
    "copy": lambda w: w.copy_(torch.ones(4, 4)),
    "data": lambda w: w.data.zero_(),
    "new data": lambda w: setattr(w, "data", torch.ones(4, 4)),
    "item": lambda w: w.__setitem__(0, 5.0),
    "rows": fill_rows,
    "transposed": lambda w: w.T[0].zero_(),
    "unbound": lambda w: [row.zero_() for row in w.unbind()],
    "rows in turn": lambda w: [row.zero_() for row in w],
    "broadcast": lambda w: torch.broadcast_to(w, (4, 4)).zero_(),
    "seen as integers": lambda w: w.view(torch.int32).zero_(),
    "product": lambda w: w.mul_(2),
    "data in place": lambda w: operator.imul(w.data, 2),
    "out": lambda w: torch.add(torch.ones(4, 4), 1, out=w),
    "of many": of_many,
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_goes_into_the_own_weight(write: str):
    model, base = adapted(), Reading().inner
    with torch.no_grad():
        base.weight.copy_(own_weight(model.inner))
        WRITES[write](base.weight)
        WRITES[write](model.inner.weight)
        assert torch.equal(own_weight(model.inner), base.weight)
        torch.testing.assert_close(model.inner.weight + 0, base.weight + change(model))


ASSIGNED = [
    *("weight += 1", "weight *= 2", "weight.data *= 0.5", "weight.data[0] += 1", "weight[1:] += 1"),
    "weight.data += weight.new_ones(4, 4)",
]


@pytest.mark.parametrize("statement", ASSIGNED)
def test_a_part_is_changed_in_place_as_that_of_the_own_weight(statement: str):
    model, base = adapted(), Reading().inner
    with torch.no_grad():
        base.weight.copy_(own_weight(model.inner))
        for layer in (base, model.inner):
            exec(f"layer.{statement.replace('= weight', '= layer.weight')}", {"layer": layer})
    assert torch.equal(own_weight(model.inner), base.weight)


def test_what_belongs_to_the_own_weight_is_set_there():
    model = adapted()
    model.inner.weight.requires_grad_()
    assert own_weight(model.inner).requires_grad
    model.inner.weight.grad = torch.ones(4, 4)
    assert model.inner.weight.grad is own_weight(model.inner).grad is not None


REFUSED: dict[str, Callable[[Any], Any]] = {
    "half of it": lambda layer: layer.weight.copy_(0.5 * layer.weight),
    "half of its data": lambda layer: setattr(layer.weight, "data", 0.5 * layer.weight.data),
    "itself": lambda layer: layer.weight.copy_(layer.weight),
    "a product after a look": lambda layer: layer.weight.mul_(layer.weight.norm()),
    "a part after a look": lambda layer: (layer.weight.sum(), layer.weight[0].zero_()),
    "what a cast to the same dtype returns": lambda layer: layer.weight.to(torch.float32).zero_(),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
    "registered": lambda layer: layer.register_parameter("weight", nn.Parameter(layer.weight * 2)),
}


@pytest.mark.parametrize("write", REFUSED)
def test_a_write_after_the_changed_numbers_were_read_is_an_error(write: str):
    model = adapted()
    before = own_weight(model.inner).clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"may be in what is written, .*own_weight\(layer\)"):
        REFUSED[write](model.inner)
    assert torch.equal(own_weight(model.inner), before)


def test_another_parameter_is_assigned_where_nothing_was_read():
    model, other = adapted(), nn.Parameter(torch.ones(4, 4))
    model.inner(X)
    model.inner.weight = other
    assert own_weight(model.inner) is other
    torch.testing.assert_close(model.inner.weight + 0, other + change(model))


def test_a_state_dict_is_assigned_after_a_read():
    model = adapted()
    model.inner.weight.norm()
    state = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert own_weight(model.inner) is not None
    torch.testing.assert_close(own_weight(model.inner).detach(), state["inner.weight"])


@pytest.mark.parametrize("as_array", [lambda w: w.numpy(), np.asarray])
def test_an_array_of_the_changed_numbers_takes_no_writes(as_array: Callable[[Tensor], Any]):
    layer = adapted().inner
    with torch.no_grad(), pytest.raises(ValueError, match="read-only"):
        as_array(layer.weight.data)[0] = 0


def test_a_python_module_of_a_users_own_may_be_called_like_a_package():
    model = adapted()
    function: dict[str, Any] = {"__name__": "accelerated"}
    exec("def read(layer): return layer.weight", function)
    torch.testing.assert_close(function["read"](model.inner) + 0, own_weight(model.inner) + change(model))
    function["__name__"] = "accelerate.hooks"
    assert function["read"](model.inner) is own_weight(model.inner)


def test_a_function_of_a_users_own_may_be_called_like_a_method():
    def reset_parameters(layer: Any) -> Tensor:
        return layer.weight

    def extra_repr(x: Tensor, layer: Any) -> Tensor:
        return x @ layer.weight.T

    model = adapted()
    assert reset_parameters(model.inner) is own_weight(model.inner)
    weight = own_weight(model.inner) + change(model)
    torch.testing.assert_close(extra_repr(X, model.inner), X @ weight.T)


def test_a_write_past_the_functions_of_tensors_is_an_error():
    layer = adapted().inner
    before = own_weight(layer).clone()
    read, match = layer.weight, "would write into a weight with the changes of adapters"
    with torch.no_grad(), DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match=match):
        read.zero_()
    assert torch.equal(own_weight(layer), before)


OPERATORS: dict[str, Callable[[Any], Any]] = {
    "custom": lambda layer: torch.ops.graphpeft_tests.zero(torch.ones(2), layer.weight),
    "renorm": lambda layer: (layer.weight.sum(), F.embedding(torch.tensor([0]), layer.weight, max_norm=0.1)),
    "stashed": lambda layer: layer.weight.copy_(layer.stash),
    "mode": lambda layer: layer.weight.copy_(layer.seen_by_a_mode()),
}


class Stashing(Reading):
    def forward(self, x: Tensor) -> Tensor:
        self.inner.stash = self.inner.weight.detach().clone()
        return super().forward(x)


@torch.library.custom_op("graphpeft_tests::zero", mutates_args=("weight",))
def zero(x: Tensor, weight: Tensor) -> None:
    weight.zero_()


@pytest.mark.parametrize("write", OPERATORS)
def test_a_write_of_an_operator_or_of_numbers_that_a_forward_has_seen_is_an_error(write: str):
    model = adapted(Stashing())
    before = own_weight(model.inner).clone()
    if write == "stashed":
        model(X)
    if write == "mode":
        with FlopCounterMode(display=False):
            seen = model.inner.weight.clone()
        model.inner.seen_by_a_mode = lambda: seen
    if write == "custom":
        OPERATORS[write](model.inner)  # the first time, nothing was read
        assert not own_weight(model.inner).any()
        return
    with torch.no_grad(), pytest.raises(RuntimeError, match="adapters"):
        OPERATORS[write](model.inner)
    assert torch.equal(own_weight(model.inner), before)


ASKED: dict[str, Callable[[Any], Any]] = {
    "hook": lambda weight: weight.register_hook(lambda gradient: 2 * gradient),
    "gradient": lambda weight: weight.retain_grad(),
    "memory": lambda weight: torch.from_dlpack(weight.detach()),
    "storage": lambda weight: weight.untyped_storage(),
    "leaf": lambda weight: setattr(weight.detach(), "requires_grad", True),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_needs_a_tensor_that_lives_on_is_an_error(asked: str):
    with pytest.raises(RuntimeError, match="take a tensor with its numbers"):
        ASKED[asked](adapted().inner.weight)


def test_what_is_detached_may_have_a_gradient_of_its_own():
    model = adapted()
    leaf = model.inner.weight.detach().requires_grad_()
    torch.testing.assert_close(leaf, own_weight(model.inner) + change(model))
    F.linear(X, leaf).sum().backward()
    assert leaf.grad is not None
    assert model.inner.default.lora_A.grad is None


def test_a_view_that_is_made_without_gradients_has_none():
    layer = adapted().inner
    with torch.no_grad():
        view = layer.weight.T
    assert not (X @ view).requires_grad
    assert not layer.weight.detach()[1:].requires_grad


def test_a_tensor_that_is_kept_has_the_numbers_of_each_use():
    model = adapted()
    with torch.no_grad():
        kept = model.inner.weight
        before = kept + 0
        model.inner.default.lora_B.mul_(2)
        torch.testing.assert_close(kept + 0, before + change(model) / 2)


# what can't be read


def test_an_effect_that_is_no_change_of_a_weight_is_an_error_where_it_is_read():
    model: Any = get_peft_model(
        nn.Sequential(nn.Embedding(6, 4, max_norm=0.5)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    )
    read = model[0].weight
    assert read.shape == (6, 4)
    with pytest.raises(AdaptError, match=r"weight of a layer is read by .*LORA does there is no change .*own_weight"):
        read + 0


class Asking(nn.Module):
    """Asks a weight for its dtype, as T5 does, and may compute with it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4, max_norm=0.5)

    def forward(self, tokens: Tensor, multiplies: bool) -> Tensor:
        found = self.table(tokens).to(self.table.weight.dtype)
        return F.linear(found, self.table.weight) if multiplies else found


def test_code_may_ask_for_the_dtype_of_a_weight_without_changed_numbers_where_it_is_compiled():
    tokens = torch.tensor([1, 4])
    model: Any = get_peft_model(Asking(), lora("table"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, False), model(tokens, False))
    with pytest.raises(Unsupported, match="LORA does there is no change of its weight"):
        compiled(tokens, True)


def test_a_trace_may_ask_for_the_dtype_of_a_weight_without_changed_numbers():
    tokens = torch.tensor([1, 4])
    model: Any = get_peft_model(Asking(), lora("table"))
    torch.testing.assert_close(graphpeft.trace(model, (tokens, False))(tokens, False), model(tokens, False))
    with pytest.raises(TraceError, match="LORA does there is no change of its weight"):
        graphpeft.trace(model, (tokens, True))


def test_compiled_code_asks_a_bias_without_changed_numbers_for_its_own_size():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.inner.bias.numel()

    model = adapted(Sized(), lora_bias=True)
    model.add_adapter("other", LilyConfig(r=2, target_modules=["inner"]))
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), model(X))


def test_readers_in_a_batch_of_several_adapters_are_told():
    model = adapted()
    model.add_adapter("other", lora("inner"))
    assert model(X, adapter_names=["__base__"] * 3).shape == (3, 4)
    for names in (["default"] * 3, ["other"] * 3):
        model.set_adapter(names[0])
        torch.testing.assert_close(model(X, adapter_names=names), model(X))
    for names in (["default", "other", "__base__"], ["default", "__base__", "__base__"]):
        with pytest.raises(AdaptError, match="reads weight of inner in a batch whose rows have different adapters"):
            model(X, adapter_names=names)
    model.unload()
    assert type(model.inner) is nn.Linear


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_has_no_place_where_a_weight_is_read(mode: bool):
    model = adapted(lora_dropout=0.5).train(mode)
    torch.testing.assert_close(model.inner.weight + 0, own_weight(model.inner) + change(model))


def test_an_adapter_of_one_call_is_an_error_where_the_weight_is_read_beside_it():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w), self.w)

    config = LoraPerCallConfig(r=2, target_modules=["w"], init_lora_weights=False)
    model: Any = get_peft_model(Twice(), config)
    model(X)
    with pytest.raises(AdaptError, match="acts in one of the uses of its w alone"):
        model.w + 0


@pytest.mark.parametrize("register", ["list", "closure", "hook"])
def test_a_parameter_that_code_holds_itself_is_refused(register: str):
    model: Any = Reading()
    weight = model.inner.weight
    if register == "list":
        model.held = {"weights": [weight]}
    elif register == "closure":
        model.held = lambda x: x @ weight
    else:
        model.register_forward_hook(lambda module, args, y: y @ weight)
    with pytest.raises(AdaptError, match=r"its weight is held by self\..* of the model, too"):
        adapted(model)


# what a call has besides


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_set_forward_recomputes_with_the_weight_that_it_had(use_reentrant: bool):
    def gradients(checkpointed: bool) -> list[Any]:
        layer: Any = nn.Linear(4, 4, bias=False, dtype=torch.float64)

        def compute(x: Tensor) -> Tensor:
            return torch.tanh(F.linear(x, layer.weight))

        layer.forward = lambda x: checkpoint(compute, x, use_reentrant=use_reentrant) if checkpointed else compute(x)
        model: Any = get_peft_model(nn.Sequential(layer), lora("0"))
        x = X.double().requires_grad_()
        model(x).sum().backward()
        return [x.grad, layer.default.lora_A.grad, layer.default.lora_B.grad]

    torch.manual_seed(0)
    wanted = gradients(checkpointed=False)
    torch.manual_seed(0)
    torch.testing.assert_close(gradients(checkpointed=True), wanted)


@pytest.mark.parametrize("computed", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_a_later_adapter_of_a_computed_weight_starts_from_the_base(computed: Callable[[nn.Module], nn.Module]):
    model: Any = Reading()
    model.inner = computed(model.inner)
    base = own_weight(model.inner).detach()
    model = adapted(model)
    model.add_adapter("other", lora("inner"))
    model.set_adapter("other")
    torch.testing.assert_close(model.inner.weight + 0, base + change(model, "other"))
    torch.testing.assert_close(model(X, adapter_names=["other"] * 3), model(X))
    model.add_adapter("magnitudes", lora("inner", use_dora=True))
    norms = (base + change(model, "magnitudes")).norm(dim=1)
    torch.testing.assert_close(model.inner.magnitudes.lora_magnitude, norms)


def test_rows_of_a_model_around_leave_the_changes_of_one_inside():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = adapted(DecidingReader()), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x))

    model: Any = get_peft_model(Outer(), lora("last"), "one")
    model.add_adapter("other", lora("last"))
    of_each = {}
    for name in ("one", "other"):
        model.set_adapter(name)
        of_each[name] = model(X)
    names = ["one", "other", "one"]
    wanted = torch.stack([of_each[name][row] for row, name in enumerate(names)])
    torch.testing.assert_close(model(X, adapter_names=names), wanted)


class DecidingReader(Reading):
    """Decides on values, so that its own code reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > -1e9 else x


def test_rows_ask_for_a_bias_that_adapters_change_and_that_others_read():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.inner(x)) + operator.attrgetter("bias")(self.inner)

    model = adapted(Reader(), lora_bias=True)
    nn.init.ones_(model.inner.default.lora_bias)
    wanted = model(X)
    model.add_adapter("elsewhere", lora("last"))
    model.set_adapter("elsewhere")
    torch.testing.assert_close(model(X, adapter_names=["default"] * 3), wanted)
    with pytest.raises(AdaptError, match="reads bias of inner"):
        model(X, adapter_names=["default", "elsewhere", "default"])


def test_a_wrapper_of_getattr_changes_no_read(monkeypatch: pytest.MonkeyPatch):
    model, written = adapted(), adapted().inner
    wanted, plain = model(X), nn.Module.__getattr__
    monkeypatch.setattr(nn.Module, "__getattr__", lambda module, name: plain(module, name))
    torch.testing.assert_close(model(X), wanted)
    with torch.no_grad():
        written.weight.zero_()
    assert not own_weight(written).any()


def test_a_read_without_the_adapters_tensors_raises():
    model = adapted()
    del model.inner.default.lora_A
    with pytest.raises(RuntimeError, match=r"weight with the changes of adapters can't be computed.*lora_A"):
        model.inner.weight  # noqa: B018


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_dropout_of_a_stack_that_is_read_is_not_compiled_away():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x.expand(2, 3, 4), self.w) if x.sum() > -1e9 else x

    config = LoraConfig(r=2, init_lora_weights=False, target_parameters=["w"], lora_dropout=0.5)
    model: Any = get_peft_model(Stack(), config)
    torch.testing.assert_close(torch.compile(model.eval(), backend="eager")(X), model(X))
    with pytest.raises(RuntimeError, match="dropout beside a weight that code reads isn't compiled"):
        torch.compile(model.train(), backend="eager")(X)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_compiled_read_is_as_precise_as_another_under_autocast():
    model = adapted(DecidingReader())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.compile(model, backend="eager")(X), model(X))


def test_a_recurrent_layer_keeps_its_own_list_of_parameters():
    model: Any = get_peft_model(nn.LSTM(4, 4), LoraConfig(r=2, target_parameters=["weight_ih_l0"]))
    new = nn.Parameter(torch.zeros(16, 4))
    model.weight_ih_l0 = new
    assert vars(model)["_flat_weights"][0] is new


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which Dynamo asks for
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_is_compiled_with_the_change(cls: Any):
    model: Any = get_peft_model(
        nn.Sequential(cls(4, 4)), LoraConfig(r=2, target_parameters=["0.weight_ih_l0"], init_lora_weights=False)
    )
    with model.disable_adapter():
        base = model(X)[0]
    assert not torch.allclose(model(X)[0], base)
    torch.testing.assert_close(torch.compile(model, backend="eager")(X)[0], model(X)[0])
