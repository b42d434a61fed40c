"""Fake implementations of functions whose fake kernels in PyTorch refuse inputs that the real kernels accept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from graphpeft._torch import GROUPED_MM


def _grouped_mm(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    # the shapes of aten::_grouped_mm, whose fake kernel accepts only bfloat16
    if mat_a.ndim == 2 and mat_b.ndim == 2:
        assert offs is not None
        return mat_a.new_empty(offs.shape[0], mat_a.shape[0], mat_b.shape[1])
    return mat_a.new_empty(*mat_a.shape[:-1], mat_b.shape[-1])


FAKES: dict[Any, Callable[..., Any]] = dict.fromkeys(GROUPED_MM, _grouped_mm)
"""Fake implementations by function."""
