"""The tensors that adapters train, as a batch tells: which learn, which wait for others, which never will."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from graphpeft.wording import as_html, joined, number_of, text_table

State = Literal["learns", "waits", "dead"]


class TensorLearning(NamedTuple):
    """How a tensor learns.

    Attributes:
        state: ``"learns"`` if its gradient isn't zero; ``"waits"`` if it is zero until what learns has changed, as that
            of LoRA's A while B is zero; ``"dead"`` if it remains zero then, it isn't finite, or there is none.
        gradient: The norm of its gradient now; None without one.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> site = check_learning(model, (torch.ones(1, 4),)).sites[0]
        >>> {name: tensor.state for name, tensor in site.tensors.items()}
        {'lora_A': 'waits', 'lora_B': 'learns'}
    """

    state: State
    gradient: float | None


class SiteLearning(NamedTuple):
    """How the tensors of an adapter at one site learn.

    Attributes:
        adapter: The adapter's name.
        label: The site's name; of tensors that are fully trained, the path of their module.
        tensors: The tensors by name.
        reason: Why some are dead, or "".
        line: The line of code that goes past the site, or "".

    Examples:
        >>> class Past(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)
        ...
        ...     def forward(self, x):
        ...         return self.used(x)
        >>> model = get_peft_model(Past(), LoraConfig(r=2, target_modules=["used", "unused"]))
        >>> dead = check_learning(model, (torch.ones(1, 4),)).dead[0]
        >>> dead.label, dead.reason
        ('unused', 'it is never called with this batch; the forward of Past does not mention unused')
    """

    adapter: str
    label: str
    tensors: Mapping[str, TensorLearning]
    reason: str = ""
    line: str = ""

    @property
    def state(self) -> State:
        """``"dead"`` if any of its tensors is; else ``"waits"`` if none learns now."""
        states = {tensor.state for tensor in self.tensors.values()}
        if "dead" in states:
            return "dead"
        return "learns" if "learns" in states else "waits"


@dataclass(frozen=True)
class LearningReport:
    """The findings of `check_learning`; they print as a table.

    Attributes:
        sites: Each site of each active adapter, and what else these train.
        named: The number of sites that each entry of ``target_modules`` and ``target_parameters`` has named, by the
            adapter's name and the entry.

    Examples:
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
        >>> report = check_learning(model, (torch.ones(1, 4),))
        >>> report.dead, dict(report.named)
        ((), {('default', '0'): 1})
    """

    sites: tuple[SiteLearning, ...]
    named: Mapping[tuple[str, str], int]

    @property
    def dead(self) -> tuple[SiteLearning, ...]:
        """The sites with tensors that no gradient reaches."""
        return tuple(site for site in self.sites if site.state == "dead")

    def __str__(self) -> str:
        count = len(self.sites)
        verb = "doesn't" if len(self.dead) == 1 else "don't"
        dead, all_learn = f"{number_of(count, 'site')} {verb} learn", number_of(count, "site learns", "sites learn")
        lines = [f"{len(self.dead)} of {dead}" if self.dead else f"{count} of {all_learn}"]
        rows = [(site.adapter, site.label, _told(site)) for site in self.sites]
        lines += ["", *text_table(("adapter", "site", "tensors"), rows)]
        named = [(adapter, entry, str(sites)) for (adapter, entry), sites in self.named.items()]
        if named:
            lines += ["", *text_table(("adapter", "entry", "sites"), named, ("sites",))]
        for site in self.dead:
            lines += ["", f"{site.label}: {site.reason}", *([f"  {site.line}"] if site.line else [])]
        return "\n".join(lines)

    __repr__ = __str__
    _repr_html_ = as_html


def _told(site: SiteLearning) -> str:
    by_state: dict[State, list[str]] = {}
    for name, tensor in site.tensors.items():
        norm = "" if not tensor.gradient else f" ({tensor.gradient:.2g})"
        by_state.setdefault(tensor.state, []).append(f"{name}{norm}")
    return "; ".join(f"{joined(names)} {_VERBS[state][len(names) > 1]}" for state, names in by_state.items())


_VERBS: dict[State, tuple[str, str]] = {
    "learns": ("learns", "learn"),
    "waits": ("waits for others", "wait for others"),
    "dead": ("never learns", "never learn"),
}
"""Each state in words, of one tensor and of several."""
