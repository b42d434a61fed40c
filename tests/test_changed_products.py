"""A change that is a whole matrix: in single precision, a linear operation multiplies many rows by W + ΔW."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import graphpeft
from graphpeft import (
    DeftConfig,
    FourierFTConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    ShiraConfig,
    SupertuningConfig,
    get_peft_model,
    own_weight,
)
from graphpeft.graph.changed_products import is_apart

MANY, FEW = 17, 16
"""Numbers of rows with one product, and with two."""

METHODS: list[Any] = [
    (ShiraConfig, {"r": 2, "init_weights": False}),
    (SupertuningConfig, {"sparsity": 0.8, "init_weights": False}),
    (LoHaConfig, {"r": 2, "init_weights": False}),
    (LoKrConfig, {"r": 2, "init_weights": False}),
    (FourierFTConfig, {"n_frequency": 10, "scaling": 5}),
    (HiraConfig, {"r": 2, "init_weights": False}),
]
IDS = [config.__name__ for config, _ in METHODS]


def adapted(config: Any, options: dict[str, Any], dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 20)).to(dtype)
    return get_peft_model(base, config(target_modules=["0"], **options), **more)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.sizes.append(tuple(result.shape))
        return result


@contextlib.contextmanager
def as_if_nothing_recorded() -> Iterator[None]:
    """Lets functions run as in a plain call, though a dispatch mode counts operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphpeft.graph.changed_products, "is_captured", lambda: False)
        yield


def products(model: nn.Module, x: Tensor) -> int:
    """Returns how often the model makes as many rows of outputs as x has."""
    with as_if_nothing_recorded(), _Count() as count:
        model(x)
    return count.sizes.count((len(x), 20))


@pytest.mark.parametrize(("config", "options"), METHODS, ids=IDS)
@pytest.mark.parametrize("is_training", [False, True])
def test_many_rows_take_one_product_and_few_take_two(config: Any, options: dict[str, Any], is_training: bool):
    model = adapted(config, options).train(is_training)
    assert products(model, torch.randn(MANY, 24)) == 1
    assert products(model, torch.randn(FEW, 24)) == 2


@pytest.mark.parametrize(("config", "options"), METHODS, ids=IDS)
def test_both_ways_give_the_same_values_and_gradients(config: Any, options: dict[str, Any]):
    model, x = adapted(config, options), torch.randn(MANY, 24, requires_grad=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    once = model(x)
    twice = torch.cat([model(x[:FEW]), model(x[FEW:])])
    torch.testing.assert_close(once, twice)
    weights = torch.randn_like(once)
    for one, other in zip(
        torch.autograd.grad((once * weights).sum(), [x, *trained]),
        torch.autograd.grad((twice * weights).sum(), [x, *trained]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(once, model[0].bias + x @ own_weight(model[0]).mT, atol=1e-2)


@pytest.mark.parametrize(("config", "options"), METHODS, ids=IDS)
def test_half_precision_and_autocast_take_two_products(config: Any, options: dict[str, Any]):
    x = torch.randn(MANY, 24)
    assert products(adapted(config, options, torch.bfloat16), x.bfloat16()) == 2
    assert products(adapted(config, options).bfloat16(), x.bfloat16()) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert products(adapted(config, options), x) == 2


def test_a_change_below_the_weights_own_rounding_acts_in_half_precision():
    model = adapted(ShiraConfig, {"r": 10}, torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
        model[0].default.shira_weight.fill_(2.0**-11)  # 1 + 2⁻¹¹ is 1 in bfloat16
    x = torch.zeros(MANY, 24, dtype=torch.bfloat16)
    x[:, 0::2], x[:, 1::2] = 1, -1
    assert model(x).abs().max() > 2.0**-12


@pytest.mark.parametrize(
    ("config", "options"),
    [(LoHaConfig, {"module_dropout": 0.1}), (LoKrConfig, {"rank_dropout": 0.1}), (HiraConfig, {"hira_dropout": 0.5})],
)
def test_dropout_takes_two_products_in_training_alone(config: Any, options: dict[str, Any]):
    model, x = adapted(config, {"r": 2, "init_weights": False, **options}), torch.randn(MANY, 24)
    assert products(model.train(), x) == 2
    assert products(model.eval(), x) == 1


@pytest.mark.parametrize("first", [LoraConfig, IA3Config, OFTConfig, ShiraConfig, LoHaConfig, DeftConfig])
@pytest.mark.parametrize("is_second", [True, False])
def test_beside_another_adapter_it_is_what_is_merged(first: Any, is_second: bool):
    options: dict[Any, dict[str, Any]] = {
        LoraConfig: {"r": 2, "init_lora_weights": False},
        IA3Config: {"feedforward_modules": [], "init_ia3_weights": False},
        OFTConfig: {"oft_block_size": 4, "init_weights": False},
        DeftConfig: {"r": 2, "init_weights": False},
    }
    chosen = options.get(first, {"r": 2, "init_weights": False})
    configs = [first(target_modules=["0"], **chosen), ShiraConfig(r=2, init_weights=False, target_modules=["0"])]
    torch.manual_seed(1)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(24, 20)), configs[not is_second])
    model.add_adapter("second", configs[is_second])
    model.set_adapter(["default", "second"])
    x = torch.randn(MANY, 24)
    active = model(x)
    model.set_adapter(["default"])
    alone = model(x)
    assert not torch.allclose(active, alone, atol=1e-2)
    model.set_adapter(["default", "second"])
    torch.testing.assert_close(active, model(x), rtol=0, atol=0)
    torch.testing.assert_close(model.merge_and_unload()(x), active, rtol=1e-4, atol=1e-5)


def test_two_changes_of_a_weight_are_in_one_product():
    model = adapted(ShiraConfig, {"r": 2, "init_weights": False})
    model.add_adapter("second", LoHaConfig(r=2, init_weights=False, target_modules=["0"]))
    model.set_adapter(["default", "second"])
    assert products(model, torch.randn(MANY, 24)) == 1


def test_without_its_adapter_the_graph_is_the_layers_own():
    model = adapted(ShiraConfig, {"r": 2})
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0"]))
    before = model[0].graph.python_code("self").src
    model.set_adapter(["default", "second"])
    model.set_adapter(["second"])
    model.set_adapter(["default"])
    assert model[0].graph.python_code("self").src == before
    model.unload()
    assert type(model[0]) is nn.Linear


def test_a_weight_that_is_read_twice_changes_at_the_adapted_operations_once_each():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(24, 24) / 5)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w).tanh(), self.w)

    torch.manual_seed(0)
    config = ShiraConfig(r=2, init_weights=False, target_modules=["w"])
    model: Any = get_peft_model(Twice(), config, example_inputs=(torch.randn(MANY, 24),))
    x = torch.randn(MANY, 24)
    active = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), active, rtol=1e-4, atol=1e-5)


def test_a_forward_that_was_set_on_a_layer_keeps_its_own_way_with_the_weight():
    torch.manual_seed(0)
    layer = nn.Linear(24, 20)
    layer.forward = lambda x: F.linear(x, layer.weight, layer.bias) * 2  # type: ignore[method-assign]
    model: Any = get_peft_model(nn.Sequential(layer), ShiraConfig(r=2, init_weights=False, target_modules=["0"]))
    x = torch.randn(MANY, 24)
    with model.disable_adapter():
        base = model(x)
    change = torch.zeros(20, 24)
    rows, columns = layer.default.shira_indices.long()  # type: ignore[union-attr]
    change[rows, columns] = layer.default.shira_weight.detach()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(model(x), base + x @ change.mT)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_that_round_float32_are_two_since_a_small_change_would_be_lost_in_the_weight(precision: str):
    x, weight = torch.randn(MANY, 24), torch.randn(20, 24)
    assert not is_apart(x, weight)
    torch.set_float32_matmul_precision(precision)
    try:
        assert is_apart(x, weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert not is_apart(x, weight)


@pytest.mark.parametrize(("cls", "options"), METHODS)
def test_on_the_meta_device_shapes_come_out(cls: Any, options: dict[str, Any]):
    model: Any = get_peft_model(nn.Sequential(nn.Linear(24, 20)), cls(**options, target_modules=["0"]))
    assert model.to("meta")(torch.randn(MANY, 24, device="meta")).shape == (MANY, 20)


@pytest.mark.parametrize(("cls", "options"), METHODS)
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_checkpointing_without_reentrance_gives_the_same_gradients(cls: Any, options: dict[str, Any], rows: int):
    torch.manual_seed(0)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(24, 20)), cls(**options, target_modules=["0"]))
    x, found = torch.randn(rows, 24), []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        run(x).square().sum().backward()
        found.append([tensor.grad.clone() for tensor in model.parameters() if tensor.grad is not None])
    assert found[0]
    assert all(map(torch.equal, *found))
