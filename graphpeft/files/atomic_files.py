"""Writes files that replace older files together or not at all.

New files are written into a staging folder, and synced to disk. A new folder is moved to its place whole. Into a folder
that is there, files are moved one by one, and an error undoes the moves; if the process is killed between two moves,
the remaining files stay in the staging folder, where `waiting` finds them. A symbolic link is replaced itself; its
target doesn't change.

An adapter is two files. The metadata of its tensors has a digest of its config (`PeftConfig.digest`), so a reader sees
whether they belong together.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")

_PREFIX = ".graphpeft-"

_ABANDONED = 24 * 60 * 60
"""The age in seconds above which a staging folder counts as left behind by a killed process."""


class Staging:
    """A staging folder for new files, which `put` moves to their places. The end of the context removes the folder.

    Attributes:
        folder: The staging folder; its files have the same relative paths as in `place`.
    """

    def __init__(self, place: Path) -> None:
        self._place = place.absolute()
        ground = next(folder for folder in (self._place, *self._place.parents) if folder.exists())
        try:
            self._own = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=ground))
        except OSError as error:
            raise type(error)(error.errno, error.strerror, str(ground)) from None  # not the staging folder's name
        self.folder, self._old, self._begun = self._own / "new", self._own / "old", self._own / _BEGUN
        self.folder.mkdir()
        self._old.mkdir()

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._own, ignore_errors=True)

    def put(self) -> list[Path]:
        """Moves all files to their places, in descending order of names, and returns the places.

        In this order, tensors (`adapter_model`) are moved before their config (`adapter_config`). Files of the same
        names are replaced; other files stay.
        """
        files = sorted((file for file in self.folder.rglob("*") if file.is_file()), reverse=True)
        for file in files:
            _sync(file)
        names = [file.relative_to(self.folder) for file in files]
        targets = [self._place / name for name in names]
        if not self._move_whole():
            self._exchange(files, targets, [self._old / name for name in names])
        for folder in dict.fromkeys(target.parent for target in targets):
            with contextlib.suppress(OSError):  # some systems can't sync a folder
                _sync(folder)
        _remove_abandoned(self._own.parent, set(names))
        return targets

    def _move_whole(self) -> bool:
        """Moves the folder itself to its place if there is nothing yet, so that it is there with all files or not."""
        made: list[Path] = []
        try:
            _make_folder(self._place.parent, made)
            # an empty folder would be replaced, with its owner and its rights
            if not os.path.lexists(self._place):
                os.rename(self.folder, self._place)
                return True
        except OSError:
            _remove_empty(made)  # another process has made the place meanwhile, or files can't be moved there
        except BaseException:
            _remove_empty(made)
            raise
        return False

    def _exchange(self, files: list[Path], targets: list[Path], backups: list[Path]) -> None:
        moves: list[_Move] = []
        made: list[Path] = []
        try:
            _make_folder(self._place, made)
            with _alone_in(self._place):
                open(self._begun, "xb").close()
                for file, target, kept in zip(files, targets, backups, strict=True):
                    _make_folder(target.parent, made)
                    if os.path.lexists(target):
                        kept.parent.mkdir(parents=True, exist_ok=True)
                        link_or_copy(target, kept)
                    moves.append(_Move(file, target, kept))
                    os.replace(file, target)
        except BaseException:
            for move in reversed(moves):
                move.undo()
            _remove_empty(made)
            raise


_BEGUN = "begun"
"""The name of the file in a staging folder that says that files may be in their places already."""


class _Move(NamedTuple):
    """The move of one file: its staged path, its place, and the backup path of a replaced file."""

    file: Path
    target: Path
    kept: Path

    def undo(self) -> None:
        if os.path.lexists(self.file):
            return  # the move hasn't happened
        if os.path.lexists(self.kept):
            os.replace(self.kept, self.target)
        else:
            self.target.unlink()


def is_on_another_disk(folder: Path, around: Path) -> bool:
    """Returns whether a folder that is there, maybe by a link, lies on another disk than the folder around it."""
    return folder.is_dir() and around.is_dir() and folder.stat().st_dev != around.stat().st_dev


def waiting(place: Path, name: str) -> list[Path]:
    """Returns the staged files of this name for a folder, from running or killed processes."""
    place = place.absolute()
    grounds = (place, *place.parents[:_LEVELS])
    staged = [own / "new" / place.relative_to(ground) for ground in grounds for own in ground.glob(f"{_PREFIX}*")]
    found = []
    for folder in staged:
        with contextlib.suppress(OSError):  # that of another user
            found += [folder / name] if (folder / name).is_file() else []
    return sorted(found)


_LEVELS = 3
"""How far above the folder of a file that file may be staged: ``model/adapters/name`` beside ``model``."""


def read_together(paths: Sequence[str | os.PathLike[str]], read: Callable[[], T]) -> T:
    """Reads several files in versions that existed at the same time, even if another process replaces them."""
    for _ in range(_READS):
        with contextlib.ExitStack() as stack:
            # the system doesn't reuse the inode of an open file
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
"""The greatest number of calls of `read`, if files are replaced during each call."""


def _are_there(opened: Sequence[BinaryIO], paths: Sequence[str | os.PathLike[str]]) -> bool:
    return all(
        os.path.samestat(os.fstat(file.fileno()), os.stat(path)) for file, path in zip(opened, paths, strict=True)
    )


def link_or_copy(source: Path, target: Path) -> None:
    """Makes a hard link to a file, or a copy if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _make_folder(folder: Path, made: list[Path]) -> None:
    lacking = list(itertools.takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    for path in reversed(lacking):
        path.mkdir(exist_ok=True)  # another process may have made it meanwhile
        made.append(path)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):  # another process has written files there
            folder.rmdir()


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Locks a folder against other writers inside the context, if the system and the disk support locks."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        # unlocked before closing, since a process forked meanwhile keeps the handle open
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _sync(path: Path) -> None:
    """Syncs a file or a folder to disk."""
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_abandoned(ground: Path, placed: Set[Path]) -> None:
    """Removes what killed processes have left, but for files that belong to some that they have put into place."""
    for folder in ground.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            is_old = time.time() - folder.lstat().st_mtime > _ABANDONED
            if is_old and folder.is_dir() and not folder.is_symlink() and _is_needless(folder, placed):
                shutil.rmtree(folder, ignore_errors=True)


def _is_needless(folder: Path, placed: Set[Path]) -> bool:
    """Returns whether none of a staging folder's files is in its place, or all others have been replaced since."""
    new = folder / "new"
    left = {file.relative_to(new) for file in new.rglob("*") if file.is_file()}
    return not (folder / _BEGUN).exists() or left <= placed
