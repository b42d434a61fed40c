"""PyTorch's compilers, exporters and function transforms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from loops import adapted, close, fit, trained
from safetensors.torch import load_file, load_model, save_model
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from workflow import Values, workflow

TOOL = "torch, compilers and transforms"
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(3))


@workflow(TOOL, "torch.compile with its default backend: trained as without")
def compiled(peft: Any, folder: Path) -> Values:
    plain, model = _adapted(peft), _adapted(peft)
    function = torch.compile(model)
    found = fit(model, lambda: function(X).square().mean())
    close(torch.tensor(found), torch.tensor(fit(plain, lambda: plain(X).square().mean())))
    model.save_pretrained(str(folder))
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(X), function(X))
    return {"losses": found}


@workflow(TOOL, "torch.compile of the whole graph, with DoRA")
def full_graph(peft: Any, folder: Path) -> Values:
    model = _adapted(peft, use_dora=True)
    function = torch.compile(model, backend="aot_eager", fullgraph=True)
    return {"losses": fit(model, lambda: function(X).square().mean())}


@workflow(TOOL, "a compiled model whose adapter is switched, disabled and merged")
def compiled_switching(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    torch.manual_seed(4)
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["2"], init_lora_weights=False))
    function = torch.compile(model, backend="eager")
    outputs = [function(X)]
    model.set_adapter("other")
    outputs.append(function(X))
    with model.disable_adapter():
        outputs.append(function(X))
    close(outputs[2], _base()(X))
    model.merge_adapter()
    close(function(X), outputs[1])
    return {"outputs": [output.square().sum().item() for output in outputs]}


@workflow(TOOL, "Module.compile in place")
def compiled_in_place(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    model.compile(backend="eager")
    return {"losses": fit(model, lambda: model(X).square().mean())}


@workflow(TOOL, "torch.export of an adapted and of a merged model, saved and loaded")
def exported(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    expected = model(X)
    for name in ("adapted", "merged"):
        each = model if name == "adapted" else model.merge_and_unload()
        torch.export.save(torch.export.export(each, (X,)), folder / f"{name}.pt2")
        program = torch.export.load(folder / f"{name}.pt2").module()
        close(program(X), expected)
    return {"output": expected.square().sum().item()}


@workflow(TOOL, "torch.onnx.export of an adapted and of a merged model, run in onnxruntime")
def onnx(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    expected = model(X)
    for name in ("adapted", "merged"):
        each = model if name == "adapted" else model.merge_and_unload()
        torch.onnx.export(each, (X,), str(folder / f"{name}.onnx"), verbose=False)
        session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"))
        close(torch.tensor(session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]), expected)
    return {"output": expected.square().sum().item()}


@workflow(TOOL, "torch.jit.trace")
def jit_traced(peft: Any, folder: Path) -> Values:
    model = _adapted(peft).eval()
    torch.jit.save(torch.jit.trace(model, X), str(folder / "model.pt"))
    loaded = torch.jit.load(str(folder / "model.pt"))
    close(loaded(X[:2]), model(X[:2]))
    return {"output": loaded(X).square().sum().item()}


@workflow(TOOL, "functional_call with other values for the adapter")
def functional(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    values = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    close(functional_call(model, zeros, (X,)), _base()(X))
    halves = {name: value / 2 for name, value in values.items()}
    return {"output": functional_call(model, halves, (X,)).square().sum().item()}


@workflow(TOOL, "gradients of each row by vmap and grad, clipped as for differential privacy")
def per_row(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    values = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}

    def loss(own: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, own, (row[None],)).square().mean()

    rows = vmap(grad(loss), in_dims=(None, 0))(values, X)
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in rows.values()]).norm(dim=0)
    model(X).square().mean().backward()
    for name, parameter in model.named_parameters():
        if name in rows:
            close(rows[name].mean(0), parameter.grad)
    return {"norms": norms.tolist()}


@workflow(TOOL, "a directional derivative by jvp, and a second gradient")
def forward_mode(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    _, slope = jvp(model, (X,), (torch.ones_like(X),))
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    penalties = [parameter.grad.square().sum().item() for parameter in trained(model)]
    return {"slope": slope.square().sum().item(), "penalty": sum(penalties)}


@workflow(TOOL, "stack_module_state of two adapted models, and vmap over them as an ensemble")
def ensemble(peft: Any, folder: Path) -> Values:
    both = [_adapted(peft), _adapted(peft)]
    fit(both[1], lambda: both[1](X).square().mean())
    parameters, buffers = stack_module_state(both)
    bare = copy.deepcopy(both[0]).to("meta")
    outputs = vmap(lambda own, rest: functional_call(bare, (own, rest), (X,)))(parameters, buffers)
    for output, model in zip(outputs, both, strict=True):
        close(output, model(X))
    return {"outputs": outputs.square().sum((1, 2)).tolist()}


@workflow(TOOL, "safetensors' save_model and load_model of an adapted model")
def safetensors_whole(peft: Any, folder: Path) -> Values:
    model = _adapted(peft)
    fit(model, lambda: model(X).square().mean())
    save_model(model, str(folder / "model.safetensors"))
    other = _adapted(peft)
    load_model(other, str(folder / "model.safetensors"))
    close(other(X), model(X))
    return {"tensors": len(load_file(folder / "model.safetensors")), "output": other(X).square().sum().item()}


@workflow(TOOL, "an adapted model inside of another one, which is trained with it")
def inside(peft: Any, folder: Path) -> Values:
    torch.manual_seed(5)
    whole = nn.Sequential(nn.Linear(8, 8), _adapted(peft), nn.Linear(4, 2))
    losses = fit(whole, lambda: whole(X).square().mean())
    whole[1].save_pretrained(str(folder))
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(X), whole[1](X))
    return {"losses": losses}


@workflow(TOOL, "only a part of a model is adapted, and saved")
def part(peft: Any, folder: Path) -> Values:
    torch.manual_seed(5)
    whole = nn.ModuleDict({"encoder": _base(), "head": nn.Linear(4, 2)})
    whole["encoder"] = _adapted(peft, whole["encoder"])
    losses = fit(whole, lambda: whole["head"](whole["encoder"](X)).square().mean())
    whole["encoder"].save_pretrained(str(folder))
    close(peft.PeftModel.from_pretrained(_base(), str(folder))(X), whole["encoder"](X))
    return {"losses": losses}


def _base() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 4))


def _adapted(peft: Any, base: Any = None, **options: Any) -> Any:
    return adapted(peft, _base() if base is None else base, "0", "2", **options)
