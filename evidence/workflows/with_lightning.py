"""Lightning's Trainer and Fabric."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning
import tiny
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from loops import adapted, close, trained
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workflow import Values, workflow

X = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))


class Regression(lightning.LightningModule):
    """Trains a model to return zero."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.losses = model, []

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.model(batch[0]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("validation", self.model(batch[0]).square().mean())

    def predict_step(self, batch: Any, index: int) -> Tensor:
        return self.model(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(trained(self), lr=0.02)


class AdapterOnly(Regression):
    """Keeps the adapter alone in checkpoints."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        names = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in names}


@workflow("lightning", "fit with validation, a checkpoint of the best, and predict")
def fitted(peft: Any, folder: Path) -> Values:
    module = Regression(_adapted(peft))
    best = ModelCheckpoint(folder, monitor="validation", save_top_k=1)
    trainer = _trainer(folder, max_epochs=2, callbacks=[best, EarlyStopping("validation")], enable_checkpointing=True)
    trainer.fit(module, _loader(), _loader())
    outputs = torch.cat(trainer.predict(module, _loader()))  # type: ignore[arg-type]
    close(outputs, module.model(X))
    return {"losses": module.losses, "best": float(best.best_model_score or 0)}


@workflow("lightning", "fit is resumed from a checkpoint")
def resumed(peft: Any, folder: Path) -> Values:
    whole = Regression(_adapted(peft))
    _trainer(folder, max_epochs=2).fit(whole, _loader())
    trainer = _trainer(folder, max_epochs=1)
    trainer.fit(Regression(_adapted(peft)), _loader())
    trainer.save_checkpoint(folder / "first.ckpt")
    rest = Regression(_adapted(peft))
    _trainer(folder, max_epochs=2).fit(rest, _loader(), ckpt_path=folder / "first.ckpt", weights_only=False)
    close(torch.tensor(rest.losses), torch.tensor(whole.losses[3:]))
    return {"losses": rest.losses}


@workflow("lightning", "checkpoints hold the adapter alone, and are loaded not strictly")
def adapter_only(peft: Any, folder: Path) -> Values:
    module = AdapterOnly(_adapted(peft))
    trainer = _trainer(folder, max_epochs=1)
    trainer.fit(module, _loader())
    trainer.save_checkpoint(folder / "adapter.ckpt", weights_only=True)
    state = torch.load(folder / "adapter.ckpt", weights_only=True)["state_dict"]
    assert len(state) == 4
    other = AdapterOnly(_adapted(peft))
    _, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected
    close(other.model(X), module.model(X))
    return {"losses": module.losses, "shapes": sorted(list(value.shape) for value in state.values())}


@workflow("lightning", "the adapter is saved by a callback, and loaded with from_pretrained")
def saving_callback(peft: Any, folder: Path) -> Values:
    class Saving(lightning.Callback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            module.model.save_pretrained(str(folder / f"epoch {trainer.current_epoch}"))

    module = Regression(_adapted(peft))
    _trainer(folder, max_epochs=2, callbacks=[Saving()]).fit(module, _loader())
    loaded = peft.PeftModel.from_pretrained(_base(), str(folder / "epoch 1"))
    close(loaded(X), module.model(X))
    return {"losses": module.losses}


@workflow(
    "lightning",
    "bfloat16, accumulated and clipped gradients",
    apart="y + s·change is rounded to bfloat16 once, and twice in PEFT",
)
def mixed_precision(peft: Any, folder: Path) -> Values:
    module = Regression(_adapted(peft))
    options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    _trainer(folder, max_epochs=2, **options).fit(module, _loader())
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    return {"losses": module.losses}


@workflow("lightning", "stochastic weight averaging over epochs")
def averaged(peft: Any, folder: Path) -> Values:
    module = Regression(_adapted(peft))
    callback = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
    _trainer(folder, max_epochs=3, callbacks=[callback]).fit(module, _loader())
    return {"losses": module.losses, "output": module.model(X).square().sum().item()}


@workflow("lightning", "the module is adapted itself, in configure_model")
def configured(peft: Any, folder: Path) -> Values:
    class Configured(Regression):
        def configure_model(self) -> None:
            if not hasattr(self.model, "peft_config"):
                self.model = _adapted(peft, self.model)

    module = Configured(_base())
    _trainer(folder, max_epochs=1).fit(module, _loader())
    return {"losses": module.losses}


@workflow("lightning", "a language model of Transformers, its adapter alone in the optimizer")
def language_model(peft: Any, folder: Path) -> Values:
    class Language(Regression):
        def training_step(self, batch: Any, index: int) -> Tensor:
            loss = self.model(input_ids=batch[0], labels=batch[0]).loss
            self.losses.append(loss.item())
            return loss

    module = Language(adapted(peft, tiny.llama(), "q_proj", "v_proj", task_type="CAUSAL_LM"))
    ids = torch.arange(24).reshape(4, 6)
    _trainer(folder, max_epochs=1).fit(module, DataLoader(TensorDataset(ids), batch_size=2))
    return {"losses": module.losses}


@workflow("lightning", "Fabric: setup, backward, save and load of the adapter's tensors")
def fabric(peft: Any, folder: Path) -> Values:
    runtime = Fabric(accelerator="cpu", devices=1)
    model = _adapted(peft)
    wrapper, optimizer = runtime.setup(model, torch.optim.AdamW(trained(model), lr=0.02))
    losses = []
    for _ in range(3):
        loss = wrapper(X).square().mean()
        runtime.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    runtime.save(folder / "state.ckpt", {"model": wrapper}, filter={"model": lambda name, _: name in names})
    other = runtime.setup(_adapted(peft))
    runtime.load(folder / "state.ckpt", {"model": other}, strict=False)
    close(other(X), wrapper(X))
    return {"losses": losses}


def _base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))


def _adapted(peft: Any, base: Any = None) -> Any:
    return adapted(peft, _base() if base is None else base, "0", "2")


def _loader() -> Any:
    return DataLoader(TensorDataset(X), batch_size=4)


def _trainer(folder: Path, **options: Any) -> Any:
    warnings.simplefilter("ignore")
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"accelerator": "cpu", "devices": 1, "enable_checkpointing": False, "default_root_dir": folder}
    return lightning.Trainer(**quiet | options)
