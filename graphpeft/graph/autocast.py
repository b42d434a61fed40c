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


def depth_of_autocast() -> int:
    """Returns how many regions of autocast are around the caller, also of those that switch it off."""
    inside = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    return inside - 1
