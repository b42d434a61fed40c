"""What all tests share: no network, one thread, the same random numbers in every run, a compiler that forgets."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub, which reads it once

import logging

import pytest
import torch

from graphpeft.testing.profiles import load_profile

torch.set_num_threads(1)
# a device that isn't there notes each seed for later, with the stack as text, which took a third of the laws' time
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None
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
