"""Traces a model and compares the graph with it: in both modes, and on inputs of other sizes."""

from __future__ import annotations

import dataclasses
import gc
import random
import time
from typing import Any

import numpy
import torch
import torch.utils._pytree as pytree
from case import Case
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphpeft import GuardError, LoraConfig, explain, trace
from graphpeft.graph.template import template_of
from graphpeft.sites.layer_kinds import linear_classes
from graphpeft.testing.laws import LawError, require_unchanged, snapshot

Row = dict[str, Any]
"""What was measured of one case."""


def measure(case: Case) -> Row:
    """Returns what there is to say of a case."""
    torch.manual_seed(0)
    model = case.build().eval()
    inputs = case.inputs(2, 1)
    row: Row = {"case": case.key}
    before = snapshot(model)
    clock = Clock()
    try:
        with clock:
            traced: Any = trace(model, inputs)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:600]
    row["seconds"] = clock.seconds
    try:
        require_unchanged(model, before, "the trace")
    except LawError as error:
        row["changed"] = str(error)[:300]
    del before
    if "error" not in row:
        row |= _compared(model, traced, case, inputs)
        template = template_of(traced)
        row["graphs"] = len(template.graphs)
        row["nodes"] = max(len(graph.nodes) for graph in template.graphs)
        row["guards"] = sum(
            n.target.__name__.startswith("expect") for n in traced.graph.nodes if n.op == "call_function"
        )
        row["kept"] = traced.kept
        row["other mode"] = traced.other_mode_error
    row |= _sites(model, inputs)
    row["export"] = _export_seconds(model, inputs)
    gc.collect()
    return row


def _compared(model: nn.Module, traced: nn.Module, case: Case, inputs: Any) -> Row:
    return {
        "eval": _verdict(model.eval(), traced.eval(), inputs),
        "train": _verdict(model.train(), traced.train(), inputs),
        "batch": _verdict(model.eval(), traced.eval(), case.inputs(3, 1)),
        "size": _verdict(model.eval(), traced.eval(), case.inputs(2, 1.5)),
    }


def _verdict(model: nn.Module, traced: nn.Module, inputs: Any) -> str:
    try:
        expected = _output(model, inputs)
    except Exception as error:
        return f"refused by the model ({type(error).__name__})"
    try:
        found = _output(traced, inputs)
    except GuardError as error:
        return f"guard: {error}"[:300]
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    left, left_tree = pytree.tree_flatten(found)
    right, right_tree = pytree.tree_flatten(expected)
    if left_tree != right_tree:
        return f"DIFFERENT structure: {left_tree} and {right_tree}"[:300]
    worst = max((_distance(a, b) for a, b in zip(left, right, strict=True)), default=0.0)
    return "equal" if worst == 0 else f"DIFFERENT by {worst:.1e}"


def _distance(found: Any, expected: Any) -> float:
    if not isinstance(expected, Tensor):
        return 0.0 if found == expected or found is expected else float("inf")
    if not isinstance(found, Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    if torch.equal(found, expected):
        return 0.0
    same = (found == expected) | (found.isnan() & expected.isnan())
    if same.all():
        return 0.0
    return float(
        (found.double() - expected.double()).abs()[~same].max() / expected.double().abs().max().clamp(min=1e-12)
    )


def _output(module: nn.Module, inputs: Any) -> Any:
    """Runs a module with a seed for each generator that models draw from, and puts its buffers back."""
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    for seed in (torch.manual_seed, numpy.random.seed, random.seed):
        seed(0)
    try:
        with torch.no_grad():
            return _opened(module(**inputs) if isinstance(inputs, dict) else module(*inputs))
    finally:
        for name, buffer in module.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:
                buffer.copy_(buffers[name])


def _opened(output: Any) -> Any:
    """Returns a dataclass of a user's as its type and its fields, which can be compared."""
    is_closed = dataclasses.is_dataclass(output) and not isinstance(output, dict)
    return (type(output), vars(output)) if is_closed else output


def _sites(model: nn.Module, inputs: Any) -> Row:
    """Returns how many linear layers there are, how many LoRA can adapt, and why not the others."""
    names = [path for path, module in model.named_modules() if isinstance(module, linear_classes())]
    if not names:
        return {"linears": 0, "adaptable": 0, "refused": {}}
    report = explain(model.eval(), LoraConfig(target_modules=names), example_inputs=inputs)
    return {
        "linears": len(names),
        "adaptable": len({adapted.site.owner for adapted in report.adapted} & set(names)),
        "refused": {refusal.name: refusal.reason for refusal in report.refused},
    }


def _export_seconds(model: nn.Module, inputs: Any) -> float | str:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    clock = Clock()
    try:
        with clock:
            torch.export.export(model.eval(), args, kwargs)
    except Exception as error:
        return type(error).__name__
    return clock.seconds


class Clock:
    """Takes the processor time of what runs within it, which begins with nothing known of the model's shapes.

    What is compared runs on fake tensors, whose values PyTorch keeps: the second one would find those of the first.
    The garbage collector, which would go through all that this process has, waits.

    Attributes:
        seconds: The time.
    """

    seconds = 0.0

    def __enter__(self) -> None:
        FakeTensorMode.cache_clear()
        gc.collect()
        gc.disable()
        self._started = time.process_time()

    def __exit__(self, *error: object) -> None:
        self.seconds = time.process_time() - self._started
        gc.enable()
