"""get_peft_model on models of small linear modules, so that little but the library's own work is measured.

A nest of linear modules has nothing else; a Llama has modules whose code is read, and a config that they all hold.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import median

import torch
from cases import Cases
from models import LIBRARIES, TARGETS, adapt, llama, nest
from rows import Row, Target
from timing import Effort, Ratio, Samples, measure, once
from torch import nn

LAYERS = (25, 100, 400)
LLAMA_LAYERS = 12


def injection_time(effort: Effort) -> Cases:
    """Times both libraries on all models, per target; every measurement adapts a new model."""
    return {"injection": functools.partial(_rows, effort)}


def _rows(effort: Effort) -> list[Row]:
    sizes = {_nest(layers): effort.of(layers, 1) for layers in LAYERS}
    models: dict[str, tuple[Callable[[], nn.Module], int]] = {
        what: (functools.partial(nest, layers), layers * len(TARGETS)) for what, layers in sizes.items()
    }
    layers = effort.of(LLAMA_LAYERS, 1)
    models[_LLAMA] = (functools.partial(llama, 64, layers), layers * len(TARGETS))
    for make, targets in models.values():
        _check(make, targets)
    candidates = {
        _name(library, what): once(make, functools.partial(_adapt, what, library), parts=targets)
        for library in LIBRARIES
        for what, (make, targets) in models.items()
    }
    samples = measure("get_peft_model", candidates, effort)
    growth = [_growth("PEFT", samples, None), _growth("graphpeft", samples, Target.at_most(1.2))]
    return [_row(what, samples) for what in models] + growth


_LLAMA = f"a Llama of {LLAMA_LAYERS} layers, all-linear"


def _adapt(what: str, library: str, model: nn.Module) -> object:
    return adapt(model, library, targets="all-linear" if what == _LLAMA else TARGETS)


def _row(what: str, samples: Samples) -> Row:
    peft, ours = samples[_name("PEFT", what)], samples[_name("graphpeft", what)]
    target = Target.at_most(0.07)
    return Row(
        f"get_peft_model, {what}, per target", None, median(peft), median(ours), "PEFT", Ratio.of(ours, peft), target
    )


def _growth(library: str, samples: Samples, target: Target | None) -> Row:
    few, many = _nest(LAYERS[0]), _nest(LAYERS[-1])
    ratio = Ratio.of(samples[_name(library, many)], samples[_name(library, few)])
    return Row(
        f"{library}'s time per target at {many} to that at {few}",
        None,
        None,
        None,
        "itself",
        ratio,
        target,
        noise=library == "PEFT",
    )


def _name(library: str, what: str) -> str:
    return f"{library} {what}"


def _nest(layers: int) -> str:
    return f"{layers * len(TARGETS)} targets"


def _check(make: Callable[[], nn.Module], targets: int) -> None:
    """Makes sure that both libraries create the same tensors, with the same first values."""
    states = {}
    for library, package in LIBRARIES.items():
        model = make()
        torch.manual_seed(0)
        states[library] = package.get_peft_model_state_dict(adapt(model, library))
    peft, ours = states["PEFT"], states["graphpeft"]
    assert len(peft) == 2 * targets
    assert peft.keys() == ours.keys()
    assert all(torch.equal(peft[key], ours[key]) for key in peft)
