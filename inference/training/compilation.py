"""``compile_objective``: a loss of a pair at the speed of bare tensor code.

Pyro's handlers cost Python time at each site and step. A loss is called once as it is, traced at those shapes to a flat graph
of its values and gradient (:mod:`.flat_graph`), compared with itself on the same draws, and handed to a compiler. What is
traced is the law, not the draws: noise is fresh at each call and comes from torch's generator, in the order of the loss
itself, so that from one seed both draw the same.

    fast = compile_objective(loss, x)
    fast(x).mean().backward()           # in place of loss(x).mean().backward()

A graph holds for one *signature*: shape and dtype of x, dtypes, strides and devices of the parameters, which of them are
trained, which modules are in training mode, the numbers and words that modules keep as attributes, autocasting, and whether
gradients are recorded. Another signature is traced when it is met, and runs uncompiled until it has been met often enough to
be worth compiling. Each such event is logged. A number that changes at each step is better a buffer, which a graph reads.

The one constraint: all else is frozen as it was when traced, such as what lies in lists, in closures or in objects that are no
modules; and no Python decision may hang on a tensor's value. The gradient is one of all differentiable outputs together: those
that a backward pass leaves out count with zero, as under ``torch.compile``.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.fx import GraphModule
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from inference.bounds.particles import forked_rng
from inference.training.flat_graph import Backend, FlatGraph, InPlaceError, Sample
from inference.training.inductor import compile_graph, lowered, options_of
from inference.training.module_state import ModuleState
from inference.training.traceability import (
    NotTraceableError,
    check_same,
    explain,
    gradients_of_sum,
    own_attributes_kept,
    python_noise_refused,
)

__all__ = ["CompiledObjective", "NotTraceableError", "compile_objective"]

COMPILE_AFTER = 20  # calls at a signature other than the example's
MAX_GRAPHS = 16

_SEED = 20_180_515  # of the draws compared: no seed that a program is likely to set itself
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device)  # what may come back beside tensors

_LOG = logging.getLogger(__name__)
# Tracing puts stand-ins in the places of parameters, which no other thread may read, and compares draws from torch's generator,
# which no other thread's replay may move.
_LOCK = threading.RLock()


def compile_objective(
    loss: nn.Module,
    example: Tensor,
    method: str = "forward",
    backend: str | Backend = "inductor",
    mode: str | None = None,
) -> CompiledObjective:
    """A loss of a pair as flat compiled graphs: from one seed the same values and gradients to rounding, called like the loss.

    Parameters and buffers are read from the loss at each call, so that optimisers, ``load_state_dict`` and gradient
    accumulation work as ever. When numbers that modules keep as attributes change, such as a weight or a dropout's p, it is
    traced anew; what lies elsewhere, as in a list or a closure, is frozen. Tracing and compiling draw no random numbers and
    change no buffer.

    Args:
        loss: ``loss(x)``, as :class:`inference.ElboLoss`; its modules stay the ones that they are.
        example: data ``[B, *data_shape]``, of the size of most batches.
        method: which of the loss's methods to compile, as ``"terms"`` or ``"step"``; any nest of tensors may come back.
        backend: ``"inductor"``; ``"eager"`` for the flat graph as it is; or ``backend(graph, example inputs) -> callable``.
        mode: of inductor, as ``torch.compile`` has it; ``"reduce-overhead"`` replays CUDA graphs.

    Returns:
        The compiled loss, a module with the loss's parameters. Without a working compiler it runs the flat graph
        uncompiled and says so in a logged warning.

    Raises:
        NotTraceableError: control flow or shapes that depend on values, a tensor that is not registered, or a graph that
            does not give the loss's own values and gradients on the same draws.
        InPlaceError: the loss changes data or parameters in place.
        TypeError: the loss is no module, or holds one that is wrapped in DDP; or the example is no tensor.
        ValueError: an unknown backend, or a mode with another backend than inductor.

    Example:
        >>> from inference.training.objectives import ElboLoss
        >>> from ppl_models import VAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> loss, x = ElboLoss(VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,))), torch.ones(5, 6)
        >>> fast = compile_objective(loss, x, backend="eager")
        >>> def draw(objective):
        ...     torch.manual_seed(0)
        ...     return objective(x)
        >>> bool(torch.allclose(draw(fast), draw(loss))), bool((fast(x) == fast(x)).any())
        (True, False)
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"expected a loss that is a torch module, got {type(loss).__name__}: use ElboLoss(pair), say")
    if any(isinstance(module, DistributedDataParallel) for module in loss.modules()):  # a graph would not sum gradients
        raise TypeError(
            "expected a loss that is not wrapped in DistributedDataParallel, for a graph goes past what averages gradients: "
            "put the compiled loss inside, DistributedDataParallel(compile_objective(loss, x))"
        )
    if not isinstance(example, Tensor):
        raise TypeError(f"expected example data as one tensor, got {type(example).__name__}")
    options: dict[str, Any] = {}
    if backend == "inductor":
        options = options_of(mode)
    elif mode is not None:
        raise ValueError(f"expected a mode with backend 'inductor' only, got {mode!r} with {backend!r}")
    elif isinstance(backend, str) and backend != "eager":
        raise ValueError(f"expected backend 'inductor', 'eager' or a callable, got {backend!r}")
    fast = CompiledObjective(loss, method, None if backend == "eager" else backend, options)
    fast.prepare(example)
    return fast


@dataclass
class _Traced:
    graph: FlatGraph
    compiled: bool = False
    calls: int = 0


class CompiledObjective(nn.Module):
    """A loss as flat graphs, called like the loss; made by :func:`compile_objective`.

    Attributes:
        loss: the loss itself; its parameters and buffers are this module's.
        history: what was traced, compiled or left uncompiled, and the seconds that it took: a sentence each.
    """

    def __init__(self, loss: nn.Module, method: str, backend: str | Backend | None, options: dict[str, Any]) -> None:
        super().__init__()
        self.loss, self.method = loss, method
        self.history: list[str] = []
        self._options = options
        self._backend: Backend | None = self._inductor if isinstance(backend, str) else backend
        self._begin()

    def forward(self, x: Tensor) -> Any:
        """What the loss's method returns at ``x``, on fresh draws.

        Raises:
            NotTraceableError: inside a transform of ``torch.func``, which a graph's gradient does not know.
        """
        if peek_interpreter_stack() is not None:
            raise NotTraceableError(
                "expected a compiled loss outside torch.func's transforms (vmap, grad, ...), which go through no graph of its "
                f"own: transform the loss itself, .loss.{self.method}"
            )
        with _LOCK:
            inputs = self._inputs(x)
            traced = self._traced(inputs)
            if traced is not None and not traced.compiled and self._backend is not None:
                traced.calls += 1
                if traced.calls == COMPILE_AFTER:
                    self._compile(traced, inputs)
            return getattr(self.loss, self.method)(x) if traced is None else traced.graph(inputs)

    def prepare(self, x: Tensor) -> None:
        """Traces and compiles for batches like ``x``, if that has not been done; see :func:`compile_objective`."""
        with _LOCK:
            inputs = self._inputs(x)
            traced = self._traced(inputs)
            if traced is not None and not traced.compiled and self._backend is not None:
                self._compile(traced, inputs)

    def _inputs(self, x: Tensor) -> list[Tensor]:
        """Parameters, buffers and data as they are now."""
        if not self._state.is_current():
            self._begin()
            self._say("modules or ties of the loss are not those that were traced: traced anew", logging.WARNING)
        return [*self._state.read(), x.contiguous()]

    def _begin(self) -> None:
        """No graphs yet, for the modules that there are."""
        self._graphs: dict[Any, _Traced | None] = {}
        self._traced_modules = list(self.loss.modules())
        self._state = ModuleState(self.loss)

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs, which are traced anew: unpickled, torch's would have their random numbers frozen."""
        return vars(self) | {"_graphs": {}}

    def _traced(self, inputs: list[Tensor]) -> _Traced | None:
        key = self._signature(inputs)
        return self._graphs[key] if key in self._graphs else self._meet(key, inputs)

    def _signature(self, inputs: list[Tensor]) -> Any:
        """All that a graph is traced for."""
        device = inputs[-1].device.type
        return (
            torch.is_grad_enabled(),
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            tuple([module.training for module in self._traced_modules]),
            self._state.settings(),
            tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in inputs]),
        )

    def _meet(self, key: Any, inputs: list[Tensor]) -> _Traced | None:
        """Traces for a signature not met before; None, and the loss itself from then on, where there were too many."""
        if self._num_graphs() >= MAX_GRAPHS:
            if None not in self._graphs.values():
                self._say(
                    f"{MAX_GRAPHS} signatures were traced; others run as the loss itself, uncompiled: keep batches to a few "
                    "sizes",
                    logging.WARNING,
                )
            self._graphs[key] = None
            return None
        started = time.perf_counter()
        traced = self._graphs[key] = _Traced(self._trace(inputs))
        self._graphs[self._signature(inputs)] = traced  # a loss may note something at its first call
        first, later = self._num_graphs() == 1, f", to be compiled at its {COMPILE_AFTER}th call"
        self._say(
            f"traced {type(self.loss).__name__}.{self.method} for x of shape {list(inputs[-1].shape)}"
            f"{'' if torch.is_grad_enabled() else ' without gradients'}: {traced.graph.num_operations} operations, "
            f"{time.perf_counter() - started:.1f} s{'' if first or self._backend is None else later}",
            logging.INFO if first else logging.WARNING,
        )
        return traced

    def _num_graphs(self) -> int:
        """Different ones: a graph may stand for two signatures."""
        return len({id(traced) for traced in self._graphs.values()})

    def _compile(self, traced: _Traced, inputs: list[Tensor]) -> None:
        assert self._backend is not None
        started = time.perf_counter()
        try:
            traced.graph.compile(self._backend, inputs, self._lower if self._backend == self._inductor else None)
        except Exception as error:  # whatever a compiler may raise: the flat graph is right without it
            self._backend = None
            reason = " ".join(str(error).split())[:200]
            self._say(f"runs uncompiled, for the compiler failed ({type(error).__name__}: {reason})", logging.WARNING)
            return
        traced.compiled = True
        traced.graph.replays = bool(self._options.get("triton.cudagraphs")) and inputs[-1].is_cuda
        self._say(
            f"compiled for x of shape {list(inputs[-1].shape)} in {time.perf_counter() - started:.1f} s", logging.INFO
        )

    def _inductor(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Any:
        return compile_graph(graph, inputs, self._options)

    def _lower(self, graph: GraphModule, inputs: Sequence[Tensor]) -> GraphModule:
        return lowered(graph, inputs, self._options)

    def _trace(self, inputs: list[Tensor]) -> FlatGraph:
        """The flat graph, checked against the loss; random state and buffers stay as they were."""
        with forked_rng(), _kept(inputs[self._state.num_parameters : -1]) as put_back:
            torch.manual_seed(_SEED)
            with python_noise_refused():
                sample = self._sample(inputs)
            buffers = [inputs[i].clone() for i in sample.mutated]
            gradients = gradients_of_sum(sample.values, [inputs[i] for i in sample.wanted])
            put_back()
            try:
                with pyro.validation_enabled(False), own_attributes_kept(self.loss):  # validation reads values
                    graph = FlatGraph(getattr(self.loss, self.method), self._state.replaced, sample)
                torch.manual_seed(_SEED)
                values = [leaf for leaf in tree_flatten(graph(inputs))[0] if isinstance(leaf, Tensor)]
                found = gradients_of_sum(values, [inputs[i] for i in sample.wanted])
            except (InPlaceError, NotTraceableError):
                raise
            except Exception as error:  # tracing fails in as many ways as programs are written
                raise NotTraceableError(explain(error)) from error
            check_same("value", values, sample.values)
            check_same("new buffer", [inputs[i] for i in sample.mutated], buffers)
            check_same("gradient", found, gradients)
        return graph

    def _sample(self, inputs: list[Tensor]) -> Sample:
        """One call of the loss itself, which also lets it decide what it decides at its first call."""
        state, x = inputs[:-1], inputs[-1]
        before = [(tensor.detach().clone(), tensor._version) for tensor in state]
        leaves, spec = tree_flatten(getattr(self.loss, self.method)(x if x.requires_grad else x.clone()))
        for leaf in leaves:
            if leaf is not None and not isinstance(leaf, (Tensor, *_PLAIN)):
                raise NotTraceableError(
                    f"expected a loss that returns a nest of tensors, got a {type(leaf).__name__} in it, which a graph would "
                    "return as it was for the example: return the tensors themselves"
                )
        mutated = [i for i, tensor in enumerate(state) if _changed(tensor, *before[i])]
        if self._state.write(state):
            raise NotTraceableError(
                "expected parameters and buffers to stay where they are, but the loss puts other tensors in their places, as a "
                "PyroParam does: use copy_ for a buffer and nn.Parameter for a PyroParam, or train it uncompiled"
            )
        if mutated and mutated[0] < self._state.num_parameters:
            raise InPlaceError("expected a loss that leaves parameters as they are, but it changes one in place")
        wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad and torch.is_grad_enabled()]
        return Sample(inputs, wanted, mutated, leaves, spec)

    def _say(self, sentence: str, level: int) -> None:
        self.history.append(sentence)
        _LOG.log(level, "%s", sentence)


def _changed(tensor: Tensor, old: Tensor, version: int) -> bool:
    """Whether a tensor was written to; batch normalisation does so without a change of version."""
    if tensor._version != version:
        return True
    return not torch.equal(*(t.detach().nan_to_num() for t in (tensor, old)))


@contextmanager
def _kept(buffers: list[Tensor]) -> Iterator[Callable[[], None]]:
    """Puts back what buffers hold, on exit and whenever the function that it yields is called."""
    before = [(buffer, buffer.clone(), buffer._version) for buffer in buffers]

    def put_back() -> None:
        with torch.no_grad():
            for buffer, old, version in before:
                if _changed(buffer, old, version):  # writing in vain would spoil a gradient under way
                    buffer.copy_(old)

    try:
        yield put_back
    finally:
        put_back()
