"""A flat graph through torch's inductor, to be called with a list that is emptied on the way.

``torch._inductor.compile`` wraps what it compiles in handlers for aliases and mutations, which a flat graph has none of: they
cost about 20 microseconds a call, and hold every argument until the call is over, so that the activations of a forward pass
would all live as long as its gradient. Here the graph is lowered to inductor's own operations and compiled as it is, and
an argument can be freed after its last use.

The one constraint: graphs are functional, without autograd, and of one fixed shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["Boxed", "compile_graph", "lowered", "options_of"]


class Boxed:
    """A function of a list of tensors, which it may empty to free what it holds.

    Args:
        function: called with that list.

    Example:
        >>> add, arguments = Boxed(lambda tensors: tensors.pop() + tensors.pop()), [torch.ones(1), torch.ones(1)]
        >>> add(arguments), arguments
        (tensor([2.]), [])
    """

    def __init__(self, function: Callable[[list[Tensor]], Any]) -> None:
        self.function = function

    def __call__(self, arguments: list[Tensor]) -> Any:
        """What the function returns."""
        return self.function(arguments)


def lowered(graph: GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> GraphModule:
    """The graph in inductor's own operations, smaller ones than PyTorch's.

    What a backward pass can do again, from less than a forward pass has to keep otherwise, shows only in these.

    Args:
        graph: as in :mod:`inference.training.flat_graph`.
        inputs: examples of its arguments.
        options: inductor's settings for it, which also say whose random numbers are meant.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, at what it imports itself
        from torch._inductor import config
        from torch._inductor.decomposition import select_decomp_table

        with config.patch(options), torch.no_grad():
            return make_fx(graph, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)


def compile_graph(graph: GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]) -> Boxed:
    """The graph as machine code.

    Args:
        graph: as in :mod:`inference.training.flat_graph`.
        inputs: examples of its arguments.
        options: inductor's settings for it.

    Raises:
        Exception: whatever the compiler raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's, at what it imports itself
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.fx_passes.joint_graph import joint_graph_passes

        with config.patch(options), torch.no_grad():
            own = lowered(graph, inputs, options)
            fake = detect_fake_mode([node.meta["val"] for node in own.graph.nodes if node.op == "placeholder"])
            with fake or nullcontext():
                joint_graph_passes(own)  # which makes tensors of its own, as for a softmax of a quotient
            return Boxed(compile_fx_inner(own, list(inputs)))


def options_of(mode: str | None) -> dict[str, Any]:
    """Inductor's settings for a mode of ``torch.compile``, with eager torch's stream of random numbers.

    Raises:
        RuntimeError: an unknown mode.
    """
    settings: dict[str, Any] = {"fallback_random": True}
    if mode is None:
        return settings
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor

        return settings | torch._inductor.list_mode_options(mode)
