"""PyTorch alone: what a training loop of one's own uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from loops import adapted, close, fit, trained
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from workflow import Values, workflow

TOOL = "torch"


class Network(nn.Module):
    """Embeds tokens, and has a convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 12, 3, padding=1)
        self.norm = nn.BatchNorm1d(12)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.conv(self.embedding(tokens).transpose(1, 2))).transpose(1, 2)
        return self.down(torch.relu(self.up(x)))


TOKENS = torch.arange(30).reshape(5, 6) % 20
ALL = ("embedding", "conv", "up", "down")


@workflow(TOOL, "a loop, save_pretrained, from_pretrained, merge_and_unload")
def loop(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    losses = fit(model, lambda: _loss(model))
    model.eval().save_pretrained(str(folder))
    base = _base()
    base.load_state_dict({**base.state_dict(), **_buffers(model)})
    loaded = peft.PeftModel.from_pretrained(base, str(folder)).eval()
    close(loaded(TOKENS), model(TOKENS))
    close(loaded.merge_and_unload()(TOKENS), model(TOKENS))
    return {"losses": losses}


@workflow(TOOL, "torch.save of a whole model, and torch.load")
def saved_whole(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    torch.save(model, folder / "model.pt")
    loaded = torch.load(folder / "model.pt", weights_only=False)
    close(loaded(TOKENS), model(TOKENS))
    return {"losses": fit(loaded, lambda: _loss(loaded))}


@workflow(TOOL, "state_dict and load_state_dict, with the optimizer's: training goes on")
def checkpointing(peft: Any, folder: Path) -> Values:
    def optimizer_of(model: Any) -> Any:
        return torch.optim.AdamW(trained(model), lr=0.05)

    def step(model: Any, optimizer: Any) -> float:
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        optimizer.step()
        return loss.item()

    model = _adapted(peft)
    optimizer = optimizer_of(model)
    losses = [step(model, optimizer) for _ in range(2)]
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "checkpoint.pt")
    losses.append(step(model, optimizer))
    other = _adapted(peft)
    own = optimizer_of(other)
    state = torch.load(folder / "checkpoint.pt")
    other.load_state_dict(state["model"])
    own.load_state_dict(state["optimizer"])
    assert step(other, own) == losses[-1]
    return {"losses": losses}


@workflow(TOOL, "an exponential moving average by AveragedModel, whose adapter is saved")
def averaged(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for _ in range(2):
        fit(model, lambda: _loss(model), steps=1)
        average.update_parameters(model)
    average.module.save_pretrained(str(folder))
    loaded = peft.PeftModel.from_pretrained(_base(), str(folder))
    return {"output": loaded.eval()(TOKENS).square().sum().item()}


@workflow(TOOL, "stochastic weight averaging with SWALR and update_bn")
def stochastic_averaging(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    average = AveragedModel(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    scheduler = SWALR(optimizer, swa_lr=0.05, anneal_epochs=2)
    for _ in range(3):
        optimizer.zero_grad()
        _loss(model).backward()
        optimizer.step()
        scheduler.step()
        average.update_parameters(model)
    update_bn([TOKENS, TOKENS + 0], average)
    return {"output": average.eval()(TOKENS).square().sum().item(), "rate": scheduler.get_last_lr()}


@workflow(TOOL, "gradients clipped by norm and by value, and accumulated")
def clipped(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    _loss(model).backward()
    _loss(model).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    nn.utils.clip_grad_value_(model.parameters(), 0.05)
    largest = max(parameter.grad.abs().max().item() for parameter in trained(model))
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    return {"norm": norm.item(), "largest": largest}


@workflow(TOOL, "two groups of an optimizer, by the names of parameters")
def groups(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, modules_to_save=["down"], target_modules=["conv", "up"])
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    lora = [parameter for name, parameter in named if "lora_" in name]
    rest = [parameter for name, parameter in named if "lora_" not in name]
    assert all(parameter.shape in {(4, 16), (4,)} for parameter in rest)
    optimizer = torch.optim.AdamW([{"params": lora, "lr": 0.1}, {"params": rest, "lr": 0.01}])
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "sizes": [len(lora), len(rest)]}


@workflow(TOOL, "LBFGS, which calls the model several times in a step")
def several_calls(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    optimizer = torch.optim.LBFGS(trained(model), lr=0.1, max_iter=3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss

    return {"losses": [float(optimizer.step(closure)) for _ in range(2)]}  # type: ignore[arg-type]


@workflow(TOOL, "each parameter is stepped in the backward, as soon as it has its gradient")
def stepped_in_backward(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    optimizers = {parameter: torch.optim.SGD([parameter], lr=0.1) for parameter in trained(model)}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(step)
    losses = []
    for _ in range(3):
        losses.append(_loss(model).item())
        _loss(model).backward()
    assert losses[-1] < losses[0]
    return {"losses": losses}


@workflow(TOOL, "a merged model is quantised dynamically")
def quantised(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    output = model(TOKENS)
    found = torch.ao.quantization.quantize_dynamic(model.merge_and_unload(), {nn.Linear}, dtype=torch.qint8)
    assert [type(layer) for layer in (found.up, found.down)] == [torch.ao.nn.quantized.dynamic.Linear] * 2
    close(found(TOKENS), output, 0.1)
    return {"output": found(TOKENS).square().sum().item()}


@workflow(TOOL, "autocast in bfloat16", apart="y + s·change is rounded to bfloat16 once, and twice in PEFT")
def autocast(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(TOKENS)
        assert output.dtype == torch.bfloat16
        return output.float().square().mean()

    return {"losses": fit(model, loss)}


@workflow(TOOL, "torch.utils.checkpoint around an adapted model and in sequence")
def recomputed(peft: Any, folder: Path) -> Values:
    torch.manual_seed(3)
    stack = adapted(peft, nn.Sequential(*(nn.Linear(8, 8) for _ in range(4))), "0", "2", lora_dropout=0.2)
    x = torch.randn(5, 8, requires_grad=True)
    losses = fit(stack, lambda: checkpoint(stack, x, use_reentrant=False).square().mean())  # type: ignore[union-attr]
    layers = next(module for module in stack.modules() if isinstance(module, nn.Sequential))
    losses += fit(stack, lambda: checkpoint_sequential(layers, 2, x, use_reentrant=False).square().mean())
    return {"losses": losses}


@workflow(TOOL, "hooks on adapted layers and on the model see inputs, outputs and gradients")
def hooked(peft: Any, folder: Path) -> Values:
    model, seen = _adapted(peft), []
    layer = _module(model, "up")
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    handle = layer.register_forward_hook(lambda *call: 2 * call[-1])
    layer.register_full_backward_hook(lambda *call: seen.append(call[-1][0].shape))
    losses = fit(model, lambda: _loss(model), steps=2)
    handle.remove()
    return {"losses": losses, "after": _loss(model).item(), "shapes": [list(shape) for shape in seen]}


@workflow(TOOL, "features are taken from a layer inside by a hook, for a loss")
def features(peft: Any, folder: Path) -> Values:
    model, kept = _adapted(peft), {}
    _module(model, "conv").register_forward_hook(lambda *call: kept.__setitem__("conv", call[-1]))

    def loss() -> Tensor:
        return model(TOKENS).square().mean() + kept["conv"].abs().mean()

    return {"losses": fit(model, loss)}


@workflow(TOOL, "a teacher: the same model with its adapter disabled")
def distilled(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()

    def loss() -> Tensor:
        with torch.no_grad(), model.disable_adapter():
            aim = model(TOKENS).softmax(-1)
        return nn.functional.kl_div(model(TOKENS).log_softmax(-1), aim, reduction="batchmean")

    losses = fit(model, loss)
    assert losses[-1] < losses[0]
    return {"losses": losses}


def _base() -> Any:
    torch.manual_seed(0)
    return Network()


def _adapted(peft: Any, **options: Any) -> Any:
    return adapted(peft, _base(), *ALL, **options)


def _module(model: Any, path: str) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith(path))


def _loss(model: Any) -> Tensor:
    return model(TOKENS).square().mean()


def _buffers(model: Any) -> dict[str, Tensor]:
    return {name.removeprefix("base_model.model."): value for name, value in model.named_buffers() if "norm" in name}
