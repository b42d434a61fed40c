"""Files ``.pt2`` of ``torch.export``; ``torch.export.load(path).module()`` loads the model."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from graphpeft.exporting.formats.format import Export, Runner

_ABOUT = "graphpeft.json"


class Pt2:
    """An ``ExportedProgram``."""

    suffixes = (".pt2",)
    has_graph = True
    checks_inputs = True
    adapter_suffix = ".safetensors"

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Saves the program."""
        torch.export.save(export.program.exported, staged, extra_files={_ABOUT: about})

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the program."""
        with warnings.catch_warnings():
            # PyTorch 2.10 warns about its own code for reading weights
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            model = torch.export.load(path).module()
        return lambda case, example: case.full(example).call(model)

    def about(self, path: Path) -> str | None:
        """Reads one file of the archive, without the weights."""
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            found = [name for name in archive.namelist() if name.endswith(f"/extra/{_ABOUT}")]
            return archive.read(found[0]).decode() if found else None

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Writes safetensors."""
        write_safetensors(tensors, staged)


def write_safetensors(tensors: Mapping[str, Tensor], staged: Path) -> None:
    """Writes tensors, which may share memory, as safetensors."""
    alone = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(alone, staged, metadata={"format": "pt"})
