"""A weight that a hook or a ``__call__`` reads too, around the forward in which its adapter acts, is refused."""

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
from graphpeft.sites import around_forwards
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
    "tensor in hand": with_a_tensor_in_hand,
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
def test_a_weight_that_a_hook_reads_too_is_refused_and_a_trace_has_the_hook(name):
    inside = r"inner\.layer" if name in ("of a layer inside", "closure") else "inner"
    match = rf"inner\.w: its w may be read by a forward (pre-)?hook of {inside} \(.*where no adapter acts; put .*trace"
    assert_refused(Around(hooked(READING[name])), match)
    assert_merged_is_unmerged(trace(Around(hooked(READING[name])), (X,)))


INSIDE: dict[str, Callable[[Any], Tensor]] = {
    "path": lambda module: module.inner.w,
    "get_parameter": lambda module: module.get_parameter("inner.w"),
    "get_submodule": lambda module: module.get_submodule("inner").w,
    "parameters": lambda module: next(p for p in module.parameters() if p.shape == (6, 6)),
    "modules": lambda module: next(m.w for m in module.modules() if isinstance(m, Product)),
    "children": lambda module: next(m.w for m in module.children() if isinstance(m, Product)),
}


@pytest.mark.parametrize("name", INSIDE)
def test_a_hook_of_the_model_that_reads_a_weight_inside_is_seen(name):
    read = INSIDE[name]

    def reading() -> nn.Module:
        model: Any = Around(hooked(lambda _: None))
        model.register_forward_pre_hook(lambda module, args: (args[0] @ read(module),))
        return model

    assert_refused(reading(), "its w may be read by a forward pre-hook of the model")
    assert_merged_is_unmerged(trace(reading(), (X,)))


def test_a_backward_hook_that_reads_a_weight_is_seen():
    def backward(module: Any, _: Any, gradients: Any) -> Any:
        return (gradients[0] @ module.w,)

    model = hooked(lambda model: model.register_full_backward_hook(backward))
    assert_refused(model, r"may be read by a backward hook of the model .*; remove it")


def before_products(module: Any, args: tuple[Tensor]) -> Any:
    return before(module, args) if isinstance(module, Product) else None


def before_those_with_parameters(module: Any, args: tuple[Tensor]) -> Any:
    return (args[0] * sum(p.sum() for p in module.parameters(recurse=False)),) if hasattr(module, "w") else None


@pytest.fixture(params=[before_products, before_those_with_parameters])
def hook_of_all(request: pytest.FixtureRequest) -> Iterator[None]:
    register: Any = register_module_forward_pre_hook
    handle = register(request.param)
    yield
    handle.remove()


@pytest.mark.usefixtures("hook_of_all")
def test_a_hook_of_all_modules_that_reads_a_weight_is_seen():
    assert_refused(hooked(lambda _: None), r"may be read by a hook of all modules .*; remove it")


class Calling(Product):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x) + x @ self.w


class CallingMethod(Product):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x) + self._product(x)


@pytest.mark.parametrize("cls", [Calling, CallingMethod])
def test_a_weight_that_a_call_of_its_own_reads_beside_the_forward_is_refused(cls):
    match = rf"its w may be read by the __call__ of %s \({cls.__name__}\) too, where no adapter acts; put what it does"
    assert_refused(cls(), match % "the model")
    assert_refused(Around(cls()), match % "inner")
    assert_merged_is_unmerged(trace(Around(cls()), (X,)))


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


class Watching:
    """An object with a method for each of several hooks, as a trainer has them."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def before(self, module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] @ self.weight,)

    def after(self, module: Any, args: tuple[Tensor], y: Tensor) -> Tensor:
        return y @ self.weight


def test_what_an_object_holds_is_looked_through_once_for_all_of_its_hooks(monkeypatch: pytest.MonkeyPatch):
    model, other, walked = nn.Sequential(Product(), Product()), Watching(torch.eye(6)), []
    for layer in model:
        layer.register_forward_pre_hook(other.before)
        layer.register_forward_hook(other.after)
    reached_from = around_forwards.reached_from

    def noting(start: Any) -> Any:
        walked.append(start)
        return reached_from(start)

    monkeypatch.setattr(around_forwards, "reached_from", noting)
    get_peft_model(model, config())
    assert walked.count(other) == 1
