"""Other configs of a method: for a second adapter beside one, and for the sites alone that can be merged."""

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
    """Returns a config of the same method whose sizes, such as a rank, are one more, each where the model takes that.

    Args:
        config: A config that fits the model.
        model: The model, which stays as it is.
        inputs: Inputs of the model.
    """
    for name, size in sizes_of(config).items():
        try:
            other = dataclasses.replace(config, **{name: size + 1})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                report = explain(model, other, example_inputs=inputs)
        except ValueError:
            continue  # it belongs to something else, as the size of a table to the entries that are named for it
        if not report.refused:
            config = other
    return config


def of_sites_that_merge(adapter: Adapter, build: Callable[[], nn.Module], inputs: ExampleInputs) -> PeftConfig | None:
    """Returns the config that names those sites of an adapter alone that can be merged, if these are some and not all.

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
