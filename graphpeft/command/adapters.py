"""Subcommands about a saved adapter: ``info``, ``merge`` and ``convert``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from safetensors.torch import save_model

from graphpeft.adapters.saved_adapter import SavedAdapter, read
from graphpeft.command.completing import FOLDER, PLACE
from graphpeft.command.printing import as_json, tell
from graphpeft.command.sources import NO_BASE, model_from
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.files.hub import WEIGHTS_NAME
from graphpeft.methods import save_as_lora
from graphpeft.model.peft_model import PeftModel
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.short_options import short_options

_TENSORS = "base_model.model."
"""With this the names of tensors in a file begin."""

base_option = click.option(
    "--base", metavar="MODEL", type=PLACE, help="The base model; the one that the config names if left out."
)


@click.command()
@click.argument("adapter", metavar="ADAPTER", type=FOLDER)
@as_json
def info(adapter: str, as_json: bool) -> None:
    """Tells what a saved ADAPTER is: a folder, or a repository on the Hub.

    \b
      graphpeft info runs/checkpoint-100
      graphpeft info my-name/my-adapter --json
    """
    tell(_info(adapter), as_json)


def _info(adapter: str) -> dict[str, Any]:
    try:
        saved = read(adapter)
        saved.refuse_two_saves(adapter)
        _refuse_half_pairs(saved.tensors, adapter)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    config, tensors = saved.config, saved.tensors
    options: Any = config.target_options
    targets = options.target_modules or ()
    return {
        "adapter": adapter,
        "method": config.method,
        "options": short_options(config),
        "targets": targets if isinstance(targets, str) else sorted(targets),
        "target_parameters": sorted(options.target_parameters or ()),
        "task": None if config.task_type is None else config.task_type.value,
        "base": config.base_model_name_or_path,
        "tensors": len(tensors),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "peft_reads_it": _for_peft(saved),
        "digest": config.digest(),
    }


def _for_peft(saved: SavedAdapter) -> str:
    """Returns whether PEFT reads an adapter, and why not."""
    if saved.config.method not in [each.value for each in PeftType]:
        return f"no: it has no method {saved.config.method}"
    for entry in getattr(saved.config.target_options, "target_parameters", None) or ():
        path, _, name = entry.rpartition(".")
        if not path and f"{_TENSORS}lora_A.weight" in saved.tensors:
            return f"no: it has no adapters for parameters of the model itself, such as {name}"
        factor = saved.tensors.get(f"{_TENSORS}{path}.lora_A.weight")
        if factor is not None and factor.ndim > 2:
            return f"no: it has no adapters for the kernels of convolutions without a layer, such as {entry}"
    return "yes"


def _refuse_half_pairs(tensors: Iterable[str], adapter: str) -> None:
    """Raises CheckpointError if a file has one factor of a product without the other."""
    names = set(tensors)
    for name in sorted(names):
        for one, other in (("_A", "_B"), ("_B", "_A")):
            head, found, tail = name.rpartition(f"lora{one}")
            partner = f"{head}lora{other}{tail}"
            if found and partner not in names:
                raise CheckpointError(
                    f"{adapter}/{WEIGHTS_NAME} has {name}, and lacks {partner}; save the adapter again"
                )


@click.command()
@click.argument("adapter", metavar="ADAPTER", type=FOLDER)
@click.argument("path", metavar="PATH", type=PLACE)
@base_option
@as_json
def merge(adapter: str, path: str, base: str | None, as_json: bool) -> None:
    """Writes the base model with an ADAPTER in its weights, to the folder or the .safetensors file PATH.

    \b
      graphpeft merge runs/checkpoint-100 merged
      graphpeft merge adapter merged.safetensors --base timm:vit_small_patch16_224
    """
    model = _adapted(adapter, base)
    merged = model.merge_and_unload()
    if path.endswith(".safetensors"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_model(merged, path)
    elif hasattr(merged, "save_pretrained"):
        merged.save_pretrained(path)
    else:
        raise click.UsageError(
            f"a {type(merged).__name__} can't save itself as a folder; name a file, {path}.safetensors"
        )
    tell({"adapter": adapter, "merged": path}, as_json)


@click.command()
@click.argument("adapter", metavar="ADAPTER", type=FOLDER)
@click.argument("path", metavar="FOLDER", type=FOLDER)
@click.option("--rank", type=float, default=0.99, show_default=True, help="The rank, or the share of squares to keep.")
@base_option
@as_json
def convert(adapter: str, path: str, rank: float, base: str | None, as_json: bool) -> None:
    """Writes any ADAPTER as plain LoRA, which all servers read, to FOLDER.

    \b
      graphpeft convert loha-adapter lora-adapter --rank 16
    """
    model = _adapted(adapter, base)
    save_as_lora(path, model, int(rank) if rank >= 1 else rank, progressbar=not as_json)
    tell({"adapter": adapter, "lora": path, **{name: _info(path)[name] for name in ("options", "parameters")}}, as_json)


def _adapted(adapter: str, base: str | None) -> Any:
    try:
        saved = read(adapter)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    if base is None:
        if not saved.config.base_model_name_or_path:
            raise click.UsageError(f"{adapter}: {NO_BASE}; name it by --base")
        return model_from(adapter).model
    return PeftModel.from_pretrained(model_from(base).model, Path(adapter) if Path(adapter).exists() else adapter)
