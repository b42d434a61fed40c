"""The tensors in a checkpoint's files of safetensors: read one at a time, and written one at a time into new files.

A file begins with the size of its header: eight bytes, the lowest first. The header is JSON, and tells each tensor's
place in the bytes behind it (https://huggingface.co/docs/safetensors). A changed tensor has its dtype and shape, so its
place in the new file is that in the old one, and no file has to be in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from graphpeft.files.foreign_files import CheckpointError, unreadable
from graphpeft.wording import joined


class Place(NamedTuple):
    """The place of a tensor in a file.

    Attributes:
        file: The file.
        start: The number of its first byte in the file.
        end: The number of the byte behind its last.
        shape: Its shape.
        dtype: Its dtype.
    """

    file: Path
    start: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class CheckpointFiles:
    """A checkpoint's tensors in its files, and those that are written into new ones.

    Attributes:
        folder: The checkpoint's folder.
        places: The place of each tensor, by its name.
    """

    def __init__(self, folder: Path, new: Path) -> None:
        self.folder, self._new = folder, new
        self._files = _files_in(folder)
        self.places = {name: place for file in self._files for name, place in _places_in(file).items()}
        self._written: set[str] = set()

    def empty(self) -> dict[str, torch.Tensor]:
        """Returns the tensors on the meta device, by name."""
        return {name: torch.empty(place.shape, dtype=place.dtype, device="meta") for name, place in self.places.items()}

    def read(self, name: str) -> torch.Tensor:
        """Returns a tensor, as it was written last."""
        file = self.places[name].file
        try:
            with safe_open(str(self._in_new(file) if name in self._written else file), "pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: {name} can't be read: {error}; copy the file anew") from error

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Writes a tensor of the same dtype and shape into the new file, and returns the number of bytes."""
        place = self.places[name]
        values = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if tuple(tensor.shape) != place.shape or len(values) != place.end - place.start:
            raise CheckpointError(
                f"{place.file}: {name} has the shape {place.shape} in {place.end - place.start} bytes, and would have "
                f"{tuple(tensor.shape)} in {len(values)}; merge it in memory"
            )
        new = self._in_new(place.file)
        if not new.exists():
            _begin(place.file, new)
        with open(new, "r+b") as file:
            file.seek(place.start)
            file.write(values.numpy().tobytes())
        self._written.add(name)
        return len(values)

    def complete(self, told: Callable[[int], object]) -> None:
        """Copies all else into the new files: tensors that weren't written, and the checkpoint's other files."""
        for file in self._files:
            written = sorted(self.places[name][1:3] for name in self._written if self.places[name].file == file)
            new = self._in_new(file)
            if not new.exists():
                _begin(file, new)
            _copy_between(file, new, written, told)
        for file in _others_in(self.folder):
            target = self._in_new(file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)

    @property
    def size(self) -> int:
        """The size of the files of tensors, in bytes."""
        return sum(file.stat().st_size for file in self._files)

    def _in_new(self, file: Path) -> Path:
        return self._new / file.relative_to(self.folder)


def _files_in(folder: Path) -> list[Path]:
    """Returns the files that have a checkpoint's tensors: those that its index names, or the only one that is there."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) == 1:
        files = sorted({folder / name for name in _named_by(indexes[0])})
    else:
        files = [file for file in [folder / "model.safetensors"] if file.is_file()] or [*folder.glob("*.safetensors")]
    lacking = [str(file) for file in files if not file.is_file()]
    if lacking:
        raise CheckpointError(f"{indexes[0]} names {joined(lacking)}, which isn't there; copy the folder anew")
    if len(indexes) > 1 or not files or (not indexes and len(files) > 1):
        raise CheckpointError(
            f"{folder} has {len(files)} files of safetensors and {len(indexes)} indexes of such files; a checkpoint "
            "has one file, or one index"
        )
    return files


def _named_by(index: Path) -> Iterable[str]:
    try:
        names = json.loads(index.read_bytes())["weight_map"].values()
    except OSError as error:
        raise unreadable(index, error) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} has no weight_map; copy it anew") from error
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: weight_map names what is no file of its folder; copy it anew")
    return names


def _places_in(file: Path) -> dict[str, Place]:
    try:
        with safe_open(str(file), "pt") as tensors:  # which checks the header
            dtypes = {name: _dtype(tensors, name) for name in tensors.keys()}  # noqa: SIM118
        with open(file, "rb") as opened:
            start = 8 + int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(start - 8))
    except OSError as error:
        raise unreadable(file, error) from error
    except SafetensorError as error:
        raise CheckpointError(f"{file} isn't a file of safetensors: {error}; copy it anew") from error
    found = {}
    for name, dtype in dtypes.items():
        first, last = (start + offset for offset in header[name]["data_offsets"])
        found[name] = Place(file, first, last, tuple(header[name]["shape"]), dtype)
    return found


def _dtype(tensors: Any, name: str) -> torch.dtype:
    """Returns a tensor's dtype, by a part of it without numbers."""
    one = tensors.get_slice(name)
    return (one[:0] if one.get_shape() else tensors.get_tensor(name)).dtype


def _begin(source: Path, staged: Path) -> None:
    """Makes a new file with the header of another one, and of its size."""
    staged.parent.mkdir(parents=True, exist_ok=True)
    with open(source, "rb") as old, open(staged, "xb") as new:
        size = old.read(8)
        new.write(size + old.read(int.from_bytes(size, "little")))
        new.truncate(source.stat().st_size)


_CHUNK = 2**24


def _copy_between(
    source: Path, target: Path, written: Iterable[tuple[int, int]], told: Callable[[int], object]
) -> None:
    """Copies the bytes of a file that aren't in the ranges that were written."""
    with open(source, "rb") as old, open(target, "r+b") as new:
        at = 0
        for start, end in (*written, (source.stat().st_size, source.stat().st_size)):
            old.seek(at)
            new.seek(at)
            while at < start:
                chunk = old.read(min(_CHUNK, start - at))
                new.write(chunk)
                at += len(chunk)
                told(len(chunk))
            at = end


_OF_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".npz"})
"""The endings of files that may hold the same weights once more, which would be other ones than the new ones."""


def _others_in(folder: Path) -> list[Path]:
    """Returns the files beside those of weights, such as the config and the tokenizer's; none that is hidden."""
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return [
        file
        for file in found
        if file.suffix not in _OF_WEIGHTS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and not file.name.endswith(".bin.index.json")
    ]
