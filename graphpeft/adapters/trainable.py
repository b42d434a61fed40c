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
    _set_flags([(parameter, False) for parameter in before])


def thaw(modules: Modules, adapters: Adapters) -> None:
    """Makes those parameters require grad that did before the first adapter came, and no others."""
    trained = set(adapters.trained_before)
    _set_flags(
        [
            (parameter, (path, name) in trained)
            for path, module in modules.items()
            for name, parameter in all_parameters(module)
        ]
    )


def set_trainable(modules: Modules, adapters: Adapters, names: Iterable[str]) -> None:
    """Makes the tensors of adapters require grad if they are active, and else not."""
    wanted = {name: name in adapters.active and not adapters.by_name[name].config.inference_mode for name in names}
    set_trainable_now(modules, adapters, wanted)


def set_trainable_now(modules: Modules, adapters: Adapters, wanted: Mapping[str, bool]) -> None:
    """Makes the tensors of adapters require grad, or not."""
    flags: list[tuple[nn.Parameter | None, bool]] = []
    for name, trains in wanted.items():
        adapter = adapters.by_name[name]
        frozen = adapter.frozen_names(name) if trains else ()
        flags += [
            (parameter_at(modules[place[0]], place[1]), trains and place not in frozen)
            for place in adapter.tensor_names(name)
            if place[0] in modules  # somebody may have put another module in the place of an adapted one
        ]
    _set_flags(flags)
    on = {name for name, trains in wanted.items() if trains}
    set_attribute(adapters, "trainable", (adapters.trainable - wanted.keys()) | on)


def _set_flags(flags: Iterable[tuple[nn.Parameter | None, bool]]) -> None:
    """Makes parameters require grad, or not, but for those that can't have a gradient."""
    changed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter, wanted in flags:
        if parameter is not None and parameter.requires_grad != wanted:
            changed[wanted].append(parameter)
    off, on = changed[False], [each for each in changed[True] if each.is_floating_point() or each.is_complex()]
    undone_by(_give_flags, off, on)
    _give_flags(on, off)


def _give_flags(on: list[nn.Parameter], off: list[nn.Parameter]) -> None:
    # not by a method, which an uninitialised parameter of a lazy layer refuses
    for parameter in on:
        parameter.requires_grad = True
    for parameter in off:
        parameter.requires_grad = False
