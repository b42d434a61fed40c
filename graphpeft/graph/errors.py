"""What can go wrong when a model becomes a graph, and when a graph stands for the model."""

import torch

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What says nothing about the code that raises it, and so never becomes the reason why that can't be recorded."""


class TraceError(RuntimeError):
    """A forward that can't be recorded truthfully; the message says where, why and what to do."""


class NeedsInputsError(TraceError):
    """A forward that decides on its inputs, traced without any."""


class DrawsNumbersError(TraceError):
    """A forward that draws random numbers by other means than PyTorch's."""


class GuardError(RuntimeError):
    """A traced graph was called with inputs for which the model would have decided otherwise."""
