"""Weights without a graph: the base model's weights by name, and adapters in PEFT's files.

Merged weights are one file, for timm, torchvision and ``load_state_dict``. A path without a suffix is a folder, for
``from_pretrained`` of a Transformers model. Weights hold no computation, so the other adapter modes write a folder with
the base model and, in `adapters`, a folder for each adapter, which PEFT can load.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from graphpeft.adapters import checkpoint, merged_weights
from graphpeft.exporting import copies
from graphpeft.exporting.carriers import Case
from graphpeft.exporting.errors import ExportError
from graphpeft.exporting.example import Example
from graphpeft.exporting.formats.format import Export, Runner
from graphpeft.exporting.formats.pt2 import write_safetensors
from graphpeft.model.peft_model import PeftModel

_ADAPTERS = "adapters"


@dataclass(frozen=True)
class Weights:
    """A file of tensors.

    Attributes:
        suffixes: The allowed suffixes of a path; ``""`` means a folder with the file `within`.
        within: The name of the file in a folder.
        save: Writes tensors.
        load: Reads tensors.
        tied: Whether a tied tensor is written under each of its names.
    """

    suffixes: tuple[str, ...]
    within: str
    save: Callable[[Mapping[str, Tensor], Path], None]
    load: Callable[[Path], Mapping[str, Tensor]]
    tied: bool

    has_graph = False
    checks_inputs = True
    adapter_suffix = ""

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Writes the weights; a folder also gets the model's config and the adapters."""
        if export.prepared.adapter_mode == "merged":
            self._write_base(export.prepared.model, staged)
            return
        if staged.suffix:
            raise ExportError(
                f"{staged.name} names one file, and with adapters={export.prepared.adapter_mode!r} the base and the "
                "adapters are files of their own; let the path be a folder"
            )
        self._write_base(copies.base_of(export.source), staged)
        for name in self._adapters(export):
            state = export.source._peft_adapters
            originals = merged_weights.Originals(export.source, state)
            checkpoint.save(export.source, state.by_name[name], name, staged / _ADAPTERS / name, originals)

    def _write_base(self, base: nn.Module, staged: Path) -> None:
        tensors = self._tensors(base)
        if staged.suffix:
            self.save(tensors, staged)
            return
        staged.mkdir()
        self.save(tensors, staged / self.within)
        of_model: Any = getattr(base, "config", None)
        # the config from which Transformers builds the model
        if hasattr(of_model, "save_pretrained"):
            of_model.save_pretrained(staged)

    def _tensors(self, base: nn.Module) -> dict[str, Tensor]:
        state = base.state_dict()
        if self.tied:
            return state
        # under the first name only, as in Transformers, which ties the other names when it loads
        first = {id(parameter): name for name, parameter in base.named_parameters()}
        named = dict(base.named_parameters(remove_duplicate=False))
        return {name: t for name, t in state.items() if name not in named or first[id(named[name])] == name}

    def _adapters(self, export: Export) -> list[str]:
        state = export.source._peft_adapters
        if export.prepared.adapter_mode != "baked":
            return list(state.by_name)
        # a merged adapter acts even if it isn't active
        return list(dict.fromkeys((*state.read, *state.merged)))

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the weights into a copy of the base model, first set to zero, and then the adapters."""
        if export.prepared.adapter_mode == "merged":
            merged = self._filled(export.prepared.model, path)
            return lambda _, example: example.call(merged)
        model = self._filled(copies.base_of(export.source), path)
        names = self._adapters(export)
        for name in names:
            folder = path / _ADAPTERS / name
            PeftModel.from_pretrained(model, folder, name, example_inputs=_example_inputs(export.example))
        if export.prepared.adapter_mode == "baked" and names:
            model.set_adapter(names, inference_mode=True)

        def run(case: Case, example: Example) -> Any:
            return case.expected(model, example)

        return run

    def _filled(self, base: Any, path: Path) -> Any:
        copied = copies.with_own_weights(base)
        tensors = self.load(path if path.suffix else path / self.within)
        with torch.no_grad():
            for tensor in copied.state_dict().values():
                tensor.zero_()
        copied.load_state_dict(tensors, strict=self.tied)
        return copied

    def about(self, path: Path) -> str | None:
        """Returns None, since weights have no inputs for adapters."""
        return None

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Raises ExportError, since adapters are in PEFT's files."""
        raise ExportError("weights have no inputs for adapters; save an adapter with save_pretrained")


def _example_inputs(example: Example) -> Any:
    return example.kwargs or example.args


def _save_state_dict(tensors: Mapping[str, Tensor], staged: Path) -> None:
    torch.save({name: tensor.detach() for name, tensor in tensors.items()}, staged)


def _load_state_dict(path: Path) -> Mapping[str, Tensor]:
    return torch.load(path, weights_only=True)


SAFETENSORS = Weights((".safetensors", ""), "model.safetensors", write_safetensors, load_file, tied=False)
STATE_DICT = Weights((".pt", ".pth", ".bin", ""), "pytorch_model.bin", _save_state_dict, _load_state_dict, tied=True)
