"""In half precision the laws allow what roundings move, whatever a model makes of them, and nothing more."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, settings
from torch import Tensor, nn

from graphpeft import LoraConfig, PeftModel, PeftType
from graphpeft.adapters import changes
from graphpeft.rules.plain_values import plain
from graphpeft.testing import assert_two_adapters_act_together, laws
from graphpeft.testing.alike import require_alike
from graphpeft.testing.comparing import LawError, require_close
from graphpeft.testing.generated_models import in_dtype
from graphpeft.testing.snapshots import require_unchanged, snapshot
from graphpeft.testing.stochastic_rounding import StochasticRounding
from graphpeft.testing.strategies import adaptations

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


# rounding at random


@HALVES
def test_a_result_is_one_of_the_two_numbers_beside_the_exact_one_and_their_mean_is_exact(dtype: torch.dtype):
    x, y = values(dtype, 2, 500)
    exact = x.double() / y.double()
    runs = []
    for seed in range(200):
        with StochasticRounding(seed):
            runs.append((x / y).double())
    spacing = torch.finfo(dtype).eps * exact.abs()
    assert ((torch.stack(runs) - exact).abs() <= spacing).all()
    assert max(len(set(column)) for column in torch.stack(runs).T.tolist()) == 2
    assert ((torch.stack(runs).mean(0) - exact).abs() <= 0.25 * spacing).all()


class Named(nn.Parameter):
    """A class of parameters that computes as tensors do, such as bitsandbytes' `Params4bit`."""


@HALVES
def test_copies_are_the_numbers_that_they_copy(dtype: torch.dtype):
    x = values(dtype, 4, 500)
    with StochasticRounding(0):
        copies = (x.clone(), x.t().contiguous().t(), x.expand(2, 4, 500).reshape(8, 500)[:4])
    assert all(torch.equal(copied, x) for copied in copies)


@HALVES
def test_a_class_that_computes_as_tensors_do_is_rounded(dtype: torch.dtype):
    x, weight = values(dtype, 2, 500)
    with StochasticRounding(0):
        found = Named(weight).data / x  # .data shows a parameter's class to modes
    assert not torch.equal(found, weight / x)


@HALVES
def test_a_class_that_says_how_it_computes_is_rounded_in_its_operations(dtype: torch.dtype):
    x, inner = values(dtype, 2, 500)
    seen = []

    class Wrapped(Tensor):
        @staticmethod
        def __new__(cls) -> Tensor:
            return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=dtype)

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*(inner if isinstance(arg, cls) else arg for arg in args), **(kwargs or {}))

    with StochasticRounding(0):
        found = Wrapped() / x
    assert seen == [torch.ops.aten.div.Tensor]
    assert not torch.equal(found, inner / x)


@HALVES
def test_results_that_need_no_rounding_and_single_precision_stay(dtype: torch.dtype):
    x, single = values(dtype, 4, 4), values(torch.float32, 4)
    with StochasticRounding(0) as mode:
        found = (2 * x, torch.relu(x), x.T.contiguous(), torch.cat([x, x]), x.float(), torch.ones_like(x) * x)
        products = single / 3
        drawn = torch.rand_like(x, generator=None)
    expected = (2 * x, torch.relu(x), x.T.contiguous(), torch.cat([x, x]), x.float(), x)
    laws.require_equal(found, expected, "exact results")
    assert torch.equal(products, single / 3)
    assert drawn.dtype is dtype
    assert mode.has_rounded


@HALVES
def test_what_is_written_in_place_is_rounded_too(dtype: torch.dtype):
    x = values(dtype, 100)
    written, copied = x.clone(), torch.empty_like(x)
    with StochasticRounding(0):
        assert written.add_(1e-3) is written
        copied.copy_(x.float() + 1e-3)
    for found in (written, copied):
        assert ((found.double() - x.double() - 1e-3).abs() <= torch.finfo(dtype).eps * (x.abs().double() + 1e-3)).all()
        assert not torch.equal(found, x + 1e-3)


@HALVES
def test_copies_of_modules_have_the_same_numbers(dtype: torch.dtype):
    norm = nn.BatchNorm1d(30).to(dtype)
    norm.running_mean = values(dtype, 30)
    with StochasticRounding(0):
        copied = copy.deepcopy(norm)
    laws.require_equal(copied.state_dict(), norm.state_dict(), "a copy")


@HALVES
def test_random_numbers_are_those_without_the_mode(dtype: torch.dtype):
    x = values(dtype, 100)
    torch.manual_seed(0)
    expected = nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    with StochasticRounding(0):
        assert torch.equal(nn.functional.dropout(x, 0.5), expected)


# the bound


@HALVES
def test_roundings_that_a_computation_raises_are_no_difference(dtype: torch.dtype):
    x = values(dtype, 20)

    def one() -> Tensor:
        return ((x + 7) * 3 - 21) / x

    def other() -> Tensor:
        return (x * 3 + 21 - 21) / x

    with pytest.raises(LawError):
        require_close(one(), other(), 1e-4, "two ways")
    require_alike(one, other, 1e-4, "two ways")


@HALVES
def test_the_same_roundings_beside_a_fault_are_one(dtype: torch.dtype):
    x = values(dtype, 200)
    with pytest.raises(LawError, match="two ways: by"):
        require_alike(lambda: (x + 7) * 3 - 21, lambda: (x * 3.2 + 21) - 21, 1e-4, "two ways")


def test_in_single_precision_the_tolerance_is_the_bound():
    x = values(torch.float32, 20)
    with pytest.raises(LawError, match="two ways: by"):
        require_alike(lambda: x, lambda: x * 1.001, 1e-4, "two ways")
    require_alike(lambda: x, lambda: x * 1.00001, 1e-4, "two ways")


@pytest.mark.parametrize(
    "other", [lambda x: (x / 3).float(), lambda x: x[:1], lambda x: (x,), lambda x: x * torch.nan, lambda x: None]
)
def test_results_of_another_kind_are_no_roundings(other: Callable[[Tensor], Any]):
    x = values(torch.bfloat16, 20)
    with pytest.raises(LawError):
        require_alike(lambda: other(x), lambda: x / 3, 1e-4, "two ways")


def test_a_snapshot_sees_that_a_gradient_was_exchanged():
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    before, gradient = snapshot(layer), layer.weight.grad
    assert gradient is not None
    layer.weight.grad = gradient.clone()
    with pytest.raises(LawError, match=r"it changes the tensor \.weight"):
        require_unchanged(layer, before, "it")


# faults that the laws find in bfloat16


@contextlib.contextmanager
def changes_wrong_by(factor: float) -> Iterator[None]:
    """Lets merging, and adding by hand, make too much of each change."""
    of_weight, of_bias = changes._delta, changes._bias_delta
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "_delta", lambda *given: factor * of_weight(*given))
        patch.setattr(changes, "_bias_delta", lambda *given: _times(factor, of_bias(*given)))
        yield


def _times(factor: float, change: Tensor | None) -> Tensor | None:
    return None if change is None else factor * change


@contextlib.contextmanager
def last_site_left_out() -> Iterator[None]:
    sites = changes.changing_sites
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(changes, "changing_sites", lambda *given: sites(*given)[:-1])
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "changes wrong by 5 percent": lambda: changes_wrong_by(1.05),
    "a site left out": last_site_left_out,
}
# a branch, factors of outputs, rotated inputs, and a change of the weight
OF_EACH_KIND = [PeftType.LORA, PeftType.IA3, PeftType.OFT, PeftType.FOURIERFT]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", OF_EACH_KIND, ids=plain)
def test_a_fault_of_a_method_is_found_in_one_of_the_examples_of_a_law(method: str, fault: str):
    law = inspect.unwrap(laws.assert_adapted_is_base_with_delta)  # without the search for the site

    def is_found(drawn: Any) -> bool:
        case, config = drawn
        half = in_dtype(case, torch.bfloat16)
        try:
            with FAULTS[fault]():
                law(half.build, config, half.inputs)
        except LawError:
            return True
        return False

    first = settings(phases=[Phase.generate], database=None)
    find(adaptations(method), is_found, settings=first)


@pytest.mark.parametrize("factor", [1.01, 0.99])
def test_one_percent_of_the_change_is_found_where_it_is_most_of_the_output(factor: float):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)).bfloat16()

    config, inputs = LoraConfig(r=4, lora_alpha=64, target_modules=["0", "2"]), (values(torch.bfloat16, 32, 16),)
    laws.assert_adapted_is_base_with_delta(build, config, inputs)
    with changes_wrong_by(factor), pytest.raises(LawError, match="adapted isn't base with deltas: by"):
        laws.assert_adapted_is_base_with_delta(build, config, inputs)


def one_layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8)).bfloat16()


BESIDE = (
    one_layer,
    LoraConfig(r=2, target_modules=["0"]),
    (values(torch.bfloat16, 2, 8),),
    LoraConfig(r=1, lora_alpha=100_000, target_modules=["0"]),
)
"""An adapter, and another one, beside which its effect is rounded off."""


def saturated() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Tanh())


LOST = (
    saturated,
    LoraConfig(r=2, lora_alpha=0.1, target_modules=["0"]),
    (values(torch.float32, 2, 8),),
    LoraConfig(r=1, lora_alpha=10**9, target_modules=["1"]),
)
"""An adapter, and another one that makes values so large that the tanh behind gives 1 for all of them."""


@pytest.mark.parametrize("case", [BESIDE, LOST], ids=["rounded off", "behind a tanh"])
def test_an_effect_that_is_lost_beside_another_one_is_there(case: Any):
    assert_two_adapters_act_together(*case)


@pytest.mark.parametrize("case", [BESIDE, LOST], ids=["rounded off", "behind a tanh"])
def test_an_effect_that_is_not_there_beside_another_one_is_missed(case: Any, monkeypatch: pytest.MonkeyPatch):
    choose = PeftModel.set_adapter
    monkeypatch.setattr(
        PeftModel, "set_adapter", lambda self, name: choose(self, name if isinstance(name, str) else name[-1])
    )
    with pytest.raises(LawError, match="beside 'second' the other adapter has no effect"):
        assert_two_adapters_act_together(*case)
