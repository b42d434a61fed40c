"""The answers of an adapted module to code that takes it for one of PEFT's wrappers, or for a plain layer."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from graphpeft.absent_names import ABSENT_MEMBERS
from graphpeft.graph.holders import Holder
from graphpeft.peft_errors import PeftWarning

_ADVICE = {name: reason for names, reason in ABSENT_MEMBERS["layers"].items() for name in names.split(", ")}


class NoWrapper(nn.Module):
    """A module whose errors say what to use in place of what PEFT's wrappers have; nothing else differs."""

    def __getattr__(self, name: str) -> Any:
        # parameters are found here, too, and by nn.Module's function, which traces exchange
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name not in _ADVICE or not _has_adapters(self):
                raise
            raise AttributeError(f"{error}: {_ADVICE[name]}", name=name, obj=self) from None

    @property
    def qconfig(self) -> Any:
        """The options of ``torch.ao.quantization``, which finds layers by their very class, and so no adapted one."""
        return vars(self)["qconfig"] if "qconfig" in vars(self) else self.__getattr__("qconfig")

    @qconfig.setter
    def qconfig(self, options: Any) -> None:
        if _has_adapters(self):
            warnings.warn(
                "torch.ao.quantization leaves adapted layers as they are; to have them quantised, call "
                "merge_and_unload() before, or quantise what torch.export makes of the model, as "
                "torchao.quantization.pt2e does",
                PeftWarning,
                stacklevel=3,
            )
        vars(self)["qconfig"] = options

    @qconfig.deleter
    def qconfig(self) -> None:
        del vars(self)["qconfig"]


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(child, Holder) for child in module._modules.values())
