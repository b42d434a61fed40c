"""Runs one of llama.cpp's converters on a model whose tokenizer it doesn't know.

python llama_cpp_converter.py SCRIPT ARGUMENT…
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Runs the script with the arguments that follow it."""
    script = sys.argv[1]
    sys.path[:0] = [str(Path(script).parent), str(Path(script).parent / "gguf-py")]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"  # which it tells by a hash of known ones
    del sys.argv[0]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
