"""Training in two processes."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import tiny
import torch
import torch.distributed as dist
import transformers
from loops import adapted, close, fit, trained
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from two_processes import WORLD, in_two_processes
from workflow import Values, workflow

TOOL = "several processes"
FSDP1: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
FULL = StateDictOptions(full_state_dict=True)


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


BATCH = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


@workflow(TOOL, "DistributedDataParallel trains as one process does, and its adapter is saved")
@in_two_processes
def ddp(peft: Any, folder: Path) -> Values:
    alone, model = _adapted(peft), _adapted(peft)
    wrapper = DistributedDataParallel(model)
    losses = _trains_as_alone(wrapper, alone)
    if dist.get_rank() == 0:
        wrapper.module.save_pretrained(str(folder))
    dist.barrier()
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(BATCH), alone(BATCH))
    return {"losses": losses}


@workflow(TOOL, "DistributedDataParallel with no_sync over two batches and modules_to_save")
@in_two_processes
def no_sync(peft: Any, folder: Path) -> Values:
    wrapper = DistributedDataParallel(_adapted(peft, modules_to_save=["head"]))
    with wrapper.no_sync():
        wrapper(_rows()).square().mean().backward()
    wrapper(_rows() + 1).square().mean().backward()
    return {"gradients": sum(parameter.grad.square().sum().item() for parameter in trained(wrapper))}


@workflow(TOOL, "DistributedDataParallel with a static graph and gradient checkpointing")
@in_two_processes
def checkpointed(peft: Any, folder: Path) -> Values:
    model = adapted(peft, tiny.llama(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    wrapper = DistributedDataParallel(model.train(), static_graph=True)
    ids = torch.arange(6).reshape(1, 6) + 5 * dist.get_rank() + 3
    return {"losses": _mean(fit(wrapper, lambda: wrapper(input_ids=ids, labels=ids).loss))}


@workflow(TOOL, "DistributedDataParallel with ZeroRedundancyOptimizer")
@in_two_processes
def zero_redundancy(peft: Any, folder: Path) -> Values:
    wrapper = DistributedDataParallel(_adapted(peft))
    optimizer = ZeroRedundancyOptimizer(trained(wrapper), torch.optim.AdamW, lr=0.05)
    losses = []
    for _ in range(3):
        loss = wrapper(_rows()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": _mean(losses)}


@workflow(TOOL, "accelerate's prepare in two processes")
@in_two_processes
def through_accelerate(peft: Any, folder: Path) -> Values:
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == WORLD
    model = _adapted(peft)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained(model), lr=0.05))
    losses = []
    for _ in range(3):
        loss = model(_rows()).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    unwrapped = accelerator.unwrap_model(model)
    options = {"state_dict": accelerator.get_state_dict(model), "save_function": accelerator.save}
    unwrapped.save_pretrained(str(folder), is_main_process=accelerator.is_main_process, **options)
    accelerator.wait_for_everyone()
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(BATCH), unwrapped(BATCH))
    return {"losses": _mean(losses)}


@workflow(TOOL, "Transformers' Trainer in two processes: checkpoints hold the adapter, and are resumed")
@in_two_processes
def trainer(peft: Any, folder: Path) -> Values:
    accelerate.state.AcceleratorState._reset_state(True)

    def trained_until(steps: int, **options: Any) -> Any:
        model = adapted(peft, tiny.llama(), "q_proj", "v_proj", task_type="CAUSAL_LM")
        settings = {"save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.02}
        arguments = transformers.TrainingArguments(
            str(folder), max_steps=steps, use_cpu=True, report_to=[], disable_tqdm=True, **settings
        )
        rows = [{name: torch.arange(6) + start for name in ("input_ids", "labels")} for start in range(3, 19)]
        found = transformers.Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
        found.train(**options)
        dist.barrier()
        return found

    trained_until(2)
    resumed = trained_until(4, resume_from_checkpoint=True)
    files = {file.name for file in (folder / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in files
    return {"losses": [entry["loss"] for entry in resumed.state.log_history if "loss" in entry]}


@workflow(TOOL, "fully_shard of each layer and the root, and the adapter's tensors gathered")
@in_two_processes
def fully_sharded(peft: Any, folder: Path) -> Values:
    alone, model = _adapted(peft), _sharded(_adapted(peft))
    losses = _trains_as_alone(model, alone)
    full = get_model_state_dict(model, options=FULL)
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=full)
    dist.barrier()
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(BATCH), alone(BATCH))
    return {"losses": losses}


@workflow(TOOL, "fully_shard of the root alone, with DoRA")
@in_two_processes
def fully_sharded_dora(peft: Any, folder: Path) -> Values:
    return {"losses": _trains_as_alone(fully_shard(_adapted(peft, use_dora=True)), _adapted(peft, use_dora=True))}


@workflow(TOOL, "fully_shard with mixed precision in bfloat16")
@in_two_processes
def fully_sharded_half(peft: Any, folder: Path) -> Values:
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return {"losses": _trains_as_alone(_sharded(_adapted(peft), mp_policy=half), _adapted(peft), 0.05)}


@workflow(TOOL, "fully_shard with weights that are offloaded to main memory")
@in_two_processes
def fully_sharded_offloaded(peft: Any, folder: Path) -> Values:
    policy = CPUOffloadPolicy(pin_memory=False)
    return {"losses": _trains_as_alone(_sharded(_adapted(peft), offload_policy=policy), _adapted(peft))}


@workflow(
    TOOL,
    "save_pretrained of a model under fully_shard, called in both processes",
    apart="PEFT writes no sharded tensors: it asks for their data pointers",
)
@in_two_processes
def fully_sharded_saving(peft: Any, folder: Path) -> Values:
    model = _sharded(_adapted(peft))
    fit(model, lambda: model(_rows()).square().mean())
    model.save_pretrained(str(folder), is_main_process=dist.get_rank() == 0)
    dist.barrier()
    loaded = peft.PeftModel.from_pretrained(_base(), str(folder))
    close(loaded(BATCH), model(BATCH))
    return {"output": loaded(BATCH).square().sum().item()}


@workflow(TOOL, "torch.distributed.checkpoint of a model under fully_shard, loaded into one sharded otherwise")
@in_two_processes
def distributed_checkpoint(peft: Any, folder: Path) -> Values:
    model, other = _sharded(_adapted(peft)), fully_shard(_adapted(peft))
    losses = fit(model, lambda: model(_rows()).square().mean())
    save(get_model_state_dict(model), checkpoint_id=str(folder / "checkpoint"))
    state_dict = get_model_state_dict(other)
    load(state_dict, checkpoint_id=str(folder / "checkpoint"))
    set_model_state_dict(other, state_dict)
    close(other(BATCH), model(BATCH))
    return {"losses": _mean(losses)}


@workflow(
    TOOL,
    "torch.distributed.checkpoint of model and optimizer (get_state_dict, set_state_dict), sharded otherwise: goes on",
)
@in_two_processes
def distributed_checkpoint_with_optimizer(peft: Any, folder: Path) -> Values:
    model, other = _sharded(_adapted(peft)), fully_shard(_adapted(peft))
    optimizers = [torch.optim.AdamW(trained(each), lr=0.05) for each in (model, other)]
    first = [_step(model, optimizers[0]) for _ in range(2)]
    save(dict(zip("mo", get_state_dict(model, optimizers[0]), strict=True)), checkpoint_id=str(folder / "checkpoint"))
    values = dict(zip("mo", get_state_dict(other, optimizers[1]), strict=True))
    load(values, checkpoint_id=str(folder / "checkpoint"))
    set_state_dict(other, optimizers[1], model_state_dict=values["m"], optim_state_dict=values["o"])
    through, resumed = (
        _mean([_step(each, optimizer) for _ in range(2)])
        for each, optimizer in zip((model, other), optimizers, strict=True)
    )
    close(torch.tensor(resumed), torch.tensor(through), 1e-6)
    close(other(BATCH), model(BATCH), 1e-6)
    return {"losses": _mean(first) + resumed}


@workflow(TOOL, "a checkpoint of what is trained alone, of a model under fully_shard")
@in_two_processes
def checkpoint_of_the_adapter(peft: Any, folder: Path) -> Values:
    model, other = _sharded(_adapted(peft)), _sharded(_adapted(peft))
    losses = fit(model, lambda: model(_rows()).square().mean())
    own = StateDictOptions(ignore_frozen_params=True)
    state_dict = get_model_state_dict(model, options=own)
    assert len(state_dict) == 8
    save(state_dict, checkpoint_id=str(folder / "checkpoint"))
    state_dict = get_model_state_dict(other, options=own)
    load(state_dict, checkpoint_id=str(folder / "checkpoint"))
    set_model_state_dict(other, state_dict, options=StateDictOptions(strict=False))
    close(other(BATCH), model(BATCH))
    return {"losses": _mean(losses)}


@workflow(
    TOOL,
    "FullyShardedDataParallel of each block, and save_pretrained of its full state dict",
    apart="PEFT writes a file without tensors: it looks for names of modules, which have `_fsdp_wrapped_module`",
)
@in_two_processes
def fsdp1(peft: Any, folder: Path) -> Values:
    alone, model = _adapted(peft), _adapted(peft)
    policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={Block})
    wrapper = FullyShardedDataParallel(model, auto_wrap_policy=policy, **FSDP1)
    losses = _trains_as_alone(wrapper, alone)
    with FullyShardedDataParallel.state_dict_type(wrapper, StateDictType.FULL_STATE_DICT):
        full = wrapper.state_dict()
    if dist.get_rank() == 0:
        model.save_pretrained(str(folder), state_dict=full)
    dist.barrier()
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(BATCH), alone(BATCH))
    return {"losses": losses}


@workflow(TOOL, "FullyShardedDataParallel of the root alone, and save_pretrained inside of summon_full_params")
@in_two_processes
def fsdp1_of_the_root(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    wrapper = FullyShardedDataParallel(model, **FSDP1)
    losses = _mean(fit(wrapper, lambda: wrapper(_rows()).square().mean()))
    with FullyShardedDataParallel.summon_full_params(wrapper):
        if dist.get_rank() == 0:
            model.save_pretrained(str(folder))
    dist.barrier()
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(BATCH), wrapper(BATCH))
    return {"losses": losses}


@workflow(
    TOOL,
    "parallelize_module of the base, which is then adapted, trained and saved",
    apart="PEFT's factors are whole, and don't fit the output of a sharded layer",
)
@in_two_processes
def tensor_parallel(peft: Any, folder: Path) -> Values:
    plan: dict[str, Any] = {"head": ColwiseParallel(output_layouts=Replicate())}
    for index in range(2):
        plan |= {f"blocks.{index}.up": ColwiseParallel(), f"blocks.{index}.down": RowwiseParallel()}
    base = parallelize_module(_base(), init_device_mesh("cpu", (WORLD,)), plan)
    alone, model = _adapted(peft), _adapted(peft, base)
    found, expected = (fit(each, lambda each=each: each(BATCH).square().mean()) for each in (model, alone))
    close(torch.tensor(found), torch.tensor(expected))
    model.save_pretrained(str(folder), is_main_process=dist.get_rank() == 0)
    dist.barrier()
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(BATCH), alone(BATCH))
    return {"losses": found}


@workflow(TOOL, "two stages of a pipeline, each adapted by itself")
@in_two_processes
def pipeline(peft: Any, folder: Path) -> Values:
    rank = dist.get_rank()
    torch.manual_seed(4)
    own = [nn.Sequential(Block()), nn.Sequential(Block(), nn.Linear(6, 3))][rank]
    model = adapted(peft, own, "up", "down")
    schedule = ScheduleGPipe(PipelineStage(model, rank, WORLD, torch.device("cpu")), 2, loss_fn=_to_zero)
    optimizer = torch.optim.AdamW(trained(model), lr=0.05)
    found: list[Tensor] = []
    for _ in range(3):
        losses: list[Tensor] = []
        if rank == 0:
            schedule.step(BATCH)
        else:
            schedule.step(target=torch.zeros(4, 3), losses=losses)
            found.append(torch.stack(losses).mean())
        optimizer.step()
        optimizer.zero_grad()
    all_losses = torch.stack(found) if found else torch.zeros(3)
    dist.broadcast(all_losses, 1)
    assert all_losses[2] < all_losses[0]
    return {"losses": all_losses.tolist()}


@workflow(TOOL, "a script that torchrun starts")
def torchrun(peft: Any, folder: Path) -> Values:
    script = Path(__file__).with_name("script_of_torchrun.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    subprocess.run([*command, peft.__name__, str(folder)], check=True, timeout=120)
    loaded = peft.PeftModel.from_pretrained(_base(), str(folder))
    return {"output": loaded(BATCH).square().sum().item()}


def _base() -> Any:
    torch.manual_seed(0)
    return Model()


def _adapted(peft: Any, base: Any = None, **options: Any) -> Any:
    return adapted(peft, _base() if base is None else base, "up", "down", **options)


def _sharded(model: Any, **options: Any) -> Any:
    for module in model.modules():
        if isinstance(module, Block):
            for layer in (module.up, module.down):
                fully_shard(layer, **options)
    return fully_shard(model, **options)


def _step(model: Any, optimizer: torch.optim.Optimizer) -> float:
    loss = model(_rows()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _rows() -> Tensor:
    return BATCH.chunk(WORLD)[dist.get_rank()]


def _to_zero(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _mean(losses: list[float]) -> list[float]:
    total = torch.tensor(losses)
    dist.all_reduce(total)
    return (total / WORLD).tolist()


def _trains_as_alone(model: Any, alone: Any, tolerance: float = 1e-4) -> list[float]:
    found = _mean(fit(model, lambda: model(_rows()).square().mean()))
    close(torch.tensor(found), torch.tensor(fit(alone, lambda: alone(BATCH).square().mean())), tolerance)
    return found
