"""All private names of PyTorch that the package uses, each with its purpose.

No other file uses private names of PyTorch, so a new release of PyTorch affects only this file. Names without a remark
are the same in all supported versions.

Three kinds of names with an underscore are exempt and used all over the package, since libraries subclass and read
them, and they are the same in all versions:

- names of ``nn.Module``: its dictionaries (``_parameters``, ``_buffers``, ``_modules``,
  ``_non_persistent_buffers_set`` and the dictionaries of hooks), and the methods that classes override (``_apply``,
  ``_load_from_state_dict``, ``_save_to_state_dict``, ``_replicate_for_data_parallel``);
- ``_orig_mod``, the attribute in which ``torch.compile`` keeps a model;
- the attributes that ``fx.GraphModule`` reads of itself (``_graph``, ``_code``, ``_lineno_map``), which
  `graph/template.py` defines.

Code that fx generates contains names of ``torch._C._nn``, where public functions such as ``F.gelu`` are defined.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint as checkpoint_module
from torch import fx, nn
from torch._C import DisableTorchFunction, DisableTorchFunctionSubclass
from torch._C import _are_functorch_transforms_active as function_transforms_active
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._guards import TracingContext
from torch._library.custom_ops import CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses import fake_tensor
from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as leave_autocast
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace as symbolic_tracing
from torch.fx.graph import PythonCode
from torch.nn.modules import module as _hooks
from torch.nn.modules.module import _IncompatibleKeys as IncompatibleKeys
from torch.nn.utils import stateless
from torch.overrides import _get_current_function_mode as current_function_mode
from torch.overrides import _pop_mode_temporarily as function_mode_set_aside
from torch.utils._python_dispatch import TorchDispatchMode, is_in_torch_dispatch_mode
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "CHECKPOINT_GENERATOR",  # the implementation of `checkpoint` with use_reentrant=False
    "CODE_OF_CALLS",  # tells by the frames around whether a module is being called
    "CODE_OF_FUNCTIONAL_CALLS",  # tells likewise whether it is called with other weights in place of its own
    "CONTEXT_OF",  # the attribute of a function's context class that is the `torch.autograd.Function`
    "FORWARD_HOOKS_OF_ALL",  # global hooks that a forward runs
    "GROUPED_MM",  # products with experts' weights, some of which fake tensors refuse
    "PADDING_OF_CONVOLUTION",  # for convolutions with padding other than zeros
    "CheckpointFunction",  # the implementation of `checkpoint` with use_reentrant=True; public by name, undocumented
    "CustomOpDef",  # an operator of `torch.library.custom_op`, which may write into its arguments
    "DisableTorchFunction",  # reads tensors without `__torch_function__`, and so without recording
    "DisableTorchFunctionSubclass",  # the same, but function modes stay on
    "IncompatibleKeys",  # the result of `nn.Module.load_state_dict`, and of PEFT's functions
    "OpOverload",  # tells calls of operators from calls of functions, to pickle operators by name
    "OpOverloadPacket",  # likewise; a packet has all overloads of an operator
    "TorchDispatchMode",  # rounds what operators give in another way, for bounds of tests
    "aot_inductor",  # the export format of that name
    "argument_names",  # tells whether a node of a program draws random numbers
    "autocast_options",  # for nodes of regions under autocast
    "base_of",  # of a view that was made without gradients, the tensor that has one
    "call_modules_by",  # holds calls of other threads while a model isn't itself
    "call_with_hooks",  # calls a module where `fx` has replaced `nn.Module.__call__`
    "can_take_data",  # lets a buffer that several holders have be moved once
    "checkpoint_module",
    "compiler_asks",  # tells a compiler's read of a graph from an edit
    "compiler_options",  # lets a trace go through compiled code
    "computes_in_own_way",
    "current_function_mode",  # tells whether a trace's mode is the innermost one
    "elements_in_flat_shard",  # what a process keeps of a parameter that FSDP has gathered for a forward
    "empty_graph_like",  # for copies of graphs
    "enter_autocast",  # begins a region under autocast, as `fx` itself records it
    "fake_tensor",  # example values without data
    "function_mode_set_aside",  # turns a trace's mode off for unrecorded code
    "has_hooks_of_all",  # a hook may keep a tensor that a pass would overwrite
    "is_in_backward",  # a checkpoint runs a forward again, which may be in a thread of PyTorch's own
    "is_in_torch_dispatch_mode",  # tells whether operators are recorded, as by `make_fx`
    "is_recorded_by_jit",  # its constants are plain tensors
    "is_transformed",  # under a transform, passes leave computations unchanged
    "leave_autocast",
    "make_wrapper",  # tensors without numbers of their own
    "module_stack_tracer",  # an export leaves out the calls of graph modules, in which quantisers look for layers
    "padding_of_convolution",
    "post_accumulate_hooks",  # such hooks may step an optimizer in a backward that is undone
    "printed_target",  # a node's target as text
    "pytree",  # flattens nested containers as `fx` and `torch.export` do
    "saved_tensors_go_elsewhere",  # tells whether hooks handle tensors saved for backward
    "schemas_of",  # the arguments of PyTorch's functions and methods, by name
    "sharded_parameter_behind",  # the same for `fully_shard`
    "storage_key",  # tells which tensors share memory, also fake ones
    "symbolic_tracing",  # tells fx's own tracer from the one of this library
    "uncompiled",  # hooks and modes see what runs; with fullgraph=True, compiled code refuses them
    "version",  # counts in-place writes into a tensor
    "without_compiler",  # leaves the compiler's import to its users
    "written_arguments",  # of operators, whose names tell less than those of PyTorch's functions
]

_Function = TypeVar("_Function", bound=FunctionType)

# checkpoints: for adapters by rows, and for changed weights of own forwards, when a function runs again

CHECKPOINT_GENERATOR = next(
    name
    for name in ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    if hasattr(checkpoint_module, name)
)
"""A function of ``torch.utils.checkpoint`` whose first argument is the function to run again.

Since 2.15, the name ends in ``_impl``, and the function without ``_impl`` only calls it.
"""

# no set, since the code that Dynamo makes can't be hashed
CODE_OF_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)
CODE_OF_FUNCTIONAL_CALLS = stateless._functional_call.__code__
CONTEXT_OF = "_forward_cls"

# autograd


def saved_tensors_go_elsewhere() -> bool:
    """Returns whether hooks, such as a checkpoint's, handle the tensors saved for backward."""
    # True (ignore_is_tracing): also while PyTorch traces the hooks
    return _top_saved_tensors_default_hooks(True) is not None


def is_transformed() -> bool:
    """Returns whether a transform of ``torch.func`` or forward-mode AD is active."""
    return function_transforms_active() or forward_ad._current_level >= 0


def is_recorded_by_jit() -> bool:
    """Returns whether ``torch.jit.trace`` runs."""
    return torch._C._get_tracing_state() is not None


def is_in_backward() -> bool:
    """Returns whether a backward runs, as when a checkpoint runs a forward again."""
    return torch._C._current_graph_task_id() != -1


def version(tensor: torch.Tensor) -> int:
    """Returns the number of in-place writes into a tensor."""
    return tensor._version


def base_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Returns the base of a view; None for a tensor that is no view."""
    return tensor._base


def post_accumulate_hooks(tensor: torch.Tensor) -> dict[int, Any]:
    """Returns the hooks that run after a tensor's gradient is there; {} without any."""
    return tensor._post_accumulate_grad_hooks or {}


def can_take_data(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether `tensor.data` can be set to another tensor, which may be on another device."""
    return torch._has_compatible_shallow_copy_type(tensor, other)  # pyright: ignore[reportPrivateImportUsage]


def storage_key(tensor: torch.Tensor) -> int:
    """Returns an identifier of a tensor's storage; fake tensors have no address."""
    return tensor.untyped_storage()._cdata


def module_stack_tracer() -> Any:
    """Returns the tracer of a running export without Dynamo, which notes the modules of operations, or None."""
    from torch.fx.experimental import proxy_tensor

    mode = proxy_tensor.get_proxy_mode()
    tracer = None if mode is None else mode.tracer
    return tracer if isinstance(tracer, proxy_tensor._ModuleStackTracer) else None


# modules

call_with_hooks: Any = nn.Module._call_impl
"""``nn.Module.__call__`` with its hooks, by a name that no tracer replaces."""


def call_modules_by(function: Callable[..., Any]) -> Callable[..., Any]:
    """Lets all modules be called by a function, and returns by which they were called: `call_with_hooks` if by none."""
    before, nn.Module._call_impl = nn.Module._call_impl, function  # pyright: ignore[reportAttributeAccessIssue]
    return before


FORWARD_HOOKS_OF_ALL: tuple[Any, Any] = (_hooks._global_forward_hooks, _hooks._global_forward_pre_hooks)
"""The dictionaries of global hooks, which run with each module's forward."""


def has_hooks_of_all() -> bool:
    """Returns whether there are global hooks that get outputs or gradients of modules."""
    return bool(_hooks._global_forward_hooks or _hooks._global_backward_hooks or _hooks._global_backward_pre_hooks)


PADDING_OF_CONVOLUTION = "_reversed_padding_repeated_twice"
"""The attribute of a convolution that holds its padding in the order of ``F.pad``."""


def computes_in_own_way(convolution: Any) -> bool:
    """Returns whether a convolution with PyTorch's forward overrides a method that this forward calls."""
    names = ("_conv_forward", "_output_padding")
    if not vars(convolution).keys().isdisjoint(names):
        return True
    methods = [getattr(type(convolution), name) for name in names if hasattr(type(convolution), name)]
    home = os.path.join(os.path.dirname(torch.__file__), "")
    codes = [getattr(method, "__code__", None) for method in methods]
    return not all(code is not None and code.co_filename.startswith(home) for code in codes)


def padding_of_convolution(convolution: Any) -> tuple[int, ...]:
    """Returns the padding of a convolution in the order of `F.pad`, the last dimension first."""
    return tuple(convolution._reversed_padding_repeated_twice)


def autocast_options(region: torch.autocast) -> tuple[Any, ...]:
    """Returns the arguments of `enter_autocast` that begin the same region."""
    return (region.device, region.fast_dtype, region._enabled, region._cache_enabled)


# compiled code


def compiler_options() -> Any:
    """Returns the Python module of Dynamo's options; None before anything is compiled, since its import is slow.

    With its `error_on_nested_fx_trace` off, compiled code runs uncompiled in a trace.
    """
    return sys.modules.get("torch._dynamo.config")


def uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Returns a context in which compiled modules run their own code, as if they weren't compiled."""
    # before its first use, its import would be slow
    dynamo = sys.modules.get("torch._dynamo")
    return contextlib.nullcontext() if dynamo is None else torch.compiler.set_stance("force_eager")


def without_compiler(reason: str) -> Callable[[_Function], _Function]:
    """Returns a decorator, by which compiled code calls a function as it is, as after ``torch.compiler.disable``.

    PyTorch's own decorator imports ``torch._dynamo``, which takes longer than importing this library.
    """

    def marked(function: _Function) -> _Function:
        marks = {"": True, "_msg": reason, "_recursive": True}
        vars(function).update({f"_torchdynamo_disable{name}": value for name, value in marks.items()})
        set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
        return function

    return marked


def schemas_of(name: str) -> list[Any]:
    """Returns the schemas of the operators of PyTorch with a name, without those that write; [] if there are none."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return []
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return [schema for schema in schemas if not schema.is_mutable]


def written_arguments(function: Any) -> Mapping[str, int]:
    """Returns the arguments into which an operator of ``torch.ops`` writes, by name, with their places."""
    if isinstance(function, OpOverloadPacket):
        schemas = [getattr(function, name)._schema for name in function.overloads()]
    else:
        schemas = [function._schema] if isinstance(function, OpOverload) else []
    return {
        argument.name: place
        for schema in schemas
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }


def compiler_asks() -> bool:
    """Returns whether the caller is Dynamo, or code that Dynamo compiles."""
    # in 2.10, `is_compiling` is False while Dynamo itself inspects a model
    return torch.compiler.is_compiling() or TracingContext.try_get() is not None


# graphs


def empty_graph_like(graph: fx.Graph) -> fx.Graph:
    """Returns a graph without nodes, with the same tracer class and a copy of the same code generator."""
    made = fx.Graph(tracer_cls=graph._tracer_cls)
    made.set_codegen(copy.deepcopy(graph._codegen))
    return made


def printed_target(node: fx.Node) -> str:
    """Returns a node's target as text."""
    return node._pretty_print_target(node.target)


def argument_names(operator: OpOverload) -> list[str]:
    """Returns the names of an operator's arguments, in order."""
    return [argument.name for argument in operator._schema.arguments]


def lines_of_nodes(code: PythonCode) -> Any:
    """Returns the node of each line of generated code, for error messages."""
    return code._lineno_map


# functions

GROUPED_MM: tuple[Any, ...] = (torch._grouped_mm, nn.functional.grouped_mm)  # pyright: ignore[reportPrivateImportUsage]
"""Functions with which Transformers multiplies by experts' weights: a private one, and its public successor."""


make_wrapper: Any = torch.Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
"""Makes a tensor of a subclass, without numbers, that has a shape, a dtype and a device."""


def aot_inductor() -> Any:
    """Returns the Python module with ``aoti_compile_and_package`` and ``aoti_load_package``; its import is slow."""
    return torch._inductor


# parameters that are gathered for a forward


def sharded_parameter_behind(gathered: torch.Tensor) -> Any:
    """Returns the ``DTensor`` that `fully_shard` has gathered as this very parameter, or None."""
    composable: Any = sys.modules.get("torch.distributed._composable_state")
    states = [] if composable is None else [state() for state in list(composable._module_state_mapping.values())]
    for state in states:
        # releases before several groups have one in each module
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for held in (parameter for group in groups for parameter in getattr(group, "fsdp_params", ())):
            if getattr(held, "_unsharded_param", None) is gathered:
                return held.sharded_param
    return None


def elements_in_flat_shard(gathered: torch.Tensor) -> tuple[torch.Tensor, slice] | None:
    """Returns what a process keeps of a parameter that FSDP has gathered, and which of its elements these are.

    None if the first version of FSDP has not gathered it.
    """
    flat: Any = gathered._base
    places: Any = getattr(flat, "_param_infos", ())
    for (name, module, _), shard in zip(places, getattr(flat, "_shard_param_infos", ()), strict=True):
        if getattr(module, name, None) is gathered:
            if not shard.in_shard:
                return flat._local_shard[:0], slice(0, 0)
            kept = flat._local_shard[shard.offset_in_shard : shard.offset_in_shard + shard.numel_in_shard]
            return kept, slice(shard.intra_param_start_idx, shard.intra_param_end_idx + 1)
    return None
