"""Which parameters require grad: those of active adapters, and none of the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from graphpeft.adapters.state import Adapters, Modules
from graphpeft.graph.holders import all_parameters, parameter_at
from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.transaction import set_attribute, undone_by


def trained_besides(model: nn.Module) -> list[str]:
    """Returns the parameters that require grad and are the model's own, such as those of a module that came later."""
    return [
        join(path, name)
        for path, module in modules_by_path(model).items()
        for name, own in module._parameters.items()
        if own is not None and own.requires_grad
    ]


def freeze(modules: Modules, adapters: Adapters) -> None:
    """Freezes the parameters of the base."""
    before = [own_parameter(modules[path], name) for path, name in adapters.trained_before]
    off = [parameter for parameter in before if parameter.requires_grad]
    undone_by(_give_flags, off, [])
    _give_flags([], off)


def thaw(modules: Modules, adapters: Adapters) -> None:
    """Makes those parameters require grad that did before the first adapter came, and no others."""
    trained, changed = set(adapters.trained_before), _Flags()
    for path, module in modules.items():
        for name, parameter in all_parameters(module):
            changed.note(parameter, (path, name) in trained)
    changed.set()


def set_trainable(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Makes the tensors of adapters require grad if they are active, and else not.

    Args:
        modules: The model's modules by path.
        adapters: The model's adapters.
        names: Those that have come, or have begun or ceased to be active; going through all would take the longer the
            more there are.
    """
    wanted = {name: name in adapters.active and not adapters.by_name[name].config.inference_mode for name in names}
    set_trainable_now(modules, adapters, wanted)


def set_trainable_now(modules: Modules, adapters: Adapters, wanted: Mapping[str, bool]) -> None:
    """Makes the tensors of adapters require grad, or not.

    Args:
        modules: The model's modules by path.
        adapters: The model's adapters.
        wanted: Whether those of an adapter require grad, by its name.
    """
    changed = _Flags()
    for name, trains in wanted.items():
        adapter = adapters.by_name[name]
        frozen = adapter.frozen_names(name)
        for path, attribute in adapter.tensor_names(name):
            # somebody may have put another module in the place of an adapted one
            if path in modules:
                changed.note(parameter_at(modules[path], attribute), trains and (path, attribute) not in frozen)
    changed.set()
    on = {name for name, trains in wanted.items() if trains}
    set_attribute(adapters, "trainable", (adapters.trainable - wanted.keys()) | on)


class _Flags:
    """The parameters that come to require grad, and those that cease to."""

    def __init__(self) -> None:
        self._on: list[nn.Parameter] = []
        self._off: list[nn.Parameter] = []

    def note(self, parameter: nn.Parameter | None, wanted: bool) -> None:
        """Notes a parameter, if there is one, unless it is so already or can't have a gradient."""
        if parameter is not None and parameter.requires_grad != wanted:
            if not wanted:
                self._off.append(parameter)
            elif parameter.is_floating_point() or parameter.is_complex():
                self._on.append(parameter)

    def set(self) -> None:
        """Sets the flags of all that were noted."""
        undone_by(_give_flags, self._off, self._on)
        _give_flags(self._on, self._off)


def _give_flags(on: list[nn.Parameter], off: list[nn.Parameter]) -> None:
    # not by a method, which an uninitialised parameter of a lazy layer refuses
    for parameter in on:
        parameter.requires_grad = True
    for parameter in off:
        parameter.requires_grad = False
