"""Trains an adapted model in as many processes as torchrun starts, and saves it.

torchrun --nproc-per-node=2 script_of_torchrun.py graphpeft FOLDER
"""

from __future__ import annotations

import importlib
import sys

import torch
import torch.distributed as dist
from loops import adapted, fit
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from with_processes import BATCH, Model


def main(library: str, folder: str) -> None:
    """Trains on this process's rows of the batch."""
    peft = importlib.import_module(library)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model: nn.Module = DistributedDataParallel(adapted(peft, Model(), "up", "down"))
    rows = BATCH.chunk(dist.get_world_size())[dist.get_rank()]
    fit(model, lambda: model(rows).square().mean())
    if dist.get_rank() == 0:
        model.module.save_pretrained(folder)  # type: ignore[operator]
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
