"""Attention masks of Transformers, computed by one call of the graph.

``transformers.masking_utils.create_*_mask`` return None for a mask of ones when they see real tensors and a mask when
they see fake ones, so a graph must neither follow nor run them as they are: it always materialises the mask.
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
ASKED_ABOUT = ("inputs_embeds", "input_embeds")
"""Arguments of which a mask function uses no values, only the shape, the dtype and the device."""


def attention_mask(create: str, *args: Any, **kwargs: Any) -> Any:
    """Calls ``transformers.masking_utils.<create>`` with every shortcut to a mask of None switched off."""
    # PyTorch 2.10 compiles no import from Transformers, whose module isn't one of Python's class
    function = getattr(sys.modules.get(_MASKING_UTILS) or importlib.import_module(_MASKING_UTILS), create)
    accepted = inspect.signature(function).parameters
    return function(*args, **kwargs, **{skip: False for skip in _SKIPS if skip in accepted and skip not in kwargs})


def mask_functions_seen_by(root: nn.Module) -> Iterator[tuple[ModuleType, str]]:
    """Yields the Python modules that define `root`'s classes with the names of mask functions that they imported."""
    masking_utils = sys.modules.get(_MASKING_UTILS)
    if masking_utils is None:
        return
    names = [name for name in vars(masking_utils) if name.startswith("create_") and name.endswith("_mask")]
    for source in sorted({cls.__module__ for module in root.modules() for cls in type(module).__mro__}):
        module = sys.modules.get(source)
        for name in names:
            if module is not None and getattr(module, name, None) is getattr(masking_utils, name):
                yield module, name
