"""Merges an adapter into the files of a checkpoint, without the model in memory.

The model is on the meta device, and its tensors are in the files, from where a module's own are loaded for as long as
the adapter's change of them is computed. The rest is copied, byte for byte.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphpeft.adapters import merging
from graphpeft.adapters.adapting import modules_of
from graphpeft.files.atomic_files import Staging
from graphpeft.files.foreign_files import CheckpointError
from graphpeft.graph.autocast import in_own_precision
from graphpeft.graph.hosts.accelerate import InFiles
from graphpeft.graph.paths import join
from graphpeft.model.peft_model import PeftModel
from graphpeft.progress import of_bytes
from graphpeft.wording import joined

if TYPE_CHECKING:
    from graphpeft.files.checkpoint_files import CheckpointFiles
    from graphpeft.stacks.checkpoints import Conversion


def merge_checkpoint(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
) -> list[Path]:
    """Writes a checkpoint's files with an adapter in their weights, without the model in memory.

    At any time, memory holds the tensors of one module, and the adapter. The new files have the names, dtypes and
    shapes of the old ones. Tensors that the adapter doesn't change are copied, also such that the model doesn't know,
    and so are the other files of the folder, such as the index, the config and the tokenizer's; but no weights in
    other formats.

    Args:
        model: The base model on the meta device. The adapter is loaded into it, and it can't be used any more.
        checkpoint: The folder with the base model's files of safetensors: one file, or an index and its files. A model
            of Transformers may have other names and shapes there, by Transformers' own conversions.
        adapter: The adapter's folder, or its repository on the Hub.
        folder: The new folder. It is made if it doesn't exist, and it isn't the checkpoint's.

    Returns:
        The paths of the new files.

    Raises:
        AdaptError: If the adapter can't be merged, for example since it has a prompt.
        CheckpointError: If a file can't be read, or the merged weights don't fit the checkpoint's files: the adapter
            changes a tensor that the files don't have, or one that is tied to another, or the checkpoint is quantised.
            Then load the model, and call `merge_and_unload`.
        OSError: If a file can't be written. In all cases, `folder` is as it was.

    Examples:
        >>> from pathlib import Path
        >>> from safetensors.torch import load_file, save_model
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> Path("base").mkdir()
        >>> save_model(base, "base/model.safetensors")
        >>> config = LoraConfig(r=2, target_modules=["2"], init_lora_weights=False)
        >>> get_peft_model(base, config).save_pretrained("adapter")
        >>> with torch.device("meta"):
        ...     empty = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        >>> [file.name for file in merge_checkpoint(empty, "base", "adapter", "merged")]
        ['model.safetensors']
        >>> torch.equal(load_file("merged/model.safetensors")["2.weight"], base.merge_and_unload()[2].weight)
        True
    """
    from graphpeft.files.checkpoint_files import CheckpointFiles  # which most programs don't need
    from graphpeft.stacks.checkpoints import Conversion

    source, target = Path(checkpoint), Path(folder)
    if target.exists() and source.exists() and target.samefile(source):
        raise CheckpointError(f"{folder} is the checkpoint itself, which would be lost; choose another folder")
    _refuse_quantised(model, checkpoint)
    with Staging(target) as staging:
        files = CheckpointFiles(source, staging.folder)
        with of_bytes("merging", files.size) as told:
            weights = _Weights(model, files, Conversion(model, files.empty()), told)
            for path, module in model.named_modules():
                weights.stand_in(path, module)
            _merge(model, adapter)
            files.complete(told)
        return staging.put()


def _refuse_quantised(model: Any, checkpoint: str | os.PathLike[str]) -> None:
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise CheckpointError(
            f"{checkpoint} is quantised, and its numbers are its quantiser's own; load the model, and call "
            "merge_and_unload"
        )


def _merge(model: Any, adapter: str | os.PathLike[str]) -> None:
    adapted = PeftModel.from_pretrained(model, adapter)
    modules, state = modules_of(adapted), adapted._peft_adapters
    # without a transaction, which would keep a copy of each weight
    with in_own_precision(modules):
        merging.merge(modules, state, adapted.active_adapters)


class _Weights:
    """The tensors of a model on the meta device, in the files of its checkpoint."""

    def __init__(
        self, model: nn.Module, files: CheckpointFiles, conversion: Conversion, told: Callable[[int], object]
    ) -> None:
        self._files, self._conversion, self._told = files, conversion, told
        own = [*model.named_parameters(remove_duplicate=False)]
        held = Counter(id(parameter) for _, parameter in own)
        self._tied = {name for name, parameter in own if held[id(parameter)] > 1}
        for name, parameter in own:
            if name in self._conversion.made:
                parameter.data = _as_in_files(name, parameter, self._conversion.made[name])

    def stand_in(self, path: str, module: nn.Module) -> None:
        """Lets a module's tensors be loaded from the files, and be written there."""
        buffers = module._buffers.keys() - module._non_persistent_buffers_set
        held = {**module._parameters, **{name: module._buffers[name] for name in buffers}}
        names = {name: join(path, name) for name, tensor in held.items() if tensor is not None}
        if names:
            vars(module)["_hf_hook"] = InFiles(_Read(names, self._read), functools.partial(self._keep, names))

    def _read(self, name: str) -> torch.Tensor:
        return self._together(name)[name]

    def _together(self, name: str) -> dict[str, torch.Tensor]:
        """Returns a tensor of the model, and those that are made of the same tensors in the files."""
        if name not in self._conversion.parts:
            raise CheckpointError(
                f"{self._files.folder} has no {name}, which the adapter changes or reads; load the model, and call "
                "merge_and_unload"
            )
        return self._conversion.in_model({part: self._files.read(part) for part in self._conversion.parts[name]})

    def _keep(self, names: Mapping[str, str], values: Mapping[str, torch.Tensor]) -> None:
        for own, value in values.items():
            name = names[own]
            together = self._together(name)
            if torch.equal(together[name], value):
                continue
            if name in self._tied:
                raise CheckpointError(
                    f"the adapter changes {name}, which is tied to another tensor, and the files may have one of the "
                    "two; load the model, and call merge_and_unload"
                )
            self._write(name, {**together, name: value})

    def _write(self, name: str, values: Mapping[str, torch.Tensor]) -> None:
        written = self._conversion.in_files(values)
        if {*written} != {*self._conversion.parts[name]}:
            raise CheckpointError(
                f"{self._files.folder}: Transformers makes {name} of {joined(self._conversion.parts[name])}, and "
                f"{joined([*written])} of it; load the model, and call merge_and_unload"
            )
        for part, tensor in written.items():
            self._told(self._files.write(part, tensor))


class _Read(Mapping[str, torch.Tensor]):
    """The tensors of a module, each of which is read when it is asked for."""

    def __init__(self, names: Mapping[str, str], read: Callable[[str], torch.Tensor]) -> None:
        self._names, self._read = names, read

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._read(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _as_in_files(name: str, own: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    if own.shape != made.shape:
        raise CheckpointError(
            f"{name} has the shape {tuple(made.shape)} in the checkpoint's files, and {tuple(own.shape)} in the model; "
            "build the model from the checkpoint's own config"
        )
    if not own.is_meta:
        raise CheckpointError(f"{name} of the model has values; build the model on the meta device")
    if made.dtype not in _SUMMED:
        raise CheckpointError(f"{name} is of {made.dtype} in the checkpoint's files, in which sums can't be rounded")
    return own.data.to(made.dtype)


_SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
