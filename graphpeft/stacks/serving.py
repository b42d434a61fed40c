"""The rules of servers for adapters' files: a server refuses some, and computes something else with others.

A server reads PEFT's files by code of its own, and some of it ignores keys that it doesn't know. Each rule here is a
line of such code.

Sources: vLLM 0.32, ``vllm/lora/peft_helper.py`` and ``lora_model.py``; SGLang 0.5.23, ``srt/lora/lora.py`` and
``lora_manager.py``; llama.cpp as of llama-cpp-python 0.3.36, ``convert_lora_to_gguf.py`` and ``src/llama-adapter.cpp``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from graphpeft.files.foreign_files import CheckpointError
from graphpeft.stacks.adapter_files import AdapterFiles, changed_base
from graphpeft.stacks.peft_files import SavedAdapter
from graphpeft.wording import joined, shortened

Outcome = Literal["refused", "wrong"]
"""Whether a server refuses an adapter, or computes something else."""


class Broken(NamedTuple):
    """A rule of a server that an adapter breaks.

    Attributes:
        rule: The rule, with the entries of the files that break it.
        outcome: Whether the server refuses the adapter, or computes something else.
        way_out: The remedy, often a line of shell.
    """

    rule: str
    outcome: Outcome
    way_out: str


@dataclass(frozen=True)
class ServingReport:
    """A server's rules for an adapter's files, and the ones that are broken.

    Attributes:
        server: The server, with the version whose rules these are.
        broken: The rules that the adapter breaks.
        needs: Options with which the server must be started.
    """

    server: str
    broken: tuple[Broken, ...]
    needs: tuple[str, ...]

    @property
    def is_served(self) -> bool:
        """Whether the server computes what the adapter does."""
        return not self.broken

    def __str__(self) -> str:
        needs = f", started with {' '.join(self.needs)}" if self.needs else ""
        if not self.broken:
            return f"{self.server}: served{needs}"
        lines = [f"  {each.outcome}: {each.rule}\n    way out: {each.way_out}" for each in self.broken]
        return "\n".join([f"{self.server}:", *lines])


_AS_LORA = "convert it to LoRA, which tells how far outputs move: graphpeft convert ADAPTER FOLDER --rank 16"
_MERGE = "merge it, and serve the model: graphpeft merge ADAPTER FOLDER"
_PLAIN = "write ranks and scales into the factors: graphpeft convert ADAPTER FOLDER --to plain"
_OF_ORIGINAL = "save it as LoRA of the base as it was: save_pretrained(…, path_initial_model_for_weight_conversion=…)"

_BY_TRANSFORMERS = "serve it by Transformers, which runs the adapter beside the base"
_OWN_KINDS = {
    "alora_invocation_tokens": _BY_TRANSFORMERS,
    "layer_replication": _MERGE,
    "use_bdlora": _AS_LORA,
    "use_qalora": _MERGE,
}
"""Options that make another function of the same factors, each with its way out."""

_FACTOR = re.compile(r".*\.(lora_[AB]\.weight|lora_embedding_[AB])")
_OF_BASE = re.compile(r".*\.(embed_tokens|lm_head)\.base_layer\.weight")
_CLASSIFIER = re.compile(r".*\.(score|classifier)\.(weight|bias)")


def report_on(saved: SavedAdapter, server: str) -> ServingReport:
    """Returns which rules of a server a saved adapter breaks."""
    if server not in SERVERS:
        raise CheckpointError(f"the rules of {server!r} aren't known; choose among {joined(list(SERVERS))}")
    files = AdapterFiles(saved.config.to_dict(), saved.tensors)
    title, rules, needs = SERVERS[server]
    if files.config["peft_type"] != "LORA":
        method = Broken(f"it reads LoRA alone, and this is {files.config['peft_type']}", "refused", _AS_LORA)
        return ServingReport(title, (method,), ())
    return ServingReport(title, tuple(rules(files)), tuple(needs(files)))


def _vllm(files: AdapterFiles) -> Iterator[Broken]:
    config = files.config
    yield from _refused_options(config, {"use_dora": _AS_LORA, "lora_bias": _MERGE, **_OWN_KINDS})
    yield from _changed_base(config, "refused")
    heads = [name for name in config.get("modules_to_save") or () if name not in ("classifier", "score")]
    if heads:
        yield Broken(f"modules_to_save has {joined(heads)}; it reads classifier or score alone", "refused", _MERGE)
    yield from _other_tensors(files, (_FACTOR, _OF_BASE, _CLASSIFIER), "refused")
    if _highest_rank(files) > 512:
        yield Broken(f"its highest --max-lora-rank is 512, and this has {_highest_rank(files)}", "refused", _AS_LORA)


def _sglang(files: AdapterFiles) -> Iterator[Broken]:
    yield from _refused_options(files.config, {"use_dora": _AS_LORA})
    yield from _ignored_options(files.config)
    yield from _ignored_scales(files.config, "lora_alpha / r", ("use_rslora", "rank_pattern", "alpha_pattern"))
    targets = files.config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        rule = f"target_modules is the expression {shortened(targets)!r}, from which it infers nothing"
        yield Broken(rule, "refused", f"start it with --lora-target-modules; or {_PLAIN}")
    yield from _changed_base(files.config, "wrong")
    yield from _whole_stacks(files.config, "wrong")
    yield from _other_tensors(files, (_FACTOR, _OF_BASE), "wrong")


def _llama_cpp(files: AdapterFiles) -> Iterator[Broken]:
    yield from _ignored_options(files.config)
    yield from _ignored_scales(files.config, "lora_alpha / rank", ("use_rslora", "alpha_pattern"))
    yield from _changed_base(files.config, "wrong")
    yield from _whole_stacks(files.config, "refused")
    yield from _other_tensors(files, (_FACTOR, _OF_BASE), "refused")


def _ignored_options(config: Mapping[str, Any]) -> Iterator[Broken]:
    for broken in _refused_options(config, _OWN_KINDS):
        yield broken._replace(outcome="wrong")


def _ignored_scales(config: Mapping[str, Any], scale: str, options: Sequence[str]) -> Iterator[Broken]:
    ignored = [option for option in options if config.get(option)]
    if ignored:
        yield Broken(f"it takes {scale} for the scale of each layer, and ignores {joined(ignored)}", "wrong", _PLAIN)


def _changed_base(config: Mapping[str, Any], outcome: Outcome) -> Iterator[Broken]:
    if told := changed_base(config):
        yield Broken(f"{told} has changed the base's weights", outcome, _OF_ORIGINAL)


def _whole_stacks(config: Mapping[str, Any], outcome: Outcome) -> Iterator[Broken]:
    if config.get("target_parameters"):
        rule = (
            f"it has an entry for each expert's matrix, and none for {joined(config['target_parameters'])} as a whole"
        )
        yield Broken(rule, outcome, "write such entries: graphpeft convert ADAPTER FOLDER --to transformers4")


def _refused_options(config: Mapping[str, Any], ways_out: Mapping[str, str]) -> Iterator[Broken]:
    for option, way_out in ways_out.items():
        if config.get(option):
            yield Broken(f"it doesn't know {option}={shortened(str(config[option]))}", "refused", way_out)


def _other_tensors(files: AdapterFiles, known: Sequence[re.Pattern[str]], outcome: Outcome) -> Iterator[Broken]:
    others = [key for key in files.tensors if not any(pattern.fullmatch(key) for pattern in known)]
    if others:
        yield Broken(f"it {'drops' if outcome == 'wrong' else 'stops at'} {joined(others)}", outcome, _MERGE)


def _highest_rank(files: AdapterFiles) -> int:
    return max([files.config["r"], *(files.config.get("rank_pattern") or {}).values()])


def _vllm_needs(files: AdapterFiles) -> Iterator[str]:
    wanted = _highest_rank(files)
    offered = next((rank for rank in (16, 32, 64, 128, 256, 320, 512) if rank >= wanted), None)
    if offered is not None and offered > 16:
        yield f"--max-lora-rank {offered}"


def _sglang_needs(files: AdapterFiles) -> Iterator[str]:
    yield f"--max-lora-rank {_highest_rank(files)}"


def _no_needs(_: AdapterFiles) -> Iterator[str]:
    yield from ()


_Rules = Callable[[AdapterFiles], Iterator[Broken]]
_Needs = Callable[[AdapterFiles], Iterator[str]]

SERVERS: dict[str, tuple[str, _Rules, _Needs]] = {
    "vllm": ("vLLM 0.32", _vllm, _vllm_needs),
    "sglang": ("SGLang 0.5.23", _sglang, _sglang_needs),
    "llama.cpp": ("llama.cpp of llama-cpp-python 0.3.36", _llama_cpp, _no_needs),
}
"""The servers by name, each with its version, its rules, and the options that it needs."""
