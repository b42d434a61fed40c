"""AOTInductor's package: a compiled model without Python, loaded by ``torch._inductor.aoti_load_package(path)``."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from graphpeft._torch import aot_inductor
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.formats.format import Export, Runner
from graphpeft.exporting.formats.pt2 import write_safetensors
from graphpeft.exporting.program import quiet

_ABOUT = "graphpeft"


class Aoti:
    """A program compiled for the model's device."""

    suffixes = (".pt2",)
    has_graph = True
    checks_inputs = False
    adapter_suffix = ".safetensors"

    def write(self, export: Export, staged: Path, about: str) -> None:
        """Compiles the program."""
        program = export.program.exported
        configs = {"aot_inductor.metadata": {_ABOUT: about}}
        try:
            with quiet():
                aot_inductor().aoti_compile_and_package(program, package_path=str(staged), inductor_configs=configs)
        except Exception as error:
            raise ExportError(
                f"AOTInductor can't compile the model: {in_short(error)}. It needs a "
                "C++ compiler, which the variable CXX may name; format='pt2' needs none"
            ) from error

    def runner(self, export: Export, path: Path) -> Runner:
        """Loads the compiled model."""
        model = aot_inductor().aoti_load_package(str(path))
        return lambda case, example: case.full(example).call(model)

    def about(self, path: Path) -> str | None:
        """Reads the text from the package's metadata."""
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith("wrapper_metadata.json"):
                    return json.loads(archive.read(name)).get(_ABOUT)
        return None

    def write_adapter(self, tensors: Mapping[str, Tensor], staged: Path) -> None:
        """Writes safetensors."""
        write_safetensors(tensors, staged)
