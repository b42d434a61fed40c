"""The layout of tensors in memory, by which PyTorch chooses how it adds up products, and so how these are rounded."""

from __future__ import annotations

import torch
from torch import Tensor

from graphpeft._torch import is_transformed
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import is_captured


@recorded
def laid_out_as(made: Tensor, given: Tensor, features: int = -1) -> Tensor:
    """Returns a tensor with the layout of another one from which it was made, row by row.

    So an operation on a tensor that equals the other one gives the same bits. Compiled code chooses layouts itself.

    Args:
        made: The tensor.
        given: The other one, of the same shape. Where it repeats its rows, `made` repeats its own; where it repeats
            one feature, the features made of it still differ, and `made` stays as it is.
        features: The dimension of the elements of a row.
    """
    if is_captured() or is_transformed() or made.stride() == given.stride() or made.shape != given.shape:
        return made
    if given.stride(features) == 0 and given.shape[features] > 1:
        return made
    once = tuple(1 if stride == 0 else size for size, stride in zip(given.shape, given.stride(), strict=True))
    if not _is_apart(once, given.stride()):
        return made
    own = made[tuple(slice(size) for size in once)]
    laid_out = torch.empty_strided(once, given.stride(), dtype=made.dtype, device=made.device).copy_(own)
    return laid_out.expand(given.shape)


def _is_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Returns whether each element has a place of its own."""
    reach = 0
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return True
