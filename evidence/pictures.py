"""Draws the pictures of the documentation by `graphpeft.show`, in light and dark, into docs/pictures/.

``rule-*.svg`` are graphs, for docs/concepts.md, and ``show-*.png`` is the page that `show` writes, for docs/index.md.

python evidence/pictures.py

Chromium lays them out, Debian's package chromium; tests/test_pictures.py compares them with today's graphs.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from graphpeft import LoHaConfig, LoraConfig, get_peft_model, show, trace

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
SCHEMES = ("light", "dark")
GAP = 24  # pixels between two graphs

# what the page's style gives each shape becomes a part of it, so that the picture needs no style
INLINED = """(figure) => {
    const svg = figure.querySelector("svg").cloneNode(true);
    const seen = [...figure.querySelectorAll("svg :is(path, polygon, ellipse, text)")];
    const made = [...svg.querySelectorAll("path, polygon, ellipse, text")];
    made.forEach((shape, place) => {
        const style = getComputedStyle(seen[place]);
        shape.setAttribute("fill", style.fill);
        if (shape.tagName !== "text") shape.setAttribute("stroke", style.stroke);
    });
    for (const each of svg.querySelectorAll("*")) each.removeAttribute("tabindex");
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    const inside = new XMLSerializer().serializeToString(svg.querySelector("g")).replace(/ xmlns="[^"]*"/g, "");
    return {inside, width, height, caption: figure.querySelector("figcaption").textContent,
            ink: getComputedStyle(figure.querySelector("figcaption")).color};
}"""


class Layer(nn.Module):
    """The layer of the page's example of a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns x Wᵀ."""
        return F.linear(x, self.weight)


def graph() -> nn.Module:
    """Returns its graph with an adapter."""
    return get_peft_model(trace(Layer()), LoraConfig(r=4, target_modules=["weight"]))


class Mixer(nn.Module):
    """The model of the home page: a weight that is used functionally, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(8, 4)), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns two numbers for each row."""
        return self.head(F.relu(F.linear(x, self.weight)))


def trained() -> nn.Module:
    """Returns it with two adapters, after a step of training, with gradients."""
    torch.manual_seed(0)
    model: Any = get_peft_model(Mixer(), LoraConfig(r=2, lora_alpha=4, target_modules=["weight", "head"]))
    model.add_adapter("other", LoHaConfig(r=2, alpha=8, target_modules=["head"]))
    model.set_adapter(["default", "other"])
    optimizer = torch.optim.Adam([each for each in model.parameters() if each.requires_grad], lr=0.05)
    x = torch.randn(16, 4)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model


def picture(graphs: list[dict[str, Any]], title: str) -> str:
    """Returns graphs beside each other, as SVG."""
    left, parts = 0.0, []
    for graph in graphs:
        parts.append(f'<text x="{left + 4:.0f}" y="12" font-size="11" fill="{graph["ink"]}">{graph["caption"]}</text>')
        parts.append(f'<g transform="translate({left:.0f} 18)">{graph["inside"]}</g>')
        left += graph["width"] + GAP
    height = max(graph["height"] for graph in graphs) + 20
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left - GAP:.0f} {height:.0f}" '
    head += f'width="{left - GAP:.0f}" role="img" font-family="Helvetica, Arial, sans-serif">'
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>\n"])


def drawn(chromium: Any) -> dict[Path, str]:
    """Returns the files with their content.

    Args:
        chromium: A browser of playwright.
    """
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        page = show(graph(), Path(folder) / "rule.html").path
        for scheme in SCHEMES:
            tab = chromium.new_context(color_scheme=scheme, offline=True).new_page()
            tab.goto(page.absolute().as_uri())
            tab.wait_for_selector("body[data-ready]")
            graphs = [figure.evaluate(INLINED) for figure in tab.query_selector_all(".graphs figure")]
            made[PICTURES / f"rule-{scheme}.svg"] = picture(graphs, "The graph of a linear layer before and after LoRA")
    return made


def shoot(chromium: Any) -> None:
    """Writes screenshots of the page that `show` writes, with a node that was clicked.

    Args:
        chromium: A browser of playwright.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = show(trained(), Path(folder) / "model.html").path
        for scheme in SCHEMES:
            settings = {"viewport": {"width": 1100, "height": 640}, "offline": True}
            tab = chromium.new_context(color_scheme=scheme, **settings).new_page()
            tab.goto(page.absolute().as_uri())
            tab.wait_for_selector("body[data-ready]")
            tab.locator(".after .node.call_function.adapter").nth(1).click()
            tab.mouse.move(1, 1)
            tab.screenshot(path=PICTURES / f"show-{scheme}.png")


def main() -> None:
    """Writes the files."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for path, content in drawn(chromium).items():
            path.write_text(content, encoding="utf-8")
        shoot(chromium)
        chromium.close()


if __name__ == "__main__":
    main()
