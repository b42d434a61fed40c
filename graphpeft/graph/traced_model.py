"""The modules of a model traced into one flat graph: a `Place` for each module whose forward was inlined."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from graphpeft.graph import in_place
from graphpeft.graph.own_modes import OwnModes
from graphpeft.graph.settings import Settings, Watch, expect_settings
from graphpeft.graph.template import SIMPLE, template_of
from graphpeft.graph.trace_report import TraceReport


class Original(NamedTuple):
    """Facts about a module whose forward was inlined.

    Attributes:
        cls: The module's class.
        plain: The module's plain attributes, such as numbers and flags, by name.
    """

    cls: type
    plain: Mapping[str, Any]


class Place(nn.Module):
    """Holds the tensors of a module whose forward was inlined, at the module's path in a traced model."""

    # named unlike any attribute of a model
    _graphpeft_original_module: Original
    _graphpeft_own_modes: OwnModes | None = None
    _graphpeft_watch: Watch
    _graphpeft_watched: frozenset[str] = frozenset()
    _graphpeft_of_class: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        is_inside = name in self._modules
        super().__setattr__(name, value)
        self._note_change(name, is_inside or name in self._modules)

    def __delattr__(self, name: str) -> None:
        is_inside = name in self._modules
        super().__delattr__(name)
        self._note_change(name, is_inside)

    def __getattr__(self, name: str) -> Any:
        if name in self._graphpeft_of_class:
            return getattr(self._graphpeft_original_module.cls, name)
        return super().__getattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Adds a parameter, as ``nn.Module`` does."""
        super().register_parameter(name, param)
        self._note_change(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Adds a buffer, as ``nn.Module`` does."""
        super().register_buffer(name, tensor, persistent)
        self._note_change(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Adds a module, as ``nn.Module`` does."""
        super().add_module(name, module)
        self._note_change(name, is_module=True)

    def _note_change(self, name: str, is_module: bool = False) -> None:
        if (is_module and "_graphpeft_watch" in self.__dict__) or name in self._graphpeft_watched:
            self._graphpeft_watch.changes += 1

    def train(self, mode: bool = True) -> Any:
        """Sets training or evaluation mode, as the inlined module's own method does."""
        super().train(mode)
        if self._graphpeft_own_modes is not None:
            _set_modes(self, self._graphpeft_own_modes.by_train[mode])
        return self

    def eval(self) -> Any:
        """Sets evaluation mode, as the inlined module's own method does."""
        super().eval()
        if self._graphpeft_own_modes is not None:
            _set_modes(self, self._graphpeft_own_modes.by_eval)
        return self

    @classmethod
    def of(cls, module: nn.Module) -> Any:
        """Returns the place of `module`, in the same mode."""
        place = cls().train(module.training)
        plain = {name: value for name, value in vars(module).items() if isinstance(value, SIMPLE)}
        place._graphpeft_original_module = Original(stands_for(module), plain)
        return place


def _set_modes(root: nn.Module, modes: Mapping[str, bool]) -> None:
    for path, module in root.named_modules(remove_duplicate=False):
        module.training = modes.get(path, module.training)


class TracedModel(Place):
    """The modules and tensors that a flat graph calls and reads, at their paths in the model.

    Attributes:
        kept: The reason for each module that could not be inlined, by path.
        not_kept: The paths of attributes that the model sets and its next call doesn't use; the graph doesn't set them.
        other_mode_error: Why there is a graph only for the mode in which the model was traced; None if there are both.
        config: The model's config, if it has one: its `model_type` chooses default targets.
        input_embedding: The path of the embedding of the model's inputs, if the model names one.
        output_head: The path of the model's output head, if the model names one.
    """

    kept: dict[str, str]
    not_kept: tuple[str, ...]
    other_mode_error: str | None
    config: Any
    input_embedding: str | None
    output_head: str | None
    _graphpeft_read_once: tuple[str, ...]
    _graphpeft_frozen: tuple[str, ...]

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

    def train(self, mode: bool = True) -> Any:
        """Sets training or evaluation mode, as the model does."""
        self._refuse_other_modes()
        return super().train(mode)

    def eval(self) -> Any:
        """Sets evaluation mode, as the model does."""
        self._refuse_other_modes()
        return super().eval()

    def _refuse_other_modes(self) -> None:
        # all checks come before any change
        for path, place in self.named_modules():
            if isinstance(place, Place) and place._graphpeft_own_modes is not None:
                place._graphpeft_own_modes.refuse_others(place, path)

    @property
    def report(self) -> TraceReport:
        """The report on the trace: the branches it took, and the modules that stay calls. It can be printed."""
        template = template_of(self)
        assert template is not None
        reads = [settings.reads for graph in template.graphs for settings in _settings_of(self, graph)]
        return TraceReport.of(
            template.graphs,
            self.kept,
            self.not_kept,
            self.other_mode_error,
            reads,
            self._graphpeft_read_once,
            self._graphpeft_frozen,
        )


def _settings_of(root: nn.Module, graph: fx.Graph) -> list[Settings]:
    nodes = [node for node in graph.nodes if node.target is expect_settings]
    return [getattr(root, str(node.all_input_nodes[0].target)) for node in nodes]


def stands_for(module: nn.Module) -> type:
    """Returns the original class of `module`; of a `Place`, the class of the inlined module."""
    return module._graphpeft_original_module.cls if isinstance(module, Place) else in_place.original_class(module)


def plain_attribute(module: nn.Module, name: str, default: Any) -> Any:
    """Returns a plain attribute of `module`, such as a number; of a `Place`, the inlined module's attribute."""
    if isinstance(module, Place):
        return module._graphpeft_original_module.plain.get(name, default)
    return getattr(module, name, default)


def module_told(model: Any, getter: str) -> nn.Module | None:
    """Returns the module that a getter of a model returns, such as `get_input_embeddings`; None without one."""
    try:
        return getattr(model, getter)() if hasattr(model, getter) else None
    except NotImplementedError:
        return None  # Transformers' audio and vision models raise it
