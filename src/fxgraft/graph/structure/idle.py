"""Sites whose positions no prediction reads, since a class token alone goes on from there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxgraft._torch import FakeTensor, pytree
from fxgraft.graph.dataflow.reach import Reach
from fxgraft.graph.structure.rest_of_network import Rest
from fxgraft.graph.tracing.model_trace import ModelTrace
from fxgraft.graph.tracing.observe import bare_calls, tensors
from fxgraft.graph.tracing.preserve import preserved_attributes, preserved_modes, preserved_random_state


def reads_places(trace: ModelTrace, rest: Rest, prefix: int, compute: bool = False) -> bool:
    """Say whether the logits read anything of a site's value but its class and register tokens.

    Every operation on the way is looked at, on fake tensors: one that may mix tokens is taken to read all of them.

    Args:
        trace: of the bare model.
        rest: of the network after the site.
        prefix: how many class and register tokens come first.
        compute: whether to look for a gradient as well, where the weights are there.
    """
    value = rest.site.value
    others = [each.value for each in rest.captured]
    others += [trace.observation.calls[""][0].args[index] for index in rest.inputs]
    if prefix:
        reach = Reach(prefix)
        observation = trace.observation
        z = observation.run(torch.empty_like, value)
        reach.start(z)
        with _left_alone(trace), rest.evaluation_mode(trace.model):
            out = observation.follow(reach, rest.function, trace.model, z, *others)
        if not any(reach.reads(each) for each in tensors(out)):
            return False
    found = _gradient(trace, rest, value, others) if compute and rest.tail is None else None
    # A gradient of nought everywhere says nothing: a classifier that starts at nought passes none.
    return found is None or not found.any() or bool(found[:, prefix:].any())


@contextlib.contextmanager
def _left_alone(trace: ModelTrace) -> Iterator[None]:
    """Run layers without their hooks, and put back what a forward writes on its modules."""
    modules = list(trace.model.modules())
    with (
        preserved_modes(trace.model),
        preserved_attributes(modules),
        preserved_random_state(),
        bare_calls(),
    ):
        yield


def _gradient(trace: ModelTrace, rest: Rest, value: Tensor, others: list[Any]) -> Tensor | None:
    """Differentiate random logits' sum by random values at the site; None where that cannot be computed."""
    model = trace.model
    modules = {each for name in rest.children for each in model.get_submodule(name).modules()}
    held = [tensor for each in modules for tensor in (*each.parameters(False), *each.buffers(False))]
    if any(each.is_meta or isinstance(each, FakeTensor) for each in held):
        return None
    generator = torch.Generator().manual_seed(0)

    def drawn(fake: Any) -> Any:
        if not isinstance(fake, Tensor):
            return fake
        real = (
            torch.randn(fake.shape, generator=generator)
            if fake.is_floating_point()
            else torch.zeros(fake.shape)
        )
        return real.to(fake.device, fake.dtype)

    kept = [(each, each._version, each.clone()) for each in held if not each.requires_grad]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            _left_alone(trace),
            rest.evaluation_mode(model),
        ):
            z = drawn(value).requires_grad_()
            out = rest.function(model, z.clone(), *pytree.tree_map(drawn, others))
            logits = [each for each in tensors(out) if each.requires_grad]
            if not logits:
                return torch.zeros_like(z)
            score = torch.stack([(each * drawn(each)).sum() for each in logits]).sum()
            return torch.autograd.grad(score, z)[0]
    except Exception:  # a forward that takes no values but real ones: what its operations say is believed
        return None
    finally:
        for each, version, content in kept:
            if each._version != version:
                each.detach().copy_(content)
