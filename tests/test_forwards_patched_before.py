"""Forwards that are patched before modules are adapted: adapters act beside and in them, and they come back."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers.pytorch_utils import Conv1D

import graphpeft
from graphpeft import AdaptError, LoraConfig, PeftModel, get_peft_model, own_weight, trace
from graphpeft.adapters import acting


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.last = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(self.first(x)))


def doubled(self: Any, x: torch.Tensor) -> torch.Tensor:
    return 2 * F.linear(x, self.weight, self.bias)


def a_lambda(model: Any) -> None:
    model.first.forward = lambda x: 3 * F.linear(x, model.first.weight)


def a_method(model: Any) -> None:
    model.first.forward = types.MethodType(doubled, model.first)


def a_partial(model: Any) -> None:
    model.first.forward = functools.partial(doubled, model.first)


def around_the_old_one(model: Any) -> None:
    old = model.first.forward
    model.first.forward = lambda x: old(x + 1).relu()


def deciding(model: Any) -> None:
    old = model.first.forward
    model.first.forward = lambda x: old(x) if float(x.detach().sum()) > 0 else -old(x)


def with_a_switch(model: Any) -> None:
    layer = model.first
    layer.doubles = False
    layer.forward = lambda x: doubled(layer, x) if layer.doubles else F.linear(x, layer.weight, layer.bias)


def with_more_arguments(model: Any) -> None:
    old = model.first.forward
    model.first.forward = lambda x, scale=1.0: scale * old(x)
    model.forward = lambda x: model.last(model.inner(model.first(x, scale=0.5)))


def compiled(model: Any) -> None:
    model.first.forward = torch.compile(model.first.forward, backend="eager")


def generated(model: Any) -> None:
    namespace: dict[str, Any] = {"F": F, "layer": model.first}
    exec("def forward(x):\n    return 2 * F.linear(x, layer.weight, layer.bias)", namespace)
    forward = namespace["forward"]
    assert forward.__module__ is None
    model.first.forward = forward


def the_same_again(model: Any) -> None:
    model.first.forward = lambda x: F.linear(x, model.first.weight, model.first.bias)


def handing_on(model: Any) -> None:
    old = model.first.forward
    model.first.forward = lambda *args, **kwargs: old(*args, **kwargs)


def of_a_parent(model: Any) -> None:
    inner = model.inner
    inner.forward = lambda x: 2 * inner[0](x)


def around_a_parents(model: Any) -> None:
    old = model.inner.forward
    model.inner.forward = lambda x: old(2 * x)


def of_the_model(model: Any) -> None:
    model.forward = types.MethodType(lambda self, x: 2 * self.inner(self.first(x)), model)


def around_the_models(model: Any) -> None:
    old = model.forward
    model.forward = lambda x: old(-x)


OTHER = [a_lambda, a_method, a_partial, around_the_old_one, deciding, with_a_switch, with_more_arguments, generated]
"""Forwards of the layer that compute something else than its class."""
SAME = [compiled, the_same_again, handing_on, of_a_parent, around_a_parents, of_the_model, around_the_models]
SetForward = Callable[[Any], None]

X = torch.rand(5, 4, generator=torch.Generator().manual_seed(3))
OPTIONS: dict[str, Any] = {"target_modules": ["first", "inner.0"], "r": 2, "lora_alpha": 3}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", OPTIONS),
    "dora": ("LoraConfig", {**OPTIONS, "use_dora": True}),
    "ia3": ("IA3Config", {"target_modules": ["first", "inner.0"], "feedforward_modules": ["first"]}),
    "oft": ("OFTConfig", {"target_modules": ["first", "inner.0"], "oft_block_size": 2, "r": 0}),
    "loha": ("LoHaConfig", {"target_modules": ["first", "inner.0"], "r": 2}),
}


def net(change: SetForward | None = None) -> Any:
    torch.manual_seed(0)
    model = Net()
    if change is not None:
        change(model)
    return model


def adapted(change: SetForward, library: Any = graphpeft, name: str = "lora") -> Any:
    cls, options = CONFIGS[name]
    return filled(library.get_peft_model(net(change), getattr(library, cls)(**options)))


def place(path: str) -> tuple[str, ...]:
    """Returns what PEFT's name of a tensor has in common with that here."""
    return tuple(
        sorted(set(path.replace("magnitude_vector", "magnitude").split(".")) - {"base_model", "model", "weight"})
    )


@torch.no_grad()
def filled(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    trained = {place(path): p for path, p in model.named_parameters() if p.requires_grad}
    for _, parameter in sorted(trained.items()):
        parameter.add_(torch.rand(parameter.shape, generator=generator) / 2)
    return model


def patched_forwards(model: nn.Module) -> dict[str, Any]:
    return {path: vars(module).get("forward") for path, module in model.named_modules()}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("change", [*OTHER, *SAME])
def test_it_is_adapted_as_by_peft(change: SetForward, name: str) -> None:
    ours, theirs = adapted(change, name=name), adapted(change, peft, name)
    torch.testing.assert_close(ours(X), theirs(X))
    with ours.disable_adapter(), theirs.disable_adapter():
        torch.testing.assert_close(ours(X), theirs(X))
        assert torch.equal(ours(X), net(change)(X))
    assert not torch.allclose(ours(X), net(change)(X))
    (ours(X) ** 2).sum().backward()
    (theirs(X) ** 2).sum().backward()
    gradients = [
        {place(path): tensor.grad for path, tensor in each.named_parameters() if tensor.requires_grad}
        for each in (ours, theirs)
    ]
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][path], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", [*OTHER, *SAME])
def test_unloaded_it_is_there_as_it_was(change: SetForward) -> None:
    model = net(change)
    before, expected = patched_forwards(model), model(X)
    peft_model = filled(get_peft_model(model, LoraConfig(**OPTIONS)))
    peft_model.add_adapter("second", LoraConfig(**OPTIONS))
    peft_model.set_adapter("second")
    assert peft_model.unload() is model
    after = patched_forwards(model)
    assert all(after[path] is before[path] for path in before)
    assert not any("graphpeft" in name for module in model.modules() for name in vars(module))
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("change", SAME)
def test_it_is_merged_where_it_computes_what_the_class_does(change: SetForward) -> None:
    model = adapted(change)
    expected, base = model(X), net(change)(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected)
    model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)
    assert not torch.allclose(expected, base)


@pytest.mark.every
@pytest.mark.parametrize("change", OTHER)
def test_it_is_not_merged_where_it_may_compute_something_else(change: SetForward) -> None:
    model = adapted(change)
    expected = model(X)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(AdaptError, match="first of adapter 'default' can't be merged: a forward was set on first"):
            merge()
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("change", [a_method, around_the_old_one, handing_on, of_a_parent])
def test_two_adapters_act_and_rows_of_a_batch_have_theirs(change: SetForward) -> None:
    model = adapted(change)
    model.add_adapter("second", LoraConfig(**{**OPTIONS, "r": 3}))
    model.set_adapter("second")
    filled(model, 2)
    outputs = {"__base__": net(change)(X)}
    for name in ("default", "second"):
        model.set_adapter(name)
        outputs[name] = model(X)
    names = ["second", "default", "__base__", "default", "second"]
    mixed = model(X, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], outputs[name][row])
    assert torch.equal(model(X), outputs["second"])
    with model.disable_adapter():
        assert torch.equal(model(X), outputs["__base__"])


def test_several_active_adapters_are_those_of_peft() -> None:
    results = []
    for library in (graphpeft, peft):
        model = adapted(a_method, library)
        model.add_adapter("second", library.LoraConfig(**{**OPTIONS, "r": 3}))
        model.base_model.set_adapter(["default", "second"])
        results.append(filled(model, 2)(X))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("change", [a_method, a_partial, of_the_model])
def test_a_copy_runs_it_on_its_own_weights(change: SetForward) -> None:
    model = adapted(change)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    with torch.no_grad():
        copied.first.weight.zero_()
        copied.inner[0].default.lora_B.zero_() if hasattr(copied.inner[0].default, "lora_B") else None
    assert not torch.allclose(copied(X), model(X))
    base = copied.unload()
    assert base.first.forward != vars(model.first).get("forward")
    with torch.no_grad():
        base.first.weight.copy_(own_weight(model.first))
    assert torch.equal(base(X), net(change)(X))


def test_it_goes_into_a_pickle_with_its_module() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].forward = functools.partial(torch.mul, 2)  # type: ignore[method-assign]
    model = filled(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(X), model(X))
    torch.testing.assert_close(again.unload()(X), 2 * X)


@pytest.mark.parametrize("change", [a_method, around_the_old_one, of_a_parent, of_the_model])
def test_a_file_goes_both_ways_with_peft(change: SetForward, tmp_path: Path) -> None:
    for ours, (writer, reader) in enumerate([(peft, graphpeft), (graphpeft, peft)]):
        model, folder = adapted(change, writer), tmp_path / str(ours)
        model.save_pretrained(folder)
        read = reader.PeftModel.from_pretrained(net(change), folder)
        torch.testing.assert_close(read(X), model(X))


@pytest.mark.parametrize("change", [a_lambda, a_method, around_the_old_one, handing_on, of_a_parent, around_the_models])
def test_it_is_compiled_and_optimized_like_any_other(change: SetForward) -> None:
    model = adapted(change)
    expected = model(X)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(X), expected)
    graphpeft.optimize(model)
    torch.testing.assert_close(model(X), expected)


def test_what_it_returns_is_not_written_into() -> None:
    kept = []

    def keeping(model: Any) -> None:
        old = model.first.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            kept.append(old(x))
            return kept[-1]

        model.first.forward = forward

    model = adapted(keeping)
    graphpeft.optimize(model)
    model(X)
    assert torch.equal(kept[-1], F.linear(X, own_weight(model.first), model.first.bias))


@pytest.mark.parametrize("change", [a_lambda, a_method, around_the_old_one, of_a_parent, around_the_models])
def test_a_traced_model_has_it(change: SetForward) -> None:
    model = filled(get_peft_model(trace(net(change)), LoraConfig(**OPTIONS)))
    torch.testing.assert_close(model(X), adapted(change)(X))


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd", "ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize("layer", ["embedding", "conv", "transposed conv", "conv1d"])
def test_other_layers_than_linear_ones_have_one_too(layer: str) -> None:
    layers: dict[str, Callable[[], nn.Module]] = {
        "embedding": lambda: nn.Embedding(6, 4, padding_idx=1),
        "conv": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2),
        "transposed conv": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2),
        "conv1d": lambda: Conv1D(5, 4),
    }
    x = torch.tensor([[0, 1, 5]]) if layer == "embedding" else torch.rand(2, 4, 4)
    found = []
    libraries = [graphpeft] if layer == "transposed conv" else [graphpeft, peft]
    for library in libraries:
        torch.manual_seed(0)
        model: Any = nn.Sequential(layers[layer]())
        old = model[0].forward
        model[0].forward = lambda x, old=old: 2 * old(x)
        model = library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["0"]))
        found.append(filled(model)(x))
        with model.disable_adapter():
            assert not torch.allclose(found[-1], model(x))
    torch.testing.assert_close(found[0], found[-1])


def test_that_of_a_convolution_that_pads_by_itself_runs_on_the_changed_weight() -> None:
    found, x = [], torch.rand(2, 4, 5)
    for library in (graphpeft, peft):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"))
        old = model[0].forward
        model[0].forward = lambda x, old=old: old(x)
        model = filled(library.get_peft_model(model, library.LoraConfig(r=2, target_modules=["0"])))
        found += [model(x), model.merge_and_unload()(x)]
    assert found[0].shape == (2, 4, 5)
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[3])


def test_a_weight_that_it_reads_from_a_layer_inside_is_adapted_there() -> None:
    model = net()
    inner = model.inner
    inner.forward = lambda x: 2 * F.linear(x, inner[0].weight, inner[0].bias)
    model = filled(get_peft_model(model, LoraConfig(**OPTIONS)))
    expected = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)
    assert model.inner.forward.__name__ == "<lambda>"


def test_a_weight_that_the_models_own_reads_is_changed_there() -> None:
    model = net()
    model.forward = lambda x: F.linear(model.inner(model.first(x)), model.last.weight)
    before = model(X)
    model = filled(get_peft_model(model, LoraConfig(r=2, target_modules=["last"])))
    expected = model(X)
    assert not torch.allclose(expected, before)
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_one_that_looks_for_the_forward_of_the_class_in_each_call_runs_on_the_changed_weight() -> None:
    model = net()
    model.first.forward = lambda x: type(model.first).forward(model.first, x)
    model = filled(get_peft_model(model, LoraConfig(r=2, target_modules=["first"])))
    expected = model(X)
    assert not torch.allclose(expected, net()(X))
    torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_one_that_is_set_on_an_adapted_layer_stays_until_it_is_taken_off() -> None:
    model = adapted(a_method)
    expected = model(X)
    known = model.first.forward
    model.first.forward = lambda x: known(x) + 1
    assert not torch.allclose(model(X), expected)
    with pytest.raises(AdaptError, match="a forward was set on first itself since it was adapted"):
        model.unload()
    model.first.forward = known
    assert torch.equal(model(X), expected)
    assert torch.equal(model.unload()(X), net(a_method)(X))


def test_one_that_is_deleted_meanwhile_does_not_come_back() -> None:
    model = get_peft_model(net(a_method), LoraConfig(**OPTIONS))
    with model.disable_adapter():
        del model.first.forward
    assert torch.equal(model.unload()(X), net()(X))


def test_it_runs_under_a_hook_of_accelerate_that_comes_before_or_afterwards_or_goes() -> None:
    def hooked(model: Any) -> None:
        a_method(model)
        add_hook_to_module(model.first, ModelHook())

    expected = adapted(a_method)(X)
    model = adapted(hooked)
    assert torch.equal(model(X), expected)
    remove_hook_from_module(model.first)
    assert torch.equal(model(X), expected)
    assert torch.equal(model.unload()(X), net(a_method)(X))
    model = adapted(a_method)
    add_hook_to_module(model.first, ModelHook())
    assert torch.equal(model(X), expected)
    base = model.unload()
    assert torch.equal(base(X), net(a_method)(X))
    remove_hook_from_module(base.first)
    assert base.first.forward.__func__ is doubled


def test_hooks_of_its_module_run_around_it_and_the_adapter() -> None:
    seen = []
    model = adapted(a_method)
    model.first.register_forward_hook(lambda _, args, y: seen.append(y))
    model(X)
    (y,) = seen
    assert not torch.allclose(y, net(a_method).first(X))


def test_an_adaptation_that_fails_leaves_it_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net(a_method)
    known, names, seen = model.first.forward, set(vars(model.first)), []

    def failing(modules: Any, *_: Any) -> None:
        seen.append(vars(modules["first"])["forward"])
        raise KeyboardInterrupt

    monkeypatch.setattr(acting, "_keep_padded", failing)
    with pytest.raises(KeyboardInterrupt):
        get_peft_model(model, LoraConfig(**OPTIONS))
    assert seen[0] is not known
    assert model.first.forward is known
    assert set(vars(model.first)) == names


def test_a_prompt_goes_to_a_module_with_one_that_takes_the_same_arguments() -> None:
    from graphpeft import PromptTuningConfig

    results = []
    for is_set in (False, True):
        model: Any = nn.Sequential(nn.Identity(), Sums())
        if is_set:
            model[1].forward = twice(model[1].forward)
        torch.manual_seed(0)
        config = PromptTuningConfig(num_virtual_tokens=2, token_dim=4, prompt_scope=["1"])
        results.append(get_peft_model(model, config)(torch.ones(1, 3, 4)))
    torch.testing.assert_close(2 * results[0], results[1])


def twice(old: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: 2 * old(x)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.scale * x).cumsum(1)


def test_a_model_with_one_is_freed() -> None:
    model = net(a_lambda)
    freed = weakref.ref(model.first)
    get_peft_model(model, LoraConfig(**OPTIONS))(X)
    del model
    gc.collect()  # the class that stood for it
    gc.collect()  # and then what was found out about that
    assert freed() is None


def test_a_second_adapter_from_a_file_finds_it(tmp_path: Path) -> None:
    model = adapted(a_method)
    expected = model(X)
    model.save_pretrained(tmp_path)
    other = adapted(a_method)
    assert isinstance(other, PeftModel)
    other.load_adapter(tmp_path, "again")
    other.set_adapter("again")
    other.delete_adapter("default")
    assert torch.equal(other(X), expected)


def in_hand(model: Any) -> None:
    weight, bias = model.first.weight, model.first.bias
    model.first.forward = lambda x: F.linear(x, weight, bias)


def test_one_that_has_the_weight_in_hand_is_adapted_and_merged_as_by_peft() -> None:
    found = []
    for library in (graphpeft, peft):
        model = adapted(in_hand, library)
        found += [model(X), model.merge_and_unload()(X)]
    torch.testing.assert_close(found[1:], [found[0]] * 3)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["first"], "init_lora_weights": "pissa"},
        {"target_modules": ["last"], "modules_to_save": ["first"]},
        {"target_modules": ["last"], "bias": "all"},
    ],
)
def test_one_that_has_the_weight_in_hand_takes_no_other_in_its_place(options: dict[str, Any]) -> None:
    model = net(in_hand)
    with pytest.raises(AdaptError, match="first itself has a tensor of it in hand"):
        get_peft_model(model, LoraConfig(r=2, **options))
    assert torch.equal(model(X), net(in_hand)(X))
    for change in (the_same_again, handing_on, compiled):
        adapted_model = filled(get_peft_model(net(change), LoraConfig(r=2, **options)))
        assert not torch.allclose(adapted_model(X), net(change)(X))


def test_one_with_the_weight_in_hand_is_not_run_on_a_changed_one() -> None:
    model: Any = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"))
    model[0].forward = functools.partial(F.conv1d, weight=model[0].weight)
    with pytest.raises(AdaptError, match="its forward was set on the instance"):
        get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))


def test_that_of_a_quantised_layer_is_not_merged() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    model: Any = nn.Sequential(layer).to("cpu")
    old = model[0].forward
    model[0].forward = lambda x: 2 * old(x)
    x = torch.rand(2, 64)
    expected = model(x)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), expected)
    filled(model)
    with pytest.raises(AdaptError, match="can't be merged"):
        model.merge_adapter()
