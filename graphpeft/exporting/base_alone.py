"""Whether a model can be exported without its adapters: if not, its refusal isn't due to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from graphpeft.adapters.state import adapters_of
from graphpeft.exporting import carriers, copies
from graphpeft.exporting import check as checks
from graphpeft.exporting.errors import ExportError, in_short
from graphpeft.exporting.example import Example
from graphpeft.exporting.formats.format import Export, Format
from graphpeft.exporting.program import Dynamic


def with_that_of_base(
    error: ExportError, model: Any, form: Format, given: Example, dynamic: Dynamic, path: Path
) -> ExportError:
    """Returns the refusal of an export, which says so if the base alone is refused, too.

    Args:
        error: The refusal.
        model: The model that was refused.
        form: The format.
        given: The example inputs.
        dynamic: The dynamic sizes of the example.
        path: The file to write, in an empty folder; its name is that of the refused one, as errors may hold it.
    """
    if adapters_of(model) is None or not form.has_graph:
        return error
    base = copies.base_of(model)
    made = Export(base, copies.sharing_weights(base), carriers.merged(base), given, dynamic)
    try:
        form.write(made, path, "{}")
        checks.checked(form, made, path, given)
    except Exception as of_base:
        reason = str(of_base) if isinstance(of_base, ExportError) else in_short(of_base)
        why = "for the same reason" if reason == str(error) else f"since {reason}"
        return ExportError(f"{error}. The base without its adapters can't be exported so either, {why}")
    return error
