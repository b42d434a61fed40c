"""get_peft_model on models of many small linear modules, so that little but the library's own work is measured."""

from __future__ import annotations

import functools
from statistics import median

import torch
from models import LIBRARIES, TARGETS, adapt, nest
from timing import Ratio, Row, Samples, Target, measure, once

LAYERS = (25, 100, 400)


def injection_time(rounds: int) -> list[Row]:
    """Times both libraries on all sizes, per target; every measurement adapts a new model."""
    _check()
    candidates = {
        _name(library, layers): once(
            functools.partial(nest, layers), functools.partial(adapt, library=library), parts=_targets(layers)
        )
        for library in LIBRARIES
        for layers in LAYERS
    }
    samples = measure("get_peft_model", candidates, rounds)
    growth = [_growth("PEFT", samples, None), _growth("graphpeft", samples, Target.at_most(1.2))]
    return [_row(layers, samples) for layers in LAYERS] + growth


def _row(layers: int, samples: Samples) -> Row:
    peft, ours = samples[_name("PEFT", layers)], samples[_name("graphpeft", layers)]
    what = f"get_peft_model, {_targets(layers)} targets, per target"
    return Row(what, None, median(peft), median(ours), "PEFT", Ratio.of(ours, peft), Target.at_most(0.05))


def _growth(library: str, samples: Samples, target: Target | None) -> Row:
    few, many = LAYERS[0], LAYERS[-1]
    what = f"{library}'s time per target at {_targets(many)} to that at {_targets(few)}"
    ratio = Ratio.of(samples[_name(library, many)], samples[_name(library, few)])
    return Row(what, None, None, None, "itself", ratio, target)


def _name(library: str, layers: int) -> str:
    return f"{library} {layers}"


def _targets(layers: int) -> int:
    return layers * len(TARGETS)


def _check() -> None:
    """Makes sure that both libraries create the same tensors, with the same first values."""
    states = {}
    for library, package in LIBRARIES.items():
        model = nest(LAYERS[0])
        torch.manual_seed(0)
        states[library] = package.get_peft_model_state_dict(adapt(model, library))
    peft, ours = states["PEFT"], states["graphpeft"]
    assert len(peft) == 2 * _targets(LAYERS[0])
    assert peft.keys() == ours.keys()
    assert all(torch.equal(peft[key], ours[key]) for key in peft)
