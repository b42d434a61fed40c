"""The adapter that trl adds as the reference of the one that it trains, and into which it copies that one's tensors.

It finds them by their names, ``….default.…``, and copies each to ``….ref.…``. So it leaves out those whose names begin
or end with the adapter's, as trained rows' do in PEFT, too: they are copied here, lest the reference be another model.
"""

from __future__ import annotations

from typing import Any

import torch

from graphpeft.adapters.adapting import known_adapter, modules_of
from graphpeft.graph.holders import has_tensor, tensor_at
from graphpeft.graph.paths import join

_POLICY = "default"
"""The adapter that trl trains."""


@torch.no_grad()
def copy_left_out(model: Any, adapter_name: str) -> None:
    """Copies those tensors of the trained adapter that trl leaves out into those of a new one like it."""
    modules, adapter = modules_of(model), known_adapter(model, adapter_name)
    pairs = zip(adapter.tensor_names(adapter_name), adapter.tensor_names(_POLICY), strict=True)
    for (path, name), (_, source) in pairs:
        if f".{_POLICY}." not in join(path, source) and has_tensor(modules[path], source):
            tensor_at(modules[path], name).copy_(tensor_at(modules[path], source))
