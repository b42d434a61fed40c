"""Runs mlx-lm, in an environment of its own: the logits of a model with each adapter, as a file that PyTorch reads.

python mlx_logits.py MODEL OUT ADAPTER…
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model


def logits(folder: str, adapter: str | None, ids: mx.array) -> mx.array:
    """Returns what a model computes with an adapter."""
    loaded = load_model(Path(folder))
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if adapter is not None:
        model = load_adapters(model, adapter)
    return model(ids).astype(mx.float32)


def main() -> None:
    """Writes the logits of the base, and with each adapter by the name of its folder."""
    model, out, *adapters = sys.argv[1:]
    ids = mx.array([[3, 7, 11, 2, 9, 23]])
    found = {"base": logits(model, None, ids)}
    for adapter in adapters:
        found[Path(adapter).name] = logits(model, adapter, ids)
    mx.save_safetensors(out, found)


if __name__ == "__main__":
    main()
