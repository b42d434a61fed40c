"""Moves the files of an export to their places together or not at all, by `files/atomic_files.py`.

A large ONNX graph has its weights in a part file with a digest of the content in its name, so that a graph never reads
the weights of another export.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from graphpeft.exporting.errors import ExportError
from graphpeft.files.atomic_files import Staging


@contextlib.contextmanager
def staged_beside(target: Path) -> Iterator[Path]:
    """Yields an empty folder, whose files are moved beside `target` at the end.

    They replace files of the same names; part files of an earlier export to `target` are removed, and other files stay.
    If code in the context raises, nothing changes.
    """
    with _os_errors_as_export_errors(target):
        staging = Staging(target.parent)
    with staging:
        yield staging.folder
        with _os_errors_as_export_errors(target):
            placed = staging.put()
        for part in target.parent.glob("*.data"):
            if part not in placed and _is_part(part.name, target.name):
                with contextlib.suppress(OSError):
                    part.unlink()


def named_by_content(part: Path, whole: Path) -> Path:
    """Renames a part file by a digest of its content."""
    digest = hashlib.blake2b(digest_size=8)
    with part.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return part.rename(whole.with_name(f"{whole.name}.{digest.hexdigest()}.data"))


def _is_part(name: str, whole: str) -> bool:
    return re.fullmatch(rf"{re.escape(whole)}\.[0-9a-f]{{16}}\.data", name) is not None


@contextlib.contextmanager
def _os_errors_as_export_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"{target} can't be written: {error.strerror}: {error.filename}") from error
