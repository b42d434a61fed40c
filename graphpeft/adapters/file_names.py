"""The names of adapters' tensors in PEFT's files.

A tensor's name is ``base_model.model.<module>.<name>``. PEFT wraps a module that it adapts, and once more for each of
its parameters that is adapted on its own (`target_parameters`), so the names of all that is inside it have
``.base_layer`` in them. A tensor of the whole adapter is called ``base_model.<name>``.

Of patterns for ranks the first match counts, and PEFT sorts the keys of its files. So a file names each site whose rank
isn't `r`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import torch

from graphpeft.adapters.state import Adapter, Modules
from graphpeft.graph import overrides
from graphpeft.graph.paths import all_paths, join
from graphpeft.sites.site import CallSite, LeafSite, Site
from graphpeft.stacks.peft_files import PREFIX

ONCE = "base_model."
"""The begin of the names of tensors that a file has once for the whole adapter."""


def keys(adapter: Adapter, name: str, modules: Modules) -> dict[str, tuple[str, str]]:
    """Returns, for each name in the file, the module's path and the name of the tensor in the model."""
    wrapped = _wrapped_parameters(adapter, modules)
    prefix = adapter.config.file_prefix
    found: dict[str, tuple[str, str]] = {}
    for adapted in adapter.sites:
        for local, spec in adapted.specs.items():
            if spec.written_once:
                found[ONCE + spec.key] = adapted.shared.get(local, (adapted.site.owner, adapted.names[local]))
            elif spec.is_saved:
                key = _key_at_site(adapted.site, spec.key, wrapped, prefix)
                found[key] = (adapted.site.owner, adapted.names[local])
    for owner, names in adapter.fully_trained.items():
        path = _file_path(owner, wrapped, adapter.infixes) + ".base_layer" * len(wrapped.get(owner, ()))
        for own in names:
            if own not in modules[owner]._non_persistent_buffers_set:
                key = _key(prefix, path, own)
                found[key] = (owner, overrides.override_name(own, name))
    for path, rows in adapter.rows.items():
        if rows.key:
            key = _key(prefix, _file_path(path, wrapped), rows.key)
            found[key] = (path, overrides.rows(name))
    return found


def copies(adapter: Adapter, modules: Modules) -> dict[str, str]:
    """Returns, for each name that a copy of a tensor has in the file, the name of the tensor."""
    wrapped = _wrapped_parameters(adapter, modules)
    return {
        _key_at_site(adapted.site, spec.key, wrapped, adapter.config.file_prefix): ONCE + spec.key
        for adapted in adapter.sites
        for spec in adapted.specs.values()
        if spec.copied
    }


def constant_keys(adapter: Adapter, modules: Modules) -> dict[str, tuple[str, str]]:
    """Returns, for each number that an adapter's rules read, the module's path and its name there.

    Files don't have them, since they follow from the config. Their names are made as those of tensors are.
    """
    wrapped = _wrapped_parameters(adapter, modules)
    return {
        _key_at_site(adapted.site, local, wrapped, adapter.config.file_prefix): (
            adapted.site.owner,
            adapted.names[local],
        )
        for adapted in adapter.sites
        for local in adapted.constants
    }


def keys_of_layers(adapter: Adapter, modules: Modules, paths: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Returns, for each name that the own tensors of these layers have in the file, the layer's path and their name."""
    wrapped = _wrapped_parameters(adapter, modules)
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        inside = _file_path(path, wrapped) + ".base_layer" * len(wrapped.get(path, ()))
        for own in ("weight", "bias"):
            if modules[path]._parameters.get(own) is not None and own not in adapter.fully_trained.get(path, ()):
                found[_key(adapter.config.file_prefix, inside, own)] = (path, own)
    return found


def _key_at_site(site: Site | LeafSite | CallSite, name: str, wrapped: Mapping[str, list[str]], prefix: str) -> str:
    if isinstance(site, CallSite):
        return join(site.file_path, name)  # PEFT has prompts beside the model, not inside
    # behind the name of the tensor, where no module of the model's can have the same
    name = name if site.call is None else join(name, str(site.call))
    if isinstance(site, LeafSite):
        return _key(prefix, _file_path(site.owner, wrapped), name)
    around = len(wrapped[site.owner]) - 1 - wrapped[site.owner].index(site.attribute)
    path = _file_path(site.owner, wrapped) + ".base_layer" * around
    return _key(prefix, path, name)


def _key(prefix: str, path: str, name: str) -> str:
    return prefix + join(path, name).removeprefix(".")


def _wrapped_parameters(adapter: Adapter, modules: Modules) -> dict[str, list[str]]:
    """Returns the weights for which PEFT wraps their module, the innermost first, by the module's path."""
    wrapped: dict[str, set[tuple[bool, int, str]]] = {}
    for adapted in adapter.weight_sites:
        site = adapted.site
        # a layer is wrapped as such before its parameters are
        own = [*modules[site.owner]._parameters]
        number = own.index(site.attribute) if site.attribute in own else 0
        place = (not site.is_layer, number, site.attribute)
        wrapped.setdefault(site.owner, set()).add(place)
    for adapted in adapter.sites:
        if isinstance(adapted.site, LeafSite):
            wrapped.setdefault(adapted.site.owner, set()).add((False, -1, ""))
    return {owner: [name for *_, name in sorted(places)] for owner, places in wrapped.items()}


def _file_path(path: str, wrapped: Mapping[str, list[str]], infixes: Mapping[str, str] = MappingProxyType({})) -> str:
    """Returns a module's path in files: with ``.base_layer`` behind each module around it that PEFT wraps."""
    parts: list[str] = []
    here: list[str] = []
    for part in path.split(".") if path else ():
        if here:
            parts += ["base_layer"] * len(wrapped.get(".".join(here), ()))
        here.append(part)
        parts.append(part)
        if ".".join(here) in infixes:
            # PEFT leaves the adapter's name in the names of what is inside, and reads it only under the same name
            parts += [infixes[".".join(here)], *([] if len(here) == path.count(".") + 1 else ["default"])]
    return ".".join(parts)


def with_prefix(values: Mapping[str, torch.Tensor], prefix: str) -> Mapping[str, torch.Tensor]:
    """Returns tensors by their names in a file, where PEFT has left out the prefix as of a model that isn't wrapped."""
    if prefix != PREFIX or any(key.startswith("base_model.") for key in values):
        return values
    return {PREFIX + key: tensor for key, tensor in values.items()}


def meanings(key: str) -> set[str]:
    """Returns the names of the tensors of which the one of this name may be a copy, and the name itself."""
    return {pattern.sub("", key) for pattern in _REDUNDANT}


_REDUNDANT = (
    re.compile(r"\.(modules_to_save|original_module)(?=\.)"),
    re.compile(r"\.(modules_to_save\.[^.]+|original_module)(?=\.)"),
)
"""The infix in the names of copies that PEFT writes beside the tensors themselves, where biases are trained: for a
module with others inside, with the adapter's name."""


def names_of_second_paths(named: Mapping[str, tuple[str, str]], modules: Modules, prefix: str) -> Iterator[str]:
    """Yields the names under which PEFT writes the tensors of modules that stand in several places once more."""
    first = {id(module): path for path, module in modules.items()}
    for path, module in all_paths(modules[""]):
        owner = first[id(module)]
        if path != owner:
            keys_of_owner = [key for key, place in named.items() if place[0] == owner]
            yield from (key.replace(f"{prefix}{owner}.", f"{prefix}{path}.", 1) for key in keys_of_owner)
