"""Runs llama.cpp, in an environment of its own: the logits of a model with each adapter, as a file that PyTorch reads.

python llama_cpp_logits.py MODEL OUT ADAPTER…
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama
from safetensors.numpy import save_file


def logits(model: str, adapter: str | None) -> np.ndarray:
    """Returns what a model computes with an adapter."""
    numbers = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}  # else its cache rounds to half precision
    loaded = Llama(model, lora_path=adapter, logits_all=True, n_ctx=64, verbose=False, **numbers)
    loaded.eval([3, 7, 11, 2, 9, 23])
    return np.array(loaded.scores[:6])[None]


def main() -> None:
    """Writes the logits with each adapter, by the name of its folder."""
    model, out, *adapters = sys.argv[1:]
    save_file({Path(each).parent.name: logits(model, each) for each in adapters}, out)


if __name__ == "__main__":
    main()
