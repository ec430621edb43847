r"""Finite Markov chains as in lecture notes 000, "Brief reminder on Markov chains".

    P_i(t + 1) = sum_j T_ij P_j(t),        P(t) = T^t P(0),        sum_i T_ij = 1,        max |lambda(T)| = 1

T is *column*-stochastic: column j is the law of the next state given state j. (The notes print sum_j T_ij = 1, which
does not go with P(t + 1) = T P(t).) The matrices of :mod:`ppl_models.processes.transitions` are row-stochastic, as in the
papers on discrete diffusion; ``MarkovChain(transitions.dense(t).T)`` is the step t of one of them.

What a chain forgets is decided by its graph. A *closed class* is a set of states that reach one another and that no step
leaves. One closed class: one stationary law pi = T pi. If, besides, the lengths of its cycles have no common divisor
(*aperiodic*), then T^t P(0) -> pi from every start. Both are read off the zero pattern of T, not off rounded eigenvalues.
"""

from __future__ import annotations

import math
from numbers import Integral

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy.sparse.csgraph import breadth_first_order, connected_components
from torch import Tensor

__all__ = ["MarkovChain"]

_TOLERANCE = 1e-6  # of a column's sum: float32 matrices are taken, then normalised in float64
_LONGEST = 2**40  # steps after which a chain is said not to mix in any practical sense


class MarkovChain:
    """A chain with K states and column-stochastic T: P(t + 1) = T P(t), lecture notes 000.

    Args:
        matrix: T, ``[K, K]``, entry (i, j) the probability of a step from j to i. Kept in float64.

    Attributes:
        closed_classes: the closed classes, each a sorted tuple of states; every stationary law is a mixture of theirs.
        periods: of each closed class, the greatest common divisor of its cycle lengths.
        is_irreducible: whether every state reaches every other.
        forgets: whether T^t P(0) tends to one law from every start.

    Raises:
        TypeError: not a tensor.
        ValueError: not square, entries that are negative or not finite, or columns that do not sum to one.

    Example:
        >>> chain = MarkovChain(torch.tensor([[0.9, 0.5], [0.1, 0.5]]))
        >>> chain.stationary    # 5/6 and 1/6
        tensor([0.8333, 0.1667], dtype=torch.float64)
        >>> chain.mixing_time(0.25), chain.describe()
        (2, 'irreducible and aperiodic: every start ends in the one stationary law')
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = _stochastic(matrix)
        self.num_states = len(matrix)
        links = (self.matrix.T > 0).numpy()  # links[j, i]: a step from j to i
        count, label = connected_components(links, connection="strong")
        classes = [np.flatnonzero(label == c) for c in range(count)]
        closed = [c for c in classes if not np.delete(links[c], c, axis=1).any()]
        self.closed_classes = sorted(tuple(c.tolist()) for c in closed)
        self.is_irreducible = count == 1
        self.periods = tuple(_period(links, c) for c in self.closed_classes)
        self.forgets = len(self.closed_classes) == 1 and self.periods == (1,)

    def power(self, t: int) -> Tensor:
        """T^t, ``[K, K]``, by repeated squaring; T^0 = I.

        The columns of each product are normalised. A rounding error in T is then an error of the same relative size in the
        rates of its steps, as if t were t (1 + 1e-16); without, that in the sums would double with every squaring.

        Raises:
            ValueError: t is negative or no whole number.
        """
        if not isinstance(t, Integral) or isinstance(t, bool) or t < 0:
            raise ValueError(f"expected a whole number t >= 0, got {t!r}: a chain runs forwards, in steps")
        result, square, remaining = torch.eye(self.num_states, dtype=torch.float64), self.matrix, int(t)
        while remaining:
            if remaining % 2:
                result = _normalised(square @ result)
            remaining //= 2
            if remaining:
                square = _normalised(square @ square)
        return result

    def propagate(self, probabilities: Tensor, t: int = 1) -> Tensor:
        """P(t) = T^t P(0) (notes 000), ``[..., K]`` to ``[..., K]``."""
        return self._law(probabilities) @ self.power(t).T

    @property
    def stationary(self) -> Tensor:
        """pi = T pi, sum pi = 1, ``[K]``, each entry to relative rounding error (Grassmann, Taksar and Heyman 1985).

        Raises:
            ValueError: several closed classes, so that there is more than one such law.
        """
        if len(self.closed_classes) > 1:
            raise ValueError(
                f"expected a chain with one stationary law, but it is {self.describe()}; "
                "give the chain of one closed class alone"
            )
        states = list(self.closed_classes[0])
        law = torch.zeros_like(self.matrix[0])
        law[states] = _grassmann(self.matrix[states][:, states].T.clone())
        return law

    @property
    def eigenvalues(self) -> Tensor:
        """All K eigenvalues, complex, largest modulus first. The first is 1; |second| is the rate of forgetting."""
        values = torch.linalg.eigvals(self.matrix)
        return values[(-values.abs()).argsort(stable=True)]

    def distance(self, t: int) -> Tensor:
        """Total variation max_j (1/2) sum_i |(T^t)_ij - pi_i|: the worst start's distance to the stationary law.

        Returns:
            A scalar in [0, 1], not increasing in t (Levin and Peres, *Markov Chains and Mixing Times*, eq. 4.22), up to
            rounding: within about K 1e-16 of the true distance for every t.
        """
        return 0.5 * (self.power(t) - self.stationary[:, None]).abs().sum(0).max()

    def mixing_time(self, epsilon: float = 0.25) -> int:
        """The first t with ``distance(t) <= epsilon`` (Levin and Peres, eq. 4.31).

        Raises:
            ValueError: epsilon outside (0, 1), or a chain that never gets there: the message says why.
        """
        if not 0 < epsilon < 1:
            raise ValueError(f"expected epsilon in (0, 1), got {epsilon}")
        if not self.forgets:
            raise ValueError(
                f"expected a chain that forgets its start, but it is {self.describe()}: it has no mixing time"
            )
        high = 1
        while (distance := float(self.distance(high))) > epsilon:
            high *= 2
            if high > _LONGEST:
                raise ValueError(
                    f"expected a distance to pi of {epsilon} within {_LONGEST} steps, got {distance:.3g}: raise epsilon (the "
                    "rounding of distances is about 1e-16)"
                )
        low = high // 2 if high > 1 else -1  # distance(low) > epsilon, unless low = -1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.distance(middle) > epsilon else (low, middle)
        return high

    def describe(self) -> str:
        """Whether and what the chain forgets, in one sentence."""
        if len(self.closed_classes) > 1:
            names = ", ".join(_set(c) for c in self.closed_classes)
            return f"reducible, with closed classes {names}: where it ends depends on where it starts"
        kind = (
            "irreducible"
            if self.is_irreducible
            else f"reducible, with the one closed class {_set(*self.closed_classes)}"
        )
        if self.periods[0] > 1:
            return f"{kind} and periodic with period {self.periods[0]}: its law goes round for ever and has no limit"
        return f"{kind} and aperiodic: every start ends in the one stationary law"

    def model(self, num_steps: int, initial: Tensor, paths: Tensor | None = None, size: int = 1) -> Tensor:
        """P(x_0) prod_{t=1..n} T[x_t, x_{t-1}] as a Pyro program: sites ``x_0`` .. ``x_n`` in one plate ``data``.

        Args:
            num_steps: n >= 0.
            initial: P(0), ``[K]``.
            paths: int64 ``[B, n + 1]``, observed if given; otherwise paths are drawn.
            size: how many paths to draw.

        Returns:
            The paths, int64 ``[*particles, B, n + 1]``. Impossible steps score minus infinity, exactly.

        Raises:
            ValueError: states outside 0..K-1, paths of another shape, a negative number of steps, no paths to draw, or no
                law ``initial``.
            TypeError: paths that are not int64.
        """
        if not isinstance(num_steps, Integral) or isinstance(num_steps, bool) or num_steps < 0:
            raise ValueError(f"expected a whole num_steps >= 0, got {num_steps!r}: a chain runs forwards, in steps")
        if paths is not None:
            self._check_paths(paths)
        elif not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"expected a whole size >= 1, how many paths to draw, got {size!r}")
        log_step = self.matrix.T.log()
        observed = [None] * (num_steps + 1) if paths is None else list(paths.unbind(-1))
        if len(observed) != num_steps + 1:
            raise ValueError(f"expected paths of {num_steps + 1} states, x_0 to x_{num_steps}, got {len(observed)}")
        with pyro.plate("data", size if paths is None else paths.shape[-2]):
            x = pyro.sample("x_0", dist.Categorical(logits=self._law(initial).log()), obs=observed[0])
            states = [x]
            for t in range(1, num_steps + 1):
                x = pyro.sample(f"x_{t}", dist.Categorical(logits=log_step[x]), obs=observed[t])
                states.append(x)
        return torch.stack(torch.broadcast_tensors(*states), -1)

    def _check_paths(self, paths: Tensor) -> None:
        if not isinstance(paths, Tensor):
            raise TypeError(f"expected paths as a tensor, got {type(paths).__name__}: convert with torch.as_tensor")
        if paths.dtype != torch.long:
            raise TypeError(f"expected paths of states (int64), got {paths.dtype}: convert with .long()")
        if paths.dim() < 2 or paths.shape[-2] < 1:
            raise ValueError(
                f"expected paths of shape [B, n + 1], B >= 1, got {list(paths.shape)}: a single path is paths[None]"
            )
        outside = (paths < 0) | (paths >= self.num_states)
        if outside.any():
            raise ValueError(
                f"expected states in 0..{self.num_states - 1}, got {int(paths[outside][0])}: recode the states, or give the "
                "chain more"
            )

    def _law(self, probabilities: Tensor) -> Tensor:
        if isinstance(probabilities, Tensor):
            _refuse_complex(probabilities)
        try:
            law = torch.as_tensor(probabilities, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"expected probabilities of {self.num_states} states, got {probabilities!r}") from error
        sums = law.sum(-1)
        if (
            law.shape[-1:] != (self.num_states,)
            or not bool((law >= 0).all())
            or not bool(((sums - 1).abs() <= _TOLERANCE).all())
        ):
            raise ValueError(
                f"expected probabilities of shape [..., {self.num_states}], >= 0 and summing to one, got shape "
                f"{list(law.shape)} with sums from {float(sums.min()):.6g} to {float(sums.max()):.6g}: normalise them"
            )
        return law / sums[..., None]


def _stochastic(matrix: Tensor) -> Tensor:
    """The matrix in float64 with columns that sum to one to rounding, or a refusal that says what is wrong."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"expected the matrix as a tensor, got {type(matrix).__name__}: convert with torch.as_tensor")
    if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1] or len(matrix) < 1:
        raise ValueError(f"expected a square matrix [K, K], got shape {list(matrix.shape)}")
    _refuse_complex(matrix)
    matrix = matrix.detach().to("cpu", torch.float64)
    bad = ~(matrix.isfinite() & (matrix >= 0))
    if bad.any():
        i, j = bad.nonzero()[0].tolist()
        raise ValueError(f"expected probabilities >= 0, but entry ({i}, {j}) is {matrix[i, j]:.6g}")
    columns, rows = matrix.sum(0), matrix.sum(1)
    if ((columns - 1).abs() > _TOLERANCE).any():
        j = int((columns - 1).abs().argmax())
        remedy = "pass its transpose" if bool(((rows - 1).abs() <= _TOLERANCE).all()) else "normalise the columns"
        raise ValueError(
            f"expected columns that sum to one, as in P(t + 1) = T P(t), but column {j} sums to {columns[j]:.6g}: {remedy}"
        )
    return _normalised(matrix)


def _refuse_complex(probabilities: Tensor) -> None:
    if probabilities.is_complex():
        raise TypeError(f"expected real probabilities, got {probabilities.dtype}: pass the real part, if that is meant")


def _normalised(matrix: Tensor) -> Tensor:
    """The matrix with columns that sum to one."""
    return matrix / matrix.sum(0)


def _grassmann(rows: Tensor) -> Tensor:
    """The stationary law of an irreducible row-stochastic matrix by elimination of states, without a subtraction."""
    n = len(rows)
    for k in range(n - 1, 0, -1):
        rows[:k, k] /= rows[k, :k].sum()
        rows[:k, :k] += rows[:k, k, None] * rows[k, :k]
    law = torch.ones_like(rows[0])
    for k in range(1, n):
        law[k] = law[:k] @ rows[:k, k]
    return law / law.sum()


def _period(links: np.ndarray, states: tuple[int, ...]) -> int:
    """gcd over all links j -> i of depth(j) + 1 - depth(i), with depths of a breadth-first tree."""
    inside = links[np.ix_(states, states)]
    order, parents = breadth_first_order(inside, 0)
    depth = np.zeros(len(states), dtype=np.int64)
    for node in order[1:]:
        depth[node] = depth[parents[node]] + 1
    sources, targets = np.nonzero(inside)
    return math.gcd(*(depth[sources] + 1 - depth[targets]).tolist())


def _set(states: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, states[:6]))
    return f"{{{shown}, ...}}" if len(states) > 6 else f"{{{shown}}}"
