"""What benchmarks compare has the same names in both libraries, so that they check what they time."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the benchmarks' models."""
    before = sys.modules.pop("models", None)  # the tests have one of this name, too
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    yield importlib.import_module("models")
    del sys.modules["models"]
    if before is not None:
        sys.modules["models"] = before


def test_adapted_models_have_the_same_gradients_by_the_same_names(models: Any) -> None:
    base, tokens = models.llama(16, 1), torch.tensor([[1, 2, 3]])
    gradients = {}
    for library in models.LIBRARIES:
        model = models.adapted(base, library)
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients[library] = models.adapter_gradients(model)
    ours, theirs = gradients["graphpeft"], gradients["PEFT"]
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        models.assert_close(name, gradient, theirs[name])
