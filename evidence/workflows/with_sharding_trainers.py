"""Training in two processes that shard the model by FSDP's second version, as accelerate and the Trainer set it up."""

from __future__ import annotations

import contextlib
import shutil
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
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from trainer_runs import adapted as causal
from trainer_runs import losses, texts, trainer
from two_processes import in_two_new_processes, in_two_processes
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


@workflow(TOOL, "the Trainer's checkpoint of full state dicts, resumed in new processes: optimizer and weights go on")
def resumed_from_full_state_dicts(peft: Any, folder: Path) -> Values:
    return _resumed(peft, folder / "FULL_STATE_DICT", "optimizer.bin")


@workflow(
    TOOL, "the Trainer's checkpoint of sharded state dicts, resumed in new processes: optimizer and weights go on"
)
def resumed_from_sharded_state_dicts(peft: Any, folder: Path) -> Values:
    return _resumed(peft, folder / "SHARDED_STATE_DICT", "optimizer_0/.metadata")


def _resumed(peft: Any, folder: Path, file_of_the_optimizer: str) -> Values:
    """Compares a training that goes on from its second step with the one that saved it and wasn't interrupted."""
    stages = [folder / name for name in ("through", "resumed")]
    for stage in stages:
        stage.mkdir(parents=True)
    through = trained_four_steps(peft, stages[0])
    assert (folder / "run" / "checkpoint-2" / file_of_the_optimizer).is_file()
    shutil.rmtree(folder / "run" / "checkpoint-4")
    resumed = in_two_new_processes(trained_four_steps)(peft, stages[1])
    close(torch.tensor(resumed["losses"]), torch.tensor(through["losses"]), 1e-6)
    tensors = [load_file(stage / "saved" / "adapter_model.safetensors") for stage in stages]
    assert all((each.abs() > 0).any() for each in tensors[0].values())
    torch.testing.assert_close(*tensors, rtol=1e-6, atol=1e-6)
    return resumed


@in_two_processes
def trained_four_steps(peft: Any, folder: Path) -> Values:
    """Trains with a schedule over four steps and a checkpoint after two, or goes on from that one.

    Args:
        peft: The library.
        folder: Where the adapter is saved; its name says whether training is resumed. The checkpoints are in `run`
            beside it, and the folder around both has the name of the kind of state dicts.
    """
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    config["state_dict_type"] = folder.parent.name
    given = {"per_device_train_batch_size": 2, "fsdp": True, "fsdp_config": config, "max_steps": 4, "save_steps": 2}
    given |= {"lr_scheduler_type": "linear", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    output = folder.parent / "run"
    with sharding_on_cpus():
        made = trainer(causal(peft), output, texts(12), weight_decay=0.01, **given)
        made.train(resume_from_checkpoint=str(output / "checkpoint-2") if folder.name == "resumed" else None)
        made.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")  # without which it saves no adapter
        made.save_model(str(folder / "saved"))
        dist.barrier()
    assert len(losses(made)) == 4
    return {"losses": losses(made)}


def _has_the_file_of(peft: Any, folder: Path, alone: Any) -> None:
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder))
    batch = _batch(texts(4).rows)
    close(loaded.eval()(**batch).logits, alone.eval()(**batch).logits)
