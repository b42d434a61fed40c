"""What calls cost, in numbers that are the same on each machine: Python calls, operations, bytes, recordings, modules.

A row is a name and a number. `docs/costs.md` has them all, and `make costs` writes it anew.
"""

from __future__ import annotations

import gc
import json
import linecache
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphpeft
from graphpeft import IA3Config, LoraConfig, TargetedConfig, get_peft_model, optimize, trace
from graphpeft._torch import TorchDispatchMode
from graphpeft.rules.registry import registered
from graphpeft.testing.memory import kept_bytes

Rows = dict[str, int]
"""Counts by what they count."""

PACKAGE = str(Path(graphpeft.__file__).parent)
_COMPREHENSIONS = frozenset(("<listcomp>", "<dictcomp>", "<setcomp>"))
"""Functions that Python 3.12 and later versions don't call."""


class Counted(NamedTuple):
    """What a call has cost.

    Attributes:
        calls: The number of calls of Python functions.
        own: The number of calls of this package's functions.
        files: The number of files that these functions are in.
        recordings: The number of forwards that were recorded.
    """

    calls: int
    own: int
    files: int
    recordings: int


def counted(run: Callable[[], object]) -> Counted:
    """Runs a function and counts its calls; those of a garbage collection aren't among them."""
    codes: dict[CodeType, int] = {}

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call":
            codes[frame.f_code] = codes.get(frame.f_code, 0) + 1

    gc.disable()
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    compared = {code: number for code, number in codes.items() if code.co_name not in _COMPREHENSIONS}
    own = {code: number for code, number in compared.items() if code.co_filename.startswith(PACKAGE)}
    recordings = sum(number for code, number in own.items() if code.co_name == "record_forward")
    return Counted(sum(compared.values()), sum(own.values()), len({code.co_filename for code in own}), recordings)


# models


class Block(nn.Module):
    """A block of somebody's own, with layers and a functional weight."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(16, 16) for _ in range(3))
        self.w = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.relu(self.q(x) + self.k(x)) @ self.w) + x


class NamedLayers(nn.Module):
    """A block that calls its layers by their names, so that its code doesn't show which weights it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ["q", "k", "o", "w"]
        for name in self.names:
            setattr(self, name, nn.Linear(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x + torch.relu(getattr(self, name)(x))
        return x


class Layer(nn.Module):
    """A layer of a decoder like Llama's, which no release of another library changes."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(size, size, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = (nn.Linear(size, 2 * size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(2 * size, size, bias=False)
        self.norm, self.mlp_norm = nn.RMSNorm(size), nn.RMSNorm(size)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (project(normed).unflatten(-1, (4, -1)).mT for project in (self.q_proj, self.k_proj, self.v_proj))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).mT.flatten(-2))
        normed = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class Decoder(nn.Module):
    """Such a decoder."""

    def __init__(self, layers: int, size: int = 32) -> None:
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(64, size), nn.ModuleList(Layer(size) for _ in range(layers))
        self.norm, self.lm_head = nn.RMSNorm(size), nn.Linear(size, 64, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def linears(number: int) -> nn.Module:
    return nn.Sequential(*(nn.Sequential(OrderedDict(linear=nn.Linear(16, 16), act=nn.GELU())) for _ in range(number)))


def blocks(number: int) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(number)))


def named_layers(number: int) -> nn.Module:
    return nn.Sequential(*(NamedLayers() for _ in range(number)))


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(targets) or "all-linear")


_OWN = ("q", "k", "o", "w")

FURTHER: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Any], int]] = {
    "LoRA, linear layers": (linears, lora, 1),
    "IA3, linear layers": (linears, lambda: IA3Config(target_modules=["linear"], feedforward_modules=[]), 1),
    "LoRA, a decoder": (Decoder, lambda: lora(*PROJECTIONS), 7),
    "IA3, a decoder": (
        Decoder,
        lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        3,
    ),
    "LoRA, blocks with a functional weight": (blocks, lambda: lora(*_OWN), 4),
    "LoRA, blocks that call layers by name": (named_layers, lambda: lora(*_OWN), 4),
}
"""Models by their number of parts, with a config and its targets in a part."""


# rows


def imported() -> Rows:
    """Counts what a new process imports with the library, and what its first adaptation costs."""
    script = """
    import json, sys, torch
    before = set(sys.modules)
    import graphpeft
    brought = set(sys.modules) - before
    from counting import counted, lora
    def adapt():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8))
        return counted(lambda: graphpeft.get_peft_model(model, lora("0")))
    first, again = adapt(), adapt()
    slow = {"torch._dynamo", "torch._inductor", "torch.onnx", "sympy", "networkx", "transformers"}
    print(json.dumps([len(brought), sorted(slow & brought), first, again]))
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True, check=True)
    modules, slow, first, again = json.loads(done.stdout)
    first, again = Counted(*first), Counted(*again)
    return {
        "import: Python modules": modules,
        "import: of Dynamo, Inductor, ONNX, SymPy, NetworkX, Transformers": len(slow),
        "the first nn.Linear of a process: calls": first.own,
        "the first nn.Linear of a process: files": first.files,
        "another nn.Linear: calls": again.own,
        "another nn.Linear: files": again.files,
    }


def further_targets() -> Rows:
    """Counts the calls for a further target, and the recordings for eight more parts."""
    rows = {}
    for what, (build, config, targets) in FURTHER.items():
        get_peft_model(build(2), config())
        few, many = (_adapting(build(number), config()) for number in (4, 12))
        rows[f"a further target: {what}: calls"] = round((many.own - few.own) / 8 / targets)
        rows[f"a further target: {what}: recordings"] = many.recordings - few.recordings
    return rows


def _adapting(model: nn.Module, config: Any) -> Counted:
    return counted(lambda: get_peft_model(model, config))


LIFECYCLES: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Any]]] = {
    "linear layers": (linears, lora),
    "blocks with a functional weight": (blocks, lambda: lora(*_OWN)),
    "blocks that call layers by name": (named_layers, lambda: lora(*_OWN)),
}

ADAPTERS = 50
"""The number of adapters that a model has in the end."""


def lifecycle(what: str) -> tuple[Rows, dict[str, float]]:
    """Counts what calls on a model with few adapters cost, and how much more each costs with many."""
    build, config = LIFECYCLES[what]
    few, many = _lifecycle(build(8), config())
    rows: Rows = {}
    for call, first in few.items():
        rows[f"{call}, 8 {what}: calls"] = first.own
        rows[f"{call}, 8 {what}: recordings"] = first.recordings
    return rows, {call: many[call].calls / first.calls for call, first in few.items()}


def _lifecycle(model: Any, config: Any) -> tuple[dict[str, Counted], dict[str, Counted]]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, config)
        model.save_pretrained(folder)
        few = _calls_of(model, folder, 2)
        for number in range(3, ADAPTERS):
            model.load_adapter(folder, f"a{number}")
        return few, _calls_of(model, folder, ADAPTERS)


def _calls_of(model: Any, folder: str, number: int) -> dict[str, Counted]:
    name, saved = f"a{number}", Path(folder) / f"saved {number}"

    def without() -> None:
        with model.disable_adapter():
            pass

    model.load_adapter(folder, "leaves")
    found = {
        "load_adapter": counted(lambda: model.load_adapter(folder, name)),
        "set_adapter": counted(lambda: model.set_adapter(name)),
        "the first forward after it": counted(lambda: model(torch.zeros(1, 16))),
        "disable_adapter": counted(without),
        "save_pretrained": counted(lambda: model.save_pretrained(saved, selected_adapters=[name])),
        "delete_adapter": counted(lambda: model.delete_adapter("leaves")),
    }
    model.set_adapter("default")
    return found


class _Watched(dict[str, Any]):
    """The submodules of a layer, most of which are holders; counts how often somebody goes through them."""

    walks = 0

    def items(self) -> Any:
        _Watched.walks += 1
        return super().items()

    def values(self) -> Any:
        _Watched.walks += 1
        return super().values()


def walks() -> Rows:
    """Counts how often calls go through the holders of a layer with ten adapters, which no count of calls shows."""
    model: Any = get_peft_model(linears(4), lora())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for number in range(9):
            model.load_adapter(folder, f"a{number}")
        layers = [module for module in model.modules() if type(module).__name__ == "Linear"]
        for layer in layers:
            vars(layer)["_modules"] = _Watched(layer._modules)
        found = {}
        for what, call in {
            "load_adapter": lambda: model.load_adapter(folder, "another"),
            "set_adapter": lambda: model.set_adapter("a3"),
            "the first forward after it": lambda: model(torch.zeros(1, 16)),
            "delete_adapter": lambda: model.delete_adapter("a4"),
        }.items():
            _Watched.walks = 0
            call()
            found[f"{what}: walks through the holders of 4 layers"] = _Watched.walks
    return found


class _Operations(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def operations(run: Callable[[], object]) -> int:
    """Returns how many operators of PyTorch a function runs."""
    with _Operations() as mode:
        run()
    return mode.number


OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 1000},
    "C3A": {"block_size": 16},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["norm", "mlp_norm"]},
    "OFT": {"oft_block_size": 16},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [*range(8)]},
    "VBLORA": {"vector_length": 32},
}
"""Options that a method needs, or whose defaults don't fit the decoder."""

TOKENS = torch.arange(32).reshape(2, 16) % 64


def methods() -> Iterator[str]:
    """Yields the methods that adapt named weights; Poly needs tasks in each call."""
    for name, config in registered().items():
        is_own = config.__module__.startswith("graphpeft.") and name in [*graphpeft.PeftType]
        if is_own and issubclass(config, TargetedConfig) and name != "POLY":
            yield graphpeft.PeftType(name).value


def adapted(method: str, **options: Any) -> Any:
    """Returns a decoder of one layer, adapted by a method."""
    torch.manual_seed(0)
    config: Any = graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    return get_peft_model(Decoder(1, 64), config(**{"target_modules": PROJECTIONS} | OPTIONS.get(method, {}) | options))


def loss(model: nn.Module) -> Tensor:
    return model(TOKENS).square().mean()


def of_model(what: str, model: nn.Module) -> Rows:
    """Counts the operations of a forward and of a step, and the bytes that the forward keeps for its backward."""
    with torch.no_grad():
        model.eval()(TOKENS)  # the first call may prepare something
        forward = operations(lambda: model(TOKENS))
    loss(model.train()).backward()
    return {
        f"{what}: operations of a forward": forward,
        f"{what}: operations of a step": operations(lambda: loss(model).backward()),
        f"{what}: bytes kept for the backward": kept_bytes(lambda: loss(model)),
    }


def of_method(method: str) -> Rows:
    """Counts what a method computes and keeps."""
    return of_model(method, adapted(method))


def of_passes() -> Rows:
    """Counts what passes change of that, and what no adapter costs."""
    model = adapted("LORA", lora_dropout=0.1)
    rows = of_model("LORA with dropout", model)
    optimize(model, ["regenerated_dropout", "inplace_addmm"])
    rows |= of_model("LORA with dropout and passes", model)
    model = adapted("LORA")
    with model.disable_adapter():
        rows |= {"LORA disabled: operations of a forward": _without_gradients(model)}
    return rows | {"LORA merged: operations of a forward": _without_gradients(model.merge_and_unload())}


def of_traces() -> Rows:
    """Counts the nodes of a trace."""
    flat: Any = trace(Decoder(2), (TOKENS,))
    rows = {"a trace of two layers: nodes": len(flat.graph.nodes)}
    flat = get_peft_model(flat, lora(*PROJECTIONS))
    return rows | {"the same, adapted: nodes": len(flat.graph.nodes)}


def _without_gradients(model: nn.Module) -> int:
    with torch.no_grad():
        model.eval()(TOKENS)
        return operations(lambda: model(TOKENS))


def left_behind() -> Rows:
    """Counts what remains after a hundred switches between ten adapters."""
    model: Any = get_peft_model(linears(4), lora())
    for number in range(9):
        model.add_adapter(f"a{number}", lora())
    x = torch.randn(2, 16)

    def switch(times: int) -> None:
        for number in range(times):
            model.set_adapter([f"a{number % 9}", "default"] if number % 2 else f"a{number % 9}")
            with torch.no_grad():
                model(x)

    switch(20)
    tensors, sources = _alive(), len(linecache.cache)
    switch(100)
    return {
        # what is freed meanwhile is of others
        "a hundred switches: tensors more": max(0, _alive() - tensors),
        "a hundred switches: sources more": max(0, len(linecache.cache) - sources),
    }


def _alive() -> int:
    gc.collect()
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


def all_rows() -> Rows:
    """Counts everything."""
    rows = {**imported(), **further_targets()}
    for what in LIFECYCLES:
        rows |= lifecycle(what)[0]
    for method in methods():
        rows |= of_method(method)
    return {**rows, **walks(), **of_passes(), **of_traces(), **left_behind()}
