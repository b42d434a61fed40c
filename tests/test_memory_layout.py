"""A fresh rotation leaves an input's layout in memory as it is, so that outputs are the base's, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphpeft import BOFTConfig, OFTConfig, get_peft_model
from graphpeft.graph.memory_layout import laid_out_as

pytestmark = pytest.mark.quick("graph", "methods")


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


LAYOUTS: dict[str, Callable[[int], Tensor]] = {
    "contiguous": lambda n: numbers(5, 7, n),
    "a transposed matrix": lambda n: numbers(n, 35).T,
    "turned rows": lambda n: numbers(7, 5, n).transpose(0, 1),
    "turned features": lambda n: numbers(5, n, 7).mT,
    "sliced": lambda n: numbers(5, 14, n)[:, ::2],
    "sliced features": lambda n: numbers(5, 7, 2 * n)[..., ::2],
    "repeated": lambda n: numbers(1, 7, n).expand(5, -1, -1),
    "repeated and turned": lambda n: numbers(7, 1, n).expand(-1, 5, -1).transpose(0, 1),
    "features in front": lambda n: numbers(2, n, 3, 5).movedim(1, -1),
    "one row": lambda n: numbers(1, n),
    "no rows": lambda n: numbers(0, n),
}
SIZES = [(4, 1), (4, 3), (8, 3), (16, 8), (48, 33)]
CONFIGS: dict[str, Any] = {
    "oft": OFTConfig(oft_block_size=2, target_modules=["0"]),
    "oft exact": OFTConfig(r=2, oft_block_size=0, use_cayley_neumann=False, target_modules=["0"]),
    "boft": BOFTConfig(boft_block_size=2, target_modules=["0"]),
    "boft of two": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=["0"]),
}


def fresh(config: Any, layer: nn.Module) -> tuple[nn.Module, Any]:
    torch.manual_seed(1)
    base = nn.Sequential(layer).eval().requires_grad_(False)  # as an adapted model is, see the first law
    return base, get_peft_model(copy.deepcopy(base), config)


def turned(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) / 3)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fresh_rotation_changes_no_bit(layout: str, name: str, bias: bool) -> None:
    for features, outputs in SIZES:
        base, model = fresh(CONFIGS[name], nn.Linear(features, outputs, bias=bias))
        x = LAYOUTS[layout](features)
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_feature_that_is_repeated_is_rotated_as_if_it_were_written_out(name: str) -> None:
    _, model = fresh(CONFIGS[name], nn.Linear(8, 3))
    turned(model)
    for x in (numbers(5, 1).expand(-1, 8), numbers(5, 1, 1).expand(-1, 7, 8), numbers(1).expand(5, 8)):
        torch.testing.assert_close(model(x), model(x.contiguous()))


def test_so_is_a_gray_picture_as_one_of_several_colours() -> None:
    _, model = fresh(CONFIGS["oft"], nn.Conv2d(4, 3, 1))
    turned(model)
    for x in (numbers(2, 1, 5, 6).expand(-1, 4, -1, -1), numbers(1, 5, 6).expand(4, -1, -1)):
        torch.testing.assert_close(model(x), model(x.contiguous()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_so_it_is_before_a_convolution(layout: torch.memory_format) -> None:
    for features, outputs in SIZES:
        base, model = fresh(CONFIGS["oft"], nn.Conv2d(features, outputs, 1))
        x = numbers(2, features, 5, 6).contiguous(memory_format=layout)
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_is_the_given_one_and_gradients_go_through(layout: str) -> None:
    given = LAYOUTS[layout](6)
    made = (given.contiguous() * 2).requires_grad_()
    found = laid_out_as(made, given)
    assert torch.equal(found, given * 2)
    assert found.stride() == given.stride()
    if "repeated" not in layout:
        found.square().sum().backward()
        torch.testing.assert_close(made.grad, 4 * given)


def test_elements_that_share_a_place_keep_their_own() -> None:
    given = numbers(60).unfold(0, 48, 1)
    made = numbers(13, 48)
    assert torch.equal(laid_out_as(made, given), made)
