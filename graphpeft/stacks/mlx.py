"""mlx-lm's files: ``adapters.safetensors`` with factors the other way round, and an ``adapter_config.json`` of its own.

    y + scale · (x a) b        a = Aᵀ of shape (in, rank), b = Bᵀ of shape (rank, out)

One rank and one scale are all layers'. So lower ranks get zeros, which change nothing, and other scales go into b.
Experts' matrices are stacks: a of ``switch_mlp.gate_proj`` has the shape (experts, rank, in), b (experts, out, rank).

Source: mlx-lm 0.32, ``tuner/utils.py``, ``tuner/lora.py`` and ``tuner/dora.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from graphpeft.files.atomic_files import read_together
from graphpeft.files.foreign_files import CheckpointError, read_json, read_safetensors
from graphpeft.files.hub import CONFIG_NAME
from graphpeft.graph.paths import modules_by_path
from graphpeft.stacks import checkpoints, experts, transformers4
from graphpeft.stacks.adapter_files import (
    AdapterFiles,
    Lora,
    LowRank,
    refuse_unknown_names,
    written_lora,
)
from graphpeft.stacks.plain_lora import of_one_rank
from graphpeft.wording import joined

FILE = "adapters.safetensors"

_STACK = re.compile(r"(?P<before>.+)\.switch_mlp\.(?P<own>\w+)")
_OF_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""The names that mlx-lm has for the matrices of experts of Mixtral's kind."""


_OF_PEFT = ("base_model_name_or_path", "task_type")
"""Options of PEFT's configs that mlx-lm's has no use for, and carries along."""
_RENAMED = frozenset(
    [
        *("gpt2", "gpt_neox", "gptj", "gemma4", "gemma4_text", "laguna", "mistral3", "muse_glimmer", "kimi_vl"),
        *("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    ]
)
"""The types of models whose names mlx-lm changes: ``sanitize`` in its ``models/*.py``."""
_SPLIT = re.compile(r".*\.kv_b_proj")
"""The layers that mlx-lm has as two, ``embed_q`` and ``unembed_out``."""


def is_there(folder: Path) -> bool:
    """Returns whether a folder has files of mlx-lm."""
    return (folder / FILE).is_file() and (folder / CONFIG_NAME).is_file()


def converted(files: AdapterFiles, model: Any) -> AdapterFiles:
    """Returns LoRA or DoRA as mlx-lm has it: its config, and its tensors by their names.

    Args:
        files: PEFT's files.
        model: The model; None for files that name no experts.

    Raises:
        CheckpointError: If mlx-lm has no place for the adapter.
    """
    lora = _lora(files, model)
    stacks = experts.stacked(lora.layers, checkpoints.names_of_experts(model), _stack_of)
    lora = of_one_rank(lora._replace(layers=stacks))
    changes = lora.layers | lora.embeddings
    tensors = {f"{path}.m": magnitude for path, magnitude in lora.magnitudes.items()}
    for path, each in changes.items():
        is_stack = each.A.dim() == 3
        tensors |= {f"{path}.lora_a": each.A if is_stack else each.A.T}
        tensors |= {f"{path}.lora_b": each.B if is_stack else each.B.T}
    layers = sorted(changes)
    first, dropout = next(iter(changes.values())), files.config.get("lora_dropout", 0.0)
    parameters = {"rank": first.rank, "scale": first.scale, "dropout": dropout, "keys": layers}
    kind = "dora" if lora.magnitudes else "lora"
    of_peft = {name: files.config[name] for name in _OF_PEFT if files.config.get(name)}
    config = {"fine_tune_type": kind, "num_layers": 0, "lora_parameters": parameters, **of_peft}
    return AdapterFiles(config, {key: tensor.contiguous() for key, tensor in tensors.items()})


def write(files: AdapterFiles, staged: Path) -> None:
    """Writes a config and tensors of mlx-lm."""
    staged.mkdir(parents=True, exist_ok=True)
    (staged / CONFIG_NAME).write_text(json.dumps(dict(files.config), indent=2), encoding="utf-8")
    tensors = {key: tensor.detach().to("cpu", copy=True) for key, tensor in files.tensors.items()}
    save_file(tensors, staged / FILE, metadata={"format": "mlx", _DIGEST: _digest(files.config)})


_DIGEST = "graphpeft_config"
"""The key in the metadata of tensors by which a reader sees whether the config beside them is theirs."""


def _digest(config: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=16).hexdigest()


def _lora(files: AdapterFiles, model: Any) -> Lora:
    """Returns the changes by the names of a checkpoint, with all of which mlx-lm has a place for each."""
    kind = files.config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"mlx-lm reads LoRA and DoRA, and this is an adapter of {kind}; save_as_lora writes LoRA")
    refuse_unknown_names(files, model)
    lora = transformers4.lora_in_checkpoint(files, model, "mlx-lm's files are wanted")
    _refuse_renamed(lora, model)
    _refuse_tied(lora, model)
    if lora.magnitudes and lora.magnitudes.keys() != lora.layers.keys() | lora.embeddings.keys():
        raise CheckpointError("mlx-lm has DoRA at all layers of an adapter or at none; merge it, or save_as_lora")
    if lora.others or lora.parameters:
        raise CheckpointError(
            f"mlx-lm has no place for {joined([*lora.others, *lora.parameters])}: it reads LoRA and DoRA of layers "
            "alone; leave these out, or merge the adapter"
        )
    return lora


def _refuse_renamed(lora: Lora, model: Any) -> None:
    """Raises CheckpointError for layers that have other names in mlx-lm, as it drops unknown names without a word."""
    kind, changed = getattr(getattr(model, "config", None), "model_type", None), lora.layers | lora.embeddings
    renamed = [path for path in changed if kind in _RENAMED or _SPLIT.fullmatch(path)]
    if renamed:
        raise CheckpointError(
            f"mlx-lm has other names than the checkpoint for {joined(renamed)} of {kind}, and would ignore their "
            "factors; leave these out, or merge the adapter"
        )


def _refuse_tied(lora: Lora, model: Any) -> None:
    """Raises CheckpointError for changes of a table that mlx-lm has for the head, too, and for DoRA of any table."""
    if lora.magnitudes and lora.embeddings:
        raise CheckpointError(
            f"mlx-lm's DoRA of {joined([*lora.embeddings])} has a magnitude for each row, and PEFT's one for each "
            "column; merge the adapter"
        )
    if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        ends = ("embed_tokens", "wte", "lm_head", "embed_out")
        tied = [*lora.embeddings, *(path for path in lora.layers if path.rpartition(".")[2] in ends)]
        if tied:
            raise CheckpointError(
                f"{joined(tied)} is tied, and mlx-lm has one layer for the table and the head, which it changes both; "
                "leave it out, or merge the adapter"
            )


def _stack_of(place: experts.OfExpert) -> str:
    return f"{place.before}.switch_mlp.{_OF_MIXTRAL.get(place.own, place.own)}"


def read(folder: Path, model: Any) -> AdapterFiles:
    """Reads a folder of mlx-lm as PEFT's files.

    Args:
        folder: The folder.
        model: The model that gets the adapter; None takes a table of embeddings for a layer.

    Raises:
        CheckpointError: If the files are damaged, or of full weights.
    """
    config, (tensors, metadata) = _read_both(folder)
    given = config.get("lora_parameters")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora") or not isinstance(given, dict):
        raise CheckpointError(f"{folder} has no LoRA or DoRA of mlx-lm, but fine_tune_type={kind!r}")
    if metadata.get(_DIGEST) not in (None, _digest(config)):
        raise CheckpointError(f"{folder}: {FILE} was saved with another {CONFIG_NAME}; save the adapter again")
    numbers = {"scale": given.get("scale"), "rank": given.get("rank"), "dropout": given.get("dropout", 0.0)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e6:
            raise CheckpointError(f"{folder / CONFIG_NAME}: {name}={value!r} is no number that LoRA can have")
    modules = modules_by_path(model) if model is not None else {}
    scale, by_path = numbers["scale"], _by_path(tensors, checkpoints.names_of_experts(model), folder)
    lora = Lora({}, {}, {}, {}, {})
    present = checkpoints.present_names(model, [f"{path}.weight" for path in by_path])
    for path, own in by_path.items():
        layer = modules.get(present[f"{path}.weight"].removesuffix(".weight"))
        is_table = len(own["lora_a"]) == getattr(layer, "num_embeddings", -1)
        changes = lora.embeddings if is_table else lora.layers
        changes[path] = LowRank(own["lora_a"].T.contiguous(), own["lora_b"].T.contiguous(), scale)
        if "m" in own:
            lora.magnitudes[path] = own["m"]
    rank = numbers["rank"]
    _refuse_other_ranks(lora, rank, folder)
    _refuse_lacking(given.get("keys"), lora, folder)
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "lora_dropout": numbers["dropout"]}
    plain |= {name: config[name] for name in _OF_PEFT if isinstance(config.get(name), str)}
    names = [*modules, *checkpoints.names_of_experts(model), *lora.layers]
    return written_lora({**plain, "use_dora": kind == "dora"}, lora, {}, names)


def _read_both(folder: Path) -> tuple[Any, Any]:
    """Returns the config and the tensors with their metadata, which lay there at one time."""

    def both() -> tuple[Any, Any]:
        return read_json(folder / CONFIG_NAME), read_safetensors(folder / FILE)

    config, saved = read_together([folder / CONFIG_NAME, folder / FILE], both)
    return config, (saved.tensors, saved.metadata)


def _refuse_other_ranks(lora: Lora, rank: int, folder: Path) -> None:
    changes = lora.layers | lora.embeddings
    other = [
        path
        for path, each in changes.items()
        if each.A.dim() != 2 or each.B.dim() != 2 or not each.A.shape[0] == each.B.shape[1] == rank
    ]
    if other:
        raise CheckpointError(f"{folder / FILE}: factors of {joined(other)} aren't of rank {rank}, as the config says")


def _refuse_lacking(keys: Any, lora: Lora, folder: Path) -> None:
    """Raises CheckpointError if a layer has no factors that the config names by its whole path."""
    there = {*lora.layers, *lora.embeddings}
    stacks = {re.sub(r"\.experts\.\d+\.\w+$", "", path) for path in there}
    lacking = [
        key
        for key in (keys if isinstance(keys, list) else ())
        if isinstance(key, str)
        and re.search(r"\.\d+\.", key)
        and key not in there
        and not ("switch_mlp" in key and key.partition(".switch_mlp")[0] in stacks)
    ]
    if lacking:
        raise CheckpointError(f"{folder / FILE} lacks {joined(lacking)}, which the config names; copy it anew")


def _by_path(tensors: Mapping[str, Tensor], names: Iterable[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors of each layer by their names in it, with a layer for each matrix of a stack."""
    found: dict[str, dict[str, Tensor]] = {}
    known = set(names)
    for key, tensor in tensors.items():
        path, _, which = key.rpartition(".")
        match = _STACK.fullmatch(path)
        if which not in ("lora_a", "lora_b", "m"):
            raise CheckpointError(f"{folder / FILE} has {key}, which is no tensor of LoRA or DoRA")
        if match is None:
            found.setdefault(path, {})[which] = tensor
            continue
        of_mixtral = {name: own for own, name in _OF_MIXTRAL.items()}.get(match["own"], match["own"])
        stack = [each for each in known if each.startswith(f"{match['before']}.experts.0.")]
        count = sum(each.startswith(f"{match['before']}.experts.") for each in known) // max(len(stack), 1)
        if tensor.dim() != 3 or (known and len(tensor) != count):
            raise CheckpointError(
                f"{folder / FILE}: {key} has the shape {tuple(tensor.shape)}, and the model {count} experts there; "
                "load it on the model that it was trained on"
            )
        for number, matrix in enumerate(tensor):
            names = [f"{match['before']}.experts.{number}.{own}" for own in (match["own"], of_mixtral)]
            name = next((each for each in names if each in known), names[0])
            found.setdefault(name, {})[which] = matrix.T
    lacking = [path for path, own in found.items() if not {"lora_a", "lora_b"} <= own.keys()]
    if lacking or not found:
        raise CheckpointError(f"{folder / FILE} lacks a factor of {joined(lacking) or 'every layer'}; copy it anew")
    return found
