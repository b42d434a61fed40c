"""A weight with a change of low rank that isn't added to it: W + s · P Q, as a tensor that knows its parts.

    x (W + s · P Q)  =  x W + s · (dropout(x) P) Q

Code that multiplies by the weight, in whatever spelling, so computes a branch beside the product, and no tensor of the
weight's size is made. Experts' weights are large stacks of matrices, of which a forward uses few, or one at a time:
indexing a stack, and transposing its matrices, keep the parts apart. Any other function is given the sum itself, or
refused where dropout is to act on what is multiplied.
"""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphpeft._torch import (
    GROUPED_MM,
    DisableTorchFunctionSubclass,
    is_transformed,
    make_wrapper,
    pytree,
    without_compiler,
)
from graphpeft.graph.autocast import is_in_autocast
from graphpeft.graph.recorded import recorded
from graphpeft.graph.scaled_sum import add_scaled, is_captured


@recorded
def plus_product(
    weight: Tensor, first: Tensor, second: Tensor, scale: Any, dropout: float = 0.0, training: bool = False
) -> Tensor:
    """Returns W + s · P Q, not added up where the computation runs as it is written.

    Args:
        weight: W, of shape (…, m, n).
        first: P, of shape (…, m, r), in its own dtype.
        second: Q, of shape (…, r, n).
        scale: s, a number, or a tensor where an exported model takes it as an input.
        dropout: The probability of dropping an element of the branch's input.
        training: Whether elements are dropped.
    """
    dropped = dropout if training else 0.0
    # a compiler decides itself what it adds up, and it knows no such tensor
    if is_captured() or is_transformed() or isinstance(scale, Tensor):
        if dropped:
            _refuse_dropout()
        return weight + (first @ second * scale).to(weight.dtype)
    made: Any = _PlusProduct.apply(weight, _in_rows(first), _in_rows(second), scale, dropped)
    return made


def plus_stacked_product(weight: Tensor, first: Tensor, second: Tensor, scale: Any = None) -> Tensor:
    """Returns W + s · P Q, not added up where W is a stack of matrices that are larger than their factors."""
    if weight.ndim < 3 or first.shape[-1] >= min(weight.shape[-2:]):
        product = first @ second
        return weight + (product if scale is None else product * scale).to(weight.dtype)
    stack = weight.shape[:-2]
    of_each = [each if each.shape[:-2] == stack else each.expand(*stack, *each.shape[-2:]) for each in (first, second)]
    return plus_product(weight, *of_each, 1.0 if scale is None else scale)


_NO_DROPOUT = (
    "dropout beside a weight that code reads isn't compiled, exported or transformed: set lora_dropout=0, or call the "
    "model as it is"
)


# an error that a compiler sees lets it run the function as it is, and compile what that calls
@without_compiler(_NO_DROPOUT)
def _refuse_dropout() -> None:
    raise RuntimeError(_NO_DROPOUT)


def _in_rows(factor: Tensor) -> Tensor:
    """Returns a stack of matrices whose rows or columns are in one piece; batched products copy others one by one."""
    return factor if factor.ndim < 3 or 1 in factor.stride()[-2:] else factor.contiguous()


class _PlusProduct(torch.autograd.Function):
    """Makes the sum, with the gradients of its parts for code that takes it as one tensor."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, first: Tensor, second: Tensor, scale: float, dropped: float) -> LowRankSum:
        """Returns the sum."""
        ctx.save_for_backward(first, second)
        ctx.scale = scale
        return LowRankSum(weight, first, second, scale, dropped)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients of W, P and Q."""
        first, second = ctx.saved_tensors
        of_product = gradients[0].to(first.dtype) * ctx.scale
        return gradients[0], of_product @ second.mT, first.mT @ of_product, None, None


class LowRankSum(Tensor):
    """W + s · P Q.

    Attributes:
        weight: W.
        first: P.
        second: Q.
        scale: s.
        dropped: The probability with which elements of the branch's input are dropped; 0 in evaluation.
    """

    weight: Tensor
    first: Tensor
    second: Tensor
    scale: float
    dropped: float

    @staticmethod
    def __new__(cls, weight: Tensor, first: Tensor, second: Tensor, scale: float, dropped: float) -> LowRankSum:
        """Makes a tensor without numbers of its own."""
        made = make_wrapper(cls, weight.shape, strides=weight.stride(), dtype=weight.dtype, device=weight.device)
        made.weight, made.first, made.second, made.scale, made.dropped = weight, first, second, scale, dropped
        return made

    @functools.cached_property
    def total(self) -> Tensor:
        """The sum; raises RuntimeError where elements of what it would be multiplied with are to be dropped."""
        if self.dropped:
            raise RuntimeError(
                "lora_dropout drops elements of what a weight is multiplied with, and the model's code uses an adapted "
                "weight in another way: set lora_dropout=0, or leave this weight out of the targets"
            )
        weight = whole(self.weight)
        return add_scaled(weight, (self.first @ self.second).to(weight.dtype), self.scale)

    def each(self, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the sum of the tensors that a function makes of the three."""
        return plus_product(
            change(self.weight), change(self.first), change(self.second), self.scale, self.dropped, True
        )

    def transposed(self) -> Tensor:
        """Returns the sum with its last two dimensions exchanged."""
        return plus_product(self.weight.mT, self.second.mT, self.first.mT, self.scale, self.dropped, True)

    def entering(self, x: Tensor) -> Tensor:
        """Returns what the branch is given of what is multiplied with the sum."""
        h = x.to(self.first.dtype)
        return F.dropout(h, self.dropped) if self.dropped else h

    def beside(self, y: Tensor, branch: Tensor) -> Tensor:
        """Returns a product with W plus s times the one with P Q."""
        return add_scaled(y, branch.to(y.dtype), self.scale)

    def beside_product(self, y: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Returns the same for a branch that is a product, in y itself where PyTorch does that in one step."""
        one_step = {(2, 2): Tensor.addmm_, (3, 3): Tensor.baddbmm_}.get((left.ndim, right.ndim))
        # a batched product in one step takes no stack of one matrix for all, as @ does
        if one_step is None or y.dtype != left.dtype or left.shape[:-2] != right.shape[:-2]:
            return self.beside(y, left @ right)
        if is_in_autocast(y.device.type):
            return self.beside(y, left @ right)
        return one_step(y, left, right, alpha=self.scale)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes what is known of the parts, and gives the sum to all other functions."""
        kwargs = kwargs or {}
        if func in METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if type(args[0] if args else None) is LowRankSum and writes(func):
            raise RuntimeError(
                f"{func.__name__} would change a weight in place, to which the change of an adapter isn't added; merge "
                "the adapter, or leave this weight out of its targets"
            )
        # what a function was given may have been changed through it, as by w.data.clamp_(0, 1)
        reader = None if _is_added_up(args, kwargs) else _CONVERSIONS.get(func) or _READERS.get(func)
        result = NotImplemented if reader is None else reader.read(args, kwargs)
        if result is not NotImplemented:
            return result
        if any(_lost_gradients(value) for value in pytree.tree_leaves((args, kwargs))):
            with DisableTorchFunctionSubclass():  # whose gradients are those of the sum, see `_PlusProduct`
                return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gives the sum to operators, which C++ calls without asking `__torch_function__`."""
        args, kwargs = pytree.tree_map(whole, (args, kwargs or {}))
        return func(*args, **kwargs)


def whole(value: Any) -> Any:
    """Returns the sum itself of a `LowRankSum`, and any other value as it is."""
    return value.total if type(value) is LowRankSum else value


def _lost_gradients(value: Any) -> bool:
    """Returns whether a sum was added up where no gradients were wanted, as in `torch.no_grad()`, and they are now."""
    if type(value) is not LowRankSum or not torch.is_grad_enabled():
        return False
    return value.requires_grad and not value.total.requires_grad


def writes(function: Any) -> bool:
    """Returns whether a function of tensors changes its first argument."""
    name = getattr(function, "__name__", "")
    return name in _WRITING or (name.endswith("_") and not name.endswith("__"))


_WRITING = frozenset({"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__"})


def _is_added_up(args: Any, kwargs: Any) -> bool:
    values = (*args, *kwargs.values())
    return any(type(value) is LowRankSum and "total" in vars(value) for value in values)


def _weight_of(value: Any) -> Any:
    return value.weight if _is_sum(value) else value


def _is_sum(*values: Any) -> bool:
    return any(type(value) is LowRankSum for value in values)


# a reader returns NotImplemented for arguments for which it doesn't know the parts


class _Reader(NamedTuple):
    """Computes a function of sums by their parts.

    Attributes:
        function: The function.
        names: The names of its arguments.
    """

    function: Callable[..., Any]
    names: tuple[str, ...]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the function's result, or NotImplemented."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if len(args) > len(self.names) or not given.keys() <= {*self.names}:
            return NotImplemented
        return self.function(*(given.get(name) for name in self.names))


class _Conversion(NamedTuple):
    """Converts the weight of a sum; a tensor that is to be like a sum becomes like its weight.

    Attributes:
        function: The function, a method of tensors.
    """

    function: Callable[..., Any]

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the function's result, or NotImplemented."""
        converted, *others = args
        like, options = pytree.tree_map(_weight_of, (others, kwargs))
        weight = self.function(_weight_of(converted), *like, **options)
        if not _is_sum(converted):
            return weight
        if weight is converted.weight:
            return converted
        if not isinstance(weight, Tensor) or weight.device != converted.device or not weight.is_floating_point():
            return NotImplemented
        return plus_product(weight, converted.first, converted.second, converted.scale, converted.dropped, True)


def _index(stack: LowRankSum, index: Any) -> Any:
    """Returns matrices of a stack; indices within matrices aren't known."""
    indices = index if isinstance(index, tuple) else (index,)
    if not all(_is_plain(each) for each in indices):
        return NotImplemented
    dimensions = sum(each.ndim if _is_mask(each) else 1 for each in indices)
    return stack.each(lambda tensor: tensor[index]) if dimensions <= stack.ndim - 2 else NotImplemented


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


def _is_plain(index: Any) -> bool:
    if isinstance(index, Tensor):
        return not (_is_mask(index) and index.ndim == 0)
    return isinstance(index, int | slice) and not isinstance(index, bool)


def _transpose(stack: LowRankSum, dim0: int, dim1: int) -> Any:
    last = {stack.ndim - 2, stack.ndim - 1}
    return stack.transposed() if {dim0 % stack.ndim, dim1 % stack.ndim} == last else NotImplemented


def _transpose_matrix(matrix: LowRankSum) -> Any:
    return matrix.transposed() if matrix.ndim == 2 else NotImplemented


def _linear(x: Any, weight: Any, bias: Any) -> Any:
    if not _is_sum(weight) or _is_sum(x, bias):
        return NotImplemented
    h = F.linear(weight.entering(x), weight.second)
    return weight.beside_product(F.linear(x, weight.weight, bias), h, weight.first.mT)


def _matmul(left: Any, right: Any) -> Any:
    if left.ndim < 2 or right.ndim < 2 or _is_sum(left) == _is_sum(right):
        return NotImplemented
    if _is_sum(right):
        return right.beside_product(left @ right.weight, right.entering(left) @ right.first, right.second)
    return left.beside_product(left.weight @ right, left.first, left.second @ left.entering(right))


def _reflected_matmul(right: Any, left: Any) -> Any:
    return _matmul(left, right)


def _repr(stack: LowRankSum, _contents: Any) -> str:
    """Returns the text of the sum, on which dropout has no effect."""
    return repr(plus_product(stack.weight, stack.first, stack.second, stack.scale).total)


def _baddbmm(y: Any, left: Any, right: Any) -> Any:
    product = NotImplemented if _is_sum(y) else _matmul(left, right)
    return product if product is NotImplemented else y + product


def _grouped_mm(function: Any, x: Any, weight: Any, offs: Any, bias: Any, out_dtype: Any) -> Any:
    if _is_sum(x) or not _is_sum(weight) or bias is not None or out_dtype is not None:
        return NotImplemented
    # a row of x P is to begin at a multiple of 16 bytes
    if weight.first.shape[-1] * weight.first.element_size() % 16:
        return NotImplemented
    h = function(weight.entering(x), weight.first.contiguous(), offs=offs)
    branch = function(h, weight.second.contiguous(), offs=offs)
    return weight.beside(function(x, weight.weight, offs=offs), branch)


def _einsum(equation: Any, first: Any, second: Any) -> Any:
    if not isinstance(equation, str) or "->" not in equation:
        return NotImplemented
    if second is None or _is_sum(first) == _is_sum(second):
        return NotImplemented
    equation = _without_ellipses(equation.replace(" ", ""), first.ndim, second.ndim)
    inputs, output = equation.split("->")
    of_operands = inputs.split(",")
    (of_x, x), (of_stack, stack) = sorted(
        zip(of_operands, (first, second), strict=True), key=lambda pair: _is_sum(pair[1])
    )
    *batch, row, column = of_stack
    summed = [letter for letter in (row, column) if letter in of_x and letter not in output]
    if len(summed) != 1 or len({*of_stack}) < len(of_stack) or {row, column} <= {*of_x}:
        return NotImplemented
    rank = next(letter for letter in "zyxwvutsrqponmlkjihgfedcba" if letter not in inputs)
    steps = [("".join([*batch, row, rank]), stack.first), ("".join([*batch, rank, column]), stack.second)]
    (of_near, near), (of_far, far) = steps if summed == [row] else steps[::-1]
    between = "".join(dict.fromkeys(letter for letter in (*of_x, *batch, rank) if letter not in summed))
    h = torch.einsum(f"{of_x},{of_near}->{between}", stack.entering(x), near)
    y = torch.einsum(equation, *(each.weight if each is stack else each for each in (first, second)))
    return stack.beside(y, torch.einsum(f"{between},{of_far}->{output}", h, far))


def _without_ellipses(equation: str, *dimensions: int) -> str:
    """Returns an equation of einsum for operands of these numbers of dimensions, with a letter for each of them."""
    inputs, output = equation.split("->")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    counts = [count - len(of.replace("...", "")) for of, count in zip(inputs.split(","), dimensions, strict=True)]
    # those of the shorter operands are the last ones, as in broadcasting
    named = ["".join(free[max(counts) - count : max(counts)]) for count in counts]
    spelled = [of.replace("...", own) for of, own in zip(inputs.split(","), named, strict=True)]
    return f"{','.join(spelled)}->{output.replace('...', max(named, key=len))}"


def getter(name: str) -> Any:
    """Returns the function that reads an attribute of tensors."""
    return getattr(Tensor, name).__get__


METADATA: frozenset[Any] = frozenset(
    [
        *map(getter, ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        *map(getter, ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
        *(
            getattr(Tensor, name)
            for name in (
                *("size", "dim", "numel", "stride", "is_floating_point", "is_complex", "is_contiguous", "__len__"),
                *("element_size", "get_device"),
            )
        ),
    ]
)
"""The functions of tensors that ask for no numbers."""

_READERS: dict[Any, _Reader] = {
    Tensor.__getitem__: _Reader(_index, ("self", "index")),
    getter("mT"): _Reader(LowRankSum.transposed, ("self",)),
    **dict.fromkeys((getter("T"), Tensor.t, torch.t), _Reader(_transpose_matrix, ("self",))),
    **dict.fromkeys((Tensor.transpose, torch.transpose), _Reader(_transpose, ("input", "dim0", "dim1"))),
    **dict.fromkeys((Tensor.swapaxes, torch.swapaxes), _Reader(_transpose, ("input", "axis0", "axis1"))),
    F.linear: _Reader(_linear, ("input", "weight", "bias")),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _Reader(_matmul, ("input", "other"))),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _Reader(_matmul, ("input", "mat2"))),
    Tensor.__rmatmul__: _Reader(_reflected_matmul, ("self", "other")),
    **dict.fromkeys((torch.baddbmm, Tensor.baddbmm), _Reader(_baddbmm, ("input", "batch1", "batch2"))),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _Reader(_baddbmm, ("input", "mat1", "mat2"))),
    Tensor.__repr__: _Reader(_repr, ("self", "tensor_contents")),
    torch.einsum: _Reader(_einsum, ("equation", "first", "second")),
    **{
        function: _Reader(functools.partial(_grouped_mm, function), ("input", "mat2", "offs", "bias", "out_dtype"))
        for function in GROUPED_MM
    },
}
"""The readers, by function."""

_CONVERSIONS: dict[Any, _Conversion] = {
    function: _Conversion(function)
    for function in (
        *(Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16),
        Tensor.contiguous,
    )
}
"""The functions that change the kind of a tensor's numbers alone."""
