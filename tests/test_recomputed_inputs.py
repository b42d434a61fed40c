"""The pass that computes what branches read again in the backward."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import assert_equal_within, body_of, computed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphpeft import LoraConfig, get_peft_model, optimize, trace
from graphpeft.testing.memory import kept_bytes

PASS = "recomputed_inputs"
TOKENS, FEATURES, INNER = 32, 16, 64
WIDE, NARROW = 4 * TOKENS * INNER, 4 * TOKENS * FEATURES


class Gated(nn.Module):
    """A norm, and a gated feed-forward layer, whose inner values are wide."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.gate, self.up = nn.Linear(FEATURES, INNER), nn.Linear(FEATURES, INNER)
        self.down = nn.Linear(INNER, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


def adapted(build: Any = Gated, **options: Any) -> Any:
    torch.manual_seed(0)
    model = build()
    targets = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    config = LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False} | options)
    return get_peft_model(trace(model), config).train()


def inputs(*shape: int) -> Tensor:
    return torch.randn(*(shape or (TOKENS, FEATURES)), generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_products_keep_how_their_inputs_are_computed():
    model = adapted()
    assert optimize(model, [PASS]).changed == {PASS: ("gate", "up", "down")}
    assert [line for line in body_of(model) if re.search(r"norm\(|silu|mul|recipe|product", line)] == [
        "recipe = recipe('layer', {}, norm_1, x)",
        "norm = self.norm(x)",
        "product = product(norm, norm, gate_slot0_lora_a_1, 0.0, False, recipe)",
        "linear_1 = torch._C._nn.linear(product, gate_slot0_lora_b)",
        "recipe_1 = recipe('silu', {'inplace': False}, add_scaled)",
        "silu = torch.nn.functional.silu(add_scaled, inplace = False)",
        "product_1 = product(norm, norm, up_slot0_lora_a_1, 0.0, False, recipe)",
        "linear_3 = torch._C._nn.linear(product_1, up_slot0_lora_b)",
        "recipe_2 = recipe('mul', {}, recipe_1, add_scaled_1)",
        "mul = run(recipe_2, 'mul', {}, silu, add_scaled_1)",
        "down = self.down(mul)",
        "product_2 = product(mul, mul, down_slot0_lora_a_1, 0.0, False, recipe_2)",
        "linear_5 = torch._C._nn.linear(product_2, down_slot0_lora_b)",
    ]


def test_neither_the_inputs_nor_what_is_between_are_kept():
    plain, recomputed = adapted(), adapted()
    optimize(recomputed, [PASS])
    x = inputs()
    saved = kept_bytes(lambda: plain(x).sum()) - kept_bytes(lambda: recomputed(x).sum())
    # what silu returns, the input of the last layer, and what the norm returns
    assert saved == 2 * WIDE + NARROW


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}], ids=str)
@pytest.mark.parametrize(
    "others",
    [(), ("grouped_products",), ("regenerated_dropout",), ("inplace_addmm",)],
    ids=lambda names: "+".join(names),
)
def test_outputs_and_gradients_stay(options, others):
    plain, recomputed = adapted(**options), adapted(**options)
    optimize(recomputed, [PASS, *others])
    for x in (inputs(), inputs(2, 3, FEATURES), inputs(FEATURES)):
        assert_equal_within(computed(recomputed, x), computed(plain, x))


def test_gradients_of_gradients_stay():
    def second_order(model: Any) -> list[Tensor]:
        x = inputs()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        first = torch.autograd.grad(model(x).square().sum(), [x, *trained], create_graph=True)
        loss = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return list(torch.autograd.grad(loss, [x, *trained]))

    plain, recomputed = adapted(), adapted()
    optimize(recomputed, [PASS])
    for found, expected in zip(second_order(recomputed), second_order(plain), strict=True):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("activation", [torch.tanh, F.relu, torch.sigmoid])
def test_an_input_that_is_kept_anyway_is_left(activation):
    class Activated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, FEATURES)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(activation(x * 2))

    report = optimize(adapted(Activated), [PASS])
    assert report.left == {PASS: {"layer": "its input isn't computed from tensors that other operations save"}}


def test_a_value_that_others_read_too_is_where_a_recipe_begins():
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return x + self.second(self.norm(x))

    model = adapted(Residual)
    optimize(model, [PASS])
    assert [line for line in body_of(model) if " = recipe(" in line] == ["recipe = recipe('layer', {}, norm_1, add)"]


def test_what_is_written_into_after_the_forward_is_an_error():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x)
            return self.second(F.gelu(h)), h

    model = adapted(Writing)
    assert optimize(model, [PASS]).changed == {PASS: ("second",)}
    y, h = model(inputs(3, 8))
    with torch.no_grad():
        h.zero_()
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation|was written to after the forward"):
        y.sum().backward()


def test_matrices_that_are_changed_before_the_backward_are_an_error():
    model = adapted()
    optimize(model, [PASS])
    y = model(inputs()).sum()
    with torch.no_grad():
        model.down.default.lora_A.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_what_a_checkpoint_or_a_hook_keeps_is_theirs():
    plain, recomputed = adapted(), adapted()
    optimize(recomputed, [PASS])

    def by_checkpoint(model: Any) -> Any:
        return computed_by(model, lambda x: checkpoint(model, x, use_reentrant=False))

    def computed_by(model: Any, call: Any) -> dict[str, Tensor]:
        x = inputs()
        y = call(x)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return dict(zip(trained, torch.autograd.grad(y.square().mean(), list(trained.values())), strict=True))

    assert_equal_within(by_checkpoint(recomputed), by_checkpoint(plain))
    seen: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: seen.append(tensor) or tensor, lambda tensor: tensor):
        recomputed(inputs())
    assert any(tensor.shape[-1] == INNER for tensor in seen)


def test_a_compiler_sees_the_plain_form():
    plain, recomputed = adapted(), adapted()
    optimize(recomputed, [PASS])
    compiled: Any = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    assert_equal_within(computed(compiled, inputs()), computed(plain, inputs()))


def test_an_input_that_is_written_between_its_computation_and_its_product_is_left():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = F.gelu(self.first(x)) * 1
            h[:, :2] = 0
            return self.second(h)

    plain, recomputed = adapted(Writing), adapted(Writing)
    report = optimize(recomputed, [PASS])
    assert report.left[PASS]["second"] == "a node in between may write into its input"
    assert_equal_within(computed(recomputed, inputs(3, 8)), computed(plain, inputs(3, 8)))


def test_a_layer_whose_weights_are_changed_before_the_backward_is_an_error():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.norm(x))

    model = adapted(Normed)
    assert optimize(model, [PASS]).changed == {PASS: ("layer",)}
    y = model(inputs(3, 8).detach()).sum()  # the norm itself keeps nothing, as it has no gradient
    with torch.no_grad():
        model.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="was written to after the forward"):
        y.backward()


def test_a_backward_under_autocast_computes_in_the_dtypes_of_the_forward():
    def gradients(model: Any) -> list[Tensor]:
        y = model(inputs().bfloat16()).float().square().sum()
        with torch.autocast("cpu", torch.bfloat16):
            return list(torch.autograd.grad(y, [p for p in model.parameters() if p.requires_grad]))

    plain, recomputed = (adapted(lambda: Gated().bfloat16()) for _ in range(2))
    optimize(recomputed, [PASS, "recomputed_casts"])
    for found, expected in zip(gradients(recomputed), gradients(plain), strict=True):
        assert found.dtype == expected.dtype
        assert torch.allclose(found, expected, rtol=0, atol=2**-7 * float(expected.abs().max()))
