"""Every private name of torch that fxgraft uses, with its purpose and what happens without it.

All of them were seen in torch 2.14. A private name may go in any release of torch, so no other module imports one:
what torch offers in its place comes in here. Attributes of torch's own objects are read where the objects are, and
are listed here all the same (`ATTRIBUTES`). The tests of private names say which ones a torch does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as _module

__all__ = [
    "AdaptiveAvgPoolNd",
    "AdaptiveMaxPoolNd",
    "AvgPoolNd",
    "BatchNorm",
    "ConstantPadNd",
    "ConvNd",
    "DataDependentOutputException",
    "DropoutNd",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "InstanceNorm",
    "LPPoolNd",
    "MaxPoolNd",
    "NormBase",
    "OpOverload",
    "ReflectionPadNd",
    "ReplicationPadNd",
    "TorchDispatchMode",
    "dispatch_modes",
    "foreach_mul",
    "foreach_mul_",
    "foreach_norm",
    "foreach_sub",
    "pytree",
    "wrapped_functions",
]

SEEN = "2.14"
"""The release of torch that all names were last seen in."""

_functions: Any = torch

# Tracing needs all of these, and nothing can replace them: importing fxgraft names the one that is missing.
try:
    from torch._ops import OpOverload  # the operator type that a dispatch mode gets
    from torch._subclasses.fake_tensor import (  # shapes without values
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
    )
    from torch.fx._symbolic_trace import (
        _wrapped_fns_to_patch as wrapped_functions,  # torch.fx's own list, to be cleared
    )
    from torch.nn.modules.batchnorm import (
        _BatchNorm as BatchNorm,  # the kinds of layers, whatever their dimension
    )
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.modules.conv import _ConvNd as ConvNd
    from torch.nn.modules.dropout import _DropoutNd as DropoutNd
    from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNorm
    from torch.nn.modules.padding import _ConstantPadNd as ConstantPadNd
    from torch.nn.modules.padding import _ReflectionPadNd as ReflectionPadNd
    from torch.nn.modules.padding import _ReplicationPadNd as ReplicationPadNd
    from torch.nn.modules.pooling import _AdaptiveAvgPoolNd as AdaptiveAvgPoolNd
    from torch.nn.modules.pooling import _AdaptiveMaxPoolNd as AdaptiveMaxPoolNd
    from torch.nn.modules.pooling import _AvgPoolNd as AvgPoolNd
    from torch.nn.modules.pooling import _LPPoolNd as LPPoolNd
    from torch.nn.modules.pooling import _MaxPoolNd as MaxPoolNd
    from torch.utils import _pytree as pytree  # values in nested structures
    from torch.utils._python_dispatch import TorchDispatchMode  # looks at every operation
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack as dispatch_modes

    # Fused arithmetic over lists of parameters, for GAM's drift; type checkers are not told of them.
    foreach_mul, foreach_mul_ = _functions._foreach_mul, _functions._foreach_mul_
    foreach_norm, foreach_sub = _functions._foreach_norm, _functions._foreach_sub
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"fxgraft uses a private name that this torch {torch.__version__} does not have: {error}.\n"
        f"It was there in torch {SEEN}, and torch may drop such names in any release.\n"
        f"Install a newer fxgraft, or torch {SEEN}."
    ) from error


def _either(home: Any, name: str, without: Any) -> Any:
    """Return a private name of torch, or its replacement."""
    return getattr(home, name, without)


_C: Any = torch._C

transforms_active: Callable[[], bool] = _either(_C, "_are_functorch_transforms_active", lambda: False)
"""Say whether a transform of `torch.func` is running.

Without it transforms are not noticed: under ``vmap`` torch itself then raises where a value is read.
"""

graph_task: Callable[[], int] = _either(_C, "_current_graph_task_id", lambda: -1)
"""Return the number of the backward pass that is running in this thread, -1 for none.

Without it a part that checkpointing runs again is refused as one that was called by itself.
"""


def sample_dirichlet(concentration: Tensor) -> Tensor:
    """Draw from Dirichlet distributions by their concentrations (..., K).

    Without ``torch._sample_dirichlet`` `torch.distributions` does the same, which compiled code cannot hold in one
    graph.
    """
    if torch.compiler.is_dynamo_compiling():
        # It cannot be compiled for batches of several sizes. Gamma variates can, and give the same numbers.
        parts = torch._standard_gamma(concentration.double()).clamp_min(torch.finfo(torch.float64).tiny)  # pyright: ignore[reportPrivateImportUsage]
        return (parts / parts.sum(-1, keepdim=True)).to(concentration.dtype)
    if not hasattr(torch, "_sample_dirichlet"):
        return torch.distributions.Dirichlet(concentration, validate_args=False).sample()
    return _functions._sample_dirichlet(concentration)  # type: ignore[no-any-return]


def is_wrapped(tensor: Tensor) -> bool:
    """Say whether a tensor is a wrapper of `torch.func`; without a way to ask, none is."""
    ask = getattr(getattr(_C, "_functorch", None), "is_functorch_wrapped_tensor", None)
    return ask is not None and bool(ask(tensor))


def unwrapped_once(tensor: Tensor) -> Tensor:
    """Return the tensor inside such a wrapper; without ``get_unwrapped`` it raises."""
    return _C._functorch.get_unwrapped(tensor)  # type: ignore[no-any-return]


def vmapped() -> bool:
    """Say whether a ``vmap`` of `torch.func` is running.

    Without the stack of transforms, any transform is taken for one: decisions are made by tensors then.
    """
    if not transforms_active():
        return False
    functorch: Any = getattr(_C, "_functorch", None)
    try:
        stack, kind = functorch.get_interpreter_stack() or (), functorch.TransformType.Vmap
    except AttributeError:
        return True
    return any(entry.key() == kind for entry in stack)


def top_saved_tensors_hooks() -> Any:
    """Return the innermost hooks on saved tensors of this thread, as activation checkpointing sets them, or None.

    Without a way to ask there are some, of which nothing is known: the caller wraps them in a pair that does nothing.
    """
    top = getattr(getattr(_C, "_autograd", None), "_top_saved_tensors_default_hooks", None)
    return () if top is None else top(True)


def assert_later(condition: Tensor, message: str) -> None:
    """Raise in a running graph where a () bool is False, without waiting for a device.

    Without ``torch._assert_async`` compiled code fails at once, with the name in the message.
    """
    _functions._assert_async(condition, message)


def function_modes() -> int:
    """Return how many torch function modes are active; without ``torch._C._len_torch_function_stack`` it raises."""
    return int(_C._len_torch_function_stack())


def fsdp_state_before_backward() -> Any:
    """Return FSDP2's name for a module that is in its backward pass.

    Without it RSC's exact gradients raise on models that FSDP2 has sharded.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    return TrainingState.PRE_BACKWARD


SETTINGS = MappingProxyType[str, tuple[Any, str]](
    {
        "cudnn.enabled": (_C, "_get_cudnn_enabled"),
        "cudnn.benchmark": (_C, "_get_cudnn_benchmark"),
        "cudnn.deterministic": (_C, "_get_cudnn_deterministic"),
        "mkldnn.enabled": (_C, "_get_mkldnn_enabled"),
        "mkldnn.deterministic": (_C, "_get_mkldnn_deterministic"),
        "NNPACK": (_C, "_get_nnpack_enabled"),
        "the kernels of attention (flash)": (_C, "_get_flash_sdp_enabled"),
        "the kernels of attention (memory-efficient)": (_C, "_get_mem_efficient_sdp_enabled"),
        "the kernels of attention (math)": (_C, "_get_math_sdp_enabled"),
        "the kernels of attention (cudnn)": (_C, "_get_cudnn_sdp_enabled"),
        "the kernels of attention (order)": (_C, "_get_sdp_priority_order"),
        "TF32 of cudnn": (_C, "_get_cudnn_allow_tf32"),
        "multithreading of autograd": (_C, "_is_multithreading_enabled"),
        "forward-mode gradients": (_C, "_is_fwd_grad_enabled"),
        "view replay of autograd": (_C, "_is_view_replay_enabled"),
        "torch function modes": (_C, "_len_torch_function_stack"),
        "torch dispatch modes": (_C, "_len_torch_dispatch_stack"),
        "transforms of torch.func": (_C, "_are_functorch_transforms_active"),
    }
)
"""What a forward may set for its process or thread, and where the function is that reads it.

Without one of them a forward that sets this, and leaves it set, is not noticed.
"""

GRADIENT_SWITCHES = ((_C, "_set_grad_enabled"), (_C, "_InferenceMode"))
SEEDING = ((torch.random, "_manual_seed_impl"),)
"""Functions that are watched while a forward is traced. Without one, code that calls it is not noticed."""

_NO_HOOKS: dict[int, Any] = {}
GLOBAL_FORWARD_PRE_HOOKS: dict[int, Any] = _either(_module, "_global_forward_pre_hooks", _NO_HOOKS)
GLOBAL_FORWARD_HOOKS: dict[int, Any] = _either(_module, "_global_forward_hooks", _NO_HOOKS)
GLOBAL_FORWARD_HOOKS_WITH_KWARGS: dict[int, Any] = _either(
    _module, "_global_forward_hooks_with_kwargs", _NO_HOOKS
)
GLOBAL_BACKWARD_HOOKS: dict[int, Any] = _either(_module, "_global_backward_hooks", _NO_HOOKS)
GLOBAL_BACKWARD_PRE_HOOKS: dict[int, Any] = _either(_module, "_global_backward_pre_hooks", _NO_HOOKS)
"""Hooks of all modules. Without one of these lists closed forms pass over such hooks."""

COPIES = frozenset({"_unsafe_view", "_to_copy"})
BATCH_NORMS = frozenset({"_native_batch_norm_legit_no_training"})
RMS_NORMS = frozenset({"_fused_rms_norm"})
SOFTMAXES = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
PRELU = "_prelu_kernel"
"""Operators of torch by their private names. One under another name is unknown: what it gives may be anything."""

ATTRIBUTES: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "torch.nn.Module": (
            *("_modules", "_parameters", "_buffers", "_get_name", "_replicate_for_data_parallel"),
            *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks"),
            *("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
            *("_is_full_backward_hook", "_compiled_call_impl", "_non_persistent_buffers_set"),
        ),
        "torch.nn.Conv2d": ("_conv_forward",),
        "torch.Tensor": ("_version",),
        "torch.UntypedStorage": ("_cdata",),
        "torch.ops.aten.relu.default": ("_schema",),
        "torch.fx.Tracer": ("_autowrap_search", "_autowrap_function_ids"),
        # Attributes of wrappers: only models that are wrapped in that way have them.
        "torch.compile(...)": ("_orig_mod",),
        "torch.nn.DataParallel(...)": ("_is_replica",),
        "torch.distributed.fsdp.fully_shard(...)": ("_get_fsdp_state", "_training_state"),
    }
)
"""Private attributes of torch's objects. Without one, what reads it raises AttributeError with its name."""
