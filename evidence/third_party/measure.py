"""Adapts a model with PEFT and with graphpeft, and compares: sites, outputs, gradients, files, state dicts, merging."""

from __future__ import annotations

import copy
import random
import re
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import peft
import torch
from case import Case
from tensors import distance, floats, in_double
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import graphpeft

Row = dict[str, Any]
"""What was measured of one case."""

RANK = 4
OPTIONS: dict[str, Any] = {"r": RANK, "lora_alpha": 6, "init_lora_weights": False}
STEPS = 2


def measure(case: Case) -> Row:
    """Returns what there is to say of a case; an error of a check is kept beside the others' findings."""
    row: Row = {"case": case.key}
    case = _in_double_if_it_runs(case, row)
    theirs = _attempt(row, "peft", lambda: _sites(peft, case, _targets(case, known_to_peft=True)))
    ours = _attempt(row, "graphpeft", lambda: _sites(graphpeft, case, _targets(case)))
    if ours is None:
        return row
    row["sites"] = {"peft": theirs, "graphpeft": ours}
    row["apart"] = _apart(case, set(theirs or ()) ^ set(ours)) if theirs is not None else {}
    row["trained"] = _attempt(row, "trained", lambda: _trained_here(case, _pattern(ours)))
    for name, check in ALONE.items():
        row[name] = _attempt(row, name, lambda check=check: check(case, _pattern(ours)))
    common = sorted(set(theirs or ()) & set(ours))
    if not common:
        return row
    unused = _attempt(row, "unused", lambda: _unused_by_peft(case, common)) or []
    row["unused by peft"] = unused
    for name, check in WITH_PEFT.items():
        targets = _pattern([path for path in common if path not in unused])
        row[name] = _attempt(row, name, lambda check=check, targets=targets: check(case, targets))
    return row


def _attempt(row: Row, name: str, check: Callable[[], Any]) -> Any:
    try:
        return check()
    except Exception as error:
        row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"[:2000]
        row.setdefault("traces", {})[name] = traceback.format_exc()[-4000:]
        return None


def _in_double_if_it_runs(case: Case, row: Row) -> Case:
    """Returns a case in double precision, in which equal computations are told from similar ones, if it admits that."""
    double = case._replace(build=lambda: case.build().double(), inputs=lambda: in_double(case.inputs()))
    try:
        outputs(_base(double), double)
        _loss(_base(double), double).backward()
    except Exception:  # the code of a model may raise any, where it wants single precision
        row["dtype"] = "single"
        return case
    row["dtype"] = "double"
    return double


def _targets(case: Case, *, known_to_peft: bool = False) -> str:
    """Returns what a config names: all linear layers, or these and layers of the case's kinds."""
    if not case.layers:
        return "all-linear"
    kinds = (nn.Linear, *case.layers)
    layers = {path: module for path, module in _base(case).named_modules() if isinstance(module, kinds)}
    return _pattern([path for path, layer in layers.items() if not known_to_peft or _is_known_to_peft(layer)])


def _is_known_to_peft(layer: nn.Module) -> bool:
    """Returns whether PEFT adapts a layer: of a convolution it ignores dilation, and admits groups that divide r."""
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return True
    return RANK % layer.groups == 0 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"


def _pattern(paths: list[str]) -> str:
    return f"^({'|'.join(re.escape(path) for path in paths)})$"


def _base(case: Case) -> nn.Module:
    _seed(0)
    return case.build().eval()


def _seed(number: int) -> None:
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(number)


def _adapted(library: Any, case: Case, targets: str) -> Any:
    return _adapt(library, _base(case), targets)


def _adapt(library: Any, model: nn.Module, targets: str) -> Any:
    _seed(2)
    return library.get_peft_model(model, library.LoraConfig(**OPTIONS, target_modules=targets)).eval()


def _sites(library: Any, case: Case, targets: str) -> list[str]:
    names = (status.name for status in _adapted(library, case, targets).get_layer_status())
    return sorted(name.removeprefix("model.") if library is peft else name for name in names)


def _apart(case: Case, paths: set[str]) -> dict[str, list[str]]:
    """Returns sites that one library has alone, by the reason."""
    found: dict[str, list[str]] = {}
    for path in sorted(paths):
        layer = _base(case).get_submodule(path)
        if isinstance(layer, NonDynamicallyQuantizableLinear):
            reason = "PEFT alone adapts output projections of PyTorch's attention, which it never calls"
        elif not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            reason = "PEFT doesn't know the package's own linear layers"
        elif not _is_known_to_peft(layer):
            reason = (
                "PEFT can't adapt dilated convolutions, others than zero-padded ones, and groups that don't divide r"
            )
        else:
            reason = "no reason is known"
        found.setdefault(reason, []).append(path)
    return found


def _run(model: nn.Module, case: Case) -> Any:
    _seed(1)
    inputs = case.inputs()
    _seed(4)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def outputs(model: nn.Module, case: Case) -> list[Tensor]:
    """Returns the tensors that a model gives, in their order, and puts its buffers back."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        found = [tensor.clone() for tensor in floats(_run(model, case))]
        for name, buffer in model.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])
    return found


def _loss(model: nn.Module, case: Case) -> Tensor:
    found = [tensor for tensor in floats(_run(model, case)) if tensor.requires_grad]
    generator = torch.Generator().manual_seed(5)
    weighted = ((tensor * torch.randn(tensor.shape, generator=generator)).mean() for tensor in found)
    return sum(weighted, start=torch.zeros(()))


# --- with graphpeft alone


def _trained_here(case: Case, targets: str) -> Any:
    """Returns which of an adapter's tensors have no gradient, though the weight that they adapt has one in the base."""
    gradients, _ = _train(graphpeft, case, targets)
    base = _base(case).train().requires_grad_()
    _loss(base, case).backward()
    in_base = {name: parameter.grad for name, parameter in base.named_parameters(remove_duplicate=False)}
    used = {name.removesuffix(".weight") for name in in_base.keys() - _without(in_base)}
    without = _without(gradients)
    return {
        "tensors": len(gradients),
        "without gradient": sorted(without),
        "wrongly": sorted(name for name in without if _site_of(name) in used),
    }


def _site_of(name: str) -> str:
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _own_file(case: Case, targets: str) -> Any:
    ours = _adapted(graphpeft, case, targets)
    _shake(ours)
    with tempfile.TemporaryDirectory() as folder:
        ours.save_pretrained(folder)
        again = graphpeft.PeftModel.from_pretrained(_base(case), folder)
    return distance(outputs(again, case), outputs(ours, case))


def _shake(model: nn.Module) -> None:
    """Gives all that is trained other values, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter)


def _state(case: Case, targets: str) -> list[str]:
    """Returns what of the base's state dict differs in the adapted model, or once the adapter is taken off."""
    base, model = _base(case), _base(case)
    expected, classes = base.state_dict(), _classes(model)
    ours = _adapt(graphpeft, model, targets)
    found = ours.state_dict()
    wrong = _differing(expected, {name: tensor for name, tensor in found.items() if name in expected})
    adapter = {tensor.data_ptr() for tensor in graphpeft.get_peft_model_state_dict(ours).values()}
    more = {name: tensor for name, tensor in found.items() if name not in expected}
    if {tensor.data_ptr() for tensor in more.values()} != adapter:
        wrong += [f"adapter: {name}" for name in more]
    unloaded = ours.unload()
    wrong += [f"unloaded: {name}" for name in _differing(expected, unloaded.state_dict())]
    wrong += [f"class of {name}" for name in _differing(classes, _classes(unloaded))]
    if unloaded is not model:
        wrong.append("another object")
    if distance(outputs(unloaded, case), outputs(base, case)) != 0:
        wrong.append("outputs after unload")
    return wrong


def _differing(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    names = sorted(expected.keys() ^ found.keys())
    return names + [name for name in expected.keys() & found.keys() if not _same(expected[name], found[name])]


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b


def _classes(model: nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def _merged(case: Case, targets: str) -> Any:
    base = _base(case)
    names, classes = base.state_dict().keys(), _classes(base)
    ours = _adapt(graphpeft, base, targets)
    adapted = outputs(ours, case)
    merged = ours.merge_and_unload()
    wrong = sorted(names ^ merged.state_dict().keys())
    wrong += [f"class of {name}" for name in _differing(classes, _classes(merged))]
    return {"distance": distance(outputs(merged, case), adapted), "wrong": wrong}


def _copied(case: Case, targets: str) -> float:
    copy.deepcopy(_base(case))
    ours = _adapted(graphpeft, case, targets)
    return distance(outputs(copy.deepcopy(ours), case), outputs(ours, case))


ALONE: dict[str, Callable[[Case, str], Any]] = {
    "own file": _own_file,
    "state": _state,
    "merged": _merged,
    "copied": _copied,
}

# --- with both


def _unused_by_peft(case: Case, paths: list[str]) -> list[str]:
    """Returns the sites whose adapter acts here and doesn't in PEFT, where their weight is read without a call."""
    theirs, _ = _train(peft, case, _pattern(paths))
    ours, _ = _train(graphpeft, case, _pattern(paths))
    names = _without(theirs) - _without(ours)
    return sorted({_site_of(name) for name in names} & set(paths))


def _equal_outputs(case: Case, targets: str) -> Any:
    theirs, ours = (_adapted(library, case, targets) for library in (peft, graphpeft))
    found, expected = outputs(ours, case), outputs(theirs, case)
    change = distance(expected, outputs(_base(case), case))
    return {"distance": distance(found, expected), "change": change}


def _equal_merged(case: Case, targets: str) -> float:
    ours, theirs = _adapted(graphpeft, case, targets), _adapted(peft, case, targets)
    found = outputs(ours, case)
    return distance(found, outputs(theirs.merge_and_unload(), case))


def _equal_training(case: Case, targets: str) -> Any:
    (expected, their_losses), (found, our_losses) = (_train(library, case, targets) for library in (peft, graphpeft))
    if found.keys() != expected.keys():
        raise AssertionError(f"other tensors: {sorted(found.keys() ^ expected.keys())}")
    if _without(found) != _without(expected):
        raise AssertionError(f"other tensors have gradients: {sorted(_without(found) ^ _without(expected))}")
    with_gradient = [name for name, gradient in expected.items() if gradient is not None]
    losses = [abs(a - b) / max(abs(b), 1e-9) for a, b in zip(our_losses, their_losses, strict=True)]
    return {"distance": _gradient_distance(found, expected, with_gradient), "losses": max(losses)}


def _gradient_distance(found: Mapping[str, Any], expected: Mapping[str, Any], names: list[str]) -> float:
    largest = max(float(expected[name].abs().max()) for name in names)
    return max(float((found[name] - expected[name]).abs().max()) for name in names) / largest


def _train(library: Any, case: Case, targets: str) -> tuple[dict[str, Tensor | None], list[float]]:
    """Returns the gradients of the first training step by the names in files, and the losses of all steps."""
    model = _adapted(library, case, targets)
    names = {tensor.data_ptr(): name for name, tensor in library.get_peft_model_state_dict(model).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4)
    model.train()
    losses: list[float] = []
    first: dict[str, Tensor | None] = {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = _loss(model, case)
        loss.backward()
        losses.append(loss.item())
        gradients = {names[p.data_ptr()]: None if p.grad is None else p.grad.clone() for p in trained}
        first = first or gradients
        optimizer.step()
    return first, losses


def _without(gradients: Mapping[str, Tensor | None]) -> set[str]:
    return {name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0}


def _files(case: Case, targets: str) -> Any:
    theirs, ours = (_adapted(library, case, targets) for library in (peft, graphpeft))
    _shake(theirs)
    _shake(ours)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder) / "theirs")
        ours.save_pretrained(Path(folder) / "ours")
        here = graphpeft.PeftModel.from_pretrained(_base(case), Path(folder) / "theirs")
        there = peft.PeftModel.from_pretrained(_base(case), Path(folder) / "ours").eval()
    return {
        "read": distance(outputs(here, case), outputs(theirs, case)),
        "written": distance(outputs(there, case), outputs(ours, case)),
    }


def _second(case: Case, targets: str) -> Any:
    """Returns how far both are apart with a second adapter of another rank, with the first again, and with none."""
    theirs, ours = (_adapted(library, case, targets) for library in (peft, graphpeft))
    for model, library in ((theirs, peft), (ours, graphpeft)):
        config = library.LoraConfig(r=8, lora_alpha=5, init_lora_weights=False, target_modules=targets)
        _seed(6)
        model.add_adapter("second", config)
        model.set_adapter("second")
    with_second = distance(outputs(ours, case), outputs(theirs, case))
    for model in (theirs, ours):
        model.set_adapter("default")
    with_first = distance(outputs(ours, case), outputs(theirs, case))
    with ours.disable_adapter():
        disabled = distance(outputs(ours, case), outputs(_base(case), case))
    return {"second": with_second, "first": with_first, "disabled": disabled}


WITH_PEFT: dict[str, Callable[[Case, str], Any]] = {
    "outputs": _equal_outputs,
    "merged in peft": _equal_merged,
    "training": _equal_training,
    "files": _files,
    "second": _second,
}
