"""Compares nested values; errors say where they differ and by how much."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from graphpeft._torch import pytree

ROUNDING = {dtype: 8 * torch.finfo(dtype).eps for dtype in (torch.bfloat16, torch.float16)}
"""The difference of results in half precision that are rounded at other places, relative to the largest element.

It is for short computations; `alike.require_alike` finds the bound of any.

One rounding is off by half of `eps`, the distance from 1 to the next number: 2⁻⁷ for bfloat16, 2⁻¹⁰ for float16. A
merged change is rounded once with each weight, an active one with each output. Eight `eps` are sixteen roundings in one
direction, more than the few layers of a test add up to.
"""


class LawError(AssertionError):
    """A law doesn't hold."""


def require_equal(found: Any, expected: Any, law: str) -> None:
    """Raises unless all tensors of both are equal, bit for bit; NaN equals NaN.

    >>> require_equal({"y": torch.ones(2)}, {"y": torch.ones(2)}, "a copy differs")
    """
    require_close(found, expected, 0.0, law)


def require_close(found: Any, expected: Any, tolerance: float, law: str) -> None:
    """Raises unless all tensors of both are close.

    >>> require_close(torch.ones(2), torch.zeros(2), 0.5, "merged differs")
    Traceback (most recent call last):
    graphpeft.testing.comparing.LawError: merged differs: by 1
    """
    _require(found, expected, functools.partial(difference, tolerance=tolerance), law)


def require_within(found: Any, expected: Any, bound: float, law: str) -> None:
    """Raises unless all tensors of both are close, in half precision as in any other."""
    _require(found, expected, functools.partial(apart, bound=bound), law)


def _require(found: Any, expected: Any, compare: Callable[[Any, Any], str | None], law: str) -> None:
    left, left_tree = pytree.tree_flatten(opened(found))
    right, right_tree = pytree.tree_flatten_with_path(opened(expected))
    if left_tree != right_tree:
        raise LawError(f"{law}: the outputs are {left_tree}, not {right_tree}")
    parts = [part for leaf in left for part in parts_of(leaf)]
    expected_parts = [(path, part) for path, leaf in right for part in parts_of(leaf)]
    for a, (path, b) in zip(parts, expected_parts, strict=True):
        reason = compare(a, b)
        if reason is not None:
            where = f"{law}, at {pytree.keystr(path)}" if path else law
            raise LawError(f"{where}: {reason}")


def difference(found: Any, expected: Any, tolerance: float) -> str | None:
    """Returns how two leaves of a structure differ, or None if they are close."""
    dtype = getattr(expected, "dtype", None)
    rounding = 0.0 if dtype is None else ROUNDING.get(dtype, 0.0)
    return apart(found, expected, max(tolerance, rounding) if tolerance else 0.0)


def apart(found: Any, expected: Any, bound: float) -> str | None:
    """Returns how two leaves of a structure differ, or None if they are close."""
    if isinstance(found, torch.Tensor) != isinstance(expected, torch.Tensor):
        return f"{_kind(found)}, not {_kind(expected)}"
    if not isinstance(expected, torch.Tensor):
        return None if found == expected else f"{found!r}, not {expected!r}"
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return f"{found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    if not expected.numel():
        return None
    distance, scale = _distance(found, expected)
    return None if distance <= bound * scale else f"by {distance:.3g}"


def opened(value: Any) -> Any:
    """Returns a value with each incomparable object replaced by its class name and attributes.

    For example, a cache of Transformers is no pytree container, and equals only itself.
    """
    return pytree.tree_map(lambda leaf: _opened(leaf, ()), value)


def _opened(leaf: Any, around: tuple[int, ...]) -> Any:
    # a dataclass's == needs the truth value of its fields' comparisons, which tensors lack
    has_own = type(leaf).__eq__ is not object.__eq__ and not dataclasses.is_dataclass(leaf)
    knows_equality = has_own or isinstance(leaf, torch.Tensor | nn.Module | type)
    attributes = getattr(leaf, "__dict__", None)
    if knows_equality or callable(leaf) or attributes is None or id(leaf) in around:
        return leaf
    inner = (*around, id(leaf))
    return type(leaf).__name__, {
        name: pytree.tree_map(lambda part: _opened(part, inner), held) for name, held in sorted(attributes.items())
    }


def _kind(value: Any) -> str:
    return "a tensor" if isinstance(value, torch.Tensor) else repr(value)


def _distance(a: torch.Tensor, b: torch.Tensor) -> tuple[float, float]:
    """Returns the largest difference of two tensors, and the largest element of the second, 1 at least."""
    dtype = torch.complex128 if b.is_complex() else torch.float64
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0, a - b).abs().max().item(), max(1.0, b.abs().nan_to_num().max().item())


def have_equal_elements(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two tensors have equal elements; NaN equals NaN."""
    pairs = zip(parts_of(one), parts_of(other), strict=True)
    return all(torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)


def parts_of(value: Any) -> list[Any]:
    """Returns the inner tensors of a tensor subclass such as a quantised one; of any other value, the value alone."""
    if not hasattr(value, "__tensor_flatten__"):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(value, name))]


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns all tensors in a value of any structure, as `require_close` compares them one by one."""
    parts = [part for leaf in pytree.tree_leaves(opened(value)) for part in parts_of(leaf)]
    return [part for part in parts if isinstance(part, torch.Tensor)]
