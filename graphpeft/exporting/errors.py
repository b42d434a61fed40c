"""The error of exports."""

from __future__ import annotations

from graphpeft.peft_errors import PeftError


class ExportError(PeftError, ValueError):
    """A model can't be exported in this format and adapter mode; no file was written, and the model is unchanged.

    Examples:
        >>> try:
        ...     export(nn.Linear(2, 2), (torch.randn(1, 2),), "model.bin", "onnx")
        ... except ExportError as error:
        ...     print(error)
        model.bin is to end with .onnx for format='onnx'; .bin is for format='state_dict'
    """


def in_short(error: BaseException) -> str:
    """Returns the class of an error and the first line of its message, since PyTorch's messages can fill pages."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
