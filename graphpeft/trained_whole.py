"""Which tensors a config trains whole beside its adapter: those of `modules_to_save`, and biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from graphpeft import stand_ins, targets
from graphpeft.config import TASK_HEADS, PeftConfig
from graphpeft.paths import TensorPaths, join
from graphpeft.report import Refusal, Report
from graphpeft.sites import Site

_WAY_OUT = "name other modules in modules_to_save, or none"


def trained_whole(
    config: PeftConfig,
    modules: Mapping[str, nn.Module],
    sites: Sequence[Site],
    report: Report,
    owned: TensorPaths,
) -> dict[str, tuple[str, ...]]:
    """Returns the names of the tensors that `config` trains whole, by the path of their module.

    Args:
        config: The config, resolved for the model.
        modules: The model's modules by path.
        sites: The sites that it adapts.
        report: Gets what is named and can't be trained whole.
        owned: The paths of tensors that belong to adapters.
    """
    whole: dict[str, tuple[str, ...]] = {}
    saved = _saved_modules(modules, config)
    for name in config.modules_to_save or ():
        # the heads that a task brings along are named for every model, whichever it has
        if name not in TASK_HEADS and not any(path.endswith(name) for path in saved):
            near = targets.near_misses([name], modules)
            hint = f"; near misses: {', '.join(near)}" if near else ""
            report.refused.append(Refusal(name, f"modules_to_save names no module{hint}", _WAY_OUT))
    for path in saved:
        for inner, module in modules[path].named_modules(prefix=path):
            own = tuple(name for name in stand_ins.tensors_of(module) if join(inner, name) not in owned)
            reason = stand_ins.refusal(module)
            if reason is not None:
                report.refused.append(Refusal(inner, reason, _WAY_OUT))
            elif own:
                whole[inner] = own
    biases = _biases(modules, config, sites, owned)
    return whole | {path: names for path, names in biases.items() if path not in whole}


def _saved_modules(modules: Mapping[str, nn.Module], config: PeftConfig) -> list[str]:
    """Returns the paths of `modules_to_save`, as PEFT's `_set_trainable` finds them: by the end of the path."""
    ends = tuple(config.modules_to_save or ())
    found: list[str] = []
    for path in modules if ends else ():
        if path and path.endswith(ends) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _biases(
    modules: Mapping[str, nn.Module], config: PeftConfig, sites: Sequence[Site], owned: TensorPaths
) -> dict[str, tuple[str, ...]]:
    """Returns the biases to train, as PEFT's `_mark_only_adapters_as_trainable` finds them: by their name."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return {}
    if bias == "all":
        found = {
            path: tuple(
                name
                for name, tensor in module._parameters.items()
                if tensor is not None and name == "bias" and join(path, name) not in owned
            )
            for path, module in modules.items()
        }
        return {path: names for path, names in found.items() if names}
    layers = dict.fromkeys(site.owner for site in sites if site.is_layer)
    return {path: ("bias",) for path in layers if modules[path]._parameters.get("bias") is not None}
