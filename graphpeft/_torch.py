"""All that the package uses of PyTorch that PyTorch doesn't promise: private names, each with what it is for.

No other file uses such a name, so a new release of PyTorch is a matter of this one. Names without a remark are the same
in all versions that the package runs with.

Three kinds of names with an underscore are used all over the package, since libraries subclass and read them, in all
versions alike:

- those of ``nn.Module``: its dictionaries (``_parameters``, ``_buffers``, ``_modules``, ``_non_persistent_buffers_set``
  and those of hooks), and the methods that classes override (``_apply``, ``_load_from_state_dict``,
  ``_save_to_state_dict``, ``_replicate_for_data_parallel``);
- ``_orig_mod``, where ``torch.compile`` keeps a model;
- what ``fx.GraphModule`` reads of itself (``_graph``, ``_code``, ``_lineno_map``), which `graph/template.py`
  defines.

Code that fx generates names functions of ``torch._C._nn``, since public ones such as ``F.gelu`` are called so.
"""

from __future__ import annotations

import copy
import os
import sys
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint as checkpoint_module
from torch import fx, nn
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass
from torch._C import _are_functorch_transforms_active as function_transforms_active
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch._subclasses import fake_tensor
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as leave_autocast
from torch.autograd import forward_ad
from torch.fx.graph import PythonCode
from torch.nn.modules import module as _hooks
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.nn.utils.stateless import _reparametrize_module as reparametrized
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.overrides import _pop_mode_temporarily as function_mode_set_aside
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "CHECKPOINT_GENERATOR",  # what `checkpoint` calls with use_reentrant=False
    "FORWARD_HOOKS_OF_ALL",  # hooks that a forward can reach
    "GROUPED_MM",  # the products of experts, of which fake tensors refuse some
    "PADDING_OF_CONVOLUTION",  # a convolution whose padding isn't zeros
    "CheckpointFunction",  # what it calls otherwise; public by name, not documented
    "DisableTorchFunction",  # tensors are read without asking their class, and so without recording
    "DisableTorchFunctionSubclass",  # likewise, while function modes go on
    "IncompatibleKeys",  # what `nn.Module.load_state_dict` returns, and PEFT's functions, too
    "OpOverload",  # how a call of an operator is told from one of a function, to pickle it by its name
    "aot_inductor",  # the format of exports of that name
    "autocast_options",  # regions under autocast as nodes
    "call_with_hooks",  # what a call of a module runs, where `fx` exchanges `nn.Module.__call__`
    "checkpoint_module",
    "compiler_asks",  # what it asks for isn't for an edit
    "compiler_options",  # a trace goes through what was compiled
    "computes_in_own_way",
    "current_function_mode",  # a trace's mode is set aside for what isn't recorded
    "empty_graph_like",  # copies of graphs
    "enter_autocast",  # a region under autocast begins; how `fx` itself records them
    "fake_tensor",  # example values without data
    "function_mode_set_aside",
    "has_hooks_of_all",  # a hook may keep what a pass would overwrite
    "is_in_torch_dispatch_mode",  # something records the operators that are computed, as `make_fx` does
    "is_transformed",  # passes leave computations to transforms as they were written
    "leave_autocast",
    "padding_of_convolution",
    "printed_target",  # what a node calls, as text
    "pytree",  # tensors in nested containers, as `fx` and `torch.export` see them
    "reparametrized",  # a module reads other tensors for the time of its forward; `functional_call` would run hooks
    "saved_tensors_go_elsewhere",  # others decide what is kept for a backward
    "storage_key",  # which tensors share memory, fake ones too
    "version",  # how often a tensor was written into
]

# checkpoints: adapters by rows, and weights that own forwards read, are there when a function runs again

CHECKPOINT_GENERATOR = next(
    name
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    if hasattr(checkpoint_module, name)
)
"""A function of ``torch.utils.checkpoint``, whose first argument is the function to run again.

The name ends in ``_impl`` since 2.15, where the other one only calls it.
"""

# autograd


def saved_tensors_go_elsewhere() -> bool:
    """Returns whether hooks, such as those of a checkpoint, take what the backward needs."""
    # True: also where hooks are refused
    return _top_saved_tensors_default_hooks(True) is not None


def is_transformed() -> bool:
    """Returns whether a transform of ``torch.func`` or a forward-mode gradient is around."""
    return function_transforms_active() or forward_ad._current_level >= 0


def version(tensor: torch.Tensor) -> int:
    """Returns how often a tensor was written into."""
    return tensor._version


def storage_key(tensor: torch.Tensor) -> int:
    """Returns what tells a tensor's memory from that of others; fake tensors have no address."""
    return tensor.untyped_storage()._cdata


# modules

call_with_hooks: Any = nn.Module._call_impl
"""``nn.Module.__call__`` with its hooks, by a name that no tracer exchanges."""

FORWARD_HOOKS_OF_ALL: tuple[Any, Any] = (_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks)
"""The dictionaries of hooks that each module's forward calls."""


def has_hooks_of_all() -> bool:
    """Returns whether there are hooks, of all modules, that are given outputs or gradients."""
    return bool(_hooks._global_forward_hooks or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks)


PADDING_OF_CONVOLUTION = "_reversed_padding_repeated_twice"
"""The attribute of a convolution that holds its padding in the order of ``F.pad``."""


def computes_in_own_way(convolution: Any) -> bool:
    """Returns whether a convolution, whose forward is PyTorch's, has a method of its own that this calls."""
    names = ("_conv_forward", "_output_padding")
    if not vars(convolution).keys().isdisjoint(names):
        return True
    methods = [getattr(type(convolution), name) for name in names if hasattr(type(convolution), name)]
    home = os.path.join(os.path.dirname(torch.__file__), "")
    codes = [getattr(method, "__code__", None) for method in methods]
    return not all(code is not None and code.co_filename.startswith(home) for code in codes)


def padding_of_convolution(convolution: Any) -> tuple[int, ...]:
    """Returns how much `F.pad` adds in front of a convolution, the last dimension first."""
    return tuple(convolution._reversed_padding_repeated_twice)


def autocast_options(region: torch.autocast) -> tuple[Any, ...]:
    """Returns what `enter_autocast` takes to begin the same region."""
    return (region.device, region.fast_dtype, region._enabled, region._cache_enabled)


# compiled code


def compiler_options() -> Any:
    """Returns the Python module of Dynamo's options; None while nothing has been compiled, since its import takes long.

    With its `error_on_nested_fx_trace` off, what was compiled runs its own code in a trace.
    """
    return sys.modules.get("torch._dynamo.config")


def compiler_asks() -> bool:
    """Returns whether the caller is Dynamo, or code that Dynamo compiles."""
    # in 2.10, `is_compiling` is False while Dynamo itself looks at a model
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


# graphs


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """Returns a graph without nodes, of whose code the same class of tracer and the same generator of code decide."""
    made = fx.Graph(tracer_cls=graph._tracer_cls)
    made.set_codegen(copy.deepcopy(graph._codegen))
    return made


def printed_target(node: fx.Node) -> str:
    """Returns what a node calls, as text."""
    return node._pretty_print_target(node.target)


def lines_of_nodes(code: PythonCode) -> Any:
    """Returns from which node each line of generated code comes, for the messages of errors."""
    return code._lineno_map


# functions

GROUPED_MM: tuple[Any, ...] = (torch._grouped_mm, nn.functional.grouped_mm)  # pyright: ignore[reportPrivateImportUsage]
"""The functions by which Transformers multiplies with experts' weights: a private one, and its public successor."""


def aot_inductor() -> Any:
    """Returns the module with ``aoti_compile_and_package`` and ``aoti_load_package``, which take long to import."""
    return torch._inductor
