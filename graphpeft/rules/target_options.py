"""The options by which a config names modules and parameters."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class TargetOptions(NamedTuple):
    """What a config names; the names and meanings are those of PEFT's options.

    An option that is None isn't set, or the method doesn't have it.

    Attributes:
        target_modules: The modules to adapt: a regular expression, or whole names and their ends.
        exclude_modules: Those that are left out, likewise.
        modules_to_save: Those that are fully trained.
        layers_to_transform: The indices of the layers to adapt.
        layers_pattern: The names in front of such an index.
        target_parameters: The parameters to adapt: whole names and their ends.
        patterns: The options that give targets values of their own, such as ranks, by regular expressions for the ends
            of their names.
    """

    target_modules: Collection[str] | str | None = None
    exclude_modules: Collection[str] | str | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: Collection[int] | int | None = None
    layers_pattern: Collection[str] | str | None = None
    target_parameters: Sequence[str] | None = None
    patterns: Mapping[str, Mapping[str, Any]] = MappingProxyType({})
