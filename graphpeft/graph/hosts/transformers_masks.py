"""Attention masks of Transformers, each computed by one call node.

``transformers.masking_utils.create_*_mask`` return None for a mask of ones on real tensors, but a mask on fake tensors.
So a graph must neither trace these functions nor call them unchanged: it always materialises the mask.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from torch import nn

_MASKING_UTILS = "transformers.masking_utils"
_SKIPS = ("allow_is_causal_skip", "allow_is_bidirectional_skip")
METADATA_ARGUMENTS = ("inputs_embeds", "input_embeds")
"""Arguments of a mask function that it reads only for their shape, dtype and device."""


def attention_mask(create: str, *args: Any, **kwargs: Any) -> Any:
    """Calls ``transformers.masking_utils.<create>`` with every shortcut to a mask of None disabled."""
    # PyTorch 2.10 can't compile an import from Transformers, whose module object has a class of its own
    function = getattr(sys.modules.get(_MASKING_UTILS) or importlib.import_module(_MASKING_UTILS), create)
    accepted = inspect.signature(function).parameters
    return function(*args, **kwargs, **{skip: False for skip in _SKIPS if skip in accepted and skip not in kwargs})


def mask_functions_seen_by(root: nn.Module) -> Iterator[tuple[ModuleType, str]]:
    """Yields the Python modules that define `root`'s classes, each with the name of a mask function it has imported."""
    masking_utils = sys.modules.get(_MASKING_UTILS)
    if masking_utils is None:
        return
    names = [name for name in vars(masking_utils) if name.startswith("create_") and name.endswith("_mask")]
    for source in sorted({cls.__module__ for module in root.modules() for cls in type(module).__mro__}):
        module = sys.modules.get(source)
        for name in names:
            if module is not None and getattr(module, name, None) is getattr(masking_utils, name):
                yield module, name
