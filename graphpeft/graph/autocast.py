"""Whether operations are in a region of autocast."""

from __future__ import annotations

import torch
from torch.amp.autocast_mode import is_autocast_available


def is_in_autocast(device: str) -> bool:
    """Returns whether operations on a kind of device are in a region of autocast; on the meta device none is.

    Args:
        device: The kind, as ``"cpu"``.
    """
    return is_autocast_available(device) and torch.is_autocast_enabled(device)
