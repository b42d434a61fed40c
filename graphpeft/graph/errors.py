"""What can go wrong when a model becomes a graph, and when a graph stands for the model."""

import torch

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What says nothing about the code that raises it, and so never becomes the reason why that can't be recorded."""


class TraceError(RuntimeError):
    """A forward that can't be recorded truthfully; the message says where, why and what to do.

    Example:
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
    """A forward that decides on its inputs, traced without any.

    Example:
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
    """A forward that draws random numbers by other means than PyTorch's."""


class GuardError(RuntimeError):
    """A traced graph was called with inputs for which the model would have decided otherwise.

    Example:
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
