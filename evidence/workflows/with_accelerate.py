"""accelerate's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import tiny
import torch
from accelerate.utils import set_seed
from loops import adapted, close, trained
from torch.utils.data import DataLoader
from workflow import Values, workflow

ROWS = [{"input_ids": torch.arange(6) + start, "labels": torch.arange(6) + start} for start in range(3, 15)]


@workflow("accelerate", "prepare and a loop, with a scheduler and clipped gradients")
def loop(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator()
    model, optimizer, loader = _prepared(accelerator, peft)
    scheduler = accelerator.prepare(torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=3))
    losses, norms = [], []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        norms.append(accelerator.clip_grad_norm_(trained(model), 0.1).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    return {"losses": losses, "norms": norms, "rate": scheduler.get_last_lr()}


@workflow("accelerate", "gradients are accumulated over batches")
def accumulation(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator(gradient_accumulation_steps=3)
    model, optimizer, loader = _prepared(accelerator, peft)
    start = [parameter.detach().clone() for parameter in trained(model)]
    steps = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        steps.append(sum((now - then).abs().sum().item() for now, then in zip(trained(model), start, strict=True)))
    assert steps[0] == steps[1] == 0 < steps[2]
    return {"steps": steps}


@workflow("accelerate", "mixed precision in bfloat16: the adapter keeps float32, and outputs are float32")
def mixed_precision(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator(mixed_precision="bf16")
    model, optimizer, loader = _prepared(accelerator, peft)
    losses = _epoch(accelerator, model, optimizer, loader)
    assert {parameter.dtype for parameter in trained(model)} == {torch.float32}
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    return {"losses": losses, "after": unwrapped(**_batch()).loss.item()}


@workflow("accelerate", "a base in bfloat16 with its adapter in float32")
def half_base(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator()
    model = adapted(peft, tiny.llama().to(torch.bfloat16), "q_proj", "v_proj", task_type="CAUSAL_LM")
    model, optimizer, loader = accelerator.prepare(model, _optimizer(model), _loader())
    losses = _epoch(accelerator, model, optimizer, loader)
    return {"losses": losses, "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()})}


@workflow("accelerate", "save_state and load_state: training goes on where it was")
def state(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator()
    model, optimizer, loader = _prepared(accelerator, peft)
    _epoch(accelerator, model, optimizer, loader)
    accelerator.save_state(str(folder / "state"))
    expected = _epoch(accelerator, model, optimizer, loader)
    accelerator.load_state(str(folder / "state"))
    again = _epoch(accelerator, model, optimizer, loader)
    close(torch.tensor(again), torch.tensor(expected))
    return {"losses": again}


@workflow("accelerate", "a hook of save_state writes the adapter alone, and one of load_state reads it")
def state_of_the_adapter(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator()
    model, optimizer, loader = _prepared(accelerator, peft)

    def save(models: Any, weights: Any, place: str) -> None:
        for each in models:
            accelerator.unwrap_model(each).save_pretrained(place)
            weights.pop()

    def load(models: Any, place: str) -> None:
        while models:
            values = peft.load_peft_weights(place)
            peft.set_peft_model_state_dict(accelerator.unwrap_model(models.pop()), values)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    _epoch(accelerator, model, optimizer, loader)
    accelerator.save_state(str(folder / "state"))
    expected = _epoch(accelerator, model, optimizer, loader)
    accelerator.load_state(str(folder / "state"))
    again = _epoch(accelerator, model, optimizer, loader)
    close(torch.tensor(again), torch.tensor(expected))
    return {"losses": again, "files": sorted(file.name for file in (folder / "state").iterdir())}


@workflow("accelerate", "unwrap_model, then save_pretrained with a state dict and accelerate's function")
def saving(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator()
    model, optimizer, loader = _prepared(accelerator, peft)
    _epoch(accelerator, model, optimizer, loader)
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        str(folder / "adapter"),
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )
    expected = model(**_batch()).loss
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder / "adapter"))
    close(loaded(**_batch()).loss, expected)
    return {"loss": expected.item(), "files": sorted(file.name for file in (folder / "adapter").iterdir())}


@workflow("accelerate", "save_model writes the whole adapted model, which loads into another")
def whole_model(peft: Any, folder: Path) -> Values:
    accelerator = _accelerator()
    model, optimizer, loader = _prepared(accelerator, peft)
    _epoch(accelerator, model, optimizer, loader)
    accelerator.save_model(model, str(folder / "whole"))
    other = adapted(peft, tiny.llama(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    accelerate.load_checkpoint_in_model(other, str(folder / "whole"))
    close(other(**_batch()).loss, model(**_batch()).loss)
    return {"loss": other(**_batch()).loss.item()}


@workflow("accelerate", "a notebook's launcher runs a function of training")
def notebook(peft: Any, folder: Path) -> Values:
    losses: list[float] = []

    def train() -> None:
        set_seed(3)
        accelerator = _accelerator()
        losses.extend(_epoch(accelerator, *_prepared(accelerator, peft)))

    accelerate.notebook_launcher(train, num_processes=1)
    return {"losses": losses}


@workflow("accelerate", "a model that is compiled by the Accelerator trains as it does without")
def compiled(peft: Any, folder: Path) -> Values:
    plugin = accelerate.utils.TorchDynamoPlugin(backend="eager")
    accelerator = _accelerator(dynamo_plugin=plugin)
    model, optimizer, loader = _prepared(accelerator, peft)
    losses = _epoch(accelerator, model, optimizer, loader)
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    unwrapped.save_pretrained(str(folder))
    loaded = peft.PeftModel.from_pretrained(tiny.llama(), str(folder))
    close(loaded(**_batch()).loss, model(**_batch()).loss)
    return {"losses": losses}


def _accelerator(**options: Any) -> Any:
    accelerate.state.AcceleratorState._reset_state(True)  # a process has one, which the workflow before has set
    return accelerate.Accelerator(cpu=True, **options)


def _optimizer(model: Any) -> Any:
    return torch.optim.AdamW(trained(model), lr=0.05)


def _loader() -> Any:
    return DataLoader(ROWS, batch_size=4)  # type: ignore[arg-type]


def _prepared(accelerator: Any, peft: Any) -> Any:
    model = adapted(peft, tiny.llama(), "q_proj", "v_proj", task_type="CAUSAL_LM")
    return accelerator.prepare(model, _optimizer(model), _loader())


def _batch() -> dict[str, Any]:
    return {name: torch.stack([row[name] for row in ROWS[:4]]) for name in ROWS[0]}


def _epoch(accelerator: Any, model: Any, optimizer: Any, loader: Any) -> list[float]:
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
