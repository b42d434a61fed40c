"""Training and evaluation mode for the time of a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from graphpeft.transaction import at_end_of


@contextlib.contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Puts all modules into training or evaluation mode for the time of a context."""
    with contextlib.ExitStack() as stack:
        at_end_of(stack, _set_modes, {module: module.training for module in model.modules()})
        model.train(training)
        yield


def _set_modes(modes: Mapping[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
