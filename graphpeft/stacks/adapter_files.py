"""An adapter as data: the contents of PEFT's files, from which and to which all other forms are converted."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.rules.registry import registered
from graphpeft.stacks.peft_files import PREFIX
from graphpeft.targeting.pattern_values import exact_patterns, pattern_value
from graphpeft.targeting.targets import TargetOptions, exactly, match_parameter, own_parameter_entry
from graphpeft.wording import joined, shortened

_WRAPPER = ".base_layer"


class AdapterFiles(NamedTuple):
    """The contents of PEFT's two files.

    Attributes:
        config: The keys of ``adapter_config.json``.
        tensors: The tensors by their names in ``adapter_model.safetensors``.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


class LowRank(NamedTuple):
    """The change of a weight by LoRA, ΔW = s · B A; of each matrix of a stack where the factors are stacks.

    Attributes:
        A: The factor that meets the input, of shape (…, rank, in).
        B: The factor that makes the output, of shape (…, out, rank).
        scale: The number s.
    """

    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank of each matrix."""
        return self.A.shape[-2]

    def of(self, rank: int, scale: float) -> LowRank:
        """Returns the same change with a rank at least as high, by zeros, and with another scale, which goes into B."""
        B = self.B if self.scale == scale else self.B * (self.scale / scale)
        if not B.isfinite().all():
            raise CheckpointError(f"a factor in {B.dtype} can't hold the scale {self.scale / scale:.3g}; use float32")
        more = rank - self.rank
        return LowRank(F.pad(self.A, (0, 0, 0, more)), F.pad(B, (0, more)), scale)


class Lora(NamedTuple):
    """LoRA's changes in an adapter's files.

    Attributes:
        layers: The changes of layers' weights, by the layers' paths.
        parameters: The changes of other parameters, by their paths.
        embeddings: The changes of tables, by the paths of the embeddings: of a table's transpose.
        magnitudes: The magnitudes of DoRA, by the paths of layers.
        others: The other tensors, by their names in the file; also factors of convolutions, and of layers inside of
            modules that PEFT wraps as a whole.
    """

    layers: dict[str, LowRank]
    parameters: dict[str, LowRank]
    embeddings: dict[str, LowRank]
    magnitudes: dict[str, Tensor]
    others: dict[str, Tensor]


_FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<path>.+)\.(lora_(?P<of_layer>[AB])\.weight|lora_embedding_(?P<of_table>[AB])|"
    r"(?P<magnitude>lora_magnitude_vector)(\.weight)?)"
)


def read_lora(files: AdapterFiles, modules: Mapping[str, nn.Module]) -> Lora:
    """Returns LoRA's changes in files.

    Args:
        files: The files.
        modules: The modules of the model by path; what a file names and isn't there is taken for a layer.
    """
    factors: dict[tuple[str, bool], dict[str, tuple[str, Tensor]]] = {}
    lora = Lora({}, {}, {}, {}, {})
    for key, tensor in files.tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is None:
            lora.others[key] = tensor
        elif match["magnitude"]:
            lora.magnitudes[match["path"]] = tensor
        else:
            of_kind = factors.setdefault((match["path"], match["of_layer"] is None), {})
            of_kind[match["of_layer"] or match["of_table"]] = key, tensor
    options = TargetOptions(target_parameters=files.config.get("target_parameters"))
    for (path, is_table), own in factors.items():
        if own.keys() != {"A", "B"}:
            lora.others.update(own.values())
            continue
        (_, A), (_, B) = own["A"], own["B"]
        owner = re.sub(rf"({re.escape(_WRAPPER)})+$", "", path)
        targets = _target_parameters(owner, modules, options)
        if is_table or not targets:
            is_inside = f"{_WRAPPER}." in f"{path}." and path not in modules
            if is_inside or A.dim() != 2 or B.dim() != 2:
                lora.others.update(own.values())
                continue
            changes = lora.embeddings if is_table else lora.layers
            changes[path] = LowRank(A, B, scale_at(files.config, path))
        else:
            parameter = targets[len(targets) - 1 - _wrappers(path)]
            name, stack = f"{owner}.{parameter}", modules[owner].get_parameter(parameter).shape[:-2]
            lora.parameters[name] = _stacked(LowRank(A, B, scale_at(files.config, name)), *stack)
    return lora


def _wrappers(path: str) -> int:
    """Returns how often PEFT has wrapped a module inside of which a path leads."""
    return (len(path) - len(re.sub(rf"({re.escape(_WRAPPER)})+$", "", path))) // len(_WRAPPER)


def _target_parameters(owner: str, modules: Mapping[str, nn.Module], options: TargetOptions) -> list[str]:
    """Returns the parameters of a module that are targets, in the order in which PEFT wraps the module for them."""
    if not options.target_parameters or owner not in modules:
        return []
    return [own for own in modules[owner]._parameters if match_parameter(options, f"{owner}.{own}")]


_PLAIN_INIT = frozenset({"gaussian", "eva", "orthogonal", "mica"})
"""Initialisations that leave the base's weights as they are."""

_OF_PLAIN = frozenset(
    {
        *("peft_type", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"),
        *("inference_mode", "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("bias", "modules_to_save", "trainable_token_indices", "use_dora", "init_lora_weights", "fan_in_fan_out"),
        *("ensure_weight_tying", "eva_config", "runtime_config", "save_mutated_as_lora"),
    }
)
"""Options with which LoRA's factors have the meaning s · B A; others of their values are in tensors of their own."""


def changed_base(config: Mapping[str, Any]) -> str | None:
    """Returns the option by which the base's weights were changed when the adapter was made, or None."""
    init = config.get("init_lora_weights")
    is_plain = not isinstance(init, str) or init.lower() in _PLAIN_INIT
    return None if is_plain else f"init_lora_weights={init!r}"


def refuse_other_meanings(config: Mapping[str, Any], who: str) -> None:
    """Raises CheckpointError if factors don't mean s · B A beside the base's own weights, with names told by `who`."""
    defaults = registered()[config["peft_type"]]().to_dict()
    idle = (None, False, [], {}, ())
    other = [
        f"{name}={shortened(str(value))}"
        for name, value in config.items()
        if name not in _OF_PLAIN and value != defaults.get(name) and value not in idle
    ]
    if told := changed_base(config):
        other.append(told)
    if other:
        raise CheckpointError(
            f"{who}, and the adapter has {joined(other)}, with which its factors mean something else; merge it, and "
            "take the merged model"
        )


def refuse_other_factors(lora: Lora, who: str) -> None:
    """Raises CheckpointError if an adapter has tensors of LoRA beside factors of layers, parameters and tables."""
    own = [key.removeprefix(PREFIX) for key in lora.others if ".lora_" in key]
    if own:
        raise CheckpointError(
            f"{who}, and the adapter has {joined(own)}: of a convolution, of a layer in a module that is wrapped as a "
            "whole, or of a kind of LoRA of its own; merge it, and take the merged model"
        )


def refuse_unknown_names(files: AdapterFiles, model: nn.Module | None) -> None:
    """Raises CheckpointError if the names of parameters are to be told without the model."""
    if model is None and files.config.get("target_parameters"):
        raise CheckpointError("the adapter has target_parameters, whose names the base tells; name it by --base")


def scale_at(config: Mapping[str, Any], path: str) -> float:
    """Returns LoRA's scale at a module: α / r, or α / √r where the config says so."""
    rank = pattern_value(config.get("rank_pattern") or {}, path, config["r"])
    alpha = pattern_value(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def written_lora(
    config: Mapping[str, Any], lora: Lora, modules: Mapping[str, nn.Module], names: Collection[str]
) -> AdapterFiles:
    """Returns files of LoRA's changes, whose config names their targets, ranks and scales anew.

    Args:
        config: The config, of which all else remains.
        lora: The changes.
        modules: The modules by path, where there are changes of parameters.
        names: The names among which targets are told apart: of all modules, and parameters.
    """
    tensors = dict(lora.others)
    for path, change in lora.layers.items():
        tensors |= {f"{PREFIX}{path}.lora_A.weight": change.A, f"{PREFIX}{path}.lora_B.weight": change.B}
    for path, change in lora.embeddings.items():
        tensors |= {f"{PREFIX}{path}.lora_embedding_A": change.A, f"{PREFIX}{path}.lora_embedding_B": change.B}
    for name, change in lora.parameters.items():
        path, flat = _wrapped(name, lora.parameters, modules), _flat(change)
        tensors |= {f"{PREFIX}{path}.lora_A.weight": flat.A, f"{PREFIX}{path}.lora_B.weight": flat.B}
    tensors |= {f"{PREFIX}{path}.lora_magnitude_vector": own for path, own in lora.magnitudes.items()}
    entries, modules_changed = _entries(lora.parameters, names), lora.layers | lora.embeddings
    changes = modules_changed | lora.parameters
    root = bool(config.get("use_rslora"))
    alphas = {name: _alpha(change, root) for name, change in changes.items()}
    return AdapterFiles(
        {
            **config,
            "target_modules": _target_modules(modules_changed, names),
            "target_parameters": [own_parameter_entry(each) if each in changes else each for each in entries] or None,
            "rank_pattern": _patterns({name: change.rank for name, change in changes.items()}, config["r"]),
            "alpha_pattern": _patterns(alphas, round(config["lora_alpha"], 12)),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
        },
        tensors,
    )


def _alpha(change: LowRank, root: bool) -> float:
    # so that dividing and multiplying by a root gives back the number that a user has written
    alpha = round(change.scale * (math.sqrt(change.rank) if root else change.rank), 12)
    return int(alpha) if alpha == int(alpha) else alpha


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _entries(wanted: Collection[str], names: Iterable[str]) -> list[str]:
    """Returns the last parts of targets' names if these tell them from others; else their names."""
    ends = {_last(name) for name in wanted}
    if names and all(name in wanted for name in names if _last(name) in ends):
        return sorted(ends)
    return sorted(wanted)


def _target_modules(wanted: Collection[str], names: Collection[str]) -> list[str] | str:
    entries = _entries(wanted, names)
    found = exactly(entries, names) if entries == sorted(wanted) else entries
    return found if isinstance(found, str) else sorted(found)


def _patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Returns patterns for values that aren't the default: by the last part of names, where these decide."""
    by_end: dict[str, set[float]] = {}
    for name, value in values.items():
        by_end.setdefault(_last(name), set()).add(value)
    if all(len(of_end) == 1 for of_end in by_end.values()):
        return {re.escape(end): next(iter(of_end)) for end, of_end in by_end.items() if of_end != {default}}
    return exact_patterns(values, default)


def _wrapped(name: str, targets: Collection[str], modules: Mapping[str, nn.Module]) -> str:
    """Returns a parameter's path in files: PEFT wraps its module once for each target among its parameters."""
    owner, _, own = name.rpartition(".")
    wrapped = [each for each in modules[owner]._parameters if f"{owner}.{each}" in targets]
    return owner + _WRAPPER * (len(wrapped) - 1 - wrapped.index(own))


def _flat(change: LowRank) -> LowRank:
    """Returns the factors of a stack as files have them: A of shape (experts · r, in), and B (out, r · experts)."""
    if change.A.dim() == 2:
        return change
    B = change.B.permute(1, 2, 0).flatten(1)
    return LowRank(change.A.flatten(0, 1), B.contiguous(), change.scale)


def _stacked(change: LowRank, *stack: int) -> LowRank:
    """Returns factors of a stack of matrices apart; other factors, as of a kernel's three dimensions, as they are."""
    ranks = change.A.shape[0], change.B.shape[-1]
    if len(stack) != 1 or change.A.dim() != 2 or any(rank % stack[0] for rank in ranks):
        return change
    B = change.B.unflatten(1, (-1, *stack)).permute(2, 0, 1)
    return LowRank(change.A.unflatten(0, (*stack, -1)), B.contiguous(), change.scale)
