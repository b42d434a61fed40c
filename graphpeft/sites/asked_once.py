"""One answer for all layers, or all sites, that differ in their paths alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from torch import nn

from graphpeft.sites.site import Site

T = TypeVar("T")

_PLAIN = frozenset({bool, int, float, str, type(None)})
_NO_MODULE = nn.Module()
_EMPTY = frozenset(name for name, value in vars(_NO_MODULE).items() if not isinstance(value, bool | int))
"""The attributes of every module that a layer without submodules, buffers and hooks has empty."""


def likeness(layer: nn.Module) -> Hashable | None:
    """Returns the class, the options and the parameters of a layer; None for a layer with anything else of its own."""
    found: list[Any] = [type(layer)]
    for name, value in vars(layer).items():
        kind = type(value)
        if name == "_parameters":
            for own, parameter in value.items():
                if parameter is None:
                    found.append((own, None))
                elif type(parameter) is nn.Parameter:
                    found.append((own, parameter.shape, parameter.dtype))
                else:
                    return None
        elif name in _EMPTY:
            if value:
                return None
        elif kind in _PLAIN or (kind is tuple and all(type(each) in _PLAIN for each in value)):
            found.append((name, value))
        else:
            return None
    return tuple(found)


_PATHS = frozenset({"region", "owner", "bias"})


def _noting(name: str) -> Any:
    """Returns the method of `Site` of this name, which reads all of a site, as one that notes that."""
    read = getattr(Site, name)

    def noted(self: AskedSite, *args: Any) -> Any:
        self.is_placed = True
        return read(self, *args)

    return noted


class AskedSite(Site):
    """A site that notes whether somebody may have read where in the model it is."""

    is_placed = False
    __iter__, __getitem__, __repr__ = map(_noting, ("__iter__", "__getitem__", "__repr__"))
    __eq__, __hash__ = map(_noting, ("__eq__", "__hash__"))

    def __getattribute__(self, name: str) -> Any:
        if name in _PATHS:
            self.is_placed = True
        return super().__getattribute__(name)


def without_paths(site: Any) -> Site | None:
    """Returns a site of a weight as all have it that differ in their paths alone; None for other sites."""
    return site._replace(region="", owner="", bias=site.bias and "") if type(site) is Site else None


class Answers:
    """Answers about sites, each kept for all sites that differ from the one that was asked about in their paths alone.

    An answer for which a site's path was read, as by patterns for ranks, is for this site alone.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Any] = {}
        self._met: set[Hashable] = set()

    def of(self, site: Any, kind: Site | None, question: Hashable, ask: Callable[[Any], T]) -> T:
        """Returns the answer to a question about a site.

        Args:
            site: The site.
            kind: The site `without_paths`.
            question: All that the answer depends on beside the site.
            ask: Returns the answer for a site.
        """
        if kind is None:
            return ask(site)
        key = kind, question
        found = self._known.get(key, self)
        if found is not self:
            return found
        if key not in self._met:
            self._met.add(key)
            return ask(site)  # most kinds have one site, and an asked one is slower
        asked = AskedSite(*site)
        answer = ask(asked)
        if not asked.is_placed:
            self._known[key] = answer
        return answer
