"""A weight that a module around its layer reads is changed there, whether or not the module's class has source."""

from __future__ import annotations

import importlib.util
import py_compile
from collections.abc import Callable
from importlib.machinery import SourcelessFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import hidden_readers
import pytest
import torch
from torch import nn

from graphpeft import AdaptError, LoraConfig, TraceError, get_peft_model, trace
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


@pytest.mark.parametrize("load", LOADED)
@pytest.mark.parametrize("name", [cls.__name__ for cls in hidden_readers.REPLACED])
def test_a_layer_that_is_called_with_other_weights_is_refused(name: str, load: Loaded, tmp_path: Path):
    model = _models(load, name, tmp_path)
    before = model(X)
    with pytest.raises(AdaptError, match=r"by torch\.func\.functional_call, with other weights in place of its own"):
        get_peft_model(model, CONFIG)
    assert torch.equal(model(X), before)


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
