"""CorDA: first values from the weight W in the directions that a sample of inputs has.

    W C = U S Vᵀ,  C = mean of xᵀ x:     B = U_r √(S_r/s),  A = √(S_r/s) (V_rᵀ C⁻¹),     W becomes W − s B A

r are the first singular values in the instruction-previewed mode ("ipm"), and the last ones in the knowledge-preserved
mode ("kpm"). C is C + d · mean(diag C) · 1, where d begins with 0.01 and is doubled until C can be inverted. Source:
Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", arXiv 2406.05223; the numbers
are those of PEFT's ``tuners/lora/corda.py``, which takes samples of one sequence at a time; here a batch can have many.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from graphpeft.adapters.plan import AdaptError
from graphpeft.methods.lora.beginning import Beginning, First, refused_rank, taken_from
from graphpeft.methods.lora.factors import rank_at
from graphpeft.methods.lora.measured import (
    Measurements,
    cached,
    in_mode,
    is_stored_transposed,
    read_cache,
    targeted_layers,
    write_cache,
)
from graphpeft.rules.options import check_options


@dataclass
class CordaConfig:
    """The options of CorDA; the names, defaults and meanings are PEFT's.

    Attributes:
        cache_file: Where the singular vectors are kept for another run.
        covariance_file: Where the means of xᵀ x are kept, which serve other ranks too.
        corda_method: ``"ipm"`` or ``"kpm"``.
        verbose: Whether to show a progress bar.
        use_float16_for_covariance: Whether the inputs keep their dtype where they are multiplied.
        prune_temporary_fields: Read and written as PEFT does; no module gets any fields here.

    Example:
        >>> config = LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: Literal["ipm", "kpm"] = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        check_options(self)


class CordaEigens(NamedTuple):
    """The chosen singular values and vectors of one layer, by PEFT's names."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


_EIGENS: Measurements = Measurements()


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], None] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Measures what a config with ``init_lora_weights="corda"`` needs; `get_peft_model` with it comes next.

    Args:
        model: The model, which stays as it is.
        lora_config: The config.
        run_model: Runs the model on a sample of inputs; not needed where a file of `corda_config` has been written.
        hooked_model: The model that `run_model` runs, if it is another one with the same layers.

    Raises:
        AdaptError: If no linear layer is targeted, or one of them isn't run.
        ValueError: If `run_model` is needed and not given, or the inputs aren't finite.

    Example:
        >>> model, sample = nn.Sequential(nn.Linear(16, 8)), torch.randn(64, 16)
        >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights="corda")
        >>> preprocess_corda(model, config, lambda: model(sample))
        >>> model = get_peft_model(model, config)
    """
    options: CordaConfig = lora_config.corda_config or CordaConfig()
    layers = targeted_layers(model, lora_config)
    ranks = {path: rank_at(path, lora_config) for path in layers}
    cache = read_cache(options.cache_file)
    if cache is not None:
        found = {path: _from_cache(cache, path, options.cache_file, layer) for path, layer in layers.items()}
    else:
        covariances = _covariances(model, layers, lora_config, options, run_model, hooked_model)
        shown = tqdm(layers.items(), desc="Decomposing", disable=not options.verbose)
        found = {path: _eigens(layer, covariances[path], ranks[path], options.corda_method) for path, layer in shown}
        names = CordaEigens._fields
        write_cache(
            options.cache_file,
            {f"{path}.eigens.{name}": getattr(eigens, name) for path, eigens in found.items() for name in names},
        )
    for path, layer in layers.items():
        _EIGENS[layer] = found[path]


def _from_cache(cache: dict[str, Tensor], path: str, file: str | None, layer: nn.Module) -> CordaEigens:
    return CordaEigens(*(cached(cache, f"{path}.eigens.{name}", file, layer) for name in CordaEigens._fields))


def _covariances(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    config: Any,
    options: CordaConfig,
    run_model: Callable[[], None] | None,
    hooked_model: nn.Module | None,
) -> dict[str, Tensor]:
    cache = read_cache(options.covariance_file)
    if cache is not None:
        return {path: cached(cache, path, options.covariance_file, layer) for path, layer in layers.items()}
    if run_model is None:
        raise ValueError("pass run_model, which runs the model on a sample, unless a file of corda_config is there")
    ran = model if hooked_model is None else hooked_model
    measured: dict[str, list[Any]] = {}

    def measure(path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = (args[0] if args else kwargs["input"]).detach().flatten(0, -2)
        x = x if options.use_float16_for_covariance else x.float()
        x = x / torch.max(x).abs()
        covariance = x.t() @ x
        if not torch.isfinite(covariance).all():
            raise ValueError(f"the inputs of {path} aren't finite, or are all zero; run the model on other ones")
        total, count = measured.get(path, (0, 0))
        measured[path] = [total + covariance, count + 1]

    with contextlib.ExitStack() as stack:
        for path, layer in targeted_layers(ran, config).items():
            hook = _hook(functools.partial(measure, path))
            stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
        with in_mode(ran, training=False):
            run_model()
    lacking = [path for path in layers if path not in measured]
    if lacking:
        raise AdaptError(f"run_model doesn't run {lacking[0]}, of which corda needs inputs; leave it out, or run it")
    means = {path: total / count for path, (total, count) in measured.items() if path in layers}
    write_cache(options.covariance_file, means)
    return means


def _hook(measure: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Callable[..., None]:
    return lambda _, args, kwargs: measure(args, kwargs)


def _eigens(layer: nn.Module, covariance: Tensor, rank: int, method: str) -> CordaEigens:
    weight = layer.get_parameter("weight").detach().float()
    weight = weight.T if is_stored_transposed(layer) else weight
    covariance = covariance.float()
    one, mean = torch.eye(len(covariance), device=covariance.device), covariance.diagonal().mean()
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
class Corda:
    """The singular vectors that `preprocess_corda` has found."""

    replaces_weight = takes_product = True
    b_is_trained = True
    is_measured = True

    def refused(self, shape: tuple[int, int], rank: int, scaling: float) -> str | None:
        """Refuses a rank beyond the weight's, and a scale without a root."""
        if scaling <= 0:
            return "corda divides by the scale; make lora_alpha positive"
        return refused_rank(shape, rank)

    def first(self, given: Beginning) -> First:
        """Returns the chosen singular vectors, each with a half of its singular value.

        Raises:
            AdaptError: If they weren't measured, or for another rank.
        """
        eigens: CordaEigens | None = _EIGENS.get(given.module)
        if eigens is None:
            raise AdaptError(
                "init_lora_weights='corda' needs what preprocess_corda(model, config, run_model) measures on this very "
                "model; call it first. An adapter is loaded without that if it was saved with "
                "path_initial_model_for_weight_conversion"
            )
        if len(eigens.S_WC) != given.rank:
            raise AdaptError(
                f"preprocess_corda was called for rank {len(eigens.S_WC)}, not {given.rank}; call it again"
            )
        root = (eigens.S_WC / given.scaling).sqrt()
        return taken_from(given, eigens.V_WC.T * root[:, None], eigens.U_WC * root)
