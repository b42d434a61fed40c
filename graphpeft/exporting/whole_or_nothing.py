"""Files that appear at their places whole and together, or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphpeft.exporting.errors import ExportError


@contextlib.contextmanager
def folder_for(target: Path) -> Iterator[Path]:
    """Gives an empty folder, and puts what is in it beside `target` at the end, unless something fails.

    Files of the same names make way. What was there before is there again after an error.

    Raises:
        ExportError: If nothing can be written there.
    """
    ground = next(folder for folder in target.absolute().parents if folder.exists())
    try:
        made = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=ground)
    except OSError as error:
        raise ExportError(f"{target} can't be written: {error.strerror} ({ground})") from error
    with made as folder:
        new, old = Path(folder, "new"), Path(folder, "old")
        new.mkdir()
        old.mkdir()
        yield new
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _exchange(new, target.parent, old)
        except OSError as error:
            raise ExportError(f"{target} can't be written: {error.strerror}: {error.filename}") from error


def _exchange(new: Path, place: Path, old: Path) -> None:
    """Moves all that is in `new` to `place`, and what is there under these names to `old`; back after an error."""
    moved: list[tuple[Path, Path]] = []
    try:
        for source in sorted(new.iterdir()):
            target = place / source.name
            if target.exists():
                _move(target, old / source.name, moved)
            _move(source, target, moved)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        raise


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    os.replace(source, target)
    moved.append((source, target))
