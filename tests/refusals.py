"""What is refused names its words, and leaves a model as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from torch import nn

from graphpeft.testing import laws


@contextlib.contextmanager
def refused(model: nn.Module, error: type[Exception], *words: str) -> Iterator[None]:
    """Expects an error whose message has all of `words`, and a model that is as it was."""
    before = laws.snapshot(model)
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
    laws.require_unchanged(model, before, "what is refused")
