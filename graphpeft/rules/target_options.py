"""The options by which a config names modules and parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class TargetOptions(NamedTuple):
    """The options of a config that name modules and parameters; names and meanings are PEFT's.

    None means that the option isn't set, or that the method doesn't have it.

    Attributes:
        target_modules: The modules to adapt: a regular expression, or whole names and their ends.
        exclude_modules: The modules to leave out: a regular expression, or whole names and their ends.
        modules_to_save: The modules to train fully.
        layers_to_transform: The indices of the layers to adapt.
        layers_pattern: The names of containers of layers, before the index.
        target_parameters: The parameters to adapt: whole names and their ends.
        patterns: The options with values for single targets, such as ranks, by option; their keys are regular
            expressions for the ends of names.
    """

    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    target_parameters: Sequence[str] | None = None
    patterns: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
