"""get_peft_model on models of many small linear modules, so that little but the library's own work is measured."""

from __future__ import annotations

import functools
import statistics

import torch
from models import LIBRARIES, TARGETS, adapt, nest
from timing import Ratio, Row, Target, measure, once

LAYERS = (25, 100, 400)


def injection_time(rounds: int) -> list[Row]:
    """Times both libraries on all sizes; every measurement adapts a new model."""
    _check()
    candidates = {
        f"{library} {layers}": once(functools.partial(nest, layers), functools.partial(adapt, library=library))
        for library in LIBRARIES
        for layers in LAYERS
    }
    samples = measure("get_peft_model", candidates, rounds)
    per_target = {
        (library, layers): [seconds / (layers * len(TARGETS)) for seconds in samples[f"{library} {layers}"]]
        for library in LIBRARIES
        for layers in LAYERS
    }
    medians = {key: statistics.median(seconds) for key, seconds in per_target.items()}
    rows = []
    for layers in LAYERS:
        peft, ours = ((library, layers) for library in ("PEFT", "graphpeft"))
        rows.append(
            Row(
                f"get_peft_model, {layers * len(TARGETS)} targets, per target",
                None,
                medians[peft],
                medians[ours],
                "PEFT",
                Ratio.of(per_target[ours], per_target[peft]),
                Target.at_most(0.05),
            )
        )
    few, many = LAYERS[0], LAYERS[-1]
    what = f"per target at {many * len(TARGETS)} to that at {few * len(TARGETS)}"
    for library, target in (("PEFT", None), ("graphpeft", Target.at_most(1.2))):
        ratio = Ratio.of(per_target[library, many], per_target[library, few])
        rows.append(Row(f"{library}'s {what}", None, None, None, "itself", ratio, target))
    return rows


def _check() -> None:
    """Makes sure that both libraries create the same tensors, with the same first values."""
    states = {}
    for library, package in LIBRARIES.items():
        model = nest(LAYERS[0])
        torch.manual_seed(0)
        states[library] = package.get_peft_model_state_dict(adapt(model, library))
    peft, ours = states["PEFT"], states["graphpeft"]
    assert len(peft) == 2 * LAYERS[0] * len(TARGETS)
    assert peft.keys() == ours.keys()
    assert all(torch.equal(peft[key], ours[key]) for key in peft)
