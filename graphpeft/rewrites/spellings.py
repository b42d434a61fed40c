"""From the many spellings of an operation to its one form: names, arguments by name, defaults.

    torch.add(x, y), x + y, x.add(other=y)   →  add(input=x, other=y)
    F.gelu(x), nn.GELU()(x)                  →  gelu(input=x, approximate="none")
    x @ w.T, F.linear(x, w), einsum          →  linear(input=x, weight=w), and matmul(input=x, other=wᵀ)

A node may have several forms, since a pattern may spell out what the model calls by one name, or the other way round.
"""

from __future__ import annotations

import inspect
import operator
import types
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from graphpeft._torch import OpOverload, OpOverloadPacket, schemas_of
from graphpeft.rewrites.values import Form, value_of

ALIASES = {
    "absolute": "abs", "bmm": "matmul", "clip": "clamp", "concat": "cat", "concatenate": "cat", "divide": "div",
    "mm": "matmul", "multiply": "mul", "negative": "neg", "subtract": "sub", "true_divide": "div", "truediv": "div",
    "view": "reshape",
}  # fmt: skip
"""Names of the same function."""

COMMUTES = frozenset(
    ("add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or", "logical_xor", "bitwise_and",
     "bitwise_or", "bitwise_xor", "and_", "or_", "xor")
)  # fmt: skip
"""Functions whose two operands may change places."""

_CASTS = {"float": "float32", "double": "float64", "half": "float16", "bfloat16": "bfloat16"}
"""The dtypes to which methods of these names cast."""

_ARGUMENTS = {"self": "input", "train": "training", "mat2": "other", "tensor2": "other", "size": "shape"}
"""Names of arguments of PyTorch's operators, in their one form."""

_HIDDEN = ("_stacklevel",)
"""Arguments that don't change a result."""


class Bound(NamedTuple):
    """A call with its arguments by name.

    Attributes:
        function: The name of the function, or a function that isn't PyTorch's.
        arguments: The given arguments.
        defaults: The values of the others.
        lengths: The numbers of values of the arguments for which one number may stand.
    """

    function: Any
    arguments: Mapping[Any, Any]
    defaults: Mapping[Any, Any]
    lengths: Mapping[Any, int] = {}


def bound(node: fx.Node) -> Bound:
    """Returns the call that a node makes, of a function or of a method."""
    name = _name_of(node)
    args, kwargs = value_of(node.args), {key: value_of(value) for key, value in node.kwargs.items()}
    if name is None or name == "einsum":
        return Bound(name or node.target, {**dict(enumerate(args)), **kwargs} if name else _as_given(node), {})
    if name in _CASTS and len(args) == 1 and not kwargs:
        return Bound("to", {"input": args[0], "what": getattr(torch, _CASTS[name])}, {})
    if name == "to":
        return _cast(args, kwargs)
    signature = _signature(node.target) if isinstance(node.target, types.FunctionType) else None
    found = _by_signature(signature, args, kwargs) if signature else _by_schemas(name, args, kwargs)
    alias = ALIASES.get(name, name)
    found = found or (_by_schemas(alias, args, kwargs) if alias != name else None)
    named, others, lengths = map(_named, found or (_as_given(node), {}, {}))
    if name == "square":
        return Bound("pow", {**named, "exponent": 2}, {})
    return Bound(alias, named, others, lengths)


def _named(arguments: Mapping[Any, Any]) -> dict[Any, Any]:
    return {_ARGUMENTS.get(key, key): value for key, value in arguments.items() if key not in _HIDDEN}


def _as_given(node: fx.Node) -> dict[Any, Any]:
    """Returns the arguments by place and by name; x[[0, 1]] is no x[0, 1], so the places of lists are one, too."""
    given = dict(enumerate(node.args)) | node.kwargs
    lists = tuple(key for key, value in given.items() if isinstance(value, list))
    inner = tuple(
        (key, place)
        for key, value in given.items()
        if isinstance(value, tuple)
        for place, part in enumerate(value)
        if isinstance(part, list)
    )
    of_lists = {"lists": lists + inner} if lists or inner else {}
    return {key: value_of(value) for key, value in given.items()} | of_lists


def _name_of(node: fx.Node) -> str | None:
    """Returns the name of the function of PyTorch that a node calls; None for any other function."""
    target: Any = node.target
    if isinstance(target, str):
        return target.strip("_") if target.startswith("__") else target
    if isinstance(target, OpOverload | OpOverloadPacket):
        namespace, name, *_ = str(target).split(".")
        return name if namespace == "aten" else None
    home = getattr(target, "__module__", None) or ""
    is_own = home in ("_operator", "torch") or home.startswith(("torch._C", "torch.nn.functional", "torch.functional"))
    return getattr(target, "__name__", None) if is_own or target is getattr else None


def _cast(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Bound:
    x, *what = args
    given = [*what, *(kwargs[key] for key in ("dtype", "device", "other") if key in kwargs)]
    others = {key: value for key, value in kwargs.items() if key not in ("dtype", "device", "other")}
    return Bound("to", {"input": x, "what": given[0] if len(given) == 1 else tuple(given), **others}, {})


def _signature(function: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


Arguments = tuple[dict[Any, Any], dict[Any, Any], dict[Any, int]]
"""Given arguments, the defaults of the others, and the numbers of values for which one number may stand."""


def _by_signature(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return None
    parameters = signature.parameters.values()
    return given, {each.name: value_of(each.default) for each in parameters if each.default is not each.empty}, {}


def _by_schemas(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments | None:
    """Returns the arguments by the overload that suits them best."""
    found = [
        suiting
        for schema in schemas_of(name)
        for packed in _packings(args)
        for suiting in _by_schema(schema, packed, kwargs)
    ]
    return max(found, key=operator.itemgetter(0))[1] if found else None


def _packings(args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Returns the arguments as they are; and with sizes that are given one by one as one tuple."""
    packed = (args[0], tuple(args[1:])) if len(args) > 2 else args
    return [args] if packed is args else [args, packed]


def _by_schema(schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int, Arguments]]:
    """Yields how well an overload suits, and the arguments; nothing if it takes others."""
    takes = [each for each in schema.arguments if not each.kwarg_only]
    names = {each.name: each for each in schema.arguments}
    by_other_names = {_ARGUMENTS.get(name, name): name for name in names}
    given = {each.name: value for each, value in zip(takes, args, strict=False)}
    more = {by_other_names.get(key, key): value for key, value in kwargs.items()}
    if len(args) > len(takes) or not more.keys() <= names.keys() or not more.keys().isdisjoint(given):
        return
    given |= more
    lacking = [each.name for each in schema.arguments if each.name not in given and not each.has_default_value()]
    suits = [_suits(str(names[key].type), value) for key, value in given.items()]
    if lacking or None in suits:
        return
    defaults = {each.name: value_of(each.default_value) for each in schema.arguments if each.has_default_value()}
    lengths = {name: each.N or 1 for name, each in names.items() if "List[" in str(each.type)}
    yield sum(filter(None, suits)), (given, defaults, lengths)


def _suits(kind: str, value: Any) -> int | None:
    """Returns whether a value suits an argument of this type: 2 if well, 1 if it may, None if not."""
    kind, is_optional = kind.removeprefix("Optional[").rstrip("]"), kind.startswith("Optional[")
    is_list = kind.startswith("List[")
    if value is None:
        return 2 if is_optional else None
    if isinstance(value, str):
        return 2 if kind == "str" else None
    if isinstance(value, tuple):
        return 2 if is_list else None
    if isinstance(value, bool | int | float):
        return None if kind in ("str", "Dimname") else 1 if kind == "Tensor" or is_list else 2
    return 2 if kind == "Tensor" else 1


def as_transpose(name: str, arguments: Mapping[Any, Any], rank: int | None) -> Form | None:
    """Returns the form of a call that transposes two dimensions, counted from the last one; None for another call."""
    x = arguments.get("input", arguments.get(0))
    about = arguments.get(1) if name == "getattr" else name
    if about == "mT":
        return transpose(x, rank=rank)
    if about == "T" and rank is None:
        # the last two dimensions of a matrix alone; of other values, T exchanges all
        return Form("transpose", {"input": x, "dims": (-2, -1), "rank": 2}, {}, {})
    if about in ("T", "t"):
        return transpose(x) if rank in (None, 2) else None
    if name in ("transpose", "swapaxes", "swapdims"):
        dims = [arguments.get(key) for key in ("dim0", "dim1", "axis0", "axis1") if key in arguments]
    elif name == "permute":
        order = arguments.get("dims", ())
        places = range(len(order)) if all(isinstance(dim, int) for dim in order) else ()
        dims = [place for place in places if order[place] % len(order) != place]
        rank = len(order)
    else:
        return None
    counted = [_from_last(dim, rank) for dim in dims]
    if len(counted) != 2 or not all(isinstance(dim, int) for dim in counted):
        return None
    first, second = sorted(counted)
    return transpose(x, (first, second), rank)


def _from_last(dim: Any, rank: int | None) -> Any:
    return dim - rank if isinstance(dim, int) and dim >= 0 and rank is not None else dim


def transpose(x: Any, dims: tuple[int, int] = (-2, -1), rank: int | None = 2) -> Form:
    """Returns the transpose of a value of so many dimensions, if that is known, as a form."""
    return Form("transpose", {"input": x, "dims": dims}, {"rank": rank} if rank is not None else {}, {})


def einsum_operands(equation: Any, operands: tuple[Any, ...]) -> tuple[Any, Any] | None:
    """Returns the operands of the batched product of matrices that an einsum computes, or None."""
    if len(operands) == 1 and isinstance(operands[0], tuple):
        operands = operands[0]
    if not isinstance(equation, str) or len(operands) != 2 or equation.count("->") != 1 or "." in equation:
        return None
    inputs, result = equation.replace(" ", "").split("->")
    one, other = inputs.split(",")
    rows = result[:-1]
    if len({*one}) < len(one) or len({*other}) < len(other) or len(one) < 2 or not rows or one[:-1] != rows:
        return None
    batch, summed, out = rows[:-1], one[-1], result[-1]
    if other == batch + summed + out:
        return operands[0], operands[1]
    return (operands[0], transpose(operands[1], rank=len(other))) if other == batch + out + summed else None
