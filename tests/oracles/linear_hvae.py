"""The linear-Gaussian hierarchy by dense linear algebra in numpy: one joint Gaussian of all layers and x, and conditioning.

Sites are numbered 0 (x), 1 .. L from the data up and lie in this order in the joint vector. Nothing is worked out layer by
layer except the guides, which are chains by definition: each law is that of one block given others under the joint.
"""

from __future__ import annotations

import numpy as np

from tests.oracles.gaussian import kl

Array = np.ndarray


def joint(weights: list[Array], biases: list[Array], scales: list[float]) -> tuple[Array, Array, list[slice]]:
    """Mean, covariance and blocks of (x, z_1, .., z_L): every block an affine map of one vector of unit normals."""
    dims = [weights[0].shape[0], *(w.shape[1] for w in weights)]
    ends = np.cumsum([0, *dims])
    blocks = [slice(ends[i], ends[i + 1]) for i in range(len(dims))]
    mean, factor = np.zeros(ends[-1]), np.zeros((ends[-1], ends[-1]))
    factor[blocks[-1], blocks[-1]] = np.eye(dims[-1])
    for layer in range(len(weights), 0, -1):
        below, above, weight = blocks[layer - 1], blocks[layer], weights[layer - 1]
        mean[below] = weight @ mean[above] + biases[layer - 1]
        factor[below] = weight @ factor[above]
        factor[below, below] += scales[layer - 1] * np.eye(dims[layer - 1])
    return mean, factor @ factor.T, blocks


def conditional(mean: Array, cov: Array, target: list[int], given: list[int]) -> tuple[Array, Array, Array]:
    """Gain G, offset c and covariance of N(target; G given + c, S) under N(mean, cov), by index lists."""
    gain = cov[np.ix_(target, given)] @ np.linalg.inv(cov[np.ix_(given, given)])
    return gain, mean[target] - gain @ mean[given], cov[np.ix_(target, target)] - gain @ cov[np.ix_(given, target)]


def log_evidence(weights: list[Array], biases: list[Array], scales: list[float], x: Array) -> float:
    """log N(x; mean_x, cov_xx)."""
    mean, cov, blocks = joint(weights, biases, scales)
    m, s = mean[blocks[0]], cov[blocks[0], blocks[0]]
    return float(-0.5 * ((x - m) @ np.linalg.inv(s) @ (x - m) + np.linalg.slogdet(s)[1] + len(x) * np.log(2 * np.pi)))


def elbo(
    weights: list[Array],
    biases: list[Array],
    scales: list[float],
    x: Array,
    guide: str,
    exact: bool,
    shrink: float = 1.0,
) -> float:
    """log p(x) - KL(q || p(z | x)), with q composed from its conditionals into one Gaussian of all latents.

    ``guide`` says in which order the latents are drawn, each given the one before it and, top-down, x. ``exact`` takes each
    conditional's covariance as it is, otherwise the inverse of the diagonal of its precision; ``shrink`` scales the
    standard deviations of all.
    """
    mean, cov, blocks = joint(weights, biases, scales)
    index = [list(range(b.start, b.stop)) for b in blocks]
    depth, latents = len(weights), len(mean) - len(x)
    order = range(1, depth + 1) if guide == "bottom_up" else range(depth, 0, -1)
    q_mean, q_factor = np.zeros(latents), np.zeros((latents, latents))
    before: int | None = None
    for layer in order:
        given = [*(index[before] if before else []), *(index[0] if guide == "top_down" or before is None else [])]
        gain, offset, s = conditional(mean, cov, index[layer], given)
        own = slice(blocks[layer].start - len(x), blocks[layer].stop - len(x))
        q_mean[own] = offset
        if before is not None:
            above = slice(blocks[before].start - len(x), blocks[before].stop - len(x))
            width = len(index[before])
            q_mean[own] += gain[:, :width] @ q_mean[above] + gain[:, width:] @ (x if guide == "top_down" else x[:0])
            q_factor[own] = gain[:, :width] @ q_factor[above]
        else:
            q_mean[own] += gain @ x
        tril = np.linalg.cholesky(s) if exact else np.diag(np.diag(np.linalg.inv(s)) ** -0.5)
        q_factor[own, own] += shrink * tril
        before = layer
    all_latents, all_data = list(range(len(x), len(mean))), index[0]
    gain, offset, posterior = conditional(mean, cov, all_latents, all_data)
    return log_evidence(weights, biases, scales, x) - kl(q_mean, q_factor @ q_factor.T, gain @ x + offset, posterior)
