"""What all tests share: no network, one thread, the same random numbers in every run, a compiler that forgets."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import logging

import pytest
import torch

from graphpeft.testing.profiles import load_profile

torch.set_num_threads(1)
# PyTorch notes there all that its exporter and its compiler do, which takes pytest longer to keep than them to do
logging.getLogger("torch.__trace").propagate = False
load_profile()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _compiler() -> None:
    """Forgets the compilations of the tests before, since a process has only eight of a function's code."""
    torch.compiler.reset()
