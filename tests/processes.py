"""Runs checks in two processes, which talk by gloo: each check in both, in turn, and the first that fails is named."""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from graphpeft import LoraConfig, get_peft_model

# importing these in each process would take longer than the checks
multiprocessing.get_context("forkserver").set_forkserver_preload(["peft", "graphpeft", "torch.distributed.fsdp"])

WORLD = 2

Check = Callable[[], None]


class CheckError(AssertionError):
    """A check has failed in a process."""


def run_in_two_processes(checks: dict[str, Check]) -> None:
    """Runs checks, by their names, in two processes.

    Raises:
        torch.multiprocessing.spawn.ProcessRaisedException: With the name of the first check that fails.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        start_processes(_process, (port, folder, checks), nprocs=WORLD, start_method="forkserver")


def _process(rank: int, port: int, folder: str, checks: dict[str, Check]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    os.chdir(folder)
    for name, check in checks.items():
        try:
            check()
        except BaseException as error:
            raise CheckError(f"the check {name!r} fails in process {rank}") from error
        dist.barrier()
    dist.destroy_process_group()


# models and what is compared


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Has two of them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "modules_to_save": {"target_modules": ["up"], "modules_to_save": ["head"]},
    "bias": {"bias": "all"},
}

BATCH = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def rows() -> Tensor:
    """Returns the rows of the batch that are this process's."""
    return BATCH.chunk(WORLD)[dist.get_rank()]


def base() -> Any:
    torch.manual_seed(0)
    return Model()


def adapted(options: dict[str, Any], model: Any = None) -> Any:
    model = base() if model is None else model
    torch.manual_seed(1)
    config: dict[str, Any] = {"target_modules": ["up", "down"], "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **config))


def train(model: Any, x: Tensor, steps: int = 3) -> list[float]:
    """Trains a model, and returns the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mean(losses: list[float]) -> Tensor:
    """Returns the losses of the whole batch, from those of each process."""
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return total / WORLD


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def refuses(reason: str, action: Callable[[], Any]) -> None:
    """Asserts that an action is refused for a reason, which its error names."""
    with pytest.raises((ValueError, RuntimeError), match=re.escape(reason)):
        action()
