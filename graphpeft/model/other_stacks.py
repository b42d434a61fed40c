"""Adapters in the files of other libraries, and on servers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from graphpeft.adapters import checkpoint, merged_weights
from graphpeft.adapters.adapting import known_adapter, known_adapters, modules_of
from graphpeft.adapters.empty_tensors import refuse_empty
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.adapters.tensors import fingerprint
from graphpeft.files.atomic_files import Staging
from graphpeft.graph.paths import unwrapped
from graphpeft.stacks.peft_files import read

if TYPE_CHECKING:
    from graphpeft.stacks.adapter_files import AdapterFiles
    from graphpeft.stacks.known import Stack
    from graphpeft.stacks.serving import ServingReport


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    stack: str = "peft",
    adapter_name: str = "default",
    served_base: str | os.PathLike[str] | None = None,
) -> None:
    """Writes an adapter in the files of another library, all or none.

    `load_adapter` and `PeftModel.from_pretrained` read them again; ``graphpeft convert`` reads llama.cpp's.

    Args:
        model: An adapted model.
        folder: The folder; it is made if it doesn't exist.
        stack: The library: ``"peft"``; ``"transformers4"``, PEFT's files by the names of the model's checkpoint, which
            has an entry for each expert's matrix; ``"plain"``, PEFT's files of LoRA with one rank and one scale for
            all layers, for readers that ignore patterns; ``"mlx"``, the files of mlx-lm; or ``"gguf"``, a file of
            llama.cpp.
        adapter_name: The name of the adapter.
        served_base: For ``"gguf"``, the GGUF file of the base, or one of its parts. It tells the names of the tensors
            and the order of their rows, and is compared with the model's weights.

    Raises:
        AdaptError: If the model has no such adapter, or it has no values yet.
        CheckpointError: If the library isn't known, or has no place for the adapter; nothing is written then.
        OSError: If a file can't be written; the files that were there are unchanged then.

    Examples:
        >>> from pathlib import Path
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> save_adapter(model, "mlx", stack="mlx")
        >>> sorted(file.name for file in Path("mlx").iterdir())
        ['adapter_config.json', 'adapters.safetensors']
    """
    from graphpeft.stacks.known import stack_named  # few adapters are written for other libraries

    to = stack_named(stack, served_base)
    files = _files_for(to, unwrapped(model), adapter_name)
    with Staging(Path(folder)) as staging:
        to.write(files, staging.folder)
        staging.put()


class AdapterTensors(NamedTuple):
    """An adapter in memory, for a program that serves it.

    Attributes:
        config: The config, in the form of the library that reads it.
        tensors: The tensors by its names, detached, on their devices.
        checksum: A number of 64 bits in hexadecimal, another one if a bit, a name or an option is another.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> config, tensors, checksum = adapter_tensors(model)
        >>> config["r"], len(tensors), len(checksum)
        (2, 2, 16)
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    checksum: str


def adapter_tensors(
    model: nn.Module,
    *,
    stack: str = "peft",
    adapter_name: str = "default",
    served_base: str | os.PathLike[str] | None = None,
) -> AdapterTensors:
    """Returns an adapter as another library has it, without a file: for a server whose adapter follows a training.

    Tensors of the model itself are returned where nothing has to be converted, so copy them before the next step.

    Args:
        model: An adapted model.
        stack: The library: ``"peft"``, which vLLM and SGLang read within the rules of `check_serving`,
            ``"transformers4"``, ``"plain"``, ``"mlx"`` or ``"gguf"``, see `save_adapter`.
        adapter_name: The name of the adapter.
        served_base: For ``"gguf"``, the GGUF file of the base.

    Returns:
        The config, the tensors and a checksum, by which two processes tell that they have the same.

    Raises:
        AdaptError: If the model has no such adapter, or it has no values yet.
        CheckpointError: If the library isn't known, or has no place for the adapter.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> sorted(adapter_tensors(model).tensors)
        ['base_model.model.0.lora_A.weight', 'base_model.model.0.lora_B.weight']
        >>> adapter_tensors(model).checksum == adapter_tensors(model).checksum
        True
    """
    from graphpeft.stacks.known import stack_named

    config, tensors = _files_for(stack_named(stack, served_base), unwrapped(model), adapter_name)
    detached = {key: tensor.detach() for key, tensor in tensors.items()}
    return AdapterTensors(config, detached, _checksum(config, detached))


def _files_for(stack: Stack, model: nn.Module, name: str) -> AdapterFiles:
    """Returns an adapter of a model in the form of a stack."""
    from graphpeft.stacks.adapter_files import AdapterFiles

    adapter, modules = known_adapter(model, name), modules_of(model)
    refuse_missing(modules, adapter, name)
    refuse_empty(modules, adapter, name)
    if edited := adapter.edited_options:
        checkpoint.tell_of_edits(adapter, name, edited, gives_back=False)
    originals = merged_weights.Originals(model, known_adapters(model))
    tables = "auto" if stack.has_tables else False
    tensors = checkpoint.state_dict_of(modules, adapter, name, originals, None, tables)
    return stack.convert(AdapterFiles(checkpoint.file_config(model, adapter).to_dict(), tensors), model)


def _checksum(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8)
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)} {fingerprint(tensor)}".encode())
    return digest.hexdigest()


def check_serving(adapter: str | os.PathLike[str], server: str) -> ServingReport:
    """Tells whether a server computes what a saved adapter does, before it is started.

    Args:
        adapter: The folder of the adapter, or its repository on the Hub.
        server: ``"vllm"``, ``"sglang"`` or ``"llama.cpp"``.

    Returns:
        The rules that the adapter breaks, each with a way out; ``print`` shows them.

    Raises:
        CheckpointError: If the files can't be read, or the server isn't known.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(use_dora=True, target_modules=["0"]))
        >>> model.save_pretrained("adapter")
        >>> check_serving("adapter", "vllm").is_served
        False
    """
    from graphpeft.stacks.serving import report_on  # few programs ask

    return report_on(read(adapter), server)
