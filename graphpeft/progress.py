"""Shows how far a long computation has come: on stderr, in a terminal alone, and only after two seconds."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS = 2
"""A shorter work shows nothing."""


def over(items: Iterable[T], what: str, unit: str) -> Iterable[T]:
    """Returns the items, with a bar while they are gone through."""
    return tqdm(items, what, unit=f" {unit}", **_OPTIONS) if _is_seen() else items


@contextlib.contextmanager
def counted(what: str, unit: str) -> Iterator[Callable[[], object]]:
    """Yields a function that counts one more of something whose number isn't known before; arguments as for `over`."""
    if not _is_seen():
        yield _nothing
        return
    with tqdm(desc=what, unit=f" {unit}", **_OPTIONS) as bar:
        yield bar.update


@contextlib.contextmanager
def of_bytes(what: str, size: int) -> Iterator[Callable[[int], object]]:
    """Yields a function that counts bytes of a work of known size."""
    if not _is_seen():
        yield _nothing
        return
    with tqdm(desc=what, total=size, unit="B", unit_scale=True, **_OPTIONS) as bar:
        yield bar.update


@contextlib.contextmanager
def steps(count: int) -> Iterator[Callable[[str], object]]:
    """Yields a function that shows the name of the next of `count` steps, each of which may take long by itself."""
    if not _is_seen():
        yield _nothing
        return
    with tqdm(total=count, bar_format="{desc} ({n_fmt}/{total_fmt}, {elapsed})", **_OPTIONS) as bar:
        # a step doesn't come back here before it is done
        timer = threading.Timer(SECONDS, bar.refresh)
        timer.daemon = True

        def step(name: str) -> None:
            bar.set_description_str(name, refresh=False)
            bar.update()

        timer.start()
        try:
            yield step
        finally:
            timer.cancel()


_OPTIONS: dict[str, Any] = {"delay": SECONDS, "leave": False}


def _is_seen() -> bool:
    # asked here, since tqdm starts a thread for bars that aren't shown, too, and a forked process mustn't have any
    return sys.stderr is not None and sys.stderr.isatty()


def _nothing(*_: object) -> None:
    pass
