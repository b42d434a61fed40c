"""Adapters in the files of other libraries, and on servers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from graphpeft.adapters import checkpoint, merged_weights
from graphpeft.adapters.adapting import known_adapter, known_adapters, modules_of
from graphpeft.adapters.empty_tensors import refuse_empty
from graphpeft.adapters.exchanged import refuse_missing
from graphpeft.files.atomic_files import Staging
from graphpeft.graph.paths import unwrapped
from graphpeft.stacks.peft_files import read

if TYPE_CHECKING:
    from graphpeft.stacks.serving import ServingReport


def save_adapter(
    model: nn.Module, folder: str | os.PathLike[str], *, stack: str = "peft", adapter_name: str = "default"
) -> None:
    """Writes an adapter in the files of another library, all or none.

    `load_adapter` and `PeftModel.from_pretrained` read them again.

    Args:
        model: An adapted model.
        folder: The folder; it is made if it doesn't exist.
        stack: The library: ``"peft"``; ``"transformers4"``, PEFT's files by the names of the model's checkpoint, which
            has an entry for each expert's matrix; ``"plain"``, PEFT's files of LoRA with one rank and one scale for
            all layers, for readers that ignore patterns; or ``"mlx"``, the files of mlx-lm.
        adapter_name: The name of the adapter.

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
    from graphpeft.stacks.adapter_files import AdapterFiles  # few adapters are written for other libraries
    from graphpeft.stacks.known import stack_named

    to, model = stack_named(stack), unwrapped(model)
    adapter, modules = known_adapter(model, adapter_name), modules_of(model)
    refuse_missing(modules, adapter, adapter_name)
    refuse_empty(modules, adapter, adapter_name)
    originals = merged_weights.Originals(model, known_adapters(model))
    tables = "auto" if to.has_tables else False
    tensors = checkpoint.state_dict_of(modules, adapter, adapter_name, originals, None, tables)
    files = AdapterFiles(checkpoint.file_config(model, adapter).to_dict(), tensors)
    with Staging(Path(folder)) as staging:
        to.write(files, model, staging.folder)
        staging.put()


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
