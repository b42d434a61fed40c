"""Files that take their places whole and together, whatever happens to who writes them.

They are written into a folder of their own beside their places, reach the disk, and are moved one by one. An error on
the way is undone. What ends the process between two moves leaves the files that weren't moved in that folder, where
`waiting` finds them. A place that is a symbolic link is replaced itself; what it points to stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")

_PREFIX = ".graphpeft-"

_ABANDONED = 24 * 60 * 60
"""After how many seconds a folder is somebody's who was cut off."""


class Staging:
    """A folder for new files, which `put` moves to their places; what was not put goes when the context ends.

    Args:
        place: The folder that the files are for; it may be lacking, and is made with the first one.

    Attributes:
        folder: Where to write them, under the names and in the folders that they will have in `place`.
    """

    def __init__(self, place: Path) -> None:
        self._place = place.absolute()
        ground = next(folder for folder in (self._place, *self._place.parents) if folder.exists())
        try:
            self._own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=ground))
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(ground)) from None  # and not a name that nobody knows
        self.folder, self._old = self._own / "new", self._own / "old"
        self.folder.mkdir()
        self._old.mkdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._own, ignore_errors=True)

    def put(self) -> list[Path]:
        """Moves all files to their places, the last name first, and returns these.

        So tensors come before the file that says what they mean. Files of the same names are replaced, and all others
        stay.

        Raises:
            OSError: If one can't be moved; all that was there is there again.
        """
        files = sorted((file for file in self.folder.rglob("*") if file.is_file()), reverse=True)
        for file in files:
            _sync(file)
        targets = [self._place / file.relative_to(self.folder) for file in files]
        self._exchange(files, targets)
        for folder in dict.fromkeys(target.parent for target in targets):
            with contextlib.suppress(OSError):  # some systems don't tell when a folder has reached the disk
                _sync(folder)
        _remove_abandoned(self._own.parent)
        return targets

    def _exchange(self, files: list[Path], targets: list[Path]) -> None:
        moves: list[_Move] = []
        made: list[Path] = []
        try:
            _make_folder(self._place, made)
            with _alone_in(self._place):
                for file, target in zip(files, targets, strict=True):
                    _make_folder(target.parent, made)
                    kept = self._old / file.relative_to(self.folder)
                    if os.path.lexists(target):
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        link_or_copy(target, kept)
                    moves.append(_Move(file, target, kept))
                    os.replace(file, target)
        except BaseException:
            for move in reversed(moves):
                move.undo()
            for folder in reversed(made):
                with contextlib.suppress(OSError):  # another writer has put something there
                    folder.rmdir()
            raise


class _Move(NamedTuple):
    """One file on its way: where it was written, its place, and where that which was there is kept."""

    file: Path
    target: Path
    kept: Path

    def undo(self) -> None:
        if os.path.lexists(self.file):
            return  # it wasn't moved
        if os.path.lexists(self.kept):
            os.replace(self.kept, self.target)
        else:
            self.target.unlink()


def waiting(place: Path, name: str) -> list[Path]:
    """Returns the files of this name that are on their way into the folder, or were when their writer was ended."""
    return sorted(place.glob(f"{_PREFIX}*/new/{name}"))


def read_together(paths: Sequence[str | os.PathLike[str]], read: Callable[[], T]) -> T:
    """Reads files that may be replaced meanwhile, by a function that opens them one after the other, or one twice.

    Args:
        paths: The files.
        read: The function; it is called again if one of them was replaced since it began.

    Returns:
        What it returns for files that lay there all at one time.

    Raises:
        OSError: If a file can't be opened, or they are replaced as often as the function is called.
    """
    for _ in range(_READS):
        with contextlib.ExitStack() as stack:
            # as long as it is open, no other file can be the same for the system
            opened = [stack.enter_context(open(path, "rb")) for path in paths]
            try:
                found = read()
            except Exception:
                if _are_there(opened, paths):
                    raise
            else:
                if _are_there(opened, paths):
                    return found
    names = " and ".join(str(path) for path in paths)
    raise OSError(errno.EAGAIN, "replaced again and again, and can't be read between", names)


_READS = 1000
"""How often files are read that are other ones afterwards."""


def _are_there(opened: Sequence[BinaryIO], paths: Sequence[str | os.PathLike[str]]) -> bool:
    return all(
        os.path.samestat(os.fstat(file.fileno()), os.stat(path)) for file, path in zip(opened, paths, strict=True)
    )


def link_or_copy(source: Path, target: Path) -> None:
    """Lets a file have a second name, or a copy where the file system has no such names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _make_folder(folder: Path, made: list[Path]) -> None:
    lacking = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(lacking):
        path.mkdir(exist_ok=True)  # another writer may have made it now
        made.append(path)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Lets others who put files there wait, on systems and disks that can."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # a process that was forked meanwhile has the handle, too
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _sync(path: Path) -> None:
    """Returns when a file or a folder has reached the disk."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(ground: Path) -> None:
    for folder in ground.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.lstat().st_mtime > _ABANDONED and folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
