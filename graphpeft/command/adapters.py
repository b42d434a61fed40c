"""Subcommands about a saved adapter: ``info``, ``merge`` and ``convert``; ``info`` tells versions, too."""

from __future__ import annotations

import contextlib
import platform
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_model

from graphpeft.command.completing import FOLDER, PLACE
from graphpeft.command.printing import as_json, tell
from graphpeft.command.sources import Given, base_from, checkpoint_from, on_its_base
from graphpeft.files.atomic_files import Staging
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.files.hub import WEIGHTS_NAME
from graphpeft.methods import conversion_deviation, convert_to_lora
from graphpeft.methods.lora.conversion import save_converted
from graphpeft.model.merging_files import merge_checkpoint
from graphpeft.model.other_stacks import save_adapter
from graphpeft.model.peft_model import PeftModel
from graphpeft.rules.peft_names import PeftType
from graphpeft.rules.short_options import short_options
from graphpeft.stacks.adapter_files import AdapterFiles
from graphpeft.stacks.known import STACKS, recognised
from graphpeft.stacks.peft_files import PREFIX, SavedAdapter
from graphpeft.stacks.reading import read_for
from graphpeft.stacks.serving import SERVERS, report_on
from graphpeft.wording import shortened


class _Rank(click.ParamType):
    """A whole number is a rank, and a fraction a share of squares."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        with contextlib.suppress(ValueError):
            rank = int(value)
            return rank if rank > 0 else self.fail(f"{value} is no rank: the least is 1", param, ctx)
        with contextlib.suppress(ValueError):
            if 0 < float(value) <= 1:
                return float(value)
        return self.fail(f"{value} is neither a whole number, the rank, nor a share between 0 and 1", param, ctx)


base_option = click.option(
    "--base",
    metavar="MODEL",
    type=PLACE,
    help="The base model, with the weights it was adapted with; by default, the one that the config names.",
)


@click.command()
@click.argument("adapter", metavar="[ADAPTER]", required=False, type=PLACE)
@as_json
def info(adapter: str | None, as_json: bool) -> None:
    """Tells what a saved ADAPTER is, a folder or a repository on the Hub; without one, which versions are installed.

    \b
      graphpeft info runs/checkpoint-100
      graphpeft info my-name/my-adapter --json
      graphpeft info
    """
    tell(environment() if adapter is None else _info(adapter), as_json)


def _info(adapter: str) -> dict[str, Any]:
    saved = _read_whole(adapter)
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
        **_readers(saved, adapter),
        "digest": config.digest(),
    }


def _read_whole(adapter: str) -> SavedAdapter:
    try:
        saved = read_for(None, adapter)
        saved.refuse_two_saves(adapter)
        _refuse_half_pairs(saved.tensors, adapter)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    return saved


def _readers(saved: SavedAdapter, adapter: str) -> dict[str, str]:
    """Returns who reads an adapter's files, and why others don't."""
    servers = [f"{server}_serves_it" for server in SERVERS]
    stack = recognised(Path(adapter))
    if stack is not None:
        reason = f"no: the files are of {stack.title}; write others by graphpeft convert {adapter} FOLDER --to peft"
        return dict.fromkeys(["peft_reads_it", *servers], reason)
    told = [_for_server(saved, server) for server in SERVERS]
    return {"peft_reads_it": _for_peft(saved), **dict(zip(servers, told, strict=True))}


def _for_server(saved: SavedAdapter, server: str) -> str:
    """Returns whether a server computes what an adapter does, and why not."""
    report = report_on(saved, server)
    return "yes" if report.is_served else f"no: {'; '.join(each.rule for each in report.broken)}"


def _for_peft(saved: SavedAdapter) -> str:
    """Returns whether PEFT reads an adapter, and why not."""
    if saved.config.method not in [each.value for each in PeftType]:
        return f"no: it has no method {saved.config.method}"
    for entry in getattr(saved.config.target_options, "target_parameters", None) or ():
        path, _, name = entry.rpartition(".")
        if not path and f"{PREFIX}lora_A.weight" in saved.tensors:
            return f"no: it has no adapters for parameters of the model itself, such as {name}"
        factor = saved.tensors.get(f"{PREFIX}{path}.lora_A.weight")
        if factor is not None and factor.ndim > 2:
            return f"no: it has no adapters for the kernels of convolutions without a layer, such as {entry}"
    if layer := _in_groups(saved):
        return f"not on a layer whose groups don't divide the rank, as {layer} may be: it refuses such a rank"
    return "yes"


def _in_groups(saved: SavedAdapter) -> str:
    """Returns a convolution that has one input for each output, and factors that PEFT's have without groups alone."""
    if saved.config.method != PeftType.LORA.value:
        return ""
    for name, first in saved.tensors.items():
        layer, found, _ = name.removeprefix(PREFIX).rpartition(".lora_A.weight")
        second = saved.tensors.get(f"{PREFIX}{layer}.lora_B.weight")
        # PEFT's B is of rank / groups, and nothing in the file tells a layer of one channel from one in groups
        if found and second is not None and first.ndim > 2 and first.shape[1] == 1 < first.shape[0] == second.shape[1]:
            return layer
    return ""


def _refuse_half_pairs(tensors: Iterable[str], adapter: str) -> None:
    """Raises CheckpointError if a file has one factor of a product without the other."""
    names = set(tensors)
    for name in sorted(names):
        for one, other in (("_A", "_B"), ("_B", "_A")):
            head, found, tail = name.rpartition(f"lora{one}")
            partner = f"{head}lora{other}{tail}"
            # lora_bias gives B a bias, and A none
            if found and tail != ".bias" and partner not in names:
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
    is_file = path.endswith(".safetensors")
    _refuse_the_other_kind(path, is_file)
    why = _merge_files(adapter, path, base) if not is_file else "a file has tensors in one piece"
    if why is not None:
        _merge_in_memory(adapter, path, base, is_file)
    needed = "one module at a time" if why is None else f"the whole model: {why}"
    tell({"adapter": adapter, "merged": path, "in_memory": needed}, as_json)


def _merge_files(adapter: str, path: str, base: str | None) -> str | None:
    """Merges an adapter into the files of its base, and returns why that can't be, or None."""
    _refuse_broken(adapter)
    place = Path(adapter) if Path(adapter).exists() else adapter
    try:
        checkpoint = checkpoint_from(adapter, base)
        if checkpoint is None:
            return "the base is no checkpoint of Transformers"
        written = merge_checkpoint(checkpoint.model, checkpoint.folder, place, path)
    except ValueError as error:
        return shortened(str(error))  # which the model in memory raises, too, if it isn't of the files alone
    _remove_weights(Path(path), except_for=written)
    return None


def _merge_in_memory(adapter: str, path: str, base: str | None, is_file: bool) -> None:
    model: Any = _adapted(adapter, base).model
    merged = model.merge_and_unload()
    if not is_file and not hasattr(merged, "save_pretrained"):
        raise click.UsageError(
            f"a {type(merged).__name__} can't save itself as a folder; name a file, {path}.safetensors"
        )
    with Staging(Path(path).parent if is_file else Path(path)) as staging:
        if is_file:
            save_model(merged, str(staging.folder / Path(path).name))
        else:
            merged.save_pretrained(staging.folder)
        written = staging.put()
    if not is_file:
        _remove_weights(Path(path), except_for=written)


def _remove_weights(folder: Path, except_for: Collection[Path]) -> None:
    """Removes files of weights of an earlier model, such as shards, which a loader could prefer."""
    for file in folder.absolute().iterdir():
        if _WEIGHTS.fullmatch(file.name) and file not in except_for:
            file.unlink()


_WEIGHTS = re.compile(r"(diffusion_pytorch_)?model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""The names that Transformers and Diffusers give such files."""


def _refuse_the_other_kind(path: str, is_file: bool) -> None:
    """Raises UsageError if a folder is where a file is to be written, or a file where a folder is.

    Transformers' ``save_pretrained`` logs a message about a file, and writes nothing.
    """
    place = Path(path)
    if place.is_dir() if is_file else place.exists() and not place.is_dir():
        there, wanted = ("folder", "file") if is_file else ("file", "folder")
        raise click.UsageError(f"{path} is a {there}, and a {wanted} would be written there; choose another path")


@click.command()
@click.argument("adapter", metavar="ADAPTER", type=PLACE)
@click.argument("path", metavar="FOLDER", type=PLACE)
@click.option(
    "--rank", type=_Rank(), help="The rank of plain LoRA, or the share of squares to keep: 0.99 if not given."
)
@click.option(
    "--to", "stack", type=click.Choice(list(STACKS)), help="The library in whose files it is written as it is."
)
@base_option
@click.option(
    "--served-base",
    metavar="FILE",
    type=PLACE,
    help="The base's GGUF file, by whose names and order an adapter for llama.cpp is written or read.",
)
@as_json
def convert(
    adapter: str,
    path: str,
    rank: float | None,
    stack: str | None,
    base: str | None,
    served_base: str | None,
    as_json: bool,
) -> None:
    """Writes any ADAPTER as plain LoRA, or in another library's files, to FOLDER; tells how far outputs move by it.

    \b
      graphpeft convert loha-adapter lora-adapter --rank 16
      graphpeft convert lora-adapter mlx-adapter --to mlx
      graphpeft convert lora-adapter for-llama-cpp --to gguf --served-base model.gguf
      graphpeft convert adapter.gguf lora-adapter --to peft --base hf:model --served-base model.gguf
    """
    _refuse_the_other_kind(path, is_file=False)
    if Path(path).exists() and Path(adapter).exists() and Path(path).samefile(adapter):
        raise click.UsageError(f"{path} is the adapter itself, which would be lost; choose another folder")
    if stack is not None:
        if rank is not None:
            raise click.UsageError("--rank is of plain LoRA, and --to writes an adapter as it is; give one of the two")
        of_file = recognised(Path(adapter))
        if served_base is not None and not STACKS[stack].has_own_base and not (of_file and of_file.has_own_base):
            raise click.UsageError("--served-base is of an adapter for llama.cpp; add --to gguf, or leave it out")
        with _as_peft(adapter, base, served_base) as readable:
            tell({"adapter": adapter, **_in_other_files(readable, path, stack, base, served_base)}, as_json)
        return
    if served_base is not None:
        raise click.UsageError("--served-base is of an adapter for llama.cpp; add --to gguf, or leave it out")
    model, example_inputs = _adapted(adapter, base)
    converted = convert_to_lora(model, 0.99 if rank is None else rank, progressbar=not as_json)
    save_converted(path, converted)
    facts = _info(path)
    told = {"adapter": adapter, "lora": path, "options": facts["options"], "parameters": facts["parameters"]}
    tell({**told, "deviation": _deviation(model, converted, example_inputs)}, as_json)


@contextlib.contextmanager
def _as_peft(adapter: str, base: str | None, served_base: str | None) -> Iterator[str]:
    """Gives a folder of an adapter in PEFT's files, which are written for it if its own need the base to be read."""
    stack = recognised(Path(adapter))
    if stack is None or not stack.has_own_base:
        yield adapter
        return
    if base is None or served_base is None:
        raise click.UsageError(
            f"{adapter} is of {stack.title}, whose names the base tells: give --base and --served-base"
        )
    with tempfile.TemporaryDirectory() as folder:
        saved = read_for(base_from(base).model, adapter, served_base=served_base)
        STACKS["peft"].write(AdapterFiles(saved.config.to_dict(), saved.tensors), Path(folder))
        yield folder


def _in_other_files(adapter: str, path: str, stack: str, base: str | None, served_base: str | None) -> dict[str, Any]:
    """Writes an adapter in the files of a stack, and returns the facts about them."""
    told = {"written": path, "for": STACKS[stack].title}
    served_base = served_base if STACKS[stack].has_own_base else None
    saved = _read_whole(adapter)
    if base or saved.config.base_model_name_or_path:
        model, example_inputs = _adapted(adapter, base)
        with Staging(Path(path)) as staging:
            save_adapter(model, staging.folder, stack=stack, served_base=served_base)
            again = read_for(model, staging.folder, served_base=served_base)
            deviation = _deviation(model, (again.config, again.tensors), example_inputs)
            if not isinstance(deviation, str) and not deviation <= _ROUNDED:
                raise click.ClickException(
                    f"read again, the adapter moves outputs by {deviation} of their largest, more than rounding does; "
                    "nothing is written; graphpeft merge takes the adapter as it is"
                )
            staging.put()
        return {**told, "deviation": deviation}
    with Staging(Path(path)) as staging:
        to = STACKS[stack].beside(served_base)
        to.write(to.convert(AdapterFiles(saved.config.to_dict(), saved.tensors), None), staging.folder)
        staging.put()
    return {**told, "deviation": "not known: the config names no base model; name it by --base"}


_ROUNDED = 0.01
"""The largest deviation by which factors in half precision are rounded, relative to the largest output."""


def _deviation(model: Any, converted: Any, example_inputs: Any) -> str | float:
    """Returns how far the model's outputs on its example inputs move, or why that isn't known."""
    if example_inputs is None:
        return "not known: nothing tells of example inputs"
    try:
        return float(f"{conversion_deviation(model, converted, example_inputs):.2g}")
    except Exception as error:  # of the model's code: the file is written, and right
        return shortened(f"not known: {type(error).__name__}: {error}")


def _adapted(adapter: str, base: str | None) -> Given:
    """Returns the base with an adapter, and inputs of it."""
    _refuse_broken(adapter)
    if base is None:
        return on_its_base(adapter, "name it by --base")
    given = base_from(base)
    place = Path(adapter) if Path(adapter).exists() else adapter
    return given._replace(model=PeftModel.from_pretrained(given.model, place))


def _refuse_broken(adapter: str) -> None:
    """Raises ClickException if an adapter's files can't be read, before the base is loaded."""
    try:
        read_for(None, adapter)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


_PACKAGES = (
    "transformers",
    "timm",
    "torchvision",
    "peft",
    "diffusers",
    "accelerate",
    "trl",
    "bitsandbytes",
    "torchao",
    "safetensors",
    "huggingface-hub",
    "onnxruntime",
)


def environment() -> dict[str, str | None]:
    """Returns versions by name; None for a package that isn't installed."""
    return {
        "graphpeft": version("graphpeft"),
        "torch": torch.__version__,  # with its build, as +cpu
        **{name: _version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
        "accelerator": _accelerator(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accelerator() -> str | None:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type
