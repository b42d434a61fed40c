"""llama.cpp's adapters: a GGUF file of factors by the names of the GGUF file of the base that they are served with.

    y + (α / rank) · b (a x)        a = A of shape (rank, in), b = B of shape (out, rank); stacks of such for experts

One α is the whole adapter's, so other scales go into b. The factors of a table are a = Aᵀ, (tokens, rank), and b = B.

Source: llama.cpp of 2026, ``src/llama-adapter.cpp`` and ``src/llama-graph.cpp``; gguf 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import modules_by_path
from graphpeft.stacks import checkpoints, experts, transformers4
from graphpeft.stacks.adapter_files import AdapterFiles, Lora, LowRank, written_lora
from graphpeft.stacks.served_base import ARCHITECTURE, TABLE, Gguf, ServedBase, read_gguf, served_base
from graphpeft.wording import joined

FILE = "adapter.gguf"

_ALPHA = "adapter.lora.alpha"
_INVOKED = "adapter.alora.invocation_tokens"
_LEARNT = re.compile(
    r"blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps|_shexp)?|ffn_gate_inp)\.weight|(output|token_embd)\.weight"
)
"""The tensors whose factors llama.cpp's graphs use. It loads the factors of other tensors, and ignores them."""
_IGNORED: dict[str, re.Pattern[str]] = dict.fromkeys(
    [
        *("bailingmoe3", "deepseek2", "deepseek2-ocr", "deepseek32", "deepseek4", "dots3note", "glm-dsa", "glm5-next"),
        *("graniteswitch", "hy_v4", "kimi-linear", "plm"),
    ],
    re.compile(r".*\.attn_\w+\.weight|(output|token_embd)\.weight"),
)
_IGNORED["kimi-k3"] = re.compile(r".*")
"""The tensors whose factors an architecture's graph doesn't use, or not all: it has ``ggml_mul_mat`` itself there."""
_KIND = {"general.type": "adapter", "adapter.type": "lora"}


def is_there(path: Path) -> bool:
    """Returns whether a path leads to a GGUF file, or to a folder that has an adapter's."""
    return path.suffix == ".gguf" or (path / FILE).is_file()


def converted(files: AdapterFiles, model: Any, base: Path | None = None) -> AdapterFiles:
    """Returns LoRA as llama.cpp has it: its metadata, and its tensors by their names.

    Args:
        files: PEFT's files.
        model: The model, with the weights of the base.
        base: The GGUF file of the base.

    Raises:
        CheckpointError: If llama.cpp has no place for the adapter, or the file is of another base.
    """
    if files.config.get("peft_type") != "LORA":
        kind = files.config.get("peft_type")
        raise CheckpointError(f"llama.cpp reads LoRA, and this is an adapter of {kind}; save_as_lora writes LoRA")
    served, own = _base(model, base), checkpoints.Matrices(model)
    lora = transformers4.lora_in_checkpoint(files, model, "llama.cpp's file is wanted")
    if others := [*lora.magnitudes, *lora.others, *lora.parameters]:
        raise CheckpointError(
            f"llama.cpp has no place for {joined(others)}: it reads LoRA of layers alone; leave these out, or merge "
            "the adapter, and convert the merged model"
        )
    changes = lora.layers | lora.embeddings
    alpha = next((each.scale * each.rank for each in changes.values() if each.scale), 1.0)
    ordered = {name: _with_rows(each, served.rows_of(name, own.of(name))) for name, each in lora.layers.items()}
    layers = experts.stacked(ordered, checkpoints.names_of_experts(model), experts.name_of_stack)
    tensors: dict[str, Tensor] = {}
    for name, change in layers.items():
        tensors |= _pair(_used(served, name), change.of(change.rank, alpha / change.rank))
    for name, change in lora.embeddings.items():
        _refuse_table(served, own, name)
        A, B, _ = change.of(change.rank, alpha / change.rank)
        tensors |= _pair(_used(served, name), LowRank(A.T, B, 1.0))
    return AdapterFiles({ARCHITECTURE: served.architecture, **_KIND, _ALPHA: float(alpha)}, tensors)


def _base(model: Any, base: Path | None) -> ServedBase:
    if base is None or model is None:
        raise CheckpointError(
            "the names of an adapter for llama.cpp are told by the base that it is served with; give its GGUF file as "
            "served_base, and the model; graphpeft convert ADAPTER FOLDER --to peft --base MODEL --served-base FILE "
            "reads such an adapter"
        )
    return served_base(base)


def _used(served: ServedBase, name: str) -> str:
    """Returns the name of the tensor that has a checkpoint's matrix, if llama.cpp uses factors of it."""
    tensor, ignored = served.name_of(name), _IGNORED.get(served.architecture)
    if not _LEARNT.fullmatch(tensor) or (ignored is not None and ignored.fullmatch(tensor)):
        raise CheckpointError(
            f"llama.cpp's graph of {served.architecture} would ignore factors of {tensor}, which {name} is; leave it "
            "out, or merge the adapter, and convert the merged model"
        )
    return tensor


def _with_rows(change: LowRank, rows: Tensor) -> LowRank:
    return change._replace(A=change.A.float(), B=change.B.float()[rows.to(change.B.device)])


def _refuse_table(served: ServedBase, own: checkpoints.Matrices, name: str) -> None:
    """Raises CheckpointError if llama.cpp has a table for the head, too, or its tokens in another order."""
    served.refuse_tied(name)
    rows = served.rows_of(name, own.of(name))
    if not bool((rows == torch.arange(len(rows))).all()):
        raise CheckpointError(f"{served.file.path} has the rows of {name} in another order; leave it out, or merge")


def _pair(name: str, change: LowRank) -> dict[str, Tensor]:
    return {f"{name}.lora_a": change.A.float().contiguous(), f"{name}.lora_b": change.B.float().contiguous()}


def write(files: AdapterFiles, staged: Path) -> None:
    """Writes a GGUF file of an adapter."""
    from gguf import GGUFWriter

    staged.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(staged / FILE, files.config[ARCHITECTURE])
    for key in _KIND:
        writer.add_string(key, files.config[key])
    writer.add_float32(_ALPHA, files.config[_ALPHA])
    for name, tensor in files.tensors.items():
        writer.add_tensor(name, tensor.detach().cpu().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read(path: Path, model: Any, base: Path | None = None) -> AdapterFiles:
    """Reads a GGUF file of an adapter as PEFT's files.

    Args:
        path: The file, or its folder.
        model: The model that gets the adapter.
        base: The GGUF file of the base.

    Raises:
        CheckpointError: If the file is damaged, or no adapter's, or if the base isn't given or is another one.
    """
    file = read_gguf(path / FILE if path.is_dir() else path)
    if other := [f"{key}={file.values.get(key)!r}" for key, kind in _KIND.items() if file.values.get(key) != kind]:
        raise CheckpointError(f"{file.path} is no adapter of LoRA: it has {joined(other)}")
    served, own = _base(model, base), checkpoints.Matrices(model)
    if file.values.get(ARCHITECTURE) != served.architecture:
        of_file = file.values.get(ARCHITECTURE)
        raise CheckpointError(f"{file.path} is for {of_file!r}, and {served.file.path} is {served.architecture!r}")
    names = served.checkpoint_names(own.names)
    lora, alpha = Lora({}, {}, {}, {}, {}), _alpha_of(file)
    for tensor, (a, b) in _pairs(file).items():
        if tensor not in names:
            raise CheckpointError(f"{file.path}: the model has no matrix that is {tensor}; load it on its own base")
        _refuse_other_sizes(file, served, tensor, (a, b), len(names[tensor]))
        scale = alpha / b.shape[-1] if alpha else 1.0
        for name in names[tensor]:
            _used(served, name)
        if tensor == TABLE:
            _refuse_table(served, own, name := names[tensor][0])
            lora.embeddings[name] = LowRank(a.T.contiguous(), b, scale)
            continue
        for name, A, B in zip(names[tensor], *(each if each.dim() == 3 else [each] for each in (a, b)), strict=True):
            back = torch.argsort(served.rows_of(name, own.of(name)))
            lora.layers[name] = LowRank(A.contiguous(), B[back], scale)
    rank = next(iter((lora.layers | lora.embeddings).values())).rank
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha or rank, "lora_dropout": 0.0}
    modules = modules_by_path(model)
    return written_lora(plain, lora, {}, [*modules, *checkpoints.names_of_experts(model), *lora.layers])


def _alpha_of(file: Gguf) -> float:
    """Returns an adapter's alpha, 0 if it has none, if nothing else in its metadata changes its meaning."""
    alpha = file.values.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not abs(alpha) < 1e6:
        raise CheckpointError(f"{file.path}: {_ALPHA}={alpha!r} is no number that LoRA can have; convert it again")
    if tokens := file.values.get(_INVOKED):
        raise CheckpointError(f"{file.path} acts after the tokens {tokens} alone, {_INVOKED}, which isn't read here")
    return alpha


def _refuse_other_sizes(
    file: Gguf, served: ServedBase, tensor: str, factors: tuple[Tensor, Tensor], count: int
) -> None:
    """Raises CheckpointError if factors aren't of a tensor's sizes, or if the model has not as many matrices of it."""
    *stacked, rows, columns = served.file.shape(tensor)
    found, rank = tuple(tuple(each.shape) for each in factors), factors[1].shape[-1]
    wanted = (*stacked, rank, columns), (*stacked, rows, rank)
    if tensor == TABLE:
        wanted = (rows, rank), (columns, rank)
    if not rank or found != wanted or count != (stacked or [1])[0]:
        raise CheckpointError(
            f"{file.path}: {tensor} has factors of shapes {found}; the base wants {wanted}, and the model has {count} "
            "matrices of it; load it on its own base"
        )


def _pairs(file: Gguf) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Returns the factors in a file, by the tensors that they change."""
    found: dict[str, dict[str, Tensor]] = {}
    for key in file.tensors:
        name, _, which = key.rpartition(".lora_")
        if not name:
            raise CheckpointError(f"{file.path} has {key}, which is no factor of LoRA; convert the merged model")
        found.setdefault(name, {})[which] = numbers = file.numbers(key)
        if not bool(numbers.isfinite().all()):
            raise CheckpointError(f"{file.path}: {key} has numbers that aren't finite; convert the adapter again")
    for name, own in found.items():
        sizes = {which: tuple(tensor.shape) for which, tensor in own.items()}
        a, b = sizes.get("a", ()), sizes.get("b", ())
        ranks = a[-1 if name == TABLE else -2 :][:1], b[-1:]
        if own.keys() != {"a", "b"} or len(a) != len(b) or len(a) not in (2, 3) or ranks[0] != ranks[1]:
            raise CheckpointError(f"{file.path}: {name} has factors of shapes {sizes}; convert the adapter again")
    if not found:
        raise CheckpointError(f"{file.path} has no factors of LoRA")
    return {name: (own["a"], own["b"]) for name, own in found.items()}
