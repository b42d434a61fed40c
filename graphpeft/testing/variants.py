"""Variants of a config: with other sizes, for a second adapter, and with only the mergeable sites."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

from torch import nn

from graphpeft.adapters.state import Adapter
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.model.adapt import explain, get_peft_model
from graphpeft.rules.config import PeftConfig
from graphpeft.rules.options import sizes_of
from graphpeft.rules.report import Report


def with_other_sizes(config: PeftConfig, model: nn.Module, inputs: ExampleInputs) -> PeftConfig:
    """Returns a config of the same method with each size, such as a rank, increased by one if the model accepts it.

    A size counts if tensors of the adapter are larger then, and the model runs with these: a rank does, and neither a
    number of repetitions nor the model's own number of features.
    """
    sizes = sizes_of(config)
    shapes = _shapes(_explained(config, model, inputs)) if sizes else {}
    for name, size in sizes.items():
        try:
            other = dataclasses.replace(config, **{name: size + 1})
            report = _explained(other, model, inputs)
        except ValueError:
            continue  # the size depends on other options, as a table's size on its named entries
        fails = isinstance(report.learning, str)  # the reason why a batch can't run
        if not report.refused and not fails and _shapes(report) != shapes:
            config, shapes = other, _shapes(report)
    return config


def _explained(config: PeftConfig, model: nn.Module, inputs: ExampleInputs) -> Report:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return explain(model, config, example_inputs=inputs)


def _shapes(report: Report) -> dict[str, dict[str, tuple[int, ...]]]:
    """Returns the shapes of an adapter's tensors, by their sites and the rules' names."""
    return {one.site.label: {name: tuple(spec.shape) for name, spec in one.specs.items()} for one in report.adapted}


def of_sites_that_merge(adapter: Adapter, build: Callable[[], nn.Module], inputs: ExampleInputs) -> PeftConfig | None:
    """Returns the config that names only the mergeable sites of an adapter; None if all or none are mergeable."""
    merged = {adapted.site.name for adapted in adapter.sites if adapted.unmergeable is None}
    if not 0 < len(merged) < len(adapter.sites):
        return None
    narrowed = get_peft_model(build(), adapter.config, example_inputs=inputs, where=lambda site: site.name in merged)
    return narrowed.peft_config["default"]
