"""The formats of exports. Each format has its own Python module, and writes and runs files."""

from __future__ import annotations

from collections.abc import Mapping

from graphpeft.exporting.formats.aoti import Aoti
from graphpeft.exporting.formats.executorch import ExecuTorch
from graphpeft.exporting.formats.format import Format
from graphpeft.exporting.formats.onnx import Onnx
from graphpeft.exporting.formats.openvino import OpenVino
from graphpeft.exporting.formats.pt2 import Pt2
from graphpeft.exporting.formats.weights import SAFETENSORS, STATE_DICT

FORMATS: Mapping[str, Format] = {
    "pt2": Pt2(),
    "aoti": Aoti(),
    "onnx": Onnx(),
    "openvino": OpenVino(),
    "executorch": ExecuTorch(),
    "safetensors": SAFETENSORS,
    "state_dict": STATE_DICT,
}
"""The formats by name."""


def formats_of(suffix: str) -> list[str]:
    """Returns the names of the formats whose files can end with a suffix, such as ``".onnx"``."""
    return [name for name, format in FORMATS.items() if suffix in format.suffixes]
