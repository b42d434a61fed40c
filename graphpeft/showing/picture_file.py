"""`show`: a picture of a model, its graphs and its adapters, as one HTML file."""

from __future__ import annotations

import html
import os
import tempfile
import webbrowser
from pathlib import Path

from torch import nn

from graphpeft.files.atomic_files import Staging
from graphpeft.rules.report import Report
from graphpeft.showing.page import page
from graphpeft.showing.reading import picture_of

_HEIGHT = 640
"""The height of a picture in a notebook, in pixels."""


class Shown:
    """A picture that was written to a file; in a notebook it shows itself.

    Attributes:
        path: The file.

    Examples:
        >>> show(nn.Sequential(nn.Linear(4, 4)), "model.html").path.name
        'model.html'
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"a picture in {self.path}"

    def _repr_html_(self) -> str:
        content = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{content}" style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'


def show(shown: nn.Module | Report, path: str | os.PathLike[str] | None = None) -> Shown:
    """Draws a model: its modules, and the graphs of those that adapters act on, before and after.

    The file loads nothing from elsewhere. Each adapter's nodes have a colour. A click on a node tells of its operation,
    its source line, its rule and the adapter's parameters. Numbers are those of now: ‖ΔW‖ / ‖W‖, and the norms of
    gradients where there are any.

    Args:
        shown: A model, adapted or not; a graph that `trace` returned; or a report of `explain`, which shows what would
            be adapted, and what is refused and why.
        path: The HTML file; None for a temporary one that is opened in the browser.

    Returns:
        The picture, which shows itself in a notebook.

    Raises:
        TypeError: If `shown` is something else.
        ValueError: If it is a report of an adapter that a model has; show the model then.
        OSError: If the file can't be written.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        >>> show(model, "picture.html")
        a picture in picture.html
    """
    content = page(picture_of(shown))
    place = Path(tempfile.mkdtemp(prefix="graphpeft-")) / "picture.html" if path is None else Path(path)
    with Staging(place.parent) as staging:
        (staging.folder / place.name).write_text(content, encoding="utf-8")
        staging.put()
    if path is None:
        webbrowser.open(place.as_uri())
    return Shown(place)
