"""Serves an exported model with onnxruntime, one session for all adapters, and says how well and how fast each reads.

python serve.py digits.onnx tests.npz upside_down=digits.upside_down.onnx_adapter …
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import numpy as np
import onnxruntime


def main(model: str, tests: str, adapters: dict[str, str]) -> None:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # it warns that adapters can be exchanged
    session = onnxruntime.InferenceSession(model, settings)
    data = np.load(tests)
    images = {task: data[task] for task in data.files if task != "labels"}

    # the base is the model with an adapter of zeros
    zeros = {one.name: np.zeros(one.shape, np.float32) for one in session.get_overridable_initializers()}
    accuracies, milliseconds = {}, {}
    for name, path in {"base": None, **adapters}.items():
        adapter = onnxruntime.LoraAdapter()  # the options only point to it: it has to live as long as they do
        options = onnxruntime.RunOptions()
        if path is not None:
            adapter.Load(path)
            options.add_active_adapter(adapter)
        given = zeros if path is None else {}

        def read(batch: Any, given: Any = given, options: Any = options) -> Any:
            return session.run(None, {"x": batch, **given}, options)[0].argmax(1)

        accuracies[name] = {task: float((read(batch) == data["labels"]).mean()) for task, batch in images.items()}
        start = time.perf_counter()
        for row in range(100):
            read(images["upright"][row : row + 1])
        milliseconds[name] = (time.perf_counter() - start) * 10
    print(json.dumps({"accuracies": accuracies, "milliseconds": milliseconds}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], dict(argument.split("=", 1) for argument in sys.argv[3:]))
