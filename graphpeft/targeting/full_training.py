"""Tensors that a config trains beside its adapter: modules, biases, and rows of tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from graphpeft.graph import overrides
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.traced_model import stands_for
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import Role
from graphpeft.rules.peft_names import TASK_HEADS
from graphpeft.rules.report import Refusal, Report
from graphpeft.rules.trained import FullyTrainedModule, TableRows
from graphpeft.sites.layer_kinds import linear_classes
from graphpeft.sites.quantised import described, is_quantised
from graphpeft.sites.site import LeafSite, Site
from graphpeft.targeting import targets
from graphpeft.targeting.embedding_layers import input_embedding

_MOST_HINTS = 5  # an error shows so many refusals; only these get near misses
_SAVED = FullyTrainedModule("", "modules_to_save")


class TrainedRows(NamedTuple):
    """Trained rows of a module's weight.

    Attributes:
        indices: The indices of the rows.
        leader: The path of the module that owns the trained rows; modules tied to its weight follow it.
        key: The rows' name in files, after the path of the module; "" if files have no rows for this module.
    """

    indices: tuple[int, ...]
    leader: str
    key: str


class FullTraining(NamedTuple):
    """The tensors that a config trains fully.

    Attributes:
        names: The tensors' names, by the path of their module.
        infixes: The infix in the names of tensors in files, after the path of a fully trained module, by that path.
        saved: The paths of the modules of `modules_to_save`, and of the modules inside of these.
    """

    names: dict[str, tuple[str, ...]]
    infixes: dict[str, str]
    saved: tuple[str, ...]


def full_training(
    config: PeftConfig,
    modules: Mapping[str, nn.Module],
    sites: Sequence[Site | LeafSite],
    report: Report,
) -> FullTraining:
    """Returns the tensors that `config` trains fully."""
    named = _named_modules(config, modules, report)
    fully_trained: dict[str, tuple[str, ...]] = {}
    saved: list[str] = []
    adapted = {site.owner for site in sites if site.is_layer}
    for path, (_, option) in named.items():
        way_out = f"name other modules in {option}"
        if path in adapted:
            reason = f"{option} trains it fully, and an adapter of the layer itself can't act beside that"
            report.refused.append(Refusal(path, reason, way_out))
        for inside, module in modules_by_path(modules[path]).items():
            inner = join(path, inside)
            own = overrides.tensors_of(module)
            reason = overrides.refusal(module) or _quantised(module)
            if reason is not None:
                report.refused.append(Refusal(inner, reason, way_out))
            elif own:
                fully_trained[inner] = own
                if named[path] is _SAVED:
                    saved.append(inner)
    biases = _biases(modules, config, sites)
    fully_trained |= {path: names for path, names in biases.items() if path not in fully_trained}
    infixes = {path: module.infix for path, module in named.items() if module.infix}
    return FullTraining(fully_trained, infixes, tuple(saved))


def _named_modules(
    config: PeftConfig, modules: Mapping[str, nn.Module], report: Report
) -> dict[str, FullyTrainedModule]:
    """Returns the modules that a config trains fully, by path; refuses a module inside another one."""
    saved = _saved_modules(modules, config)
    for name in config.modules_to_save or ():
        # a task type adds the names of its possible heads, whether or not the model has them
        if name not in TASK_HEADS and not any(path.endswith(name) for path in saved):
            near = targets.near_misses([name], modules) if len(report.refused) < _MOST_HINTS else []
            hint = f"; near misses: {', '.join(near)}" if near else ""
            way_out = "name other modules in modules_to_save"
            report.refused.append(Refusal(name, f"modules_to_save names no module{hint}", way_out))
    named = {
        **config.find_fully_trained(modules, report),
        **dict.fromkeys(saved, _SAVED),
    }
    for path, module in named.items():
        around = next((path[:end] for end, letter in enumerate(path) if letter == "." and path[:end] in named), None)
        if around is not None:
            way_out = f"name other modules in {module.option}"
            report.refused.append(Refusal(path, f"it is inside of {around}, which is fully trained", way_out))
    return named


def _quantised(module: nn.Module) -> str | None:
    """Returns the reason why a module can't be fully trained, if a weight of it is quantised."""
    for name, weight in module._parameters.items():
        # plain integers, such as indices, are copied unchanged
        if weight is not None and is_quantised(weight) and type(weight) is not nn.Parameter:
            return f"its {name} is quantised ({described(weight)}), and can't be trained"
    return None


def _saved_modules(modules: Mapping[str, nn.Module], config: PeftConfig) -> list[str]:
    """Returns the paths of the modules in `modules_to_save`; like PEFT's `_set_trainable`, by the end of the path."""
    ends = tuple(config.modules_to_save or ())
    found: list[str] = []
    for path in modules if ends else ():
        if path and path.endswith(ends) and not any(path.startswith(f"{outer}.") for outer in found):
            found.append(path)
    return found


def _biases(
    modules: Mapping[str, nn.Module], config: PeftConfig, sites: Sequence[Site | LeafSite]
) -> dict[str, tuple[str, ...]]:
    """Returns the biases to train by module; like PEFT's `_mark_only_adapters_as_trainable`, by their name."""
    if config.trained_biases == "none":
        return {}
    if config.trained_biases == "all":
        layers = dict.fromkeys(modules)
    else:
        layers = dict.fromkeys(site.owner for site in sites if site.is_layer)
    return {path: ("bias",) for path in layers if modules[path]._parameters.get("bias") is not None}


def trained_rows(
    config: PeftConfig,
    modules: Mapping[str, nn.Module],
    sites: Sequence[Site | LeafSite],
    fully_trained: Mapping[str, tuple[str, ...]],
    report: Report,
) -> dict[str, TrainedRows]:
    """Returns the rows that `config` trains, by the path of their module.

    A module that is tied to an embedding trains the embedding's rows, unless the config names other rows for it.
    """
    found: dict[str, TableRows] = {}
    for path, rows in config.find_rows(modules, report).items():
        reason = _rows_refusal(path, modules[path], rows.indices, sites, fully_trained)
        if reason is not None:
            report.refused.append(Refusal(path, reason, f"change {rows.option}"))
        else:
            found[path] = rows
    return _with_tied(found, modules, config, sites, fully_trained, report)


def named_rows(
    named: Mapping[str, Sequence[int]] | Sequence[int] | None,
    option: str,
    modules: Mapping[str, nn.Module],
    report: Report,
) -> dict[str, TableRows]:
    """Returns the rows that an option names, by the path of their module."""
    if named is None:
        return {}
    if not isinstance(named, Mapping):
        named = {input_embedding(modules) or "embed_tokens": named}
    found: dict[str, TableRows] = {}
    for name, indices in named.items():
        paths = [path for path in modules if path == name or path.endswith(f".{name}")]
        if not paths:
            near = targets.near_misses([name], modules)
            hint = f"; near misses: {', '.join(near)}" if near else ""
            report.refused.append(
                Refusal(name, f"{option} names no module{hint}", f"change {option}, or leave it None")
            )
        found |= dict.fromkeys(paths, TableRows(tuple(indices), option=option))
    return found


def _with_tied(
    rows: Mapping[str, TableRows],
    modules: Mapping[str, nn.Module],
    config: PeftConfig,
    sites: Sequence[Site | LeafSite],
    fully_trained: Mapping[str, tuple[str, ...]],
    report: Report,
) -> dict[str, TrainedRows]:
    found = {path: TrainedRows(own.indices, path, own.key) for path, own in rows.items()}
    for path, own in rows.items():
        # one that follows another embedding leads none itself
        if found[path].leader != path or not issubclass(stands_for(modules[path]), nn.Embedding):
            continue
        weight = modules[path]._parameters["weight"]
        for other, module in modules.items():
            if other == path or module._parameters.get("weight") is not weight:
                continue
            if other in rows and rows[other].indices != own.indices:
                if config.keeps_tied:
                    forbids = f"which {config.option_for(Role.TYING)} forbids"
                    reason = f"it is tied to {path}, and other rows are named for it, {forbids}"
                    report.refused.append(Refusal(other, reason, f"change {own.option}"))
                continue
            reason = _rows_refusal(other, module, own.indices, sites, fully_trained)
            if reason is not None:
                report.refused.append(Refusal(other, f"it is tied to {path}, and {reason}", f"change {own.option}"))
            else:
                found[other] = TrainedRows(own.indices, path, own.key if own.written_for_tied else "")
    return found


def _rows_refusal(
    path: str,
    module: nn.Module,
    indices: Sequence[int],
    sites: Sequence[Site | LeafSite],
    fully_trained: Mapping[str, tuple[str, ...]],
) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        return f"a {stands_for(module).__name__} has no table whose rows could be trained"
    cls = stands_for(module)
    if issubclass(cls, linear_classes()) and not issubclass(cls, nn.Linear):
        return f"a {cls.__name__} stores its weight as (in, out), in which no row is of a token"
    if is_quantised(weight):
        return f"its weight is quantised ({described(weight)}), and no rows of it can be trained"
    if any(isinstance(site, Site) and site.owner == path and site.attribute == "weight" for site in sites):
        return "an adapter of its weight and rows of its own can't both act; name it in one option"
    if "weight" in fully_trained.get(path, ()):
        return "it is fully trained by modules_to_save already"
    outside = [index for index in indices if not 0 <= index < weight.shape[0]]
    if outside:
        return f"it has rows 0 to {weight.shape[0] - 1}, and none of index {outside[0]}"
    if len(set(indices)) < len(indices) or not indices:
        return "its rows have to be named, each once"
    return overrides.refusal(module)
