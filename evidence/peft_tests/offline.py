"""A pytest plugin that gives PEFT's tests small data sets, and keeps them from going to the hub."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any


def pytest_configure() -> None:
    """Exchanges what loads data sets and what goes online, before a file of tests is imported."""
    datasets: Any = importlib.import_module("datasets")
    datasets.load_dataset = _dataset
    importlib.import_module("tests.testing_utils").hub_online_once = _offline


@contextlib.contextmanager
def _offline(_: str) -> Iterator[None]:
    """Stands for the function of PEFT's tests that goes online for each model's first use."""
    yield


def _dataset(name: str, *_: Any, split: str | None = None, **__: Any) -> Any:
    from datasets import Dataset, DatasetDict

    rows = _ROWS[name]()
    made = DatasetDict({part: Dataset.from_dict(rows) for part in ("train", "validation", "test")})
    return made if split is None else made[split]


def _quotes() -> dict[str, list[Any]]:
    quotes = [f"“Be yourself; number {i} is already taken, and so is every other one.”" for i in range(64)]
    return {"quote": quotes, "author": ["Oscar Wilde"] * 64, "tags": [["be-yourself"]] * 64}


def _sentiments() -> dict[str, list[Any]]:
    return {
        "sentence": [f"the film number {i} is good, or it is not" for i in range(16)],
        "label": [i % 2 for i in range(16)],
        "idx": list(range(16)),
    }


def _pictures() -> dict[str, list[Any]]:
    import numpy as np
    from PIL import Image

    return {"image": [Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8))]}


_ROWS = {
    "ybelkada/english_quotes_copy": _quotes,
    "nyu-mll/glue": _sentiments,
    "huggingface/cats-image": _pictures,
}
