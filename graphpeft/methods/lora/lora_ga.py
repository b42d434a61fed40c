"""LoRA-GA: first values that let the first step go where that of the whole weight W would.

    G = U S Vᵀ, the gradient of W:     A = rows of Vᵀ,  B = other columns of U, times S and a factor,
                                       W becomes W − s B A

Which of the 2r first go into A and which into B is the `direction`, the factor is the `scale`. Source: Wang et al.,
"LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000; the numbers are those of PEFT's
``tuners/lora/loraga.py`` and ``layer.py``. PEFT loads an adapter onto the whole W where no gradients were measured, as
if B A had never been taken from it; here that is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphpeft.adapters.plan import AdaptError
from graphpeft.methods.lora.beginning import Beginning, First, taken_from
from graphpeft.methods.lora.measured import (
    Measurements,
    cached,
    in_mode,
    is_stored_transposed,
    read_cache,
    targeted_layers,
    write_cache,
)
from graphpeft.rules.options import Size, check_options


@dataclass
class LoraGAConfig:
    """The options of LoRA-GA; the names, defaults and meanings are PEFT's.

    Attributes:
        direction: Which singular vectors go into A and B: ``"ArB2r"``, the first r and the next r; ``"A2rBr"``, the
            other way round; ``"ArBr"``, every second one; ``"random"``, the same r at random.
        scale: ``"stable"`` multiplies B by (rows of the weight)^¼ / √γ, ``"weight_svd"`` gives it the weight's largest
            singular value, ``"gd_scale"`` divides A and B by the scale of the branch, ``"unit"`` does nothing.
        stable_gamma: γ.

    Example:
        >>> config = LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(direction="ArBr"))
    """

    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    stable_gamma: Size = 16

    def __post_init__(self) -> None:
        check_options(self)


_GRADIENTS: Measurements = Measurements()


def preprocess_loraga(
    model: nn.Module, lora_config: Any, train_step: Callable[[], None], cache_file: str | None = None
) -> None:
    """Measures what a config with ``init_lora_weights="lora_ga"`` needs; `get_peft_model` with it comes next.

    Args:
        model: The model, which stays as it is.
        lora_config: The config.
        train_step: Runs the model forwards and backwards on a sample, without a step of an optimizer.
        cache_file: Where the gradients are kept for another run.

    Raises:
        AdaptError: If no linear layer is targeted, or one of them gets no gradient.

    Example:
        >>> model, sample = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="lora_ga")
        >>> preprocess_loraga(model, config, lambda: model(sample).square().mean().backward())
        >>> model = get_peft_model(model, config)
    """
    layers = targeted_layers(model, lora_config)
    names = {path: f"{path}._peft_loraga_grad" for path in layers}
    cache = read_cache(cache_file)
    if cache is not None:
        gradients = {path: cached(cache, names[path], cache_file, layer) for path, layer in layers.items()}
    else:
        gradients = _mean_gradients(model, layers, train_step)
        write_cache(cache_file, {names[path]: gradient for path, gradient in gradients.items()})
    for path, layer in layers.items():
        _GRADIENTS[layer] = gradients[path]


def _mean_gradients(
    model: nn.Module, layers: Mapping[str, nn.Module], train_step: Callable[[], None]
) -> dict[str, Tensor]:
    counts = dict.fromkeys(layers, 0)

    def counting(path: str) -> Callable[..., None]:
        def count(_: Tensor) -> None:
            counts[path] += 1

        return lambda _, __, output: output.register_hook(count) and None

    weights = {path: layer.get_parameter("weight") for path, layer in layers.items()}
    with ExitStack() as stack:
        for path, layer in layers.items():
            stack.enter_context(layer.register_forward_hook(counting(path)))
        with in_mode(model, training=True), _only_trained(model, list(weights.values())), torch.enable_grad():
            train_step()
            found = {path: weight.grad.detach().clone() for path, weight in weights.items() if weight.grad is not None}
    lacking = [path for path in layers if path not in found]
    if lacking:
        raise AdaptError(f"train_step gives {lacking[0]} no gradient, of which lora_ga takes its start; leave it out")
    return {path: gradient / max(1, counts[path]) for path, gradient in found.items()}


@contextmanager
def _only_trained(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[None]:
    """Lets these weights alone require grad for a while, and begin without one."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
            weight.grad = None
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@dataclass(frozen=True)
class LoraGa:
    """The singular vectors of the gradient that `preprocess_loraga` has measured."""

    replaces_weight = takes_product = True
    b_is_trained = True
    is_measured = True

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank of which the gradient hasn't twice as many, and a scale of nothing."""
        if scaling <= 0:
            return "lora_ga divides by the scale; make lora_alpha positive"
        if 2 * rank <= min(shape):
            return None
        return f"lora_ga needs 2r directions; its rank is {min(shape)} at most, and r is {rank}: choose a smaller one"

    def first(self, given: Beginning) -> First:
        """Returns singular vectors of the gradient.

        Raises:
            AdaptError: If it wasn't measured.
        """
        gradient: Tensor | None = _GRADIENTS.get(given.module)
        if gradient is None:
            raise AdaptError(
                "init_lora_weights='lora_ga' needs what preprocess_loraga(model, config, train_step) measures on this "
                "very model; call it first. An adapter is loaded without that if it was saved with "
                "path_initial_model_for_weight_conversion"
            )
        options: LoraGAConfig = given.config.lora_ga_config or LoraGAConfig()
        gradient = gradient.to(torch.float32)
        gradient = gradient.T if is_stored_transposed(given.module) else gradient
        rank = given.rank
        U, S, V = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape), niter=4)
        of_A, of_B = _chosen(options.direction, rank)
        A, B = V.T[of_A], U[:, of_B] @ torch.diag(S[of_B])
        stored = given.module.get_parameter("weight")
        if options.scale == "stable":
            # by the rows of the weight as it is stored, as in PEFT
            B = B * (stored.shape[0] ** 0.25 / options.stable_gamma**0.5)
        elif options.scale == "weight_svd":
            _, of_weight, _ = torch.svd_lowrank(given.weight, q=rank, niter=4)
            largest = S[of_B][0]
            B = B * (of_weight[0] / largest) if largest > 0 else B
        elif options.scale == "gd_scale":
            A, B = A / given.scaling, B / given.scaling
        # in the precision that the branch has, so that what is taken is what it gives
        return taken_from(given, A.to(stored.dtype).float(), B.to(stored.dtype).float())


def _chosen(direction: str, rank: int) -> tuple[Any, Any]:
    """Returns which of the 2r singular vectors go into A and into B."""
    if direction == "random":
        chosen = torch.randperm(2 * rank)[:rank]
        return chosen, chosen
    first, second = slice(None, rank), slice(rank, 2 * rank)
    return {
        "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
        "A2rBr": (second, first),
        "ArB2r": (first, second),
    }[direction]
