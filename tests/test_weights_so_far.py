"""Two active adapters of which one scales the weight: it scales what the one before has made of it.

The weights are computed here by hand: LoRA adds s B A; DoRA makes m / n · (W + s B A) of it, with n = ‖W₀ + s B A‖ for
each output feature, where W is the weight so far and W₀ the module's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import (
    AdaptError,
    LoraConfig,
    OperationRule,
    ParameterSpec,
    TargetedConfig,
    get_peft_model,
    optimize,
    register,
)
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("rules")


class BothWays(nn.Module):
    """A square matrix that is used as (out, in) and as (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.w)) @ self.w


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 8, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bti,eoi->bto", x, self.w)


class Kind(NamedTuple):
    """A layer in a model.

    Attributes:
        make: Builds it.
        shape: Of the input; None for tokens.
        weight: The path of the weight in the model.
        lengthwise: The dimensions that a length is over.
        product: Returns B A in the shape of the weight.
        has_dropout: Whether a branch there can have it.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | None
    weight: str
    lengthwise: tuple[int, ...]
    product: Callable[[Tensor, Tensor], Tensor]
    has_dropout: bool = True

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(self.make(), nn.Tanh())

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        if self.shape is None:
            return torch.randint(0, 9, (3, 5), generator=generator)
        return torch.randn(self.shape, generator=generator)

    def config(self, method: str, **options: Any) -> LoraConfig:
        target = self.weight.removesuffix(".weight")
        return LoraConfig(
            r=2, lora_alpha=5, target_modules=[target], use_dora=method == "dora", init_lora_weights=False, **options
        )


def conv1d() -> nn.Module:
    layer = Conv1D(8, 6)
    nn.init.normal_(layer.bias)
    return layer


KINDS = {
    "linear": Kind(lambda: nn.Linear(6, 8), (3, 4, 6), "0.weight", (1,), lambda A, B: B @ A),
    "no-bias": Kind(lambda: nn.Linear(6, 8, bias=False), (3, 6), "0.weight", (1,), lambda A, B: B @ A),
    "flipped": Kind(conv1d, (3, 4, 6), "0.weight", (0,), lambda A, B: (B @ A).T),
    "embedding": Kind(lambda: nn.Embedding(9, 6), None, "0.weight", (0,), lambda A, B: (B @ A).T, False),
    "convolution": Kind(
        lambda: nn.Conv2d(4, 6, 3), (3, 4, 5, 5), "0.weight", (1, 2, 3),
        lambda A, B: torch.einsum("rikl,or->oikl", A, B[..., 0, 0]),
    ),
    "transposed": Kind(
        lambda: nn.ConvTranspose2d(4, 6, 3), (3, 4, 5, 5), "0.weight", (0, 2, 3),
        lambda A, B: torch.einsum("irkl,or->iokl", A, B[..., 0, 0]),
    ),
    "both-ways": Kind(BothWays, (3, 4, 6), "0.w", (1,), lambda A, B: B @ A),
    "experts": Kind(
        Experts, (3, 4, 6), "0.w", (2,),
        lambda A, B: torch.einsum("ore,eri->eoi", B.reshape(8, 2, 2), A.reshape(2, 2, 6)), False,
    ),
}  # fmt: skip
ORDERS = [("lora", "dora"), ("dora", "lora"), ("dora", "other dora"), ("lora", "dora", "other dora")]

each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
each_kind_in_an_order = pytest.mark.parametrize(
    ("kind", "order"),
    [
        pytest.param(kind, order, id=f"{name}-{' then '.join(order)}")
        for name, kind in KINDS.items()
        # all of them at one layer; at others, the longest, and the one in which the later adds to a scaled weight
        for order in (ORDERS if name == "linear" else [ORDERS[1], ORDERS[3]])
    ],
)


def adapted(kind: Kind, **options: Any) -> Any:
    """Returns a model with three adapters, whose values are far from those of the start."""
    model: Any = get_peft_model(kind.model(), kind.config("lora", **options), "lora")
    for name in ("dora", "other dora"):
        model.add_adapter(name, kind.config("dora", **options))
    generator = torch.Generator().manual_seed(2)
    for name in ("lora", "dora", "other dora"):
        tensors = graphpeft.get_peft_model_state_dict(model, adapter_name=name)
        values = {key: value + 0.3 * torch.randn(value.shape, generator=generator) for key, value in tensors.items()}
        graphpeft.set_peft_model_state_dict(model, values, name)
    return model.eval()


def factors(model: Any, name: str) -> dict[str, Tensor]:
    """Returns an adapter's tensors by the last parts of their names, without those that every name has."""
    tensors = graphpeft.get_peft_model_state_dict(model, adapter_name=name)
    found = {key.removesuffix(".weight").rsplit(".", 1)[-1].replace("embedding_", ""): t for key, t in tensors.items()}
    return {key: tensor for key, tensor in found.items() if key.startswith("lora_")}


def weight_by_hand(kind: Kind, model: Any, order: tuple[str, ...]) -> Tensor:
    own = weight = kind.model().get_parameter(kind.weight).detach()
    for name in order:
        tensors = factors(model, name)
        change = 2.5 * kind.product(tensors["lora_A"], tensors["lora_B"])
        if "dora" in name:
            lengths = torch.linalg.vector_norm(own + change, dim=kind.lengthwise, keepdim=True)
            weight = tensors["lora_magnitude_vector"].view(lengths.shape) / lengths * (weight + change)
        else:
            weight = weight + change
    return weight


def by_hand(kind: Kind, model: Any, order: tuple[str, ...]) -> nn.Module:
    """Returns the base with the weight that these adapters make of its own, in this order."""
    base = kind.model().eval()
    with torch.no_grad():
        base.get_parameter(kind.weight).copy_(weight_by_hand(kind, model, order))
    return base


@each_kind_in_an_order
def test_active_adapters_make_the_weight_that_is_computed_by_hand(kind: Kind, order: tuple[str, ...]) -> None:
    model, x = adapted(kind), kind.inputs()
    expected = by_hand(kind, model, order)(x)
    model.set_adapter(list(order))
    assert_close(model(x), expected, 1e-5)
    assert_close(model.train()(x), expected, 1e-5)
    optimize(model)
    assert_close(model(x), expected, 1e-5)


@each_kind
def test_each_switch_in_training_leaves_the_weight_of_those_that_are_active(kind: Kind) -> None:
    # dropout so rare that it takes none
    model, x = adapted(kind, **({"lora_dropout": 1e-9} if kind.has_dropout else {})), kind.inputs()
    for order in (
        *ORDERS,
        ("dora",),
        ("lora",),
        *ORDERS[::-1],
        ("other dora", "dora"),
        ("dora",),
        ORDERS[0],
        ("dora",),
    ):
        model.set_adapter(list(order))
        assert_close(model.train()(x), by_hand(kind, model, order)(x), 1e-5)
    model.set_adapter(["lora", "dora"])
    model.delete_adapter("lora")
    assert_close(model(x), by_hand(kind, model, ("dora",))(x), 1e-5)


@each_kind
def test_gradients_are_those_through_the_weight_that_is_computed_by_hand(kind: Kind) -> None:
    model, x = adapted(kind, **({"lora_dropout": 1e-9} if kind.has_dropout else {})), kind.inputs()
    model.set_adapter(["lora", "dora"])
    model.train()
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    found = torch.autograd.grad(model(x).square().mean(), [*trained.values()])
    values = [factors(model, name) for name in ("lora", "dora")]
    leaves = [tensor for value in values for tensor in value.values()]
    for leaf in leaves:
        leaf.requires_grad_()
    own = kind.model().get_parameter(kind.weight).detach()
    A, B = values[0]["lora_A"], values[0]["lora_B"]
    weight = own + 2.5 * kind.product(A, B)
    change = 2.5 * kind.product(values[1]["lora_A"], values[1]["lora_B"])
    lengths = torch.linalg.vector_norm(own + change, dim=kind.lengthwise, keepdim=True).detach()
    weight = values[1]["lora_magnitude_vector"].view(lengths.shape) / lengths * (weight + change)
    y = torch.func.functional_call(kind.model(), {kind.weight: weight}, (x,))
    expected = torch.autograd.grad(y.square().mean(), leaves)
    assert sorted(tuple(t.shape) for t in found) == sorted(tuple(t.shape) for t in expected)
    for gradient in expected:
        close = [
            other for other in found if other.shape == gradient.shape and torch.allclose(other, gradient, 1e-4, 1e-6)
        ]
        assert close


@each_kind_in_an_order
def test_merged_is_active_and_unmerged_gives_the_very_bits_back(kind: Kind, order: tuple[str, ...]) -> None:
    model, x = adapted(kind), kind.inputs()
    model.set_adapter(list(order))
    active, weight = model(x), weight_by_hand(kind, model, order)
    model.merge_adapter()
    assert_close(model(x), active, 1e-5)
    assert_close(model.get_parameter(kind.weight).detach(), weight, 1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.get_parameter(kind.weight), kind.model().get_parameter(kind.weight))
    assert torch.equal(model(x), active)
    assert_close(model.merge_and_unload().get_parameter(kind.weight).detach(), weight, 1e-5)


@each_kind
def test_rows_of_a_batch_have_their_own_adapter_whatever_is_active(kind: Kind) -> None:
    model, x = adapted(kind), kind.inputs()
    model.set_adapter(["lora", "dora"])
    names = ["other dora", "__base__", "lora"]
    found = model(x, adapter_names=names)
    for row, name in enumerate(names):
        own = () if name == "__base__" else (name,)
        assert_close(found[row], by_hand(kind, model, own)(x)[row], 1e-5)
    assert_close(model(x), by_hand(kind, model, ("lora", "dora"))(x), 1e-5)


# the bias, which isn't scaled


@pytest.mark.parametrize("order", [("biased", "dora"), ("dora", "biased")], ids=" then ".join)
@pytest.mark.parametrize("dropout", [0, 1e-9])
@pytest.mark.parametrize("kind", ["linear", "flipped", "convolution", "transposed"])
def test_a_bias_that_another_adapter_has_added_is_not_scaled(kind: str, dropout: float, order: tuple[str, ...]) -> None:
    case = KINDS[kind]
    model, x = adapted(case, lora_dropout=dropout), case.inputs()
    model.add_adapter("biased", case.config("lora", lora_bias=True, lora_dropout=dropout))
    expected = by_hand(case, model, order)
    bias = expected.get_parameter("0.bias")
    with torch.no_grad():
        bias += 2.5 * model[0].biased.lora_bias
    model.set_adapter(list(order))
    assert_close(model.train()(x), expected(x), 1e-5)
    assert_close(model.merge_and_unload()(x), expected(x), 1e-5)


# what no weight does


@dataclass(frozen=True)
class Bent(OperationRule):
    """Adds what no weight adds."""

    def parameters(self, site: Any, config: Any) -> dict[str, ParameterSpec]:
        return {"factor": ParameterSpec((site.out_features,), key="factor")}

    def initialise(self, parameters: Any, site: Any, config: Any, module: nn.Module) -> None:
        parameters["factor"].fill_(0.5)

    def rewrite(self, y: Any, factor: Any) -> Any:
        return y + torch.relu(y) * factor

    def unmergeable(self, site: Any) -> str:
        return "it isn't linear"


@register
@dataclass(kw_only=True)
class BentConfig(TargetedConfig):
    peft_type: ClassVar[Any] = "BENT_FOR_TESTS"

    def rule_for(self, site: Any, dtype: torch.dtype) -> Bent:
        return Bent()


def test_what_is_no_change_of_the_weight_cannot_act_before_one_that_scales_it() -> None:
    kind = KINDS["linear"]
    model, x = adapted(kind), kind.inputs()
    model.add_adapter("bent", BentConfig(target_modules=["0"]))
    model.set_adapter(["lora", "bent"])
    expected, before = model(x), laws.snapshot(model)
    with pytest.raises(
        AdaptError, match=r"'dora' can't act on 0: .*what 'bent' does there is none; let 'bent' act behind"
    ):
        model.set_adapter(["bent", "dora"])
    laws.require_unchanged(model, before, "a refused activation")
    assert torch.equal(model(x), expected)
    model.set_adapter(["dora", "bent"])
    y = F.linear(x, weight_by_hand(kind, model, ("dora",)), model[0].bias)
    assert_close(model(x), torch.tanh(y + torch.relu(y) / 2), 1e-5)


@pytest.mark.parametrize("autocast", [True, False], ids=["float32-adapters", "half-adapters"])
def test_half_precision_weights_are_scaled_too(autocast: bool) -> None:
    kind = KINDS["both-ways"]
    model: Any = kind.model().bfloat16()
    for name in ("lora", "dora"):
        config = kind.config(name, lora_dropout=1e-9)
        if name == "lora":
            get_peft_model(model, config, name, autocast_adapter_dtype=autocast)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=autocast)
    x = kind.inputs().bfloat16()
    model.set_adapter(["lora", "dora"])
    expected = copy.deepcopy(model).eval().merge_and_unload()(x)
    for mode in (False, True):
        assert (model.train(mode)(x) - expected).abs().max() < 0.1
        assert model(x).dtype == torch.bfloat16
