"""The versions of the environment, which a report of a problem needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

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
    """Returns versions by name; None for a package that isn't installed.

    Returns:
        Versions of this library, PyTorch, the packages around them, and Python; the system, and PyTorch's accelerator.
    """
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
