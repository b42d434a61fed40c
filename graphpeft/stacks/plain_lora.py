"""PEFT's files of LoRA with one rank and one scale for all layers, for readers that ignore patterns and √r."""

from __future__ import annotations

from typing import Any

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.paths import modules_by_path
from graphpeft.stacks.adapter_files import (
    AdapterFiles,
    Lora,
    LowRank,
    read_lora,
    refuse_other_factors,
    refuse_other_meanings,
    refuse_unknown_names,
    written_lora,
)


def of_one_rank(lora: Lora) -> Lora:
    """Returns the same changes with factors of the highest rank, and of one scale.

    Lower ranks get zeros, which change nothing, and other scales go into B.
    """
    changes = [*lora.layers.values(), *lora.parameters.values(), *lora.embeddings.values()]
    if not changes:
        raise CheckpointError("the adapter has no factors of LoRA; save it as it is")
    rank, scale = max(each.rank for each in changes), next((each.scale for each in changes if each.scale), 1.0)

    def same(own: dict[str, LowRank]) -> dict[str, LowRank]:
        return {path: each.of(rank, scale) for path, each in own.items()}

    return lora._replace(layers=same(lora.layers), parameters=same(lora.parameters), embeddings=same(lora.embeddings))


def as_plain(files: AdapterFiles, model: Any) -> AdapterFiles:
    """Returns files whose config has neither patterns nor √r; nor an expression for targets, where names can say it.

    Raises:
        CheckpointError: If the adapter is no LoRA, or is of a kind whose factors can't be changed.
    """
    if files.config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"such readers know LoRA alone, and this is an adapter of {files.config.get('peft_type')}; convert it to "
            "LoRA, as save_as_lora and graphpeft convert do"
        )
    refuse_other_meanings(files.config, "one rank and one scale are wanted")
    refuse_unknown_names(files, model)
    modules = modules_by_path(model) if model is not None else {}
    lora = of_one_rank(read_lora(files, modules))
    refuse_other_factors(lora, "one rank and one scale are wanted")
    first = next(iter([*lora.layers.values(), *lora.parameters.values(), *lora.embeddings.values()]))
    plain = {"use_rslora": False, "r": first.rank, "lora_alpha": first.scale * first.rank}
    written = written_lora({**files.config, **plain}, lora, modules, [*modules])
    # targets stay as they are
    own = ("target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern")
    config = {**files.config, **plain, "rank_pattern": {}, "alpha_pattern": {}}
    named = written.config["target_modules"]
    if isinstance(files.config.get("target_modules"), str) and isinstance(named, list) and modules:
        config |= {name: written.config[name] for name in own}
    return AdapterFiles(config, written.tensors)
