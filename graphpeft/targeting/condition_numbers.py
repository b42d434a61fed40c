"""Targets by the condition numbers of weights: those of low ones, which stretch all directions about alike.

    κ(W) = σ₁ / (σₙ + 1e-8)            σ₁ the largest singular value of W, σₙ the smallest

The names and numbers are those of PEFT's ``helpers.py``. A parameter of several matrices has the mean of their κ.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from graphpeft.graph.overrides import own_parameter
from graphpeft.graph.paths import join, modules_by_path
from graphpeft.graph.values import loaded
from graphpeft.sites.layer_kinds import is_linear
from graphpeft.sites.quantised import is_quantised
from graphpeft.sites.quantisers import numbers_of

_EXPERTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
_SMALLEST = 1e-8


class KappaTuneSelector:
    """Orders the weights of a model by their condition numbers, which are computed once, when they are asked for first.

    Args:
        model: The model. If it is adapted, its weights are meant without adapters, unless these are merged.
        max_dim_size_to_analyze: The most rows or columns of a matrix; larger ones are left out, since the singular
            values of a matrix take time.
        moe_param_suffixes: How the names of parameters end that hold a matrix for each expert; None for
            ``.gate_up_proj``, ``.down_proj``, ``.gate_proj`` and ``.up_proj``.
        show_progress: Accepted for compatibility with PEFT; nothing is shown.

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.copy_(torch.diag(torch.tensor([8.0, 1, 1, 1])))
        ...     _ = model[1].weight.copy_(torch.eye(4))
        >>> KappaTuneSelector(model).get_best_targets(num_modules=1)
        ['1']
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self._model, self._most = model, max_dim_size_to_analyze
        self._suffixes = _EXPERTS if moe_param_suffixes is None else tuple(moe_param_suffixes)

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Returns the paths of linear layers, that with the lowest condition number first.

        Args:
            top_p: The share of the layers, in [0, 1]; one layer at least.
            num_modules: The number of the layers.
            threshold: The highest condition number. One of the three may be given; without any, all layers are meant.

        Returns:
            The paths, which `target_modules` takes.

        Raises:
            ValueError: If several are given, or `top_p` is outside of [0, 1].
        """
        return _first(self._of_layers, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Returns the names of parameters of experts, that with the lowest condition number first.

        Args:
            top_p: As in `get_best_targets`, for parameters.
            num_modules: The number of the parameters.
            threshold: The highest condition number.

        Returns:
            The names, which `target_parameters` takes.

        Raises:
            ValueError: If several are given, or `top_p` is outside of [0, 1].
        """
        return _first(self._of_parameters, top_p, num_modules, threshold)

    @functools.cached_property
    def _of_layers(self) -> dict[str, float]:
        found = {}
        for path, module in modules_by_path(self._model).items():
            if is_linear(module):
                with loaded(module):
                    self._note(found, path, _numbers(module)[None])
        return found

    @functools.cached_property
    def _of_parameters(self) -> dict[str, float]:
        found = {}
        for path, module in modules_by_path(self._model).items():
            for name, parameter in module._parameters.items():
                full = join(path, name)
                if parameter is not None and parameter.ndim == 3 and f".{full}".endswith(self._suffixes):
                    with loaded(module):
                        self._note(found, full, own_parameter(module, name).detach())
        return found

    def _note(self, found: dict[str, float], name: str, matrices: Tensor) -> None:
        """Notes the mean κ of matrices, (number, rows, columns), unless they are too large."""
        if max(matrices.shape[1:]) <= self._most:
            numbers = [_condition_number(matrix) for matrix in matrices]
            found[name] = sum(numbers) / len(numbers)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Returns the linear layers, and the parameters of experts, whose weights have the lowest condition numbers.

    Args:
        model: The model.
        top_p: The share of the layers, and that of the parameters, in [0, 1]; one of each at least.
        max_dim_size_to_analyze: The most rows or columns of a matrix; larger ones are left out.
        moe_param_suffixes: How the names of parameters end that hold a matrix for each expert, as for
            `KappaTuneSelector`.
        show_progress: Accepted for compatibility with PEFT; nothing is shown.

    Returns:
        The options `target_modules` and `target_parameters` of a config; the second is None where there are no experts.

    Raises:
        ValueError: If `top_p` is outside of [0, 1].

    Examples:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        >>> config = LoraConfig(**find_kappa_target_modules(model, top_p=0.5))
        >>> len(config.target_modules)
        1
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p),
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }


def _numbers(layer: nn.Module) -> Tensor:
    weight = own_parameter(layer, "weight")
    return numbers_of(weight, getattr(layer, "state", None)) if is_quantised(weight) else weight.detach()


def _condition_number(matrix: Tensor) -> float:
    values = torch.linalg.svdvals(matrix.float())
    return float(values[0] / (values[-1] + _SMALLEST))


def _first(
    numbers: Mapping[str, float], top_p: float | None, num_modules: int | None, threshold: float | None
) -> list[str]:
    given = [each for each in (top_p, num_modules, threshold) if each is not None]
    if len(given) > 1:
        raise ValueError("pass one of top_p, num_modules and threshold, since each decides alone")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p is {top_p}, and a share of the weights is between 0 and 1")
    ordered = sorted(numbers, key=lambda name: numbers[name])
    if threshold is not None:
        return [name for name in ordered if numbers[name] <= threshold]
    if top_p is not None:
        num_modules = max(1, int(len(ordered) * top_p))
    return ordered[:num_modules]
