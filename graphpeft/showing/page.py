"""The page that draws a picture: one HTML file, which loads nothing from elsewhere."""

from __future__ import annotations

import html
from importlib import resources

from graphpeft.showing.picture import Picture

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
