"""Recipes: how a tensor is computed again in the backward, from tensors that are kept anyway.

    r₁ = recipe("silu", g)         keeps g, and computes nothing
    r₂ = recipe("mul", r₁, u)      keeps u
    x  = run(r₂, silu(g), u)       computes x, whose backward has silu(g) computed again
    product(x, x, A, source=r₂)    keeps nothing for the gradient of A, whose backward has x computed again

What is kept is noted with its version, as autograd does it: where it was written to since, the backward raises.
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
    # not the layer itself, whose hooks have run
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
"""Functions that are cheap beside a product, draw no random numbers, and don't keep what they return."""

KEEP_THEIR_INPUTS = frozenset(("gelu", "layer_norm", "mul", "rms_norm", "silu", "truediv"))
"""Those of them that keep what they are given, for their backward."""

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
"""Methods of tensors of which the same is true; in recipes they have a dot in front."""

LAYERS = (nn.GELU, nn.Identity, nn.LayerNorm, nn.RMSNorm, nn.SiLU)
"""Layers of which the same is true."""


class Recipe:
    """How one tensor is computed.

    Attributes:
        args: The arguments: tensors that are kept, recipes of those that are computed again, and anything else.
    """

    def __init__(self, step: str, options: dict[str, Any], args: tuple[Any, ...]) -> None:
        self.args = args
        self._step, self._options = step, options
        self._versions = [version(tensor) for tensor in self._kept()]

    def compute(self) -> Tensor:
        """Computes the tensor.

        Raises:
            RuntimeError: If a tensor that is kept has been written to.
        """
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
    """Carries out one step."""
    if step.startswith("."):
        return getattr(args[0], step[1:])(*args[1:], **options)
    return FUNCTIONS[step](*args, **options)


@recorded
def recipe(step: str, options: dict[str, Any], *args: Any) -> Recipe | None:
    """Returns how a tensor is computed again; None where it is kept as it would be without a recipe.

    Args:
        step: The name of one of `FUNCTIONS`, or, with a dot in front, of one of `METHODS`.
        options: Its arguments that are given by name.
        args: The others. Where one is None, and was to be a recipe, there is none of this tensor either.
    """
    if wants_plain_form() or not torch.is_grad_enabled() or any(arg is None for arg in args) or _others_decide(args):
        return None
    return Recipe(step, options, args)


def _others_decide(args: tuple[Any, ...]) -> bool:
    """Returns whether others decide here what is kept, such as a checkpoint, or in which dtypes is computed."""
    devices = {arg.device.type for arg in args if isinstance(arg, Tensor)}
    return saved_tensors_go_elsewhere() or any(map(torch.is_autocast_enabled, devices))


@recorded
def run(source: Recipe | None, step: str, options: dict[str, Any], *args: Any) -> Any:
    """Carries out one step, so that its backward has those arguments computed again that `source` has recipes of."""
    if source is None:
        return stepped(step, options, *args)
    pairs = zip(args, source.args, strict=True)
    with computed_again((value, kept) for value, kept in pairs if isinstance(kept, Recipe)):
        return stepped(step, options, *args)


def computed_again(recipes: Iterable[tuple[Tensor, Recipe | None]]) -> contextlib.AbstractContextManager[Any]:
    """Lets the backward of what is computed within the context have these tensors computed again, and not kept."""
    # by their memory, since the hook lives as long as what it packs
    known = {
        (tensor.data_ptr(), tensor.numel()): source
        for tensor, source in recipes
        if source is not None and tensor.is_contiguous()
    }
    if not known:
        return contextlib.nullcontext()

    def pack(tensor: Tensor) -> _Kept | _Again:
        # a product keeps another view of what it is given
        source = known.get((tensor.data_ptr(), tensor.numel())) if tensor.is_contiguous() else None
        return _Kept(tensor, version(tensor)) if source is None else _Again(source, tensor.shape, tensor.device.type)

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor())


class _Again(NamedTuple):
    """Stands for a tensor that is computed again."""

    source: Recipe
    shape: torch.Size
    device: str

    def tensor(self) -> Tensor:
        """Computes it; autograd itself connects it with what it was computed from."""
        # whatever is around the backward, there was no autocast around the forward
        with torch.no_grad(), without_autocast(self.device):
            return self.source.compute().reshape(self.shape)


class _Kept(NamedTuple):
    """A tensor as it is, with the version that autograd's own check would have noted."""

    itself: Tensor
    version: int

    def tensor(self) -> Tensor:
        """Returns it.

        Raises:
            RuntimeError: If it has been written to.
        """
        if version(self.itself) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of the shape {tuple(self.itself.shape)}"
            )
        return self.itself
