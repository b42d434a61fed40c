"""A printable report on an adaptation, made or only planned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from graphpeft.rules.adapted_site import AdaptedSite
from graphpeft.wording import as_html, joined, number_of, text_table


class Refusal(NamedTuple):
    """A name in a config that can't be adapted, with the reason and the way out."""

    name: str
    reason: str
    way_out: str = "narrow target_modules, or leave targets out with exclude_modules where the method has it"


@dataclass
class Report:
    """The result of applying a config to a model.

    Attributes:
        method: The method's name.
        adapter: The adapter's name.
        adapted: The adapted sites.
        fully_trained: The paths of tensors that are trained beside the adapter.
        refused: The targets that can't be adapted; adapting the model raises an error with them.
        nothing_matched: Why the config names nothing in the model, if so.
        learning: The findings of `check_learning`, if `explain` had example inputs: a `LearningReport`, or why there is
            none; else None.
        plan: The plan of `explain`, for a picture; None for an adapter that a model has.
        excluded: The names that `exclude_modules` or `modules_to_save` excludes.

    Examples:
        >>> report = explain(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
        >>> [adapted.parameter_count for adapted in report.adapted], report.refused
        ([32], [])
    """

    method: str
    adapter: str
    adapted: list[AdaptedSite] = field(default_factory=list)
    fully_trained: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    excluded: list[str] = field(default_factory=list)
    nothing_matched: str = ""
    learning: Any = field(default=None, repr=False, compare=False)
    plan: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{self.method} adapter {self.adapter!r}{self._size()}"]
        if self.adapted:
            lines += ["", *self._table()]
        if isinstance(self.learning, str):
            lines += ["", f"which sites learn can't be told: {self.learning}"]
        if self._own_code():
            lines += ["", *text_table(("runs its own code on changed weights", "because"), self._own_code())]
        if self._unmergeable():
            lines += ["", *text_table(("can't be merged", "because"), self._unmergeable())]
        if self._fixed():
            lines += ["", *text_table(("graph of", "is for calls with"), self._fixed())]
            lines += ["", "for calls with another value, give example_inputs that pass it"]
        if self.fully_trained:
            lines += ["", f"fully trained: {', '.join(self.fully_trained)}"]
        if self._dead_beside():
            lines += ["", *text_table(("never learns", "because"), self._dead_beside())]
        if self.excluded:
            lines += ["", f"excluded: {', '.join(self.excluded)}"]
        if self.nothing_matched:
            lines += ["", self.nothing_matched]
        if self.refused:
            lines += ["", *text_table(("refused", "because"), [refusal[:2] for refusal in self.refused])]
        return "\n".join(lines)

    __repr__ = __str__
    _repr_html_ = as_html

    def _size(self) -> str:
        if self.fully_trained and not self.adapted:
            return ", which trains tensors of the model"
        return f": {number_of(len(self.adapted), 'site')}, {number_of(self._parameter_count(), 'parameter')}"

    def _parameter_count(self) -> int:
        return sum(adapted.parameter_count for adapted in self.adapted)

    def _own_code(self) -> list[tuple[str, str]]:
        """Returns the modules that run their own code on changed weights, with the reasons."""
        sites = [adapted.site for adapted in self.adapted]
        rows = [(site.region or "the model", site.own_code) for site in sites if site.own_code is not None]
        return list(dict.fromkeys(rows))

    def _unmergeable(self) -> list[tuple[str, str]]:
        """Returns the sites whose change can't be merged into their weights, by reason."""
        sites: dict[str, list[str]] = {}
        for adapted in self.adapted:
            if adapted.unmergeable is not None:
                sites.setdefault(adapted.unmergeable, []).append(adapted.site.label)
        return [(joined(labels, most=3), reason) for reason, labels in sites.items()]

    def _fixed(self) -> list[tuple[str, str]]:
        """Returns the modules whose graphs are for calls with one value of some arguments, with these."""
        sites = [adapted.site for adapted in self.adapted]
        return list(dict.fromkeys((site.region or "the model", ", ".join(site.fixed)) for site in sites if site.fixed))

    def _dead_beside(self) -> list[tuple[str, str]]:
        """Returns the tensors beside the sites that no gradient reaches, with the reasons."""
        labels = {adapted.site.label for adapted in self.adapted}
        dead = [site for site in getattr(self.learning, "dead", ()) if site.label not in labels]
        return [(f"{site.label}.{name}", site.line or site.reason) for site in dead for name in site.tensors]

    def _table(self) -> list[str]:
        header = ["site", "op", "size", "graph of", "parameters", "share"]
        total = max(self._parameter_count(), 1)
        rows = [
            [
                adapted.site.label,
                adapted.site.op.__name__,
                adapted.site.size,
                adapted.site.region or "the model",
                f"{adapted.parameter_count:,}",
                f"{100 * adapted.parameter_count / total:.1f} %",
            ]
            for adapted in self.adapted
        ]
        sites = getattr(self.learning, "sites", None)
        if sites is not None:
            dead = {site.label: site.line or site.reason for site in sites if site.state == "dead"}
            header.append("learns")
            for row, adapted in zip(rows, self.adapted, strict=True):
                row.append(f"no: {dead[adapted.site.label]}" if adapted.site.label in dead else "yes")
        return text_table(header, rows, numbers=("parameters", "share"))
