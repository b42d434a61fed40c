"""The report of an export."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from graphpeft.exporting.check import Checked
from graphpeft.wording import as_html, text_table


@dataclass(frozen=True)
class ExportReport:
    """The files of an export, its inputs, and its differences from the model; it prints as tables.

    Attributes:
        format: The format, such as ``"pt2"``.
        adapter_mode: The adapter mode, such as ``"merged"``.
        path: The file, or the folder.
        files: The size of each file, in bytes.
        adapter_files: The file of each adapter by adapter name, if adapters are inputs.
        inputs: The shape of each of the model's inputs by input name, with letters for dynamic sizes, such as
            ``(a, b ≤ 500, 8)``.
        checked: The comparisons with the model; empty if `export` was called with ``check=False``.

    Examples:
        >>> report = export(nn.Linear(2, 3), (torch.randn(4, 2),), "model.safetensors", "safetensors")
        >>> print(report)
        safetensors, adapters merged: .../model.safetensors
        <BLANKLINE>
        file               bytes
        ─────────────────  ─────
        model.safetensors  ...
        <BLANKLINE>
        checked    shapes  difference
        ─────────  ──────  ──────────
        the model  (4, 2)  0.0e+00
    """

    format: str
    adapter_mode: str
    path: Path
    files: dict[Path, int]
    adapter_files: dict[str, Path]
    inputs: dict[str, str]
    checked: tuple[Checked, ...]

    def __str__(self) -> str:
        lines = [f"{self.format}, adapters {self.adapter_mode}: {self.path}", ""]
        sizes = [(str(self._relative(path)), f"{size:,}") for path, size in self.files.items()]
        lines += text_table(("file", "bytes"), sizes, ("bytes",))
        if self.inputs:
            lines += ["", *text_table(("input", "shape"), list(self.inputs.items()))]
        if self.adapter_files:
            files = [(name, str(self._relative(path))) for name, path in self.adapter_files.items()]
            lines += ["", *text_table(("adapter", "file"), files)]
        lines += [
            "",
            *(text_table(("checked", "shapes", "difference"), self._checks()) if self.checked else ["not checked"]),
        ]
        return "\n".join(lines)

    __repr__ = __str__
    _repr_html_ = as_html

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
