"""Which names an adapter can have: one is a part of attributes' names, and of those of folders and files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable

BASE = "__base__"
"""In place of an adapter's name: the base model."""

_MOST_BYTES = 100
"""So that a folder's or a file's name, which may be of 255 bytes, can have it with more around."""

_SIGNS = "_- "


def refusal(name: object) -> str | None:
    """Returns why `name` can't be an adapter's name, with the way out, or None."""
    reason = _reason(name)
    return None if reason is None else f"{name!r} can't be an adapter's name: {reason}"


def _reason(name: object) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}; choose a text"
    if name == BASE:
        return "it stands for the base model in a mixed batch; choose another one"
    other = next((sign for sign in name if not _can_be_in_names(sign)), None)
    if other is not None or name != name.strip() or not name:
        has = f"it has {other!r}" if other is not None else "it is empty, or begins or ends with a space"
        return f"{has}; choose letters, digits, '_', '-' and spaces between them"
    usual = unicodedata.normalize("NFKC", name)
    if name != usual:
        # there are several spellings that look alike, and file systems exchange them
        return f"it is another spelling of {usual!r}; give that, which is unicodedata.normalize('NFKC', name)"
    if re.fullmatch("slot[0-9]+", name):
        return "graphs use such names for whichever adapter acts; choose another one"
    size = len(name.encode())
    return f"it has {size} bytes in UTF-8; choose one of at most {_MOST_BYTES}" if size > _MOST_BYTES else None


def _can_be_in_names(sign: str) -> bool:
    # letters, decimal digits, and the marks of which letters of many scripts consist
    kind = unicodedata.category(sign)
    return sign in _SIGNS or kind[0] == "L" or kind in ("Nd", "Mn", "Mc")


def unknown(names: Iterable[object], known: Collection[str]) -> str | None:
    """Returns which of `names` a model with adapters of the names `known` lacks, or None."""
    missing = [name for name in dict.fromkeys(names) if name not in known]
    return f"Adapter {', '.join(_shown(name, known) for name in missing[:3])} does not exist" if missing else None


def _shown(name: object, known: Collection[str]) -> str:
    usual = unicodedata.normalize("NFKC", name) if isinstance(name, str) else name
    if usual in known:
        return f"{name!r}, which is another spelling of {usual!r},"
    return str(name) if name else repr(name)


def name_like(text: str, taken: Collection[str]) -> str:
    """Returns a name like `text`, which an adapter can have beside those of the names `taken`."""
    usual = "".join(sign if _can_be_in_names(sign) else "_" for sign in unicodedata.normalize("NFKC", text))
    short = usual.encode()[: _MOST_BYTES // 2].decode(errors="ignore").strip() or "_"
    name = f"{short}_" if refusal(short) else short
    while name in taken:
        name += "_"
    return name
