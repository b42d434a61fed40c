"""Errors of tracing a model, and of calling a traced graph."""

import torch

from graphpeft.peft_errors import PeftError

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Errors that say nothing about the code that raises them, so they are never the reason why code can't be recorded."""


class TraceError(PeftError, RuntimeError):
    """A forward can't be recorded faithfully; the message says where, why and what to do.

    Examples:
        >>> import random
        >>> class Noisy(nn.Module):
        ...     def forward(self, x):
        ...         return x * random.random()
        >>> try:
        ...     trace(Noisy())
        ... except TraceError as error:
        ...     print("Noisy can't be traced")
        Noisy can't be traced
    """


class NeedsInputsError(TraceError):
    """A forward that branches on its inputs was traced without example inputs.

    Examples:
        >>> class Batched(nn.Module):
        ...     def forward(self, x):
        ...         return x if x.ndim == 2 else x.unsqueeze(0)
        >>> try:
        ...     trace(Batched())
        ... except NeedsInputsError as error:
        ...     print("pass example_inputs")
        pass example_inputs
    """


class DrawsNumbersError(TraceError):
    """A forward draws random numbers from a generator other than PyTorch's."""


class GuardError(PeftError, RuntimeError):
    """A traced graph was called with inputs or module attributes for which the model would take another branch.

    Examples:
        >>> class Batched(nn.Module):
        ...     def forward(self, x):
        ...         return x if x.ndim == 2 else x.unsqueeze(0)
        >>> graph = trace(Batched(), (torch.randn(2, 3),))
        >>> try:
        ...     graph(torch.randn(3))
        ... except GuardError as error:
        ...     print("another branch than in the trace")
        another branch than in the trace
    """
