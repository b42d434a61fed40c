"""Runs code in half precision with each operation rounded at random, as a sample of what roundings can do."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphpeft._torch import TorchDispatchMode, pytree
from graphpeft.graph.autocast import HALVES


class StochasticRounding(TorchDispatchMode):
    """Rounds the exact result of each operation in half precision at random to one of the two numbers beside it.

    The nearer one is the likelier, so that the mean of many runs is exact. Results that need no rounding stay as they
    are. An operation accumulates in single precision and rounds once, as without the mode, and operations that draw
    random numbers draw the same ones.

    Attributes:
        has_rounded: Whether an operation in half precision ran.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.has_rounded, self._generator = False, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(cls.__torch_dispatch__ is not _OF_TENSOR for cls in types):
            return NotImplemented  # a class of tensors, such as torchao's, says by which operations it computes
        kwargs = kwargs or {}
        known = _traits(func)
        if known.computes_nothing or not _has_half((*args, *kwargs.values())):
            return func(*args, **kwargs)
        written = known.written_of(args, kwargs)
        if known.draws and written:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = pytree.tree_map(lambda value: _in_single(value, written), (args, kwargs))
        try:
            exact = None if known.draws else func(*wide_args, **wide_kwargs)
        except (RuntimeError, NotImplementedError):
            exact = None  # a kernel for half precision alone: its results are moved to numbers beside them
        result = func(*args, **kwargs)
        wide_written = [None] * len(written) if exact is None else known.written_of(wide_args, wide_kwargs)
        for tensor, wide in zip(written, wide_written, strict=True):
            if _is_half(tensor):
                tensor.copy_(self._rounded(tensor, wide))
        if written:
            return result
        leaves, tree = pytree.tree_flatten(result)
        wide_leaves = [None] * len(leaves) if exact is None else pytree.tree_leaves(exact)
        pairs = zip(leaves, wide_leaves, strict=True)
        return pytree.tree_unflatten(
            [self._rounded(leaf, wide) if _is_half(leaf) else leaf for leaf, wide in pairs], tree
        )

    def _rounded(self, nearest: Tensor, exact: Tensor | None) -> Tensor:
        """Returns a number beside each exact one; where these aren't known, the nearest numbers or ones beside them."""
        self.has_rounded = True
        wide, dtype = nearest.float() if exact is None else exact, nearest.dtype
        noise = torch.rand(wide.shape, generator=self._generator).to(wide.device) - 0.5
        # the distance from a number in half precision to the next
        step = torch.ldexp(torch.full_like(wide, torch.finfo(dtype).eps), torch.frexp(wide).exponent - 1)
        if exact is None:
            return torch.where(wide == 0, wide, wide + 2 * step * noise).to(dtype)
        return torch.where(nearest == wide, wide, wide + step * noise).to(dtype)


_OF_TENSOR = vars(Tensor)["__torch_dispatch__"]


class _Traits(NamedTuple):
    """The facts in an operation's schema.

    Attributes:
        computes_nothing: Whether it gives a view or a copy, or gives a tensor other memory, as copies of buffers do.
        draws: Whether it draws random numbers.
        written: The places and names of the arguments that it writes.
    """

    computes_nothing: bool
    draws: bool
    written: tuple[tuple[int, str], ...]

    def written_of(self, args: Any, kwargs: Any) -> list[Tensor]:
        """Returns the tensors that a call writes."""
        values = [args[place] if place < len(args) else kwargs.get(name) for place, name in self.written]
        return [leaf for value in values for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


_MOVES = [getattr(torch.ops.aten, name) for name in ("set_", "resize_", "clone", "empty_like", "_unsafe_view")]


@functools.cache
def _traits(func: Any) -> _Traits:
    aliases = [each.alias_info for each in func._schema.returns]
    views = any(alias is not None and not alias.is_write for alias in aliases)
    moves = func.overloadpacket in _MOVES
    written = [
        (place, each.name)
        for place, each in enumerate(func._schema.arguments)
        if each.alias_info is not None and each.alias_info.is_write
    ]
    return _Traits(views or moves, torch.Tag.nondeterministic_seeded in func.tags, tuple(written))


def _has_half(values: Iterable[Any]) -> bool:
    """Returns whether a value is a tensor or a dtype of half precision, or a sequence of such."""
    return any(_has_half(value) if isinstance(value, list | tuple) else _is_half(value) for value in values)


def _is_half(value: Any) -> bool:
    return (value.dtype if isinstance(value, Tensor) else value) in HALVES


def _in_single(value: Any, written: list[Tensor]) -> Any:
    if isinstance(value, Tensor) and any(value is tensor for tensor in written):
        return value.float() if _is_half(value) else value.clone()
    if not _is_half(value):
        return value
    return value.float() if isinstance(value, Tensor) else torch.float32
