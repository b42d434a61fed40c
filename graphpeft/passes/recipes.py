"""Recipes to compute a tensor again in the backward, from tensors that autograd saves anyway.

    r₁ = recipe("silu", g)         saves g, and computes nothing
    r₂ = recipe("mul", r₁, u)      saves u
    x  = run(r₂, silu(g), u)       computes x; its backward computes silu(g) again
    product(x, x, A, source=r₂)    saves nothing for the gradient of A; its backward computes x again

As in autograd, each saved tensor has a version: the backward raises if the tensor was written to since.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft._torch import pytree, saved_tensors_go_elsewhere, version
from graphpeft.graph.recorded import recorded
from graphpeft.passes.plain_form import wants_plain_form, without_autocast


def _called(layer: nn.Module, *args: Any) -> Any:
    # a call of the layer would run its hooks again
    return layer.forward(*args)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "layer_norm": F.layer_norm,
    "rms_norm": F.rms_norm,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "add": operator.add,
    "sub": operator.sub,
    "neg": operator.neg,
    "layer": _called,
}
"""Functions that are cheap compared to a product, draw no random numbers, and don't save their result for backward."""

KEEP_THEIR_INPUTS = frozenset(("gelu", "layer_norm", "mul", "rms_norm", "silu", "truediv"))
"""Names in `FUNCTIONS` of functions that save their inputs for backward."""

METHODS = frozenset(
    (
        "contiguous",
        "expand",
        "flatten",
        "float",
        "permute",
        "reshape",
        "to",
        "transpose",
        "type_as",
        "unsqueeze",
        "view",
    )
)
"""Tensor methods that are cheap in the same sense; recipes name them with a leading dot."""

LAYERS = (nn.GELU, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.SiLU)
"""Layers that are cheap in the same sense."""


class Recipe:
    """The last step of a tensor's computation, with recipes for those inputs that are computed again.

    Attributes:
        args: The arguments of the step: saved tensors, recipes of recomputed tensors, and other values.
    """

    def __init__(self, step: str, options: dict[str, Any], args: tuple[Any, ...]) -> None:
        self.args = args
        self._step, self._options = step, options
        self._versions = [version(tensor) for tensor in self._kept()]

    def compute(self) -> Tensor:
        """Computes the tensor."""
        if [version(tensor) for tensor in self._kept()] != self._versions:
            raise RuntimeError(_WRITTEN)
        args = [argument.compute() if isinstance(argument, Recipe) else argument for argument in self.args]
        return stepped(self._step, self._options, *args)

    def _kept(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.args, self._options))
        layers = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
        tensors = [*leaves, *(parameter for layer in layers for parameter in layer.parameters())]
        return [tensor for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_inference()]


_WRITTEN = (
    "a tensor that the backward needs, to compute a branch's input again, was written to after the forward; leave the "
    "pass recomputed_inputs out: graphpeft.optimize(model, passes)"
)


def stepped(step: str, options: dict[str, Any], *args: Any) -> Any:
    """Runs one step."""
    if step.startswith("."):
        return getattr(args[0], step[1:])(*args[1:], **options)
    return FUNCTIONS[step](*args, **options)


@recorded
def recipe(step: str, options: dict[str, Any], *args: Any) -> Recipe | None:
    """Returns the recipe of a tensor, or None if autograd should save the tensor as it would without a recipe."""
    if (
        wants_plain_form()
        or not torch.is_grad_enabled()
        or any(arg is None for arg in args)
        or _is_decided_elsewhere(args)
    ):
        return None
    return Recipe(step, options, args)


def _is_decided_elsewhere(args: tuple[Any, ...]) -> bool:
    """Returns whether other hooks decide on saved tensors, as in a checkpoint, or autocast decides on dtypes."""
    devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
    return saved_tensors_go_elsewhere() or any(map(torch.is_autocast_enabled, devices))


@recorded
def run(source: Recipe | None, step: str, options: dict[str, Any], *args: Any) -> Any:
    """Runs one step; its backward computes arguments again for which `source` has recipes."""
    if source is None:
        return stepped(step, options, *args)
    pairs = zip(args, source.args, strict=True)
    with computed_again((value, kept) for value, kept in pairs if isinstance(kept, Recipe)):
        return stepped(step, options, *args)


def computed_again(recipes: Iterable[tuple[Tensor, Recipe | None]]) -> contextlib.AbstractContextManager[Any]:
    """Makes the backward of operations inside the context compute these tensors again, instead of saving them."""
    # the hook identifies tensors by address, since it lives as long as the saved tensors and must not hold these
    known = {
        (tensor.data_ptr(), tensor.numel()): source
        for tensor, source in recipes
        if source is not None and tensor.is_contiguous()
    }
    if not known:
        return contextlib.nullcontext()

    def pack(tensor: Tensor) -> _Kept | _Again:
        # compared by address, since a product saves a view of its input
        source = known.get((tensor.data_ptr(), tensor.numel())) if tensor.is_contiguous() else None
        return _Kept(tensor, version(tensor)) if source is None else _Again(source, tensor.shape, tensor.device.type)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor())


class _Again(NamedTuple):
    """A saved tensor that is computed again."""

    source: Recipe
    shape: torch.Size
    device: str

    def tensor(self) -> Tensor:
        """Computes the tensor without gradients; autograd connects it to the graph."""
        # the forward ran without autocast, but the backward may run under it
        with torch.no_grad(), without_autocast(self.device):
            return self.source.compute().reshape(self.shape)


class _Kept(NamedTuple):
    """A saved tensor, with its version for the check that autograd makes without hooks."""

    itself: Tensor
    version: int

    def tensor(self) -> Tensor:
        """Returns the tensor."""
        if version(self.itself) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of the shape {tuple(self.itself.shape)}"
            )
        return self.itself
