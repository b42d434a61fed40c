"""Runs code in half precision with each operation rounded at random, as a sample of what roundings can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphpeft._torch import TorchDispatchMode, pytree

HALVES = (torch.bfloat16, torch.float16)


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
        if any(cls.__torch_dispatch__ is not vars(Tensor)["__torch_dispatch__"] for cls in types):
            return NotImplemented  # a class of tensors, such as torchao's, says by which operations it computes
        kwargs = kwargs or {}
        written, draws = _written(func, args, kwargs), torch.Tag.nondeterministic_seeded in func.tags
        has_half = any(map(_is_half, pytree.tree_leaves((args, kwargs))))
        if not has_half or _computes_nothing(func) or (draws and written):
            return func(*args, **kwargs)
        wide_args, wide_kwargs = pytree.tree_map(lambda value: _in_single(value, written), (args, kwargs))
        try:
            exact = None if draws else func(*wide_args, **wide_kwargs)
        except (RuntimeError, NotImplementedError):
            exact = None  # a kernel for half precision alone: its results are moved to numbers beside them
        result = func(*args, **kwargs)
        wide_written = [None] * len(written) if exact is None else _written(func, wide_args, wide_kwargs)
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


def _computes_nothing(func: Any) -> bool:
    """Returns whether an operation gives a view, or gives a tensor other memory, as copies of buffers do."""
    if func.overloadpacket in (torch.ops.aten.set_, torch.ops.aten.resize_):
        return True
    aliases = [each.alias_info for each in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Returns the tensors that an operation writes."""
    schema = func._schema.arguments
    names = [each.name for each in schema if each.alias_info is not None and each.alias_info.is_write]
    given = {each.name: value for each, value in zip(schema, args, strict=False)} | kwargs
    return [leaf for name in names for leaf in pytree.tree_leaves(given.get(name)) if isinstance(leaf, Tensor)]


def _is_half(value: Any) -> bool:
    return (value.dtype if isinstance(value, Tensor) else value) in HALVES


def _in_single(value: Any, written: list[Tensor]) -> Any:
    if isinstance(value, Tensor) and any(value is tensor for tensor in written):
        return value.float() if _is_half(value) else value.clone()
    if not _is_half(value):
        return value
    return value.float() if isinstance(value, Tensor) else torch.float32
