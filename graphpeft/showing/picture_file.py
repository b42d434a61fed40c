"""`show`: a picture of a model, its graphs and its adapters, as one HTML file, or as JSON for Model Explorer."""

from __future__ import annotations

import html
import os
import tempfile
import webbrowser
from importlib import resources
from pathlib import Path

from torch import nn

from graphpeft.files.atomic_files import Staging
from graphpeft.graph.inputs import ExampleInputs
from graphpeft.rules.report import Report
from graphpeft.showing.model_explorer import model_explorer
from graphpeft.showing.picture import Picture
from graphpeft.showing.reading import picture_of

_HEIGHT = 640
"""The height of a picture in a notebook, in pixels."""

_EXPLORED = ".json"
"""The suffix of a file for Model Explorer."""

_IMAGES = (".gif", ".jpeg", ".jpg", ".pdf", ".png", ".svg", ".webp")
"""Suffixes of files that a browser wouldn't read as a page."""


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

    def _repr_html_(self) -> str | None:
        if self.path.suffix.lower() == _EXPLORED:
            return None
        content = html.escape(self.path.read_text(encoding="utf-8"))
        return f'<iframe srcdoc="{content}" style="width: 100%; height: {_HEIGHT}px; border: 0"></iframe>'


def show(
    shown: nn.Module | Report,
    path: str | os.PathLike[str] | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> Shown:
    """Draws a model: its modules, and the graphs of those that adapters act on, before and after.

    The file loads nothing from elsewhere. Each adapter's nodes have a colour. A click on a node tells of its operation,
    its source line, its rule and the adapter's parameters. Numbers are those of now: ‖ΔW‖ / ‖W‖, the norms of
    gradients where there are any, and with a batch what the forward costs.

    Args:
        shown: A model, adapted or not; a graph that `trace` returned; or a report of `explain`, which shows what would
            be adapted, and what is refused and why.
        path: The HTML file, or a `.json` file for Google's Model Explorer; None for a temporary page that is opened in
            the browser.
        example_inputs: A batch: a tuple of positional or a dict of keyword arguments of the model. It runs forward
            twice, and the picture tells how many bytes each node keeps for the backward, and how long each module
            takes. All that the runs change is put back. None measures nothing.

    Returns:
        The picture, which shows itself in a notebook.

    Raises:
        TypeError: If `shown` is something else.
        ValueError: If it is a report of an adapter that a model has, or a report with a batch; show the model then. Or
            if `path` is that of an image.
        OSError: If the file can't be written.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
        >>> show(model, "picture.html", example_inputs=(torch.ones(2, 8),))
        a picture in picture.html
    """
    if path is not None and Path(path).suffix.lower() in _IMAGES:
        raise ValueError(
            f"a picture is a page of HTML, and {os.fspath(path)} is named as an image; name it "
            f"{Path(path).with_suffix('.html')}, and take an image of it in the browser"
        )
    picture = picture_of(shown, example_inputs)
    place = Path(tempfile.mkdtemp(prefix="graphpeft-")) / "picture.html" if path is None else Path(path)
    content = model_explorer(picture) if place.suffix.lower() == _EXPLORED else page(picture)
    with Staging(place.parent) as staging:
        (staging.folder / place.name).write_text(content, encoding="utf-8")
        staging.put()
    if path is None:
        webbrowser.open(place.as_uri())
    return Shown(place)


_FOLDER = resources.files("graphpeft.showing") / "viewer"


def page(picture: Picture) -> str:
    """Returns the page as HTML."""
    # of the parts only the picture comes from others, and within a script's text, "</" alone could end it
    parts = {
        "title": html.escape(picture.title),
        "css": _text("viewer.css"),
        "picture": picture.to_json().replace("</", "<\\/").replace("<!--", "<\\u0021--"),
        "library": _text("viz-global.js"),
        "script": _text("viewer.js"),
    }
    # by its own places alone: a part may contain the text of another part's place
    pieces = _text("viewer.html").split("{{")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, _, rest = piece.partition("}}")
        filled += [parts[name], rest]
    return "".join(filled)


def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
