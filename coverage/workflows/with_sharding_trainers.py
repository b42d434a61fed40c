"""Training in two processes that shard the model by FSDP's second version, as accelerate and the Trainer set it up."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import tiny
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from loops import close, trained
from torch.distributed.tensor import DTensor
from trainer_runs import adapted as causal
from trainer_runs import losses, texts, trainer
from two_processes import in_two_processes
from workflow import Values, workflow

TOOL = "FSDP by trainers"
LAYERS = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}


@contextlib.contextmanager
def sharding_on_cpus() -> Iterator[None]:
    """Lets accelerate shard over processes without GPUs, which it does alike, but looks for GPUs before."""
    AcceleratorState._reset_state(True)
    own, plugins = AcceleratorState.__init__, list[Any]()

    def init(state: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(state, *args, fsdp_plugin=fsdp_plugin, **options)
        plugins[:] = plugins if fsdp_plugin is None else [fsdp_plugin]
        if plugins:
            state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugins[0]

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = own
        AcceleratorState._reset_state(True)


def _alone(peft: Any, rows: list[dict[str, Any]]) -> tuple[Any, list[float]]:
    """Returns a model that one process trains on all rows, and the losses."""
    model = causal(peft)
    return model, _steps(model, torch.optim.AdamW(trained(model), lr=0.05), _batch(rows), torch.Tensor.backward)


def _batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _steps(model: Any, optimizer: Any, batch: dict[str, Any], backward: Any) -> list[float]:
    found = []
    for _ in range(3):
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def _mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return (total / dist.get_world_size()).tolist()


@workflow(TOOL, "accelerate's FullyShardedDataParallelPlugin(fsdp_version=2), and the adapter saved")
@in_two_processes
def through_accelerate(peft: Any, folder: Path) -> Values:
    rows = texts(4).rows
    alone, expected = _alone(peft, rows)
    with sharding_on_cpus():
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False, **LAYERS)
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        assert accelerator.is_fsdp2
        model = causal(peft)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=0.05))
        assert all(isinstance(parameter, DTensor) for parameter in trained(model))
        own = _batch(rows[dist.get_rank() :: 2])
        found = _mean(_steps(model, optimizer, own, accelerator.backward))
        close(torch.tensor(found), torch.tensor(expected))
        options = {"state_dict": accelerator.get_state_dict(model), "save_function": accelerator.save}
        accelerator.unwrap_model(model).save_pretrained(
            str(folder), is_main_process=accelerator.is_main_process, **options
        )
        accelerator.wait_for_everyone()
    _has_the_file_of(peft, folder, alone)
    return {"losses": found}


@workflow(
    TOOL, "Transformers' Trainer with fsdp=True, which shards by version 2: the losses of one process, and save_model"
)
@in_two_processes
def through_the_trainer(peft: Any, folder: Path) -> Values:
    rows = texts(4)
    alone, expected = _alone(peft, rows.rows)
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    given = {"per_device_train_batch_size": 2, "fsdp": True, "fsdp_config": config, "save_strategy": "no"}
    given |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    with sharding_on_cpus():
        made = trainer(causal(peft), folder / "run", rows, weight_decay=0.01, **given)
        made.train()
        assert any(isinstance(parameter, DTensor) for parameter in made.model.parameters())
        made.save_model(str(folder / "saved"))
        dist.barrier()
    close(torch.tensor(losses(made)), torch.tensor(expected))
    _has_the_file_of(peft, folder / "saved", alone)
    return {"losses": losses(made)}


def _has_the_file_of(peft: Any, folder: Path, alone: Any) -> None:
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder))
    batch = _batch(texts(4).rows)
    close(loaded.eval()(**batch).logits, alone.eval()(**batch).logits)
