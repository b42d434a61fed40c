"""Gives A and B their first values, by the config's `init_lora_weights`.

Where a part of the weight is moved into them, the module reads a frozen residual in its place while the adapter acts;
its own weight stays as it is. The residual isn't saved: a loaded adapter computes it from the weight again, as in PEFT,
which changes the weight itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphpeft.graph import ops
from graphpeft.graph.computed_weights import read_weight
from graphpeft.methods.lora.factors import draw, draw_as_layers, rank_of, scaling_of
from graphpeft.methods.lora.init.base import InitContext, Initialisation
from graphpeft.methods.lora.init.corda import Corda
from graphpeft.methods.lora.init.eva_directions import Eva
from graphpeft.methods.lora.init.from_weight import Loftq, Mica, Olora, Orthogonal, Pissa
from graphpeft.methods.lora.init.lora_ga import LoraGa
from graphpeft.sites.site import Site
from graphpeft.wording import shown

RANDOM = (True, False, "gaussian")
"""Values of `init_lora_weights` that don't depend on the weight."""

_BY_NAME: dict[str, Initialisation] = {
    "pissa": Pissa(),
    "olora": Olora(),
    "mica": Mica(),
    "orthogonal": Orthogonal(),
    "corda": Corda(),
    "lora_ga": LoraGa(),
    "eva": Eva(),
    "loftq": Loftq(),
}
_WITH_STEPS = re.compile(r"pissa_niter_(\d{1,9})")
_MOST_STEPS = 100
"""More steps change no digit."""


def initialisation_of(kind: bool | str) -> Initialisation | None:
    """Returns the initialisation that the config's `init_lora_weights` names, or None for random values."""
    if kind in RANDOM:
        return None
    steps = _WITH_STEPS.fullmatch(str(kind))
    if steps and int(steps[1]) > _MOST_STEPS:
        raise ValueError(f"init_lora_weights={kind!r} asks for more than {_MOST_STEPS} steps; choose fewer")
    found = Pissa(int(steps[1])) if steps else _BY_NAME.get(str(kind))
    if found is None:
        known = ", ".join(map(repr, (*RANDOM, *_BY_NAME, "pissa_niter_<steps>")))
        raise ValueError(f"init_lora_weights={shown(kind)} is not supported; choose one of {known}")
    return found


def traits_of(config: Any) -> type[Initialisation]:
    """Returns the class of the config's initialisation, which says what it does; the base class for random values."""
    found = initialisation_of(config.init_lora_weights)
    return Initialisation if found is None else type(found)


def refusal(site: Site, config: Any, flipped: bool) -> str | None:
    """Returns the reason why the config's initialisation can't be done at a matrix, or None."""
    found, named = initialisation_of(config.init_lora_weights), f"init_lora_weights={config.init_lora_weights!r}"
    if found is None:
        return None
    if found.needs_calibration and not (site.is_layer and site.layout is ops.Linear):
        return f"{named} is measured on linear layers, which it is none of"
    if site.call is not None and (found.needs_calibration or found.replaces_weight):
        return f"{named} is for a weight as a whole, and it is one of its calls"
    if not site.dtype.is_floating_point:
        return f"{named} looks at its values, which are {site.dtype}"
    rows, columns = reversed(site.shape) if flipped else site.shape
    return found.refusal((rows, columns), rank_of(site, config), scaling_of(site, config))


def refusal_unless_random(config: Any, what: str) -> str | None:
    """Returns the reason why the config's initialisation can't be done where there is no matrix, or None."""
    if config.init_lora_weights in RANDOM:
        return None
    return f"init_lora_weights={config.init_lora_weights!r} is for linear weights, and it is {what}"


def initialise(
    parameters: Mapping[str, Tensor], site: Site, config: Any, module: nn.Module, flipped: bool
) -> Mapping[str, Tensor] | None:
    """Gives A and B of a matrix their first values, as PEFT does, so that equal seeds give equal values."""
    found, rank = initialisation_of(config.init_lora_weights), rank_of(site, config)
    if found is None:
        draw(parameters, config.init_lora_weights, rank)
        return None
    draw_as_layers(parameters)
    weight, scaling = weight_of(site, module), scaling_of(site, config)
    weight = weight.T if flipped else weight
    first = found.first(InitContext(weight, rank, scaling, parameters["lora_A"], module, config))
    parameters["lora_A"].copy_(first.A)
    parameters["lora_B"].copy_(first.B)
    if first.residual is None:
        return None
    return {site.attribute: (first.residual.T if flipped else first.residual).contiguous()}


def weight_of(site: Site, module: nn.Module) -> Tensor:
    """Returns the values of a weight, in single precision at least."""
    weight = read_weight(module, site.attribute)
    assert weight is not None
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
