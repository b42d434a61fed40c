"""Replaces the class of a module instance, and restores it.

A dressed module's class is ``class Name(*bases of its layers, Original)``, so the instance keeps its identity, its
attributes and its ``isinstance`` answers, as with ``torch.nn.utils.parametrize``. A layer is the contribution of one
concern: a forward that comes from a graph, the methods of ``PeftModel``, parameters that read an adapter's. A module
wears at most one layer of each kind, and equal sets of layers share one class. Dressed modules can be pickled and
deep-copied.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, cast

from torch import nn
from torch.nn.utils import parametrize

from graphpeft import transaction
from graphpeft._torch import without_compiler
from graphpeft.graph.forward_arguments import leading_to_class
from graphpeft.graph.holders import adapters_at, distribute_adapters, tree_of, without_holders
from graphpeft.graph.hosts.patched_forwards import (
    follow,
    has_forward,
    keep_own_forward,
    kept_forwards,
    step_aside,
    step_back,
)
from graphpeft.graph.hosts.sharding import is_asked_by, over_shards, under_shards
from graphpeft.graph.own_tensors import own_tensor
from graphpeft.graph.paths import STATE
from graphpeft.peft_classes import ending_in

KINDS = ("peft", "methods", "reads", "rows", "graph", "slots", "padded", "merged", "hiding", "tensors")
"""The kinds of layers, outermost first: ``methods`` wraps ``rows``, which wraps ``graph``, which reads ``tensors``."""

_TENSOR_PARALLEL = "torch.distributed.tensor"
_READ = ("merged", "tensors")
"""The kinds of layers of modules whose own tensors are kept elsewhere, or aren't what is read."""

_OF_GRAPHS = ("rows", "graph")
"""The kinds whose forwards stand for a patched one."""

_AROUND_FORWARDS = ("methods", "rows")
"""The kinds whose forwards hand all arguments on to that of a layer further in."""


_WHOLE = "graphpeft whole"
"""The key in a copy's memo that says that a whole adapted model is being copied, with what manages its adapters."""

COPIES = [0]
"""The number of modules with adapters that this process has copied or unpickled."""

COPIED_ALONE: weakref.WeakSet[Any] = weakref.WeakSet()
"""Copies of modules with adapters whose model wasn't copied with them, so that nothing manages their adapters."""


class Layer:
    """The contribution of one concern to a module's class.

    Many modules share a layer, and layers compare by identity.
    """

    __slots__ = ("_for_copy", "bases", "kind", "last", "namespace", "recipe")

    def __init__(
        self,
        kind: str,
        bases: tuple[type, ...],
        namespace: Mapping[str, Any],
        recipe: tuple[Any, tuple[Any, ...]],
        for_copy: Callable[[], Layer] | None = None,
        last: tuple[type, ...] = (),
    ) -> None:
        assert kind in KINDS, kind
        self.kind, self.bases, self.namespace, self.recipe = kind, bases, namespace, recipe
        self.last = last
        self._for_copy = for_copy

    def for_copy(self) -> Layer:
        """Returns the layer for a copy of the module."""
        return self._for_copy() if self._for_copy is not None else self

    def __reduce__(self) -> tuple[Any, ...]:
        return self.recipe


class Dressed:
    """The first base of every dressed class; copies and pickles instances."""

    _graphpeft_original: ClassVar[type]
    _graphpeft_layers: ClassVar[tuple[Layer, ...]]

    def __init_subclass__(cls, **_: Any) -> None:
        # the original's hook may register subclasses, and must not register a dressed class
        pass

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Builds an instance of the original class: an adapter belongs to one instance, not to its class."""
        return cls._graphpeft_original(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        if self._graphpeft_original.__reduce__ is not object.__reduce__:
            # the class may be one that can't be imported by its name
            build, arguments, *state = cast(Any, self._graphpeft_original).__reduce__(self)
            build, *arguments = [
                self._graphpeft_original if each is type(self) else each for each in (build, *arguments)
            ]
            return _built_and_dressed, (build, tuple(arguments), self._graphpeft_layers), *state
        return _new_copy, (self._graphpeft_original, self._graphpeft_layers), _state(self)

    def __copy__(self) -> Any:
        copied = _new_for_copy(self)
        copied.__setstate__(dict(_state_for_copy(self)))
        return copied

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers a parameter; adapters' tensors are sharded like a weight that tensor parallelism has sharded."""
        module: Any = super()
        if self in COPIED_ALONE:
            raise RuntimeError(
                f"this {self._graphpeft_original.__name__} is a copy of one with adapters, without their model, and "
                f"is to get another {name}, as by torch.nn.utils.fusion; merge_and_unload() the adapters before"
            )
        if not is_asked_by(_TENSOR_PARALLEL):
            for own, parameter in self.__dict__["_parameters"].items():
                if param is not None and param is not parameter and own != name and param is own_tensor(self, own):
                    raise RuntimeError(
                        f"{own} of a {self._graphpeft_original.__name__} is an adapter's tensor while that is active, "
                        f"so it can't become {name} too, as by pruning; do that before you adapt the model, or after "
                        "merge_and_unload()"
                    )
            module.register_parameter(name, param)
            return
        if "weight" not in self.__dict__["_parameters"] or any(each.kind in _READ for each in self._graphpeft_layers):
            raise RuntimeError(
                f"an adapter of this {self._graphpeft_original.__name__} is merged, or has tensors in the place of its "
                "own, which PyTorch's tensor parallelism would shard; call parallelize_module with the base model and "
                "adapt it afterwards, which shards the adapter as the weights are"
            )
        module.register_parameter(name, param)
        if name == "weight":
            distribute_adapters(cast(nn.Module, self), param)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        """As of any module; tensor parallelism, which would shard holders by rules of its own, doesn't see these."""
        found: Iterator[tuple[str, nn.Module]] = cast(Any, super()).named_modules(*args, **kwargs)
        return without_holders(found) if is_asked_by(_TENSOR_PARALLEL) else found

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """As of any module; tensor parallelism sees a layer's own parameters alone."""
        if is_asked_by(_TENSOR_PARALLEL):
            kwargs["recurse"] = False
        return cast(Any, super()).named_parameters(*args, **kwargs)

    def _replicate_for_data_parallel(self) -> Any:
        # as nn.Module does, but without calling __new__, which would build an instance of the original class
        replica = _new_dressed(self._graphpeft_original, self._graphpeft_layers)
        replica.__dict__ = self.__dict__ | {"_parameters": {}, "_is_replica": True}
        for name in ("_buffers", "_modules"):
            replica.__dict__[name] = self.__dict__[name].copy()
        return replica

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        copied = _new_for_copy(self)
        memo[id(self)] = copied
        is_whole = STATE in self.__dict__
        if is_whole:
            memo[_WHOLE] = True
        elif _WHOLE not in memo and any(adapters_at(cast(nn.Module, self))):
            COPIED_ALONE.add(copied)
        copied.__setstate__(copy.deepcopy(_state_for_copy(self), memo))
        keep_own_forward(copied, kept_forwards(cast(nn.Module, self)))
        if is_whole:
            # parts may have been copied before
            COPIED_ALONE.difference_update(tree_of(copied))
        return copied


def _built_and_dressed(build: Callable[..., Any], arguments: tuple[Any, ...], layers: tuple[Layer, ...]) -> Any:
    """Builds a module as its class's own ``__reduce__`` says, and dresses it."""
    module = build(*arguments)
    module.__class__ = dressed_class(type(module), layers)
    return module


def _state(module: Any) -> dict[str, Any]:
    # Python 3.10 has no object.__getstate__
    get_state = getattr(module, "__getstate__", None)
    return get_state() if get_state is not None else module.__dict__


def _state_for_copy(module: Any) -> dict[str, Any]:
    # a parametrized module can be copied, though its __getstate__ refuses pickling
    return module.__dict__ if parametrize.is_parametrized(module) else _state(module)


def _new_for_copy(module: Dressed) -> Any:
    return _new_copy(module._graphpeft_original, tuple(layer.for_copy() for layer in module._graphpeft_layers))


def _new_copy(original: type, layers: tuple[Layer, ...]) -> Any:
    COPIES[0] += 1
    return _new_dressed(original, layers)


def _new_dressed(original: type, layers: tuple[Layer, ...]) -> Any:
    return object.__new__(dressed_class(original, layers))


_DRESSED: weakref.WeakValueDictionary[tuple[type, tuple[Layer, ...]], type] = weakref.WeakValueDictionary()
"""The dressed classes in use."""


def dressed_class(original: type, layers: tuple[Layer, ...]) -> type:
    """Returns the class of `original` dressed in `layers` (outermost first); equal arguments give the same class."""
    dressed = _DRESSED.get((original, layers))
    if dressed is None:
        dressed = _DRESSED[original, layers] = _new_class(original, layers)
    return dressed


@without_compiler("Python calls functions while it makes a class, in which no compiler must look for graphs")
def _new_class(original: type, layers: tuple[Layer, ...]) -> type:
    # repeating a base of the original class would break the method resolution order
    added = [Dressed, *[base for layer in layers for base in layer.bases if not issubclass(original, base)]]
    has_own_layout = _has_own_layout(original)
    bases = (original, *added) if has_own_layout else (*added, original)
    last = (*[cls for layer in layers for cls in layer.last],)

    def fill(namespace: dict[str, Any]) -> None:
        own = {name for base in bases for name in dir(base)} if last else set[str]()
        namespace.update({name: _Absent(name) for cls in last for name in dir(cls) if name not in own})
        for layer in reversed(layers):
            inner = namespace.get("forward", original.forward)
            functions = {name: v for name, v in layer.namespace.items() if isinstance(v, types.FunctionType)}
            namespace.update({**layer.namespace, **{name: _own(v, original) for name, v in functions.items()}})
            if layer.kind in _AROUND_FORWARDS and "forward" in layer.namespace:
                # callers leave out arguments that a forward doesn't take
                namespace["forward"].__signature__ = inspect.signature(inner)
                namespace["forward"].__wrapped__ = leading_to_class(inner)
        # libraries dispatch on a model's class name, so the dressed class keeps it
        namespace.update(
            __module__=original.__module__,
            __qualname__=original.__qualname__,
            __doc__=original.__doc__,
            _graphpeft_original=original,
            _graphpeft_layers=layers,
        )

    options = {"metaclass": _ordering(type(original), last, has_own_layout)} if last or has_own_layout else {}
    return types.new_class(original.__name__, bases, options, fill)


class _Absent:
    """In the place of an attribute that a class at the end of the method resolution order has."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}", name=self._name)


def _has_own_layout(original: type) -> bool:
    """Returns whether instances keep their attributes elsewhere than most modules do, as where ABC is the first base.

    Then they can have no class whose first base is another one.
    """
    cls: Any = original
    while "__dict__" not in vars(cls):
        cls = cls.__base__
    return cls.__base__ is not object


@functools.cache
def _ordering(metaclass: Any, last: tuple[type, ...], original_first: bool) -> Any:
    """Returns a metaclass that orders the classes in which attributes are looked for."""

    def mro(cls: Any) -> list[type]:
        found = metaclass.mro(cls)
        if original_first:
            own = cls.__bases__[0].__mro__
            found = [cls, *(each for each in found[1:] if each not in own), *own]
        return ending_in(found, last)

    return type(metaclass.__name__, (metaclass,), {"mro": mro})


def _own(value: types.FunctionType, original: type) -> types.FunctionType:
    # torch.compile keys the sizes of inputs by the code's file, line and name, so the name has to differ, too
    code = value.__code__.replace(co_name=f"{value.__code__.co_name} of {original.__name__}")
    own = types.FunctionType(code, value.__globals__, value.__name__, value.__defaults__, value.__closure__)
    own.__kwdefaults__ = value.__kwdefaults__
    functools.update_wrapper(own, value)
    # replaces the __wrapped__ of update_wrapper by that of `value`: readers of source would unwrap `own` to `value`
    own.__dict__ = dict(value.__dict__)
    return own


class _Quiet:
    def __init_subclass__(cls, **_: Any) -> None:
        pass


def quiet_subclass(cls: type, namespace: dict[str, Any]) -> type:
    """Returns a subclass of `cls` with the same name, without calling ``__init_subclass__`` of `cls`."""
    original = vars(cls).get("_graphpeft_original", cls)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_graphpeft_original": original}
    namespace = namespace | names
    return types.new_class(cls.__name__, (_Quiet, cls), exec_body=lambda empty: empty.update(namespace))


def original_class(module: nn.Module) -> type:
    """Returns the class of `module` before it was dressed, and before it was sharded."""
    cls = type(module)
    if len(cls.__bases__) > 1:  # a class under shards has the one that shards beside it
        cls = under_shards(cls)
    return cls.__dict__.get("_graphpeft_original", cls)


def layers_of(module: nn.Module) -> tuple[Layer, ...]:
    """Returns the layers that `module` wears, outermost first."""
    cls = under_shards(type(module))
    own = cls.__dict__.get("_graphpeft_layers")
    if own is None and hasattr(cls, "_graphpeft_layers"):
        raise RuntimeError(
            f"the class of an adapted {original_class(module).__name__} was exchanged since it was adapted, as "
            "parametrizations do; take that off first, or do it before adapting"
        )
    return own or ()


def is_exchanged(cls: type) -> bool:
    """Returns whether a class derives from that of a dressed module, and is another one."""
    cls = under_shards(cls)
    return "_graphpeft_layers" not in cls.__dict__ and hasattr(cls, "_graphpeft_layers")


def put_on(module: nn.Module, layer: Layer) -> None:
    """Dresses `module` in `layer`, replacing its layer of the same kind."""
    exchange(module, {layer.kind: layer})


def take_off(module: nn.Module, kind: str) -> None:
    """Removes the layer of `kind` from `module`; without layers it has its original class again."""
    exchange(module, {kind: None})


def exchange(module: nn.Module, layers: Mapping[str, Layer | None]) -> None:
    """Replaces layers of `module` by kind, all at once; None removes the layer of that kind."""
    exchange_all([(module, layers)])


def exchange_all(wanted: Iterable[tuple[nn.Module, Mapping[str, Layer | None]]]) -> None:
    """Replaces layers of modules by kind, as `exchange` does."""
    known: dict[Any, type] = {}  # modules of a class mostly get equal layers
    for module, layers in wanted:
        key = type(module), *layers.items()
        cls = known.get(key)
        if cls is None:
            cls = known[key] = _class_with(module, layers)
        if cls is not type(module):
            transaction.undone_by(_exchange_class, module, type(module))
            _exchange_class(module, cls)


def _class_with(module: nn.Module, layers: Mapping[str, Layer | None]) -> type:
    """Returns the class that `module` has with other layers."""
    worn = {layer.kind: layer for layer in layers_of(module)}
    wanted = {**worn, **layers} if worn else layers
    ordered = tuple([layer for kind in KINDS if (layer := wanted.get(kind)) is not None])
    original = original_class(module)
    return over_shards(type(module), dressed_class(original, ordered) if ordered else original)


def _exchange_class(module: nn.Module, cls: type) -> None:
    if has_forward(module):
        _exchange_under_forward(module, cls)
    else:
        _give_class(module, cls)
    # PyTorch 2.10 checks the class of a compiled module again only after a write to its __dict__
    vars(module)[_TOUCHED] = None
    del vars(module)[_TOUCHED]


def _exchange_under_forward(module: nn.Module, cls: type) -> None:
    """Exchanges the class under a patched forward."""
    layers: tuple[Layer, ...] = getattr(cls, "_graphpeft_layers", ())
    runs_graph = any(layer.kind in _OF_GRAPHS for layer in layers)
    follow(module, bool(layers))
    if runs_graph:
        step_aside(module)
    kept = kept_forwards(module)
    _give_class(module, cls)
    keep_own_forward(module, kept)
    if not runs_graph:
        step_back(module)


def _give_class(module: nn.Module, cls: type) -> None:
    # bypasses nn.Module.__setattr__, which is for tensors and submodules
    object.__setattr__(module, "__class__", cls)


@contextlib.contextmanager
def without(module: nn.Module, kind: str) -> Iterator[None]:
    """Removes the layer of `kind` from `module` for the duration of the context."""
    worn = [layer for layer in layers_of(module) if layer.kind == kind]
    with contextlib.ExitStack() as stack:
        for layer in worn:
            transaction.at_end_of(stack, put_on, module, layer)
        if worn:
            take_off(module, kind)
        yield


_TOUCHED = "_graphpeft_touched"
