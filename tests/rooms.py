"""The rooms of the package, as the table in ``docs/architecture.md`` has them."""

import re
from pathlib import Path

_DOCUMENT = (Path(__file__).parent.parent / "docs" / "architecture.md").read_text(encoding="utf-8")

ROOMS = {
    name: [] if knows == "none" else knows.split(", ")
    for name, knows in re.findall(r"^\| `(\w+)(?:/|\.py)` \| [^|]+ \| ([\w, ]+) \|$", _DOCUMENT, flags=re.MULTILINE)
}
"""The rooms from the ground up, with those that each knows."""
