"""Files that appear at their places whole and together, or not at all."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from graphpeft.exporting.errors import ExportError


@contextlib.contextmanager
def folder_for(target: Path) -> Iterator[Path]:
    """Gives an empty folder, and puts what is in it beside `target` at the end, unless something fails.

    Files of the same names make way, and all others stay. What was there before is there again after an error.

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
            _exchange(new, target.parent, old)
        except OSError as error:
            raise ExportError(f"{target} can't be written: {error.strerror}: {error.filename}") from error


def _exchange(new: Path, place: Path, old: Path) -> None:
    """Moves all files in `new` to `place`, and what is there under their names to `old`; back after an error.

    A folder that is there already keeps its other files: they are somebody's.
    """
    moved: list[tuple[Path, Path]] = []
    made: list[Path] = []
    try:
        for source in sorted(file for file in new.rglob("*") if file.is_file()):
            name = source.relative_to(new)
            target, kept = place / name, old / name
            _make_folder(target.parent, made)
            if target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
            if os.path.lexists(target):
                kept.parent.mkdir(parents=True, exist_ok=True)
                _move(target, kept, moved)
            _move(source, target, moved)
    except BaseException:
        for source, target in reversed(moved):
            os.replace(target, source)
        for folder in reversed(made):
            folder.rmdir()
        raise


def _make_folder(folder: Path, made: list[Path]) -> None:
    lacking = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(lacking):
        path.mkdir()
        made.append(path)


def _move(source: Path, target: Path, moved: list[tuple[Path, Path]]) -> None:
    os.replace(source, target)
    moved.append((source, target))
