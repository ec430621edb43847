"""Discrete diffusion by enumeration of all paths x_1..x_T of a joint state space, with loops and dense matrices.

States of D dimensions are numbered 0..K^D - 1, the last dimension fastest. Everything is a plain sum or product of
probabilities in float64, differentiable in the tables of logits; nothing here knows of log space, structure or Pyro.
"""

import itertools

import numpy as np
import torch


def uniform_matrices(classes: int, betas: list[float]) -> np.ndarray:
    """[Q_t]_ij, rows sum to one: 1 - (K - 1)/K beta on the diagonal, beta/K elsewhere."""
    q = np.zeros((len(betas), classes, classes))
    for t, i, j in np.ndindex(q.shape):
        q[t, i, j] = 1 - (classes - 1) / classes * betas[t] if i == j else betas[t] / classes
    return q


def absorbing_matrices(classes: int, betas: list[float]) -> np.ndarray:
    """The last state keeps all; every other one stays with probability 1 - beta and falls into it with beta."""
    q = np.zeros((len(betas), classes, classes))
    for t, i in np.ndindex(q.shape[:2]):
        if i == classes - 1:
            q[t, i, i] = 1
        else:
            q[t, i, i], q[t, i, classes - 1] = 1 - betas[t], betas[t]
    return q


def gaussian_matrices(classes: int, betas: list[float]) -> np.ndarray:
    """arXiv:2107.03006, eq. 8, entry by entry, the diagonal from the row sum."""
    q = np.zeros((len(betas), classes, classes))
    for t, i, j in np.ndindex(q.shape):
        if i != j:
            weights = [np.exp(-4 * n**2 / ((classes - 1) ** 2 * betas[t])) for n in range(-classes + 1, classes)]
            q[t, i, j] = np.exp(-4 * (i - j) ** 2 / ((classes - 1) ** 2 * betas[t])) / sum(weights)
    for t, i in np.ndindex(q.shape[:2]):
        q[t, i, i] = 1 - q[t, i].sum()
    return q


class Enumeration:
    """A D3PM with given one-dimensional steps ``[T, K, K]``, prior ``[K]`` and x_0 laws ``[T, K^D, D, K]``.

    ``x_0_laws[t - 1, s, d]`` is p(x_0^d | x_t = s), which the model uses as it is at t = 1.
    """

    def __init__(self, steps: np.ndarray, prior: np.ndarray, x_0_laws: torch.Tensor, dims: int) -> None:
        self.last, self.classes, _ = steps.shape
        self.dims = dims
        self.states = list(itertools.product(range(self.classes), repeat=dims))
        one = torch.as_tensor(steps)
        self.cumulative = [torch.eye(self.classes)]
        for t in range(self.last):
            self.cumulative.append(self.cumulative[-1] @ one[t])
        self.forward = [self._product([one[t]] * dims) for t in range(self.last)]  # [S, S] of each step
        self.marginal = [self._product([c] * dims) for c in self.cumulative]
        self.prior = torch.stack([torch.as_tensor(prior)[list(s)].prod() for s in self.states])
        self.reverse = [self._reverse(one[t - 1], x_0_laws[t - 1], t) for t in range(1, self.last + 1)]

    def _product(self, matrices: list[torch.Tensor]) -> torch.Tensor:
        result = torch.ones(1, 1)
        for m in matrices:
            result = torch.kron(result, m)
        return result

    def _reverse(self, step: torch.Tensor, law: torch.Tensor, t: int) -> torch.Tensor:
        """[S, S]: p(x_{t-1} | x_t), row x_t: sum over x_0 of q(x_{t-1}, x_t | x_0) p(x_0 | x_t), or at t = 1 p(x_0 | x_1)."""
        rows = []
        for s, state in enumerate(self.states):
            row = torch.ones(1)
            for d in range(self.dims):
                if t == 1:
                    p = law[s, d]
                else:
                    joint = [
                        sum(
                            law[s, d, k] * self.cumulative[t - 1][k, j] * step[j, state[d]] for k in range(self.classes)
                        )
                        for j in range(self.classes)
                    ]
                    total = sum(joint)
                    p = torch.stack(joint) / (total if float(total.detach()) > 0 else 1.0)
                row = torch.kron(row, p)
            rows.append(row)
        return torch.stack(rows)

    def paths(self) -> torch.Tensor:
        """All (x_1, ..., x_T) as state numbers, [S^T, T]."""
        return torch.tensor(list(itertools.product(range(len(self.states)), repeat=self.last)))

    def q(self, x_0: int) -> torch.Tensor:
        """Each path's probability under the forward process."""
        paths, result, previous = self.paths(), 1.0, torch.tensor(x_0)
        for t in range(self.last):
            result = result * self.forward[t][previous, paths[:, t]]
            previous = paths[:, t]
        return result

    def p(self, x_0: int) -> torch.Tensor:
        """Each path's probability under the model, jointly with x_0."""
        paths = self.paths()
        result = self.prior[paths[:, -1]]
        for t in range(self.last, 1, -1):
            result = result * self.reverse[t - 1][paths[:, t - 1], paths[:, t - 2]]
        return result * self.reverse[0][paths[:, 0], x_0]

    def log_evidence(self, x_0: int) -> torch.Tensor:
        """log p(x_0), the sum over all paths."""
        return self.p(x_0).sum().log()

    def elbo(self, x_0: int) -> torch.Tensor:
        """sum over paths of q log(p / q)."""
        q, p = self.q(x_0), self.p(x_0)
        possible = q > 0
        return (q[possible] * (p[possible].log() - q[possible].log())).sum()

    def terms(self, x_0: int) -> list[torch.Tensor]:
        """L_0, ..., L_T, each from the joint law of the two states that it is about."""
        result = [-self._expected(self.marginal[1][x_0], self.reverse[0][:, x_0].log())]
        for t in range(1, self.last):
            joint = self.marginal[t][x_0][:, None] * self.forward[t]  # x_t, x_{t+1}
            q = joint / joint.sum(0).where(joint.sum(0) > 0, torch.ones(()))
            ratio = torch.where(joint > 0, q.log() - self.reverse[t].T.where(joint > 0, torch.ones(())).log(), 0.0)
            result.append((joint * ratio).sum())
        q = self.marginal[self.last][x_0]
        possible = q > 0
        return [*result, (q[possible] * (q[possible].log() - self.prior[possible].log())).sum()]

    @staticmethod
    def _expected(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        possible = weights > 0
        return (weights[possible] * values[possible]).sum()
