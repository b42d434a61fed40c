"""The names of modules and parameters that a model's adapters adapt, as PEFT lists them."""

from __future__ import annotations

from typing import Any

from graphpeft.adapters.state import Adapter, Adapters
from graphpeft.sites.site import Site
from graphpeft.targeting.targets import match_parameter


def targeted_modules(adapters: Adapters) -> list[str]:
    """Returns the paths of the modules that adapters adapt as modules, without `modules_to_save`."""
    found: dict[str, None] = {}
    for adapter in adapters.by_name.values():
        sites = (adapted.site for adapted in adapter.sites)
        found |= dict.fromkeys(site.owner for site in sites if site.owner and not _is_parameter(adapter, site))
        found |= dict.fromkeys(path for path in adapter.fully_trained if path not in adapter.saved)
    return list(found)


def targeted_parameters(adapters: Adapters) -> list[str]:
    """Returns the paths of the parameters that adapters adapt by their own names."""
    named = ((adapter, adapted.site) for adapter in adapters.by_name.values() for adapted in adapter.weight_sites)
    return list(dict.fromkeys(site.weight for adapter, site in named if _is_parameter(adapter, site)))


def _is_parameter(adapter: Adapter, site: Any) -> bool:
    """Returns whether a site is named as a parameter, or is a weight that no layer holds."""
    if not isinstance(site, Site):
        return False
    return not site.is_layer or match_parameter(adapter.config.target_options, site.weight)
