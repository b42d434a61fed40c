"""The adapter that trl adds as the reference of the one that it trains, and into which it copies that one's tensors.

It finds them by their names, ``….default.…``, and copies each to ``….ref.…``. Tensors that the model itself has, as a
prompt's, have nothing before the adapter's name, so trl leaves them out, and they are copied here.
"""

from __future__ import annotations

from typing import Any

import torch

from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.graph.holders import has_tensor, name_at, tensor_at

_POLICY = "default"
"""The adapter that trl trains."""


@torch.no_grad()
def copy_at_the_model(model: Any, adapter_name: str) -> None:
    """Copies the tensors that `model` itself has for the trained adapter into those of a new one like it."""
    (root, *_) = modules_of(model).values()
    for path, name in known_adapter(model, adapter_name).tensor_names(adapter_name):
        source = name_at(_POLICY, name.removeprefix(name_at(adapter_name, "")))
        if path == "" and has_tensor(root, name) and has_tensor(root, source):
            tensor_at(root, name).copy_(tensor_at(root, source))
