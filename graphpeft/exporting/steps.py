"""Shows the progress of an export in a terminal, since its steps can take minutes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from tqdm import tqdm


@contextlib.contextmanager
def shown(count: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that shows the name of the next of `count` steps; without a terminal it shows nothing."""
    with tqdm(total=count, disable=None, leave=False, bar_format="{desc} ({n_fmt}/{total_fmt}, {elapsed})") as bar:

        def step(name: str) -> None:
            bar.set_description_str(name)
            bar.update()

        yield step
