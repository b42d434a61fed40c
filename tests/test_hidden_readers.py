"""A weight that a module around its layer reads is changed there, whether or not the module's class has source."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import py_compile
from collections.abc import Callable, Mapping
from importlib.machinery import SourcelessFileLoader
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hidden_readers
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphpeft import GuardError, LoraConfig, TraceError, get_peft_model, trace
from graphpeft.testing import laws

pytestmark = pytest.mark.quick("code", "sites")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def _with_source(folder: Path) -> ModuleType:
    return hidden_readers


def _by_exec(folder: Path) -> ModuleType:
    module = ModuleType("made_by_exec")
    exec(Path(hidden_readers.__file__).read_text(), vars(module))
    return module


def _from_bytecode(folder: Path) -> ModuleType:
    file = py_compile.compile(hidden_readers.__file__, str(folder / "compiled.pyc"), dfile="gone.py", doraise=True)
    assert file is not None
    spec = importlib.util.spec_from_loader("compiled", SourcelessFileLoader("compiled", file))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_a_file_that_has_changed(folder: Path) -> ModuleType:
    file = folder / "changed.py"
    module = ModuleType("changed")
    exec(compile(Path(hidden_readers.__file__).read_text(), str(file), "exec"), vars(module))
    # the same number of lines, all of them those of a forward that reads nothing
    file.write_text("def forward(self, x): return x\n" * 500)
    return module


Loaded = Callable[[Path], ModuleType]
LOADED: list[Loaded] = [_with_source, _by_exec, _from_bytecode, _from_a_file_that_has_changed]


def _models(load: Loaded, name: str, folder: Path) -> nn.Module:
    """Two modules of the class, of which each has a layer."""
    cls = getattr(load(folder), name)
    torch.manual_seed(1)
    return nn.Sequential(cls(), nn.Tanh(), cls())


CONFIG = LoraConfig(target_modules=["inner"], r=2, lora_alpha=7, init_lora_weights=False)


@pytest.mark.parametrize("load", LOADED)
@pytest.mark.parametrize("name", [cls.__name__ for cls in hidden_readers.ADAPTED])
def test_a_weight_is_adapted_where_it_is_read(name: str, load: Loaded, tmp_path: Path):
    model = _models(load, name, tmp_path)
    base = model(X)
    adapted: Any = get_peft_model(model, CONFIG)
    found = adapted(X)
    assert not torch.allclose(found, base)
    # in place, since what a copy holds in a function reads the weight of the original
    laws.require_close(adapted.merge_and_unload()(X), found, 1e-5, "merged and adapted")


class Fast(nn.Module):
    """Calls its layer with another weight in place of the layer's own, and another layer as it is."""

    def __init__(self, spelling: Callable[[Any, Tensor], Tensor]):
        super().__init__()
        self.inner, self.outer, self.fast = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))
        self.spelling, self.runner = spelling, SimpleNamespace(run=functional_call)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.spelling(self, x))


def _as_it_is(self: Any, x: Tensor) -> Tensor:
    return self.inner(x)


def _by_vmap(self: Any, x: Tensor) -> Tensor:
    weights = torch.stack([self.fast, 2 * self.fast])
    return torch.vmap(lambda weight: functional_call(self.inner, {"weight": weight}, (x,)))(weights).sum(0)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda self, x: torch.func.functional_call(self.inner, {"weight": self.fast}, (x,)),
        lambda self, x: getattr(torch.func, "functional" + "_call")(self.inner, {"weight": self.fast}, (x,)),
        lambda self, x: self.runner.run(self.get_submodule("inner"), {"weight": 2 * self.fast}, (x,)),
        lambda self, x: functools.partial(functional_call, self.inner)({"weight": self.fast.clone()}, (x,)),
        lambda self, x: functional_call(nn.Sequential(self.inner), {"0.weight": self.fast}, (x,)),
        _by_vmap,
    ],
    ids=["by name", "by getattr", "in an object", "in a partial", "inside of another", "by vmap"],
)
def test_a_layer_that_the_model_calls_with_other_weights_is_told(spelling: Callable[[Any, Tensor], Tensor]):
    model = nn.Sequential(Fast(spelling))
    before = model(X)
    adapted: Any = get_peft_model(model, CONFIG)
    for _ in range(2):
        with pytest.raises(GuardError, match=r"the model calls 0\.inner by torch\.func\.functional_call.*leave it out"):
            adapted(X)
    with adapted.disable_adapter():
        assert torch.equal(adapted(X), before)
    assert torch.equal(adapted.unload()(X), before)


def test_copies_of_modules_that_the_model_calls_with_other_weights_are_told():
    config = LoraConfig(target_modules=["outer"], modules_to_save=["inner"])
    adapted: Any = get_peft_model(nn.Sequential(Fast(_as_it_is), Fast(_by_vmap)), config)
    with pytest.raises(GuardError, match=r"the model calls 1\.inner by"):
        adapted(X)


def test_other_layers_beside_one_that_is_called_with_other_weights_are_adapted():
    model = nn.Sequential(Fast(_by_vmap))
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["outer"], r=2, init_lora_weights=False))
    found = adapted(X)
    laws.require_close(adapted.merge_and_unload()(X), found, 1e-5, "merged and adapted")


@pytest.mark.parametrize(
    "copied", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_each_of_several_such_layers_is_told_in_copies_too(copied: Callable[[Any], Any]):
    model = nn.Sequential(Fast(_as_it_is), Fast(_by_vmap))
    adapted: Any = copied(get_peft_model(model, CONFIG))
    with pytest.raises(GuardError, match=r"the model calls 1\.inner by"):
        adapted(X)


def test_a_layer_that_the_model_calls_with_other_weights_only_later_is_told():
    fast: Any = Fast(_as_it_is)
    adapted: Any = get_peft_model(nn.Sequential(fast), CONFIG)
    adapted(X)
    fast.spelling = _by_vmap
    with pytest.raises(GuardError, match=r"the model calls 0\.inner by"):
        adapted(X)


def test_an_adapted_model_is_called_with_other_weights():
    adapted: Any = get_peft_model(nn.Sequential(Fast(_as_it_is)), CONFIG)
    found = adapted(X)
    others = {name: 2 * own.detach() for name, own in adapted.named_parameters()}
    for _ in range(2):
        laws.require_close(functional_call(adapted, others, (X,)), _with(adapted, others)(X), 1e-6, "other weights")
        laws.require_close(adapted(X), found, 0, "after it")


def _with(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    copied = copy.deepcopy(model)
    copied.load_state_dict(dict(values), strict=False)
    return copied


def _asking(text: str) -> nn.Module:
    namespace: dict[str, Any] = {"nn": nn, "torch": torch}
    exec(f"class Asking(nn.Module):\n    def forward(self, x):\n        {text}", namespace)
    return namespace["Asking"]()


@pytest.mark.parametrize(
    "text",
    [
        "return x + 1 if type(x) is torch.Tensor else x - 1",
        "return x + 1 if x.__class__ is torch.Tensor else x - 1",
        "return (lambda y: x + 1 if type(y) is torch.Tensor else x - 1)(x)",
    ],
)
def test_a_question_for_a_class_is_seen_without_source(text: str):
    with pytest.raises(TraceError, match="asks for the class of a value"):
        trace(_asking(text), (X,))


def test_a_question_for_the_class_of_a_module_is_none_without_source():
    model = _asking("return x if type(self).__name__ == 'Asking' else -x")
    assert torch.equal(trace(model, (X,))(X), X)


def test_flags_are_compared_by_identity_without_source():
    model = _asking("return x if self.training is True else -x")
    traced = trace(model, (X,))
    for mode in (True, False):
        assert torch.equal(traced.train(mode)(X), model.train(mode)(X))
