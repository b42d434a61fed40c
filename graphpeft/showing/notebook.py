"""An adapted model in a notebook: its modules as a tree to open, with the adapters at each."""

from __future__ import annotations

import html

from torch import nn

from graphpeft.graph.holders import Holder, all_parameters
from graphpeft.graph.traced_model import stands_for
from graphpeft.wording import number_of


def modules_html(model: nn.Module, title: str) -> str:
    """Returns the modules of a model as HTML, open where adapters are."""
    return f'<div style="font-family: monospace; line-height: 1.5">{_tree(model, title)}</div>'


def _tree(module: nn.Module, name: str) -> str:
    adapters = {name: child for name, child in module.named_children() if isinstance(child, Holder)}
    inside = {name: child for name, child in module.named_children() if name not in adapters}
    numbers = sum(parameter.numel() for part in module.modules() for _, parameter in _own(part))
    line = f"<b>{html.escape(name)}</b> {html.escape(stands_for(module).__name__)} · {number_of(numbers, 'parameter')}"
    told = "".join(f"<div>↳ {html.escape(f'{name}: {holder!r}')}</div>" for name, holder in adapters.items())
    if not inside and not told:
        return f"<div>{line}</div>"
    is_open = " open" if any(isinstance(part, Holder) for part in module.modules()) else ""
    parts = "".join(_tree(child, name) for name, child in inside.items())
    content = f'<div style="margin-left: 1.5em">{told}{parts}</div>'
    return f"<details{is_open}><summary>{line}</summary>{content}</details>"


def _own(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [] if isinstance(module, Holder) else list(all_parameters(module))
