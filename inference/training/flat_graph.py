"""A loss and its gradient as two flat graphs of tensor operations, without the Python that produced them.

    forward:   parameters, buffers, x               ->  values, new buffers, what the gradient needs
    backward:  what the gradient needs, cotangents  ->  sum over values of cotangent * d value / d parameters

Both come from one trace of the loss *together with* its reverse sweep (``make_fx`` over ``torch.autograd.grad``), cut in two
by AOTAutograd's min-cut partitioner. So everything that shapes a gradient is in the graphs: hooks on draws, ``detach``,
``no_grad``, custom backward functions. Tracing uses fake tensors: nothing is computed, no random number is drawn, and a
program that reads a tensor's value is found out. Random operations stay operations of the graph, drawn anew at each call.

The one constraint: operations are recorded at given shapes, dtypes and flags, and Python values are frozen into them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import min_cut_rematerialization_partition  # type: ignore[import-untyped]
from torch import Tensor
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from inference.bounds.particles import forked_rng
from inference.training.inductor import Boxed

__all__ = ["Backend", "FlatGraph", "InPlaceError", "Sample", "without_autocast"]

Backend = Callable[[GraphModule, list[Tensor]], Callable[..., Any]]
Lower = Callable[[GraphModule, list[Tensor]], GraphModule]
Run = Callable[[Tensor], Any]
Replaced = Callable[[Sequence[Tensor]], AbstractContextManager[None]]


class InPlaceError(ValueError):
    """A loss that changes its data or parameters in place, which a graph cannot repeat."""


@dataclass(frozen=True)
class Sample:
    """One call of the loss itself: what its graph must reproduce.

    Attributes:
        inputs: parameters, buffers and, last, data; as they were before the call.
        wanted: which of the inputs take a gradient.
        mutated: which of them, buffers all, the call changed in place.
        leaves: the output's leaves.
        spec: the output's structure.
    """

    inputs: list[Tensor]
    wanted: list[int]
    mutated: list[int]
    leaves: list[Any]
    spec: Any

    @property
    def values(self) -> list[Tensor]:
        """The leaves that are tensors."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def cotangents(self) -> list[Tensor]:
        """Ones for each differentiable value."""
        return [_ones_like(value) for value in self.values if value.requires_grad]


class FlatGraph:
    """A traced loss, to be called with inputs in the order in which it was traced.

    Args:
        run: the loss as a function of its data, returning any nest of tensors.
        replaced: a context in which other tensors stand in the places of its parameters and buffers.
        sample: one call of it.

    Raises:
        InPlaceError: the loss changes data or parameters in place.
    """

    def __init__(self, run: Run, replaced: Replaced, sample: Sample) -> None:
        self.spec, self.mutated = sample.spec, sample.mutated
        self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in sample.leaves]
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in sample.leaves]
        self.differentiable = [value.requires_grad for value in sample.values]
        self.num_values = len(sample.values)
        self.num_kept = self.num_values + len(self.mutated)
        self.replays = False  # whether a CUDA graph owns the memory of what the halves return
        joint, self.reached = _trace(run, replaced, sample)
        self._joint, self._cotangents = joint, sample.cotangents()  # for a compiler, which may cut it elsewhere
        self.forward: Callable[..., Any] = joint
        self.backward: Callable[..., Any] | None = None
        if any(self.differentiable):
            self.forward, self.backward = self._cut(joint)
        self.num_operations = sum(
            node.op == "call_function"
            for half in (self.forward, self.backward)
            if isinstance(half, GraphModule)
            for node in half.graph.nodes
        )

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        """The loss's output at ``inputs``; the buffers that it changes are changed."""
        passed = list(inputs)
        for i in self.mutated:
            passed[i] = inputs[i].clone()  # the gradient may need the old value
        outputs = self.run_forward(passed)[: self.num_kept] if self.backward is None else _Step.apply(self, *passed)
        with torch.no_grad():
            for i, new in zip(self.mutated, outputs[self.num_values :], strict=True):
                inputs[i].copy_(new)
        left = iter(outputs)
        leaves = [
            next(left) if tensor else constant for tensor, constant in zip(self.is_tensor, self.constants, strict=True)
        ]
        return tree_unflatten(leaves, self.spec)

    def _cut(self, joint: GraphModule) -> tuple[GraphModule, GraphModule]:
        """The two halves, with as little as can be kept between them."""
        return min_cut_rematerialization_partition(joint, None, num_fwd_outputs=self.num_kept)

    def compile(self, backend: Backend, inputs: Sequence[Tensor], lower: Lower | None = None) -> None:
        """Hands both halves to ``backend(graph, example inputs)``; they stay as they are where it fails.

        With ``lower``, the graph is cut anew in the operations that it is lowered to.

        Random state and buffers are left as they were.
        """
        arguments = [
            tensor.detach().clone() if i in self.mutated else tensor.detach() for i, tensor in enumerate(inputs)
        ]
        with torch.no_grad(), forked_rng(), without_autocast(arguments[-1].device.type):
            forward, backward = self.forward, self.backward
            if lower is not None and backward is not None:
                joint = lower(copy.deepcopy(self._joint), [*arguments, *self._cotangents])
                forward, backward = self._cut(_tidied(joint, len(arguments)))
            forward = backend(copy.deepcopy(forward), arguments)  # type: ignore[arg-type]
            outputs = _called(forward, list(arguments))
            if backward is not None:
                values = zip(outputs, self.differentiable, strict=False)
                cotangents = [_ones_like(value) for value, differentiable in values if differentiable]
                arguments = [*outputs[self.num_kept :], *cotangents]
                backward = backend(copy.deepcopy(backward), arguments)  # type: ignore[arg-type]
                _called(backward, arguments)
        self.forward, self.backward = forward, backward

    def run_forward(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Values, new buffers, and what :meth:`run_backward` takes first; records no gradient."""
        if self.replays:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad(), without_autocast(inputs[-1].device.type):
            outputs = _called(self.forward, list(inputs))
        if self.replays:  # the next replay writes over them
            outputs = [*(value.clone() for value in outputs[: self.num_kept]), *outputs[self.num_kept :]]
        return outputs

    def run_backward(self, saved: list[Tensor], cotangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """Gradients for the inputs in :attr:`reached`; empties ``saved``, so that what is used up can be freed."""
        assert self.backward is not None
        arguments = [*saved, *(cotangent.contiguous() for cotangent in cotangents)]
        saved.clear()
        with without_autocast(arguments[-1].device.type):
            gradients = _called(self.backward, arguments)
        return [gradient.clone() for gradient in gradients] if self.replays else gradients


class _Step(torch.autograd.Function):
    """The two halves as one differentiable operation; its own gradient is not differentiable again."""

    @staticmethod
    def forward(ctx: Any, graph: FlatGraph, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = graph.run_forward(inputs)
        kept = outputs[: graph.num_kept]
        ctx.graph, ctx.num_inputs = graph, len(inputs)
        ctx.save_for_backward(*outputs[graph.num_kept :])
        differentiable = [*graph.differentiable, *[False] * len(graph.mutated)]
        ctx.mark_non_differentiable(*(v for v, d in zip(kept, differentiable, strict=True) if not d))
        return tuple(kept)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected a gradient alone, got create_graph=True: a flat graph is differentiable once; use the loss itself"
            )
        graph = ctx.graph
        given = [c for c, differentiable in zip(cotangents, graph.differentiable, strict=False) if differentiable]
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # not under retain_graph
        gradients: list[Tensor | None] = [None] * ctx.num_inputs
        for i, gradient in zip(graph.reached, graph.run_backward(saved, given), strict=True):
            gradients[i] = gradient
        return (None, *gradients)


def _called(half: Callable[..., Any], arguments: list[Tensor]) -> Any:
    """A half at its arguments; the list may be empty afterwards."""
    return half(arguments) if isinstance(half, Boxed) else half(*arguments)


def without_autocast(device: str) -> AbstractContextManager[Any]:
    """No autocasting inside: a graph that was traced under it holds its casts already."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _trace(run: Run, replaced: Replaced, sample: Sample) -> tuple[GraphModule, list[int]]:
    """The flat graph of values, new buffers and gradients, and which inputs the gradients are of."""
    reached: list[int] = []

    def joint(primals: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
        inputs = list(primals)
        for i in sample.wanted:
            inputs[i] = inputs[i].detach().requires_grad_()
        for i in sample.mutated:
            inputs[i] = inputs[i].clone()
        gradients: Sequence[Tensor | None] = ()
        with replaced(inputs[:-1]):  # for the gradient too: checkpointed parts are run again by it
            values = [leaf for leaf in tree_flatten(run(inputs[-1]))[0] if isinstance(leaf, Tensor)]
            if cotangents:
                gradients = torch.autograd.grad(
                    [value for value in values if value.requires_grad],
                    [inputs[i] for i in sample.wanted],
                    cotangents,
                    allow_unused=True,
                )
        reached[:] = [i for i, g in zip(sample.wanted, gradients, strict=False) if g is not None]
        return [*values, *(inputs[i] for i in sample.mutated), *(g for g in gradients if g is not None)]

    fake = FakeTensorMode()  # one without symbols: what depends on a value is refused rather than left open
    primals = [fake.from_tensor(tensor.detach()) for tensor in sample.inputs]
    cotangents = [fake.from_tensor(tensor) for tensor in sample.cotangents()]
    graph = make_fx(joint, _functional(), tracing_mode="fake")(primals, cotangents)
    with torch.no_grad():  # the reverse sweep is in the graph already
        graph = make_fx(functionalize(graph), tracing_mode="fake")(primals, cotangents)
    return _tidied(graph, len(primals)), reached


def _functional() -> dict[Any, Callable[..., Any]]:
    """Decompositions of operations that write to running statistics without saying so."""
    aten = torch.ops.aten
    return get_decompositions([aten.native_batch_norm, aten.cudnn_batch_norm, aten.miopen_batch_norm])


def _tidied(traced: GraphModule, num_primals: int) -> GraphModule:
    """The graph with the names that the partitioner reads, without aliases, idle reshapes and what nothing uses.

    Raises:
        InPlaceError: an input is written to.
        ValueError: a draw from a generator of its own, which would go on from call to call.
    """
    graph, new = Graph(), dict[Node, Node]()
    number = 0
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            name = f"primals_{number + 1}" if number < num_primals else f"tangents_{number - num_primals + 1}"
            new[node] = graph.placeholder(name)
            new[node].meta = dict(node.meta)
            number += 1
        elif node.kwargs.get("generator") is not None:
            raise ValueError(
                "it draws from a torch.Generator of its own, which a graph would not seed anew; draw from torch's own"
            )
        elif node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
            raise InPlaceError(
                "expected a loss that leaves data and parameters as they are, but it changes one in place, of shape "
                f"{list(node.args[0].meta['val'].shape)}: work on a copy, as in x.clone()"
            )
        elif _changes_nothing(node):
            new[node] = new[node.args[0]]
        elif node.target is torch.ops.aten.bernoulli.p and not node.args[0].meta["val"].is_contiguous():
            new[node] = _bernoulli_in_memory_order(graph, new[node.args[0]], node)
        else:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.eliminate_dead_code()
    return GraphModule(traced, graph)


def _changes_nothing(node: Node) -> bool:
    """Whether a node of a functional graph without autograd is its argument."""
    if node.target is torch.ops.aten.detach.default:
        return True
    if node.target not in (torch.ops.aten.view.default, torch.ops.aten.expand.default):
        return False
    source = node.args[0]
    return isinstance(source, Node) and source.meta["val"].shape == node.meta["val"].shape


def _bernoulli_in_memory_order(graph: Graph, source: Node, node: Node) -> Node:
    """Dropout's ``empty_like(h).bernoulli_(p)`` for an h that is dense without being contiguous.

    It is filled in the order of its memory; the functional ``bernoulli(h, p)`` that it became draws in the order of indices.
    """
    value = node.args[0].meta["val"]  # type: ignore[union-attr]
    order = sorted(range(value.dim()), key=lambda i: -value.stride(i))
    back = [order.index(i) for i in range(value.dim())]
    call, aten = graph.call_function, torch.ops.aten
    dense = call(aten.permute.default, (source, order))
    dense.meta = {"val": value.permute(order)}
    drawn = call(aten.bernoulli.p, (dense, *node.args[1:]), node.kwargs)
    drawn.meta = dict(node.meta) | {"val": torch.empty_like(dense.meta["val"], memory_format=torch.contiguous_format)}
    result = call(aten.permute.default, (drawn, back))
    result.meta = {"val": drawn.meta["val"].permute(back)}
    return result


def _ones_like(value: Tensor) -> Tensor:
    return torch.ones_like(value, memory_format=torch.contiguous_format, requires_grad=False)
