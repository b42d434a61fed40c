"""Private names of PyTorch that the package uses, so that a new release of PyTorch is a matter of one file."""

import torch.utils.checkpoint

CHECKPOINT_GENERATOR = next(
    name
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    if hasattr(torch.utils.checkpoint, name)
)
"""The function of `torch.utils.checkpoint` that ``checkpoint`` calls with ``use_reentrant=False``.

Its first argument is the function to run again. The name ends in ``_impl`` since PyTorch 2.15, where the other one only
calls it.
"""
