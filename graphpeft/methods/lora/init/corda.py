"""CorDA: first values from the weight W in the directions of a sample of inputs x.

    W C = U S Vᵀ,  C = mean of xᵀ x:     B = U_r √(S_r/s),  A = √(S_r/s) (V_rᵀ C⁻¹),     W becomes W − s B A

r are the first singular values in the instruction-previewed mode ("ipm"), and the last ones in the knowledge-preserved
mode ("kpm"). C is C + d · mean(diag C) · 1, where d begins with 0.01 and is doubled until C can be inverted. Source:
Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223; the same
numbers as PEFT's ``tuners/lora/corda.py``, which takes one sequence at a time; here a batch can have many.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphpeft.adapters.plan import AdaptError
from graphpeft.graph.modes import in_mode
from graphpeft.methods.lora.factors import rank_at
from graphpeft.methods.lora.init.base import InitContext, InitialFactors, Initialisation, rank_refusal
from graphpeft.methods.lora.init.calibration import (
    CALL_FIRST,
    from_file_or,
    is_stored_transposed,
    keep,
    kept,
    targeted_layers,
)
from graphpeft.rules.options import check_options


@dataclass
class CordaConfig:
    """The options of CorDA; the names, defaults and meanings are PEFT's.

    Attributes:
        cache_file: The file that keeps the singular vectors for another run.
        covariance_file: The file that keeps the means of xᵀ x, which serve other ranks, too.
        corda_method: The directions that A and B get: ``"ipm"``, the first ones, or ``"kpm"``, the last ones.
        verbose: Whether to show a progress bar.
        use_float16_for_covariance: Whether the inputs keep their dtype where they are multiplied.
        prune_temporary_fields: Read and written as PEFT does; what is measured on the way is never kept.

    Raises:
        ValueError: For a value that an option can't have.

    Examples:
        >>> config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    """

    cache_file: str | os.PathLike | None = None
    covariance_file: str | os.PathLike | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        check_options(self)
        # as texts, which a file can have
        if isinstance(self.cache_file, os.PathLike):
            self.cache_file = os.fspath(self.cache_file)
        if isinstance(self.covariance_file, os.PathLike):
            self.covariance_file = os.fspath(self.covariance_file)


class CordaEigens(NamedTuple):
    """The chosen singular values and vectors of one layer, by PEFT's names.

    Attributes:
        S_WC: The singular values, (r,).
        U_WC: The left singular vectors, (out, r).
        V_WC: The right ones times C⁻¹, (in, r).
    """

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Collects the statistics for a config with ``init_lora_weights="corda"``; call `get_peft_model` with it next.

    Args:
        model: The model, whose layers get an attribute that keeps what is measured; no other change is made. Copies of
            the model have it, too.
        lora_config: The `LoraConfig`.
        run_model: Runs the model on a sample of inputs; not needed if a file of `corda_config` has been written.
        hooked_model: The model that `run_model` runs, if it is another one with the same layers.

    Raises:
        AdaptError: If no linear layer is targeted, or one of them isn't run.
        ValueError: If `run_model` is needed and not given, or the inputs aren't finite.

    Examples:
        >>> model, sample = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda")
        >>> preprocess_corda(model, config, lambda: model(sample))
        >>> model = get_peft_model(model, config)
    """
    options: CordaConfig = lora_config.corda_config or CordaConfig()
    layers = targeted_layers(model, lora_config)

    def eigens() -> dict[str, CordaEigens]:
        mean = functools.partial(_mean_covariances, layers, lora_config, options, run_model, hooked_model or model)
        covariances = from_file_or(mean, options.covariance_file, layers, ["{}"])
        ranks = {path: rank_at(path, lora_config) for path in layers}
        shown = tqdm(layers.items(), desc="Decomposing", disable=not options.verbose)
        return {path: _eigens(layer, covariances[path][0], ranks[path], options.corda_method) for path, layer in shown}

    keys = [f"{{}}.eigens.{name}" for name in CordaEigens._fields]
    found = from_file_or(eigens, options.cache_file, layers, keys)
    for path, layer in layers.items():
        keep(layer, "corda", CordaEigens(*found[path]))


def _mean_covariances(
    layers: Mapping[str, nn.Module],
    config: Any,
    options: CordaConfig,
    run_model: Callable[[], None] | None,
    model: nn.Module,
) -> dict[str, tuple[Tensor]]:
    """Returns the mean of xᵀ x, (in, in), over the calls of each layer."""
    if run_model is None:
        raise ValueError("pass run_model, which runs the model on a sample, unless a file of corda_config is there")
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(path: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach().flatten(0, -2)
        x = x if options.use_float16_for_covariance else x.float()
        x = x / torch.max(x).abs()
        covariance = x.t() @ x
        if not torch.isfinite(covariance).all():
            raise ValueError(f"the inputs of {path} aren't finite, or are all zero; run the model on other ones")
        totals[path] = totals.get(path, 0) + covariance
        counts[path] += 1

    with contextlib.ExitStack() as stack:
        for path, layer in targeted_layers(model, config).items():
            if path in layers:
                hook = functools.partial(add, path)
                stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        with in_mode(model, training=False):
            run_model()
    lacking = [path for path in layers if path not in totals]
    if lacking:
        raise AdaptError(f"run_model doesn't run {lacking[0]}, of which corda needs inputs; leave it out, or run it")
    return {path: (total / counts[path],) for path, total in totals.items()}


def _eigens(layer: nn.Module, covariance: Tensor, rank: int, method: str) -> CordaEigens:
    weight = layer.get_parameter("weight").detach().float()
    weight = weight.T if is_stored_transposed(layer) else weight
    covariance = covariance.float()
    one, mean = torch.eye(len(covariance), device=covariance.device), covariance.diag().mean()
    damping = 0.01
    while True:
        damped = covariance + torch.diag(torch.ones(len(covariance), device=covariance.device) * mean * damping)
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, one) < 0.05:
            break
        damping *= 2
    U, S, Vt = torch.linalg.svd(weight @ damped, full_matrices=False)
    V = (Vt @ inverse).T
    chosen = slice(None, rank) if method == "ipm" else slice(-rank, None)
    return CordaEigens(S[chosen].clone(), U[:, chosen].clone(), V[:, chosen].clone())


@dataclass(frozen=True)
class Corda(Initialisation):
    """The singular vectors that `preprocess_corda` has computed."""

    replaces_weight = subtracts_product = needs_calibration = True

    def refusal(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank above the weight's, and a scale without a root."""
        if scaling <= 0:
            return "corda divides by the scale; make lora_alpha positive"
        return rank_refusal(shape, rank)

    def first(self, context: InitContext) -> InitialFactors:
        """Returns the chosen singular vectors, with the root of the singular value in each factor."""
        eigens: CordaEigens | None = kept(context.module, "corda")
        if eigens is None:
            needed = "init_lora_weights='corda' needs what preprocess_corda(model, config, run_model) measures"
            raise AdaptError(f"{needed} {CALL_FIRST}")
        if len(eigens.S_WC) != context.rank:
            raise AdaptError(
                f"preprocess_corda was called for rank {len(eigens.S_WC)}, not {context.rank}; call it again"
            )
        root = (eigens.S_WC / context.scaling).sqrt()
        return context.subtracting(eigens.V_WC.T * root[:, None], eigens.U_WC * root)
