"""A hook or a ``__call__`` around the forward in which an adapter acts reads the changed weight."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from oracle import assert_close, perturb
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers.modeling_layers import GradientCheckpointingLayer

from graphpeft import AdaptError, LoraConfig, get_peft_model, trace
from graphpeft.testing.snapshots import require_unchanged, snapshot

pytestmark = pytest.mark.quick("sites", "code")

X = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))


class Product(nn.Module):
    """One with a weight of its own, behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.w = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.w

    def _before(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] @ self.w,)

    def _product(self, x: Tensor) -> Tensor:
        return x @ self.w


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x))


class Reading:
    def __call__(self, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return self.changed(module, args[0])

    def changed(self, module: Any, x: Tensor) -> tuple[Tensor]:
        return (x @ module.w,)


def before(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] @ module.w,)


def after(module: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
    return y + args[0] @ module.w


def with_kwargs(module: Any, args: tuple[Tensor], kwargs: Any, y: Tensor) -> Tensor:
    return y + args[0] @ module.w


def of_any_name(name: str, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] @ getattr(module, name),)


def with_a_tensor_in_hand(model: Any) -> None:
    w = model.w
    model.register_forward_pre_hook(lambda _, args: (args[0] @ w,))


READING: dict[str, Callable[[Any], Any]] = {
    "before": lambda model: model.register_forward_pre_hook(before),
    "after": lambda model: model.register_forward_hook(after),
    "with kwargs": lambda model: model.register_forward_hook(with_kwargs, with_kwargs=True),
    "always called": lambda model: model.register_forward_hook(after, always_call=True),
    "lambda": lambda model: model.register_forward_pre_hook(lambda module, args: (args[0] @ module.w,)),
    "method": lambda model: model.register_forward_pre_hook(model._before),
    "calls a method": lambda model: model.register_forward_pre_hook(lambda module, args: (module._product(args[0]),)),
    "object": lambda model: model.register_forward_pre_hook(Reading()),
    "partial": lambda model: model.register_forward_pre_hook(functools.partial(of_any_name, "w")),
    "of a layer inside": lambda model: model.layer.register_forward_pre_hook(model._before),
    "closure": lambda model: model.layer.register_forward_pre_hook(lambda _, args: (args[0] @ model.w,)),
}


def hooked(register: Callable[[Any], Any], cls: type = Product) -> Any:
    torch.manual_seed(0)
    model = cls()
    register(model)
    return model


def config() -> LoraConfig:
    return LoraConfig(r=3, lora_alpha=7, target_modules=["w"])


def assert_merged_is_unmerged(model: nn.Module) -> None:
    base = model(X)
    adapted: Any = get_peft_model(model, config())
    perturb(adapted)
    found = adapted(X)
    assert not torch.allclose(found, base, atol=1e-2)
    adapted.merge_adapter()
    assert_close(adapted(X), found, 1e-4)


def assert_refused(model: nn.Module, match: str) -> None:
    held = snapshot(model)
    with pytest.raises(AdaptError, match=match):
        get_peft_model(model, config())
    require_unchanged(model, held, "get_peft_model")


@pytest.mark.every
@pytest.mark.parametrize("name", READING)
def test_a_weight_that_a_hook_reads_too_is_changed_there_and_in_a_trace(name):
    assert_merged_is_unmerged(Around(hooked(READING[name])))
    assert_merged_is_unmerged(trace(Around(hooked(READING[name])), (X,)))


def test_a_weight_that_a_hook_has_in_hand_is_refused_and_a_trace_has_the_hook():
    match = r"inner\.w: its w is held by self\._forward_pre_hooks of inner, too, where no change of it is read"
    assert_refused(Around(hooked(with_a_tensor_in_hand)), match)
    assert_merged_is_unmerged(trace(Around(hooked(with_a_tensor_in_hand)), (X,)))


INSIDE: dict[str, Callable[[Any], Tensor]] = {
    "path": lambda module: module.inner.w,
    "get_parameter": lambda module: module.get_parameter("inner.w"),
    "get_submodule": lambda module: module.get_submodule("inner").w,
    "modules": lambda module: next(m.w for m in module.modules() if isinstance(m, Product)),
    "children": lambda module: next(m.w for m in module.children() if isinstance(m, Product)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_hook_of_the_model_that_reads_a_weight_inside_reads_the_changed_one(name):
    read = INSIDE[name]

    def reading() -> nn.Module:
        model: Any = Around(hooked(lambda _: None))
        model.register_forward_pre_hook(lambda module, args: (args[0] @ read(module),))
        return model

    assert_merged_is_unmerged(reading())
    assert_merged_is_unmerged(trace(reading(), (X,)))


def test_a_backward_hook_reads_the_changed_weight():
    def backward(module: Any, _: Any, gradients: Any) -> Any:
        return (gradients[0] @ module.w,)

    model: Any = get_peft_model(hooked(lambda model: model.register_full_backward_hook(backward)), config())
    perturb(model)
    found = []
    for merge in (lambda: None, model.merge_adapter):
        merge()
        x = X.clone().requires_grad_()
        found += torch.autograd.grad(model(x).sum(), [x])
    unmerged, merged = found
    assert_close(merged, unmerged, 1e-4)


def before_products(module: Any, args: tuple[Tensor]) -> Any:
    return before(module, args) if isinstance(module, Product) else None


@pytest.fixture
def hook_of_all() -> Iterator[None]:
    register: Any = register_module_forward_pre_hook
    handle = register(before_products)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_of_all")
def test_a_hook_of_all_modules_reads_the_changed_weight():
    assert_merged_is_unmerged(hooked(lambda _: None))


class Calling(Product):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x) + x @ self.w


class CallingMethod(Product):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x) + self._product(x)


@pytest.mark.parametrize("cls", [Calling, CallingMethod])
def test_a_call_of_its_own_beside_the_forward_reads_the_changed_weight(cls):
    assert_merged_is_unmerged(hooked(lambda _: None, cls))
    assert_merged_is_unmerged(Around(hooked(lambda _: None, cls)))
    assert_merged_is_unmerged(trace(Around(hooked(lambda _: None, cls)), (X,)))


# hooks that don't read it


def of_its_dtype(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].to(next(module.parameters()).dtype) * module.w.shape[0],)


def asking_for_another(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * getattr(module, "factor", 2),)


def reading_the_layer(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] @ module.weight,)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "metadata": lambda model: model.register_forward_pre_hook(of_its_dtype),
    "another attribute": lambda model: model.register_forward_pre_hook(asking_for_another),
    "lambda": lambda model: model.register_forward_pre_hook(
        lambda module, args: (args[0] * getattr(module, "factor", 2),)
    ),
    "of the layer": lambda model: model.layer.register_forward_pre_hook(reading_the_layer),
    "accelerate": lambda model: add_hook_to_module(model, ModelHook()),
}


class CallingForward(Product):
    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(2 * x) + 1


class Checkpointed(GradientCheckpointingLayer, Product):
    pass


@pytest.mark.parametrize("name", OTHERS)
def test_hooks_that_do_not_read_the_weight_are_no_matter(name):
    assert_merged_is_unmerged(Around(hooked(OTHERS[name])))


@pytest.mark.parametrize("cls", [CallingForward, Checkpointed])
def test_a_call_of_its_own_that_only_runs_the_forward_is_no_matter(cls):
    assert_merged_is_unmerged(Around(hooked(lambda _: None, cls)))


def test_a_weight_beside_one_that_a_hook_reads_is_adapted():
    class Two(Product):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Parameter(torch.randn(6, 6))

    def reading_other(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] @ module.other,)

    assert_merged_is_unmerged(hooked(lambda model: model.register_forward_pre_hook(reading_other), Two))
