"""What an adapted module says to code that takes it for another one: for one of PEFT's wrappers, or a plain layer."""

from __future__ import annotations

from typing import Any

from torch import nn

from graphpeft.absent_names import ABSENT_MEMBERS
from graphpeft.graph.holders import Holder

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
        """The options of ``torch.ao.quantization``, which finds layers by their very class, and so no adapted one.

        Raises:
            RuntimeError: If it is set while the module has adapters.
        """
        return vars(self)["qconfig"] if "qconfig" in vars(self) else self.__getattr__("qconfig")

    @qconfig.setter
    def qconfig(self, options: Any) -> None:
        if _has_adapters(self):
            raise RuntimeError(
                "torch.ao.quantization would leave an adapted layer as it is, without a word; call merge_and_unload() "
                "before, or quantise what torch.export makes of the model, as torchao.quantization.pt2e does"
            )
        vars(self)["qconfig"] = options


def _has_adapters(module: nn.Module) -> bool:
    return any(isinstance(child, Holder) for child in module._modules.values())
