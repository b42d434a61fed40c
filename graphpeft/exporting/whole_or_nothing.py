"""An export's files appear at their places whole and together, or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from graphpeft.exporting.errors import ExportError
from graphpeft.files.atomic_files import Staging


@contextlib.contextmanager
def folder_for(target: Path) -> Iterator[Path]:
    """Gives an empty folder, and puts what is in it beside `target` at the end, unless something fails.

    Files of the same names make way, and so do parts of them that are files of their own; all others stay. What was
    there before is there again after an error.

    Raises:
        ExportError: If nothing can be written there.
    """
    with _told(target):
        staging = Staging(target.parent)
    with staging:
        yield staging.folder
        with _told(target):
            placed = staging.put()
        for part in target.parent.glob("*.data"):
            if part not in placed and _is_part(part.name, target.name):
                with contextlib.suppress(OSError):
                    part.unlink()


def named_by_content(part: Path, whole: Path) -> Path:
    """Names a file by what it holds, so that who reads it finds this one and no other.

    Args:
        part: The file.
        whole: The file that reads it, beside it.

    Returns:
        The file under its new name.
    """
    digest = hashlib.blake2b(digest_size=8)
    with part.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return part.rename(whole.with_name(f"{whole.name}.{digest.hexdigest()}.data"))


def _is_part(name: str, whole: str) -> bool:
    return re.fullmatch(rf"{re.escape(whole)}\.[0-9a-f]{{16}}\.data", name) is not None


@contextlib.contextmanager
def _told(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"{target} can't be written: {error.strerror}: {error.filename}") from error
