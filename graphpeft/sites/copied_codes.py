"""Lets quantised layers compute on copies of what they hold: a library's first call may pack a weight anew."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from graphpeft.sites.quantised import is_quantised
from graphpeft.sites.quantisers import codes_of, is_known
from graphpeft.transaction import undone_by


def compute_on_copied_codes(model: nn.Module) -> None:
    """Gives quantised layers copies of their tensors, and of what is beside these, until the transaction is undone."""
    for module in model.modules():
        if any(tensor is not None and is_quantised(tensor) for tensor in module._parameters.values()):
            _copy_content(module)


def _copy_content(module: nn.Module) -> None:
    content: dict[str, Any] = vars(module)
    # before the weight is another one
    beside = codes_of(module).beside if is_known(module) else {}
    undone_by(_refill, content, dict(content))
    for kind in ("_parameters", "_buffers"):
        content[kind] = {name: copy.deepcopy(tensor) for name, tensor in content[kind].items()}
    weight = content["_parameters"].get("weight")
    for name, value in beside.items():
        # where the weight has it, too, it is one and the same
        content[name] = getattr(weight, name, None) or copy.copy(value)


def _refill(content: dict[str, Any], kept: dict[str, Any]) -> None:
    content.clear()
    content.update(kept)
