"""What calls cost, in numbers that are the same on each machine: Python calls, operations, bytes, recordings, modules.

A row is a name and a number. `docs/costs.md` has them all, and `make costs` writes it anew.
"""

from __future__ import annotations

import functools
import gc
import json
import linecache
import math
import os
import subprocess
import sys
import tempfile
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import graphpeft
from graphpeft import IA3Config, LoraConfig, TargetedConfig, get_peft_model, optimize, trace
from graphpeft.graph.holders import Holder
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

    gc.collect()  # classes that were made for models live until then
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


def llama(layers: int) -> nn.Module:
    """Returns Transformers' Llama, which only what counts it has to import."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes))


def prompt(method: str, **options: Any) -> Any:
    config: Any = graphpeft.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    return config(task_type=graphpeft.TaskType.CAUSAL_LM, **options)


def lora(*targets: str) -> LoraConfig:
    return LoraConfig(r=4, target_modules=list(targets) or "all-linear")


_OWN = ("q", "k", "o", "w")

MODELS: dict[str, tuple[Callable[[int], nn.Module], Callable[[], Any], int]] = {
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
    "LoRA, a Llama": (llama, lambda: lora(*PROJECTIONS), 7),
    "prefix tuning, a Llama": (llama, lambda: prompt("PREFIX_TUNING", num_virtual_tokens=4), 1),
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


def targets() -> Rows:
    """Counts the first part of a model, and the calls for a further target and the recordings for eight more parts."""
    rows = {}
    for what, (build, config, of_part) in MODELS.items():
        first = _adapting(build(1), config())
        for number in (4, 12):
            get_peft_model(build(number), config())  # a library may be imported at last, which empties caches
        few, many = (_adapting(build(number), config()) for number in (4, 12))
        rows[f"the first part: {what}: calls"] = first.own
        rows[f"the first part: {what}: files"] = first.files
        rows[f"the first part: {what}: recordings"] = first.recordings
        rows[f"a further target: {what}: calls"] = round((many.own - few.own) / 8 / of_part)
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

GROWTH = ": % of the calls of all libraries with two"
"""How rows end that tell what the last call costs beside one of the first."""


def lifecycle(what: str) -> Rows:
    """Counts what calls on a model with two adapters cost, what they cost with fifty, and how much more that is."""
    build, config = LIFECYCLES[what]
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        model: Any = get_peft_model(build(8), config())
        model.save_pretrained(folder)
        few = _calls_of(model, folder, 2)
        for number in range(3, ADAPTERS):
            model.load_adapter(folder, f"a{number}")
        many = _calls_of(model, folder, ADAPTERS)
    for call, first in few.items():
        rows[f"{call}, 8 {what}: calls"] = first.own
        rows[f"{call}, 8 {what}: recordings"] = first.recordings
        rows[f"{call}, 8 {what}, the 50th: calls"] = many[call].own
        rows[f"{call}, 8 {what}, the 50th{GROWTH}"] = math.ceil(100 * many[call].calls / first.calls)
    return rows


def _calls_of(model: Any, folder: str, number: int) -> dict[str, Counted]:
    model.load_adapter(folder, "leaves")
    found = {call: counted(run) for call, run in _calls(model, folder, f"a{number}", "leaves").items()}
    model.set_adapter("default")
    return found


def _calls(model: Any, folder: str, name: str, leaves: str) -> dict[str, Callable[[], object]]:
    """Returns the calls of a model's life, in their order: `name` comes, and `leaves` is deleted."""

    def without() -> None:
        with model.disable_adapter():
            pass

    return {
        "load_adapter": lambda: model.load_adapter(folder, name),
        "set_adapter": lambda: model.set_adapter(name),
        "the first forward after it": lambda: model(torch.zeros(1, 16)),
        "disable_adapter": without,
        "save_pretrained": lambda: model.save_pretrained(Path(folder) / name, selected_adapters=[name]),
        "delete_adapter": lambda: model.delete_adapter(leaves),
    }


def mixed_batches() -> Rows:
    """Counts the calls for a batch whose rows have different adapters, the first of its kind and later ones."""
    rows = {}
    for what, (build, config) in LIFECYCLES.items():
        model: Any = get_peft_model(build(8), config())
        model.add_adapter("other", config())
        for batch, pairs in (("the first", 4), ("the next", 4), ("32 rows", 16)):
            names = ["default", "other"] * pairs
            call = functools.partial(model, torch.zeros(len(names), 16), adapter_names=names)
            made = counted(call)
            rows[f"a mixed batch, {batch}, 8 {what}: calls"] = made.own
            rows[f"a mixed batch, {batch}, 8 {what}: recordings"] = made.recordings
    return rows


class _Watched(dict[str, Any]):
    """The submodules of a module, most of which are holders; counts how many of these somebody goes through."""

    passed = 0

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def values(self) -> Any:
        return (held for _, held in self.items())

    def items(self) -> Any:
        for place, (name, held) in enumerate(super().items()):
            # the first one is looked at to see whether there are others than holders
            _Watched.passed += place > 0 and isinstance(held, Holder)
            yield name, held


def walks() -> Rows:
    """Counts how many holders calls go through in models with ten adapters, which no count of calls shows."""
    rows: Rows = {}
    for what, (build, config) in LIFECYCLES.items():
        model: Any = get_peft_model(build(4), config())
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            for number in range(9):
                model.load_adapter(folder, f"a{number}")
            for module in model.modules():
                if any(type(held) is Holder for held in module._modules.values()):
                    vars(module)["_modules"] = _Watched(module._modules)
            for call, run in _calls(model, folder, "another", "a4").items():
                _Watched.passed = 0
                run()
                rows[f"{call}, 4 {what}: holders gone through"] = _Watched.passed
    return rows


def operations(run: Callable[[], object]) -> int:
    """Returns how many operators of PyTorch a function runs, those that operators call among them.

    A dispatch mode would see what an exporter sees: kernels of adapted layers step aside for both.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        run()
    return sum(event.name.startswith("aten::") for event in profiled.events() or ())


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


def of_model(what: str, model: nn.Module, outputs: Callable[[], Tensor]) -> Rows:
    """Counts the operations of a forward and of a step, and the bytes that the forward keeps for its backward."""

    def loss() -> Tensor:
        return outputs().square().mean()

    model.eval()
    with torch.no_grad():
        outputs()  # the first call may prepare something
        forward = operations(outputs)
    model.train()
    loss().backward()
    return {
        f"{what}: operations of a forward": forward,
        f"{what}: operations of a step": operations(lambda: loss().backward()),
        f"{what}: bytes kept for the backward": kept_bytes(loss),
    }


def of_method(method: str) -> Rows:
    """Counts what a method computes and keeps."""
    model = adapted(method)
    return of_model(method, model, lambda: model(TOKENS))


def of_methods() -> Rows:
    """Counts what each method computes and keeps."""
    return {what: count for method in methods() for what, count in of_method(method).items()}


PROMPTS: dict[str, dict[str, Any]] = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "P_TUNING": {"num_virtual_tokens": 4},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
}
"""Methods that change what a model is given, with their options."""


def of_prompts() -> Rows:
    """Counts what prompts compute and keep, on a Llama of one layer."""
    rows: Rows = {}
    for method, options in PROMPTS.items():
        torch.manual_seed(0)
        model: Any = get_peft_model(llama(1), prompt(method, **options))
        rows |= of_model(f"{method}, a Llama", model, lambda model=model: model(input_ids=TOKENS).logits)
    return rows


def of_passes() -> Rows:
    """Counts what passes change of that, and what no adapter costs."""
    model = adapted("LORA", lora_dropout=0.1)
    rows = of_model("LORA with dropout", model, lambda: model(TOKENS))
    optimize(model, ["regenerated_dropout", "inplace_addmm"])
    rows |= of_model("LORA with dropout and passes", model, lambda: model(TOKENS))
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


GROUPS: dict[str, Callable[[], Rows]] = {
    "the import and one layer": imported,
    "adapting": targets,
    **{f"calls on {what}": functools.partial(lifecycle, what) for what in LIFECYCLES},
    "mixed batches": mixed_batches,
    "walks": walks,
    "methods": of_methods,
    "prompts": of_prompts,
    "passes": of_passes,
    "traces": of_traces,
    "switches": left_behind,
}
"""What counts the rows of each table of the page."""


def fresh(group: str) -> Rows:
    """Counts in a process of its own, since calls are fewer where others have filled caches, or loaded libraries."""
    command = [sys.executable, "-W", "ignore", __file__, group]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: Rows = json.loads(done.stdout.splitlines()[-1])
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(GROUPS[sys.argv[1]]()))
