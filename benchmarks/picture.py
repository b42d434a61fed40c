"""Draws the ratios of benchmarks/README.md as bars, in light and dark: docs/pictures/benchmarks-*.svg.

python benchmarks/picture.py
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "benchmarks" / "README.md"
PICTURES = ROOT / "docs" / "pictures"

SCHEMES = {
    "light": {"ink": "#1b1f24", "quiet": "#656d76", "bar": "#4a7ebb", "slow": "#b5762a"},
    "dark": {"ink": "#e6edf3", "quiet": "#9198a1", "bar": "#7fb3f0", "slow": "#e0a458"},
}
WIDTH, ROW, TOP, LEFT = 560, 34, 24, 8
SCALE = 400  # pixels for a ratio of one


LLAMA, SMALL = "Llama 512 × 8, 2 × 64 tokens", "Llama 64 × 4, 1 token"
MIXED = "Llama 64 × 4, mixed batch"
DRAWN = {
    "import (base: torch alone)": "import",
    "get_peft_model, 175 targets, the first in a process": "get_peft_model, 175 targets, the first in a process",
    "get_peft_model, 175 targets, per target": "get_peft_model, 175 targets",
    "get_peft_model, 700 targets, per target": "get_peft_model, 700 targets",
    "get_peft_model, 2800 targets, per target": "get_peft_model, 2800 targets",
    "get_peft_model, a Llama of 12 layers, all-linear, per target": "get_peft_model, a Llama of 84 targets",
    "load_adapter, 224 targets, the 100th (PEFT's extrapolated from 20)": "load_adapter, 224 targets, the 100th",
    "set_adapter, 100 loaded (PEFT's extrapolated from 20, as if in proportion)": "set_adapter, 100 loaded",
    f"{MIXED}, 8 rows × 1 token, 8 adapters": f"{MIXED}, 8 rows × 1 token, 8 adapters",
    f"{MIXED}, 32 rows × 1 token, 32 adapters": f"{MIXED}, 32 rows × 1 token, 32 adapters",
    f"{LLAMA}: forward, adapters on": f"{LLAMA}: forward",
    f"{SMALL}: forward, adapters on": f"{SMALL}: forward",
    f"{LLAMA}: training step": f"{LLAMA}: training step",
    f"{SMALL}: training step": f"{SMALL}: training step",
    "Llama 256 × 2, 2 × 64 tokens: training step, torch.compile(fullgraph=True)": "Llama 256 × 2: training, compiled",
    "Batched experts: step": "64 experts: training step",
    f"{LLAMA}: kept for the backward, traced, all passes for memory": f"{LLAMA}: bytes for the backward, all passes",
}
"""The rows that are drawn, with their names in the picture; the other rows are variants of these."""


class Bar(NamedTuple):
    """A measured ratio to PEFT."""

    what: str
    ratio: float


def bars(text: str) -> list[Bar]:
    """Returns the chosen ratios to PEFT of the table."""
    found = {}
    for line in text.splitlines():
        row = re.match(r"\| (.*?) \|.*\| ([\d.]+) ± [\d.]+ × PEFT \|", line)
        if row:
            found[row[1]] = float(row[2])
    return [Bar(name, found[what]) for what, name in DRAWN.items()]


def picture(found: list[Bar], scheme: str) -> str:
    """Returns the bars as SVG."""
    colours = SCHEMES[scheme]
    height = TOP + ROW * len(found) + 4
    at_one = LEFT + SCALE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="12">',
        "<title>Times and bytes of graphpeft relative to PEFT's</title>",
        f'<text x="{at_one}" y="14" text-anchor="middle" fill="{colours["quiet"]}">PEFT</text>',
        f'<line x1="{at_one}" x2="{at_one}" y1="{TOP - 4}" y2="{height}" stroke="{colours["quiet"]}" '
        'stroke-dasharray="3 3"/>',
    ]
    for place, bar in enumerate(found):
        y, length = TOP + ROW * place, min(bar.ratio * SCALE, WIDTH - LEFT - 60)
        colour = colours["bar" if bar.ratio <= 1 else "slow"]
        end = LEFT + length if length < SCALE - 40 else max(LEFT + length, at_one)
        parts += [
            f'<text x="{LEFT}" y="{y + 12}" fill="{colours["ink"]}">{escape(bar.what)}</text>',
            f'<rect x="{LEFT}" y="{y + 17}" width="{length:.1f}" height="9" rx="2" fill="{colour}"/>',
            f'<text x="{end + 6:.1f}" y="{y + 26}" fill="{colours["quiet"]}">{bar.ratio:.2f}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


def pictures() -> dict[Path, str]:
    """Returns the files with their content."""
    found = bars(TABLES.read_text(encoding="utf-8"))
    return {PICTURES / f"benchmarks-{scheme}.svg": picture(found, scheme) for scheme in SCHEMES}


if __name__ == "__main__":
    for path, content in pictures().items():
        path.write_text(content, encoding="utf-8")
