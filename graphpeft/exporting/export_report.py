"""What an export wrote, for a person to read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphpeft.exporting.check import Checked
from graphpeft.rules.report import table


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, what of it can change from call to call, and how it was checked.

    Attributes:
        format: The format.
        way: The way in which it carries adapters.
        path: The file, or the folder.
        files: All files with their numbers of bytes.
        adapter_files: The file of each adapter, where adapters are inputs.
        inputs: The shape of each of the model's inputs, with the symbols of sizes that can change.
        checked: How far it differs from the model.
    """

    format: str
    way: str
    path: Path
    files: dict[Path, int]
    adapter_files: dict[str, Path]
    inputs: dict[str, str]
    checked: tuple[Checked, ...]

    def __str__(self) -> str:
        lines = [f"{self.format}, adapters {self.way}: {self.path}", ""]
        sizes = [(str(self._relative(path)), f"{size:,}") for path, size in self.files.items()]
        lines += table(("file", "bytes"), sizes)
        if self.inputs:
            lines += ["", *table(("input", "shape"), list(self.inputs.items()))]
        if self.adapter_files:
            files = [(name, str(self._relative(path))) for name, path in self.adapter_files.items()]
            lines += ["", *table(("adapter", "file"), files)]
        lines += [
            "",
            *(table(("checked", "shapes", "difference"), self._checks()) if self.checked else ["not checked"]),
        ]
        return "\n".join(lines)

    __repr__ = __str__

    def _relative(self, path: Path) -> Path:
        return path.relative_to(self.path.parent)

    def _checks(self) -> list[tuple[str, str, str]]:
        return [
            (
                one.case or "the model",
                " ".join(str(shape) for shape in one.shapes),
                f"{one.difference:.1e}",
            )
            for one in self.checked
        ]
