"""A layer's weight as other code reads it while adapters act: W + ΔW, computed when its numbers are asked for.

The tensor answers its shape, dtype and device without a sum. Functions get the changed numbers, with the gradients of
the adapters' tensors. A write means the layer's own weight, and goes there. It raises where the written numbers may
depend on the changed ones, since the change would be added to them again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from graphpeft._torch import DisableTorchFunctionSubclass, make_wrapper, pytree, storage_key, written_arguments
from graphpeft.graph.autocast import without_autocast
from graphpeft.graph.low_rank_sum import METADATA, getter, writes
from graphpeft.graph.own_tensors import is_in_forward


class Computation(NamedTuple):
    """The computation of a changed weight, with the tensors of the time when the weight was read.

    Attributes:
        run: Computes the changed weight from the values.
        values: The layer's own weight, and what else the changed one is computed from.
        layer: The layer.
        attribute: The weight's name there.
        cls: The class of the layer, which differs with the adapters that act.
    """

    run: Callable[..., Tensor]
    values: tuple[Any, ...]
    layer: weakref.ref[nn.Module]
    attribute: str
    cls: type

    def result(self) -> Tensor:
        """Returns the changed weight, in its own precision, whatever region of autocast the caller is in."""
        own, layer = self.values[0], self.layer()
        if layer is not None and type(layer) is not self.cls:
            raise RuntimeError(
                f"{self.attribute} of a {self.cls.__name__} was read while other adapters acted; read it from the "
                "layer again"
            )
        return without_autocast(own.device.type, self.run, *self.values)

    def viewed(self, view: Callable[[Tensor], Any]) -> Computation:
        """Returns the computation of a view of the changed weight."""
        return self._replace(run=lambda *values: view(self.run(*values)))


def changed_weight(own: Tensor, computation: Computation, view: str | None = None) -> Tensor:
    """Returns a layer's changed weight, or a view of it, see `ChangedWeight`."""
    has_gradient = torch.is_grad_enabled() and view != "detached"
    if has_gradient and any(isinstance(value, Tensor) and value.requires_grad for value in computation.values):
        made: Any = _Later.apply(own, computation, view, *computation.values)
        return made
    return ChangedWeight(own, computation, view)


class _Later(torch.autograd.Function):
    """Gives a changed weight its gradients where C++ code, or a function of autograd, takes it as one tensor."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, computation: Computation, view: str | None, *values: Any) -> Tensor:
        """Returns the changed weight."""
        ctx.save_for_backward(*(value for value in values if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in values]
        ctx.run = computation.run
        return ChangedWeight(own, computation, view)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Returns the gradients of the values."""
        saved = iter(ctx.saved_tensors)
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            values = [
                next(saved).detach().requires_grad_(is_needed) if other is None else other[0]
                for other, is_needed in zip(ctx.others, needed, strict=True)
            ]
            result = ctx.run(*values)
        inputs = [value for value, is_needed in zip(values, needed, strict=True) if is_needed]
        found = iter(torch.autograd.grad(result, inputs, gradients[0].to(result.dtype), allow_unused=True))
        return None, None, None, *(next(found) if is_needed else None for is_needed in needed)


class ChangedWeight(Tensor):
    """W + ΔW, or a view of it.

    Attributes:
        _own: The layer's own weight, or the same view of it.
        _computation: The computation of the numbers.
        _view: Whether it is a "view" of the weight, or one that is "detached" from its gradient; None if neither.
        _numbers: The numbers that a function was given last without gradients.
    """

    _own: Tensor
    _computation: Computation
    _view: str | None
    _numbers: Tensor | None

    @staticmethod
    def __new__(cls, own: Tensor, computation: Computation, view: str | None = None) -> ChangedWeight:
        """Makes a tensor without numbers of its own, see `changed_weight`."""
        made = make_wrapper(cls, own.shape, strides=own.stride(), dtype=own.dtype, device=own.device)
        made._own, made._computation, made._view, made._numbers = own, computation, view, None
        return made

    def is_of(self, layer: nn.Module, name: str) -> bool:
        """Returns whether it is the whole weight of a layer."""
        return self._view is None and self._computation.layer() is layer and self._computation.attribute == name

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gives functions the changed numbers, and writes into the own weight."""
        kwargs = kwargs or {}
        if func in METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _REQUIRING and args[0]._view == "detached":
            return _leaf(func, args)
        if func in _OF_OWN or _makes_another(func):
            return func(*map(_own_of, args), **kwargs)
        if func in _REFUSED:
            raise RuntimeError(
                f"{func.__name__} of the changed weight of a layer isn't that of a parameter; take a tensor with its "
                "numbers, layer.weight + 0, or graphpeft.own_weight(layer)"
            )
        written = _changed_in(_written(func, args, kwargs))
        if written:
            return _write(func, args, kwargs, written)
        is_changed = type(args[0] if args else None) is ChangedWeight
        if is_changed and func is Tensor.__iter__:
            return iter(_viewed(Tensor.unbind, args, {}))
        if is_changed and func in _VIEWS:
            return _viewed(func, args, kwargs)
        numbers, others = pytree.tree_map(numbers_of, (args, kwargs))
        result = func(*numbers, **others)
        if is_changed and _shares_memory(result, numbers[0]):
            return _viewed(func, args, kwargs)
        if func in _ARRAYS:
            result.setflags(write=False)  # what is written there would be lost
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gives the numbers to operators, which C++ calls without asking `__torch_function__`."""
        kwargs = kwargs or {}
        _refuse_operator(func, args, kwargs)
        args, kwargs = pytree.tree_map(numbers_of, (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles the numbers."""
        return numbers_of(self).detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """Returns a copy of the numbers."""
        return numbers_of(self).detach().clone()


class RefusedWeight(Tensor):
    """A weight without changed numbers, as compiled and traced code reads it: it answers its shape, dtype and device.

    Attributes:
        reason: The reason, for a person.
    """

    reason: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises RuntimeError for what asks for numbers."""
        if func not in METADATA:
            raise RuntimeError(cls.reason)
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def numbers_of(value: Any) -> Any:
    """Returns the numbers of a changed weight, and any other value as it is."""
    if type(value) is not ChangedWeight:
        return value
    layer = layer_of(value)
    if layer is not None:
        note_read(layer, value._computation.attribute)
    numbers = value._computation.result()
    if not torch.is_grad_enabled():
        value._numbers = numbers  # lives as long, for code that has asked for its address
    return numbers


def note_read(layer: nn.Module, name: str) -> None:
    """Notes that the changed numbers of a weight were read, so that they may come back in a write."""
    _READ.setdefault(layer, set()).add(name)


def layer_of(changed: ChangedWeight) -> nn.Module | None:
    """Returns the layer whose weight it is, if that is still there."""
    return changed._computation.layer()


def refuse_read(layer: nn.Module, name: str, does: str) -> None:
    """Raises RuntimeError if a weight's changed numbers were read, so that they may come back."""
    if name in _READ.get(layer, ()):
        raise RuntimeError(
            f"{does} {name} of a {type(layer).__name__}, which adapters change, after its changed numbers were read: "
            f"the change may be in what is written, and would be added again; {_WAY_OUT}"
        )


_READ: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()
"""The names of the weights, by their layers, whose changed numbers were read."""


def _own_of(value: Any) -> Any:
    return value._own if type(value) is ChangedWeight else value


def _changed_in(values: Any) -> list[ChangedWeight]:
    return [leaf for leaf in pytree.tree_leaves(values) if type(leaf) is ChangedWeight]


# writes


def _written(func: Any, args: Any, kwargs: Any) -> Iterable[Any]:
    """Returns what a function writes into."""
    of_operator = _written_by_operator(func, args, kwargs)
    if of_operator:
        return of_operator
    first = args[:1] or [kwargs.get(name) for name in ("tensor", "input", "self")]
    if func in _RENORMING and (kwargs.get("max_norm") is not None or [*args[3:4]] not in ([], [None])):
        return [*args[1:2], kwargs.get("weight")]
    return [*(first if writes(func) or func in _SETTERS else ()), kwargs.get("out")]


def _written_by_operator(func: Any, args: Any, kwargs: Any) -> list[Any]:
    places = written_arguments(func).items()
    return [args[place] if place < len(args) else kwargs.get(name) for name, place in places]


def _write(func: Any, args: Any, kwargs: Any, written: list[ChangedWeight]) -> Any:
    """Runs a function that writes on the own weights."""
    if _is_the_same(func, args):
        return None  # what was read has been written in place already
    for each in written:
        layer, name = layer_of(each), each._computation.attribute
        reason = None
        if is_in_forward():
            reason = "in a forward"
        elif len(_changed_in((args, kwargs))) > len(written):
            reason = "with the numbers of a weight that has such changes"
        does = f"{getattr(func, '__name__', func)} writes into"
        if reason is not None:
            raise RuntimeError(
                f"{does} {name} of a {each._computation.cls.__name__}, which adapters change, {reason}: the change may "
                f"be in what is written, and would be added again; {_WAY_OUT}"
            )
        if layer is not None:
            refuse_read(layer, name, does)
    own_args, own_kwargs = pytree.tree_map(_own_of, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    return next((each for each in written if result is each._own), result)


_WAY_OUT = "read and write graphpeft.own_weight(layer), or do so while no adapter acts, as in model.disable_adapter()"


def _is_the_same(func: Any, args: Any) -> bool:
    """Returns whether a view is assigned to its own place, as the last step of ``w[0] += 1`` and ``w.data *= 2``."""
    if type(args[-1] if args else None) is not ChangedWeight or len(args) < 2:
        return False
    if func is Tensor.__setitem__:
        place = args[0]._own[args[1]]
    elif func in _SETTERS:
        place = args[0]._own
    else:
        return False
    given = args[-1]._own
    return (given.data_ptr(), given.shape, given.stride()) == (place.data_ptr(), place.shape, place.stride())


def _refuse_operator(func: Any, args: Any, kwargs: Any) -> None:
    if _changed_in(_written_by_operator(func, args, kwargs)):
        raise RuntimeError(f"{func} would write into a weight with the changes of adapters; {_WAY_OUT}")


def _leaf(func: Any, args: Any) -> Tensor:
    """Returns the numbers that are detached from a changed weight as a tensor with a gradient of its own."""
    if func is not Tensor.requires_grad_:
        raise RuntimeError(
            "what is detached from the changed weight of a layer has no gradient of its own; take a tensor with its "
            "numbers, layer.weight.detach().requires_grad_()"
        )
    return numbers_of(args[0]).detach().requires_grad_(*args[1:])


def _makes_another(func: Any) -> bool:
    """Returns whether a function makes a tensor of other numbers like its first argument."""
    name = getattr(func, "__name__", "")
    return name.startswith("new_") or name.endswith("_like")


# views


def _shares_memory(result: Any, numbers: Tensor) -> bool:
    found = result if isinstance(result, tuple | list) else (result,)
    tensors = [each for each in found if type(each) is Tensor and each.layout == torch.strided]
    return type(numbers) is Tensor and any(storage_key(each) == storage_key(numbers) for each in tensors)


def _viewed(func: Any, args: Any, kwargs: Any) -> Any:
    """Returns views of a changed weight beside the same views of the own one, so that writes go there."""
    (changed, *others), computation = args, args[0]._computation
    is_detached = func in _DETACHING or changed._view == "detached" or not torch.is_grad_enabled()
    others, kwargs = pytree.tree_map(numbers_of, (others, kwargs))
    leaves, structure = pytree.tree_flatten(func(changed._own, *others, **kwargs))
    if any(storage_key(leaf) != storage_key(changed._own) for leaf in leaves):
        return func(numbers_of(changed), *others, **kwargs)  # a copy

    def view(place: int) -> Callable[[Tensor], Tensor]:
        def viewed(numbers: Tensor) -> Tensor:
            leaf = pytree.tree_leaves(func(numbers, *others, **kwargs))[place]
            return leaf.detach() if is_detached else leaf

        return viewed

    computations = [computation.viewed(view(place)) for place in range(len(leaves))]
    kind = "detached" if is_detached else "view"
    made = [changed_weight(leaf, each, kind) for leaf, each in zip(leaves, computations, strict=True)]
    return pytree.tree_unflatten(made, structure)


_DETACHING = frozenset((getter("data"), Tensor.detach, torch.detach))

_NAMES_OF_VIEWS = (
    *(
        "__getitem__",
        "view",
        "view_as",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "expand_as",
    ),
    *("t", "transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "diagonal", "narrow", "select"),
    *("chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "unbind", "as_strided"),
    *("adjoint", "view_as_real", "contiguous", "broadcast_to"),
)
_VIEWS = frozenset(
    [
        *map(getter, ("T", "mT", "H", "mH")),
        *(getattr(of, name) for of in (Tensor, torch) for name in _NAMES_OF_VIEWS if hasattr(of, name)),
        *_DETACHING,
    ]
)
"""Functions that may return another view of their first argument, which needs no numbers."""

_ARRAYS = frozenset((Tensor.numpy, Tensor.__array__))

_SETTERS = frozenset((Tensor.data.__set__,))  # type: ignore[attr-defined]
_REQUIRING = frozenset((Tensor.requires_grad.__set__, Tensor.requires_grad_))  # type: ignore[attr-defined]
_OF_OWN = _REQUIRING | {Tensor.grad.__get__, Tensor.grad.__set__}  # type: ignore[attr-defined]
"""Functions that ask for, or set, what the own weight has beside numbers."""

_REFUSED = frozenset(
    (
        *(Tensor.register_hook, Tensor.register_post_accumulate_grad_hook, Tensor.retain_grad),
        *(Tensor.untyped_storage, Tensor.storage, Tensor.__dlpack__),
    )
)
"""Functions that need a tensor that lives on, or its memory."""

_RENORMING = frozenset((F.embedding, F.embedding_bag))
"""Functions that write into their second argument if they are given a ``max_norm``."""
