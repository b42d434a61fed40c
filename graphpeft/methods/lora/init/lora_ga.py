"""LoRA-GA: the first step of A and B goes in the direction in which a step of the whole weight W would.

    G = U S Vᵀ, the gradient of W:     A = rows of Vᵀ,  B = other columns of U, times S and a factor,
                                       W becomes W − s B A

The option `direction` chooses the vectors of A and of B from the first 2r, the option `scale` the factor. Source: Wang
et al., "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000; the same numbers as PEFT's
``tuners/lora/loraga.py`` and ``layer.py``. Without gradients, PEFT loads an adapter onto the whole W, as if B A had
never been subtracted; here that is an error.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.modes import in_mode
from graphpeft.methods.lora.init.base import InitContext, InitialFactors, Initialisation
from graphpeft.methods.lora.init.calibration import (
    CALL_FIRST,
    from_file_or,
    is_stored_transposed,
    keep,
    kept,
    targeted_layers,
)
from graphpeft.rules.options import Size, check_options
from graphpeft.transaction import at_end_of


@dataclass
class LoraGAConfig:
    """The options of LoRA-GA; the names, defaults and meanings are PEFT's.

    Attributes:
        direction: The singular vectors of A and B: ``"ArB2r"``, the first r and the next r; ``"A2rBr"``, the other way
            round; ``"ArBr"``, every second one; ``"random"``, the same r at random.
        scale: ``"stable"`` multiplies B by (rows of the weight)^¼ / √γ, ``"weight_svd"`` gives it the weight's largest
            singular value, ``"gd_scale"`` divides A and B by the scale of the branch, ``"unit"`` does nothing.
        stable_gamma: γ.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArBr"))
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: Size = 16

    def __post_init__(self) -> None:
        check_options(self)


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | os.PathLike | None = None
) -> None:
    """Collects the gradients for a config with ``init_lora_weights="lora_ga"``; call `get_peft_model` with it next.

    Args:
        model: The model, whose layers get an attribute that keeps what is measured; no other change is made. Copies of
            the model have it, too.
        lora_config: The `LoraConfig`.
        train_step: Runs the model forwards and backwards on a sample, without a step of an optimizer.
        cache_file: The file that keeps the gradients for another run.

    Raises:
        AdaptError: If no linear layer is targeted, or one of them gets no gradient.

    Examples:
        >>> model, sample = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga")
        >>> preprocess_loraga(model, config, lambda: model(sample).square().mean().backward())
        >>> model = get_peft_model(model, config)
    """
    layers = targeted_layers(model, lora_config)
    compute = functools.partial(_mean_gradients, model, layers, train_step)
    found = from_file_or(compute, cache_file, layers, ["{}._peft_loraga_grad"])
    for path, layer in layers.items():
        [gradient] = found[path]
        keep(layer, "lora_ga", gradient)


def _mean_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], train_step: Callable[[], None]
) -> dict[str, tuple[Tensor]]:
    """Returns the gradient of each layer's weight, as it is stored, divided by the number of the layer's calls."""
    counts = dict.fromkeys(layers, 0)

    def counting(path: str) -> Callable[..., None]:
        def count(_: Tensor) -> None:
            counts[path] += 1

        return lambda _, __, output: output.register_hook(count) and None

    weights = {path: layer.get_parameter("weight") for path, layer in layers.items()}
    with contextlib.ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(counting(path)))
        with in_mode(model, training=True), _only_trained(model, list(weights.values())), torch.enable_grad():
            train_step()
            found = {path: weight.grad.detach().clone() for path, weight in weights.items() if weight.grad is not None}
    lacking = [path for path in layers if path not in found]
    if lacking:
        raise AdaptError(f"train_step gives {lacking[0]} no gradient, of which lora_ga takes its start; leave it out")
    return {path: (gradient / max(1, counts[path]),) for path, gradient in found.items()}


@contextlib.contextmanager
def _only_trained(model: nn.Module, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Lets these weights alone require grad for the time of a context, at whose beginning they have no gradient."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    with contextlib.ExitStack() as stack:
        at_end_of(stack, _set_gradients, before)
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        yield


def _set_gradients(states: Sequence[tuple[nn.Parameter, bool, Tensor | None]]) -> None:
    for parameter, flag, gradient in states:
        parameter.requires_grad_(flag)
        parameter.grad = gradient


@dataclass(frozen=True)
class LoraGa(Initialisation):
    """The singular vectors of the gradient that `preprocess_loraga` has collected."""

    replaces_weight = subtracts_product = needs_calibration = True

    def refusal(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank above half of the gradient's, and a scale of nothing."""
        if scaling <= 0:
            return "lora_ga divides by the scale; make lora_alpha positive"
        if 2 * rank <= min(shape):
            return None
        return f"lora_ga needs 2r directions; its rank is {min(shape)} at most, and r is {rank}: choose a smaller one"

    def first(self, context: InitContext) -> InitialFactors:
        """Returns singular vectors of the gradient."""
        gradient: Tensor | None = kept(context.module, "lora_ga")
        if gradient is None:
            needed = "init_lora_weights='lora_ga' needs what preprocess_loraga(model, config, train_step) measures"
            raise AdaptError(f"{needed} {CALL_FIRST}")
        options: LoraGAConfig = context.config.lora_ga_config or LoraGAConfig()
        gradient = gradient.to(torch.float32)
        gradient = gradient.T if is_stored_transposed(context.module) else gradient
        rank = context.rank
        U, S, V = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
        of_A, of_B = _chosen(options.direction, rank)
        A, B = V.T[of_A], U[:, of_B] @ torch.diag(S[of_B])
        stored = context.module.get_parameter("weight")
        if options.scale == "stable":
            # by the rows of the weight as it is stored, as in PEFT
            B = B * (stored.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd":
            _, of_weight, _ = torch.svd_lowrank(context.weight, q=rank, niter=4)
            largest = S[of_B][0]
            B = B * (of_weight[0] / largest) if largest > 0 else B
        elif options.scale == "gd_scale":
            A, B = A / context.scaling, B / context.scaling
        # in the branch's precision, so that its product is what was subtracted
        return context.subtracting(A.to(stored.dtype).float(), B.to(stored.dtype).float())


def _chosen(direction: str, rank: int) -> tuple[Any, Any]:
    """Returns the indices of A's and of B's vectors among the first 2r."""
    if direction == "random":
        chosen = torch.randperm(2 * rank)[:rank]
        return chosen, chosen
    first, second = slice(None, rank), slice(rank, 2 * rank)
    return {
        "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
    }[direction]
