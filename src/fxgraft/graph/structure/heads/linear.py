"""Linear layers run with tensors other than their own, and the weights with which a layer computes the same itself.

Linear layers and convolutions act with their weight. A convolution with scaled weight standardisation (Brock, De,
Smith: Characterizing Signal Propagation to Close the Performance Gap in Unnormalized ResNets, ICLR 2021) acts with

    gain · scale · (weight − mean) / sqrt(var + eps)

for every output channel, which has mean 0 and, through the gain, any length. Sums of such weights are therefore weights
of such a layer. Weight standardisation without a gain (StdConv2d) gives weights of one length, whose sums have another.

Some layers make their weight from other parameters before every call, and some share it; both are found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame, conv2d_same
from timm.layers.padding import pad_same
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxgraft._torch import ConvNd
from fxgraft.errors import StructureError
from fxgraft.graph.structure.heads.pooling import is_classifier

_SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)
_FORWARDS = tuple(kind.forward for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, *_SCALED))
_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def is_linear(module: nn.Module) -> bool:
    """Say whether a module of a bare model is a linear layer or convolution that this file can run."""
    if isinstance(module, ConvNd):
        return type(module).forward in _FORWARDS
    return isinstance(module, nn.Linear) and is_classifier(module)


def layer_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of such a layer by name; in a replica of DataParallel they are plain tensors."""
    parameters = {name: getattr(module, name, None) for name in ("weight", "bias", "gain")}
    return {name: tensor for name, tensor in parameters.items() if isinstance(tensor, Tensor)}


def effective(module: Any, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor | None]:
    """Return the weight that a layer with these parameters multiplies with, and the bias that it adds.

    Args:
        module: the layer.
        tensors: other parameters than its own, by their names in it.
    """
    tensors = layer_tensors(module) if tensors is None else tensors
    weight = tensors["weight"]
    if _scaled(module):
        gain = (tensors["gain"] * module.scale).view(-1)
        rows = weight.reshape(1, len(weight), -1)
        # As the layer itself does it, to the bit.
        rows = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=module.eps)
        weight = rows.reshape_as(weight)
    return weight, tensors.get("bias")


@torch.no_grad()
def write_effective(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Set a layer's parameters so that it multiplies with a weight and adds a bias.

    Args:
        module: the layer.
        weight: the weight, as `effective` returns it for this layer, or a sum of such ones.
        bias: replaces the layer's own bias; None where the layer has none.
    """
    own = layer_tensors(module)
    if bias is not None:
        own["bias"].copy_(bias)
    if not _scaled(module):
        own["weight"].copy_(weight)
    elif not torch.equal(effective(module)[0], weight):
        # The weight keeps its length, on which its speed of learning depends; the gain carries the rest.
        length, wanted = (_deviation(tensor) for tensor in (own["weight"], weight))
        length = torch.where(length > 0, length, 1)
        own["weight"].copy_(weight * (length / torch.where(wanted > 0, wanted, 1)))
        own["gain"].copy_(wanted * (1 + module.eps / length**2).sqrt() / module.scale)


def apply_layer(module: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a stem or classifier with a weight and bias that aren't its own, as `effective` returns them."""
    if isinstance(module, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(module, Conv2dSame):
        return conv2d_same(
            x, weight, bias, module.stride, module.padding, module.dilation, module.groups  # type: ignore[arg-type]
        )  # fmt: skip
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        if isinstance(module, ScaledStdConv2dSame) and module.same_pad:
            x = pad_same(x, module.kernel_size, module.stride, module.dilation)  # type: ignore[arg-type]
        return module._conv_forward(x, weight, bias)
    raise StructureError(
        f"A {type(module).__name__} isn't a linear layer or plain convolution.\nUnpatch the model, then patch it again."
    )


def _scaled(module: Any) -> bool:
    # The layer's own forward isn't called: on a patched model it belongs to a grafted class.
    return isinstance(module, _SCALED)


def _deviation(weight: Tensor) -> Tensor:
    return weight.flatten(1).std(1, correction=0).reshape(-1, *[1] * (weight.ndim - 1))


def made_by_hooks(module: nn.Module) -> bool:
    """Say whether pruning, weight_norm or spectral_norm of `torch.nn.utils` makes the weight when the layer is called.

    Such a weight is an attribute that is right only during a call, and the next call overwrites it. A weight of
    `torch.nn.utils.parametrizations` is right whenever it is read.
    """
    return any(isinstance(hook, _HOOKS) for hook in module._forward_pre_hooks.values())


def is_derived(module: nn.Module) -> bool:
    """Say whether a layer computes its weight from other parameters, by any tool, so that it cannot be written."""
    return hasattr(module, "parametrizations") or made_by_hooks(module)


def sharers(model: nn.Module, module: nn.Module) -> Iterator[str]:
    """Name the other modules of a model that hold a parameter of this one."""
    own = {id(parameter) for parameter in module.parameters(recurse=False)}
    for name, other in model.named_modules():
        if other is not module and any(id(parameter) in own for parameter in other.parameters(recurse=False)):
            yield name
