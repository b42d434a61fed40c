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


def with_other_sizes(config: PeftConfig, model: nn.Module, inputs: ExampleInputs) -> PeftConfig:
    """Returns a config of the same method with each size, such as a rank, increased by one if the model accepts it.

    Args:
        config: A config that fits the model.
        model: The model, which stays unchanged.
        inputs: Inputs of the model.
    """
    for name, size in sizes_of(config).items():
        try:
            other = dataclasses.replace(config, **{name: size + 1})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = explain(model, other, example_inputs=inputs)
        except ValueError:
            continue  # the size depends on other options, as a table's size on its named entries
        if not report.refused:
            config = other
    return config


def of_sites_that_merge(adapter: Adapter, build: Callable[[], nn.Module], inputs: ExampleInputs) -> PeftConfig | None:
    """Returns the config that names only the mergeable sites of an adapter; None if all or none are mergeable.

    Args:
        adapter: The adapter.
        build: Builds the model.
        inputs: Inputs of the model.
    """
    merged = {adapted.site.name for adapted in adapter.sites if adapted.unmergeable is None}
    if not 0 < len(merged) < len(adapter.sites):
        return None
    narrowed = get_peft_model(build(), adapter.config, example_inputs=inputs, where=lambda site: site.name in merged)
    return narrowed.peft_config["default"]
