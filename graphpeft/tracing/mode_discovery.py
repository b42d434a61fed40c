"""Finds which modules are in training mode after calls of `train` and `eval` that a model's classes override.

Detection models freeze normalisation layers in this way. The overrides run on a copy of the model with fake tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from graphpeft._torch import fake_tensor
from graphpeft.graph.errors import TraceError
from graphpeft.graph.in_place import quiet_subclass
from graphpeft.graph.own_modes import OwnModes
from graphpeft.graph.paths import join
from graphpeft.tracing.attributes import MACHINERY, is_plain
from graphpeft.tracing.examples import tensors_copied_by


def own_modes(root: nn.Module) -> dict[str, OwnModes]:
    """Returns the modes after overridden `train` and `eval`, by the paths of the modules that override them."""
    own = [path for path, module in root.named_modules() if _has_own_modes(module)]
    if not own:
        return {}
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    tensors = {id(tensor): fake.from_tensor(tensor) for tensor in (*root.parameters(), *root.buffers())}
    try:
        with tensors_copied_by(fake.from_tensor):
            copied = copy.deepcopy(root, tensors)
        with fake:
            return {path: _modes_of(copied.get_submodule(path)) for path in own}
    except Exception as error:
        kinds = sorted({type(root.get_submodule(path)).__name__ for path in own})
        raise TraceError(
            f"train() and eval() of {', '.join(kinds)} fail on a copy, so a graph can't do what they do: "
            f"{type(error).__name__}: {error}"
        ) from error


def modes_after(root: nn.Module, training: bool, own: Mapping[str, OwnModes]) -> dict[nn.Module, bool]:
    """Returns whether each module is in training mode after ``root.train(training)``; `own` comes from `own_modes`."""
    found: dict[nn.Module, bool] = {}

    def note(module: nn.Module, path: str) -> None:
        found[module] = training
        if path in own:
            inside = own[path].by_train[training].items()
            found.update((module.get_submodule(inner), mode) for inner, mode in inside)
            return
        for name, child in module.named_children():
            note(child, join(path, name))

    note(root, "")
    return found


def _has_own_modes(module: nn.Module) -> bool:
    cls = type(module)
    is_own = cls.train is not nn.Module.train or cls.eval is not nn.Module.eval
    return is_own or not {"train", "eval"}.isdisjoint(module.__dict__)


def _present(module: nn.Module) -> dict[str, bool]:
    return {path: inner.training for path, inner in module.named_modules(remove_duplicate=False)}


def _modes_of(module: nn.Module) -> OwnModes:
    """Finds the modes by calls of `train` and `eval` of `module`, which is a copy."""
    asked: dict[str, Any] = {}

    def note(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        if name not in MACHINERY and name in vars(module) and is_plain(value):
            asked.setdefault(name, value)
        return value

    object.__setattr__(module, "__class__", quiet_subclass(type(module), {"__getattribute__": note}))
    # calls aren't chained, since some overrides return None
    module.train(False)
    in_evaluation = _present(module)
    module.train(True)
    in_training = _present(module)
    module.eval()
    return OwnModes((in_evaluation, in_training), _present(module), asked)
