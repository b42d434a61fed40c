"""Gives a module instance another class in place, and its own class back.

A dressed module's class is ``class Name(*bases of its layers, Original)``, so the instance keeps its identity, its
attributes and its ``isinstance`` answers, as ``torch.nn.utils.parametrize`` does it. A layer is what one concern adds:
a forward that comes from a graph, the methods of ``PeftModel``, parameters that read as an adapter's. A module wears at
most one layer of each kind, and equal dresses share one class. Dressed modules can be pickled and deep-copied.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

KINDS = ("methods", "graph", "tensors")
"""The kinds of layers, the outermost first: a model's methods see the graph's forward, which reads the tensors."""


class Layer:
    """What one concern adds to a module's class.

    Layers are values that many modules share: compared by identity, and never copied.

    Args:
        kind: One of `KINDS`.
        bases: Classes that the dressed class inherits from, before the original class.
        namespace: Attributes of the dressed class itself.
        recipe: A picklable callable and its arguments, which build the layer again.
    """

    __slots__ = ("bases", "kind", "namespace", "recipe")

    def __init__(
        self, kind: str, bases: tuple[type, ...], namespace: Mapping[str, Any], recipe: tuple[Any, tuple[Any, ...]]
    ) -> None:
        assert kind in KINDS, kind
        self.kind, self.bases, self.namespace, self.recipe = kind, bases, namespace, recipe

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        return self


class Dressed:
    """The first base of every dressed class: knows the original class, and how to be copied and pickled."""

    _original_class: ClassVar[type]
    _layers: ClassVar[tuple[Layer, ...]]

    def _state(self) -> dict[str, Any]:
        # Python 3.10 has no object.__getstate__
        get_state = getattr(self, "__getstate__", None)
        return get_state() if get_state is not None else self.__dict__

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_dressed, (self._original_class, self._layers), self._state()

    def __copy__(self) -> Dressed:
        return self._with_state(dict(self._state()))

    def __deepcopy__(self, memo: dict[int, Any]) -> Dressed:
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        return copied._set_state(copy.deepcopy(self._state(), memo))

    def _with_state(self, state: dict[str, Any]) -> Dressed:
        return object.__new__(type(self))._set_state(state)

    def _set_state(self, state: dict[str, Any]) -> Dressed:
        self.__setstate__(state)  # type: ignore[attr-defined]
        return self


def _new_dressed(original: type, layers: tuple[Layer, ...]) -> Any:
    return object.__new__(dressed_class(original, layers))


@functools.lru_cache(maxsize=4096)
def dressed_class(original: type, layers: tuple[Layer, ...]) -> type:
    """Returns the class of instances of `original` that wear `layers` (outermost first); equal calls share it."""
    added = (Dressed, *(base for layer in layers for base in layer.bases))
    # a base that the original class has already would contradict the method resolution order
    bases = (*(base for base in added if not issubclass(original, base)), original)

    def fill(namespace: dict[str, Any]) -> None:
        for layer in reversed(layers):
            namespace.update(layer.namespace)
        # libraries dispatch on a model's class name, so the dressed class keeps it
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            _original_class=original,
            _layers=layers,
        )

    return types.new_class(original.__name__, bases, exec_body=fill)


def original_class(module: nn.Module) -> type:
    """Returns the class that `module` had before it was dressed."""
    return getattr(type(module), "_original_class", type(module))


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """Returns the layers that `module` wears, the outermost first."""
    return getattr(type(module), "_layers", ())


def layer_of(module: nn.Module, kind: str) -> Layer | None:
    """Returns the layer of `kind` that `module` wears, or None."""
    return next((layer for layer in layers_of(module) if layer.kind == kind), None)


def put_on(module: nn.Module, layer: Layer) -> None:
    """Dresses `module` in `layer`, in place of the one of that kind that it wears."""
    worn = (*(other for other in layers_of(module) if other.kind != layer.kind), layer)
    module.__class__ = dressed_class(original_class(module), tuple(sorted(worn, key=_place)))


def take_off(module: nn.Module, kind: str) -> None:
    """Undresses `module` of its layer of `kind`; without layers it has its original class again."""
    worn = tuple(layer for layer in layers_of(module) if layer.kind != kind)
    module.__class__ = dressed_class(original_class(module), worn) if worn else original_class(module)


def _place(layer: Layer) -> int:
    return KINDS.index(layer.kind)
