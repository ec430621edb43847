"""KL divergences in closed form, and when a site's term equals one.

The term of a latent site z is E_q[log p(z | pa_p) - log q(z | pa_q)], with pa_p and pa_q its parents in model and guide.
With the parents drawn from the guide it equals -KL(q(z | pa_q) || p(z | pa_p)) exactly if, given those parents, z still
has the law q(z | pa_q): that is, if no parent of z in the model descends from z in the guide. The bottom-up guide
q(z_1 | x) q(z_2 | z_1) of a hierarchical VAE fails this at z_1, whose model parent z_2 descends from it; a bound that
used the KL there would be wrong, not merely noisy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributions import kl_divergence
from torch.distributions.kl import _KL_REGISTRY

from inference.bounds.dependencies import Parents, descendants
from inference.bounds.sites import Site

KNOWN_LAWS = ("torch.distributions.", "pyro.distributions.torch")


class NoClosedFormError(Exception):
    """Why no closed form is used; the message is the sentence shown to the user."""


def refuse_by_structure(name: str, model: Parents, guide: Parents) -> None:
    """Raises :class:`NoClosedFormError` where -KL(q || p) at ``name`` would not be the site's term."""
    below = descendants(name, guide)
    wrong = [parent for parent in model.get(name, ()) if parent in below]
    if wrong:
        raise NoClosedFormError(
            f"refused: {_listed(wrong)}, above {name} in the model, {'descend' if len(wrong) > 1 else 'descends'} "
            f"from it in the guide, so -KL of the factors is not this term's expectation"
        )


def site_divergence(guide_site: Site, model_site: Site) -> Tensor:
    """KL(q || p) of one site in nats, scaled and masked as the site is, of the site's batch shape.

    Raises:
        NoClosedFormError: no closed form is known for these two laws, or scale or mask differ between them.
    """
    q, p = guide_site["fn"], model_site["fn"]
    for side in ("scale", "mask"):
        if not _same(guide_site[side], model_site[side]):
            name = guide_site["name"]
            raise NoClosedFormError(f"refused: model and guide have different {side}s at {name}, so the term is no KL")
    if is_point_mass(q) and (dist.Delta, type(_unwrapped(p)[0])) not in _KL_REGISTRY:
        raise NoClosedFormError(
            f"no closed form: the guide fixes {guide_site['name']} as a function of what is above it, nothing to integrate"
        )
    kl = divergence(q, p)
    expected = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
    kl = kl.expand(expected) if kl.shape != expected else kl
    mask = guide_site["mask"]
    if mask is not None:
        kl = torch.where(torch.as_tensor(mask, device=kl.device), kl, torch.zeros_like(kl))
    kl = kl * guide_site["scale"]
    for side in ("scale", "mask"):
        kl = _nan_unless_same(kl, guide_site[side], model_site[side])
    return kl


def is_point_mass(law: Any) -> bool:
    """Whether a law is a Delta, as it is or within wrappers."""
    return isinstance(_unwrapped(law)[0], dist.Delta)


def site_entropy(guide_site: Site) -> Tensor:
    """H(q) = -E_q[log q] of a guide site given its parents, in nats, scaled as the site is, of the site's batch shape.

    Whatever descends from the site, this is the expectation of its -log q: the draw has the law q given its parents. So it
    needs no test of structure, unlike a KL.

    Raises:
        NoClosedFormError: no closed form is known, or the site is masked.
    """
    law, dims, mask = _unwrapped(guide_site["fn"])
    if mask is not None or guide_site["mask"] is not None:
        raise NoClosedFormError("only in the guide, and masked: minus its log-density, averaged over the draws")
    try:
        if not type(law).log_prob.__module__.startswith(KNOWN_LAWS):
            raise NotImplementedError
        return sum_rightmost(law.entropy(), dims) * guide_site["scale"]
    except (NotImplementedError, RuntimeError, ValueError):  # no entry, or one that cannot take these shapes
        raise NoClosedFormError("only in the guide: minus its log-density, averaged over the draws") from None


def divergence(q: dist.TorchDistribution, p: dist.TorchDistribution) -> Tensor:
    """KL(q || p) in nats, of shape ``batch_shape``.

    Beside PyTorch's table it knows a full Gaussian q against a diagonal p, and classes by their logits, for which the
    table has infinity as soon as a probability of p is too small for a float.

    Raises:
        NoClosedFormError: no closed form is known, or a law defines its own log-density, which PyTorch's table, looking
            up by base class, would take no notice of.

    Example:
        >>> one = torch.ones(2)
        >>> q = dist.Normal(one, one).to_event(1)
        >>> float(divergence(q, dist.Normal(0 * one, one).to_event(1)))
        1.0
    """
    (q_base, q_dims, q_mask), (p_base, p_dims, p_mask) = _unwrapped(q), _unwrapped(p)
    if not _same(q_mask, p_mask):
        raise NoClosedFormError("refused: the two laws are masked differently, so the term is no KL")
    if len(q.event_shape) != len(p.event_shape):
        raise NoClosedFormError(
            f"refused: the guide's event has {len(q.event_shape)} dims and the model's {len(p.event_shape)}: "
            "declare the same with .to_event()"
        )
    names = f"KL({type(q_base).__name__} || {type(p_base).__name__})"
    for law in (*_levels(q), *_levels(p)):
        registered = (law is q_base or law is p_base) and (type(q_base), type(p_base)) in _KL_REGISTRY
        if not registered and not type(law).log_prob.__module__.startswith(KNOWN_LAWS):
            raise NoClosedFormError(
                f"no closed form is known for {names}: {type(law).__name__} has a density of its own"
            )
    if isinstance(q_base, dist.ContinuousBernoulli) and isinstance(p_base, dist.Uniform):
        raise NoClosedFormError(f"refused: PyTorch's {names} is infinite where the divergence is finite")
    batch = torch.broadcast_shapes(q.batch_shape, p.batch_shape)  # not every entry of PyTorch's table broadcasts
    q_base, p_base = _expanded(q_base, batch, q_dims), _expanded(p_base, batch, p_dims)
    try:
        if isinstance(q_base, dist.MultivariateNormal) and isinstance(p_base, dist.Normal) and p_dims:
            kl = sum_rightmost(_full_against_diagonal(q_base, p_base), p_dims - 1)
        elif isinstance(q_base, dist.Normal) and isinstance(p_base, dist.MultivariateNormal) and q_dims:
            full = dist.MultivariateNormal(q_base.loc, scale_tril=torch.diag_embed(q_base.scale))
            kl = sum_rightmost(kl_divergence(full, p_base), p_dims)
        elif _are_classes(q_base, p_base):
            kl = sum_rightmost(_of_classes(q_base, p_base), min(q_dims, p_dims))
        else:
            with torch.enable_grad():  # the exponential-family entries differentiate inside
                kl = sum_rightmost(kl_divergence(q_base, p_base), min(q_dims, p_dims))
    except (
        NotImplementedError,
        RuntimeError,
        ValueError,
    ):  # no entry in the table, or one that cannot take these shapes
        raise NoClosedFormError(f"no closed form is known for {names} of these shapes") from None
    if kl.dim() > len(batch):
        raise NoClosedFormError(f"no closed form is known for {names} with these event dimensions")
    if q_mask is not None:
        kl = torch.where(torch.as_tensor(q_mask), kl, torch.zeros_like(kl))
    return _nan_unless_same(kl, q_mask, p_mask)


def law_name(fn: Any) -> str:
    """The name of a law without its wrappers, for messages."""
    return type(_unwrapped(fn)[0]).__name__


def _expanded(law: Any, batch: torch.Size, event_dims: int) -> Any:
    """A base law expanded to a batch shape, its last ``event_dims`` batch dims being event dims."""
    own = law.batch_shape[len(law.batch_shape) - event_dims :]
    return law if law.batch_shape == batch + own else law.expand(batch + own)


def _full_against_diagonal(q: dist.MultivariateNormal, p: dist.Normal) -> Tensor:
    """KL(N(m, S) || N(mu, diag s^2)) = 1/2 [sum (S_ii + (m - mu)_i^2) / s_i^2 - d + sum log s_i^2 - log |S|]."""
    tril = q.scale_tril
    variance = tril.square().sum(-1)
    log_det = 2 * torch.diagonal(tril, dim1=-2, dim2=-1).log().sum(-1)
    ratio = (variance + (q.loc - p.loc).square()) / p.scale.square()
    return 0.5 * (ratio.sum(-1) - q.event_shape[0] + 2 * p.scale.log().expand_as(q.loc).sum(-1) - log_det)


def _are_classes(q: Any, p: Any) -> bool:
    """Whether both are laws of classes, as indices or one-hot, without an entry of their own in the table."""
    kinds = (torch.distributions.Categorical, torch.distributions.OneHotCategorical)
    return any(isinstance(q, k) and isinstance(p, k) for k in kinds) and (type(q), type(p)) not in _KL_REGISTRY


def _of_classes(q: Any, p: Any) -> Tensor:
    """KL = sum_k q_k (log q_k - log p_k), with 0 log 0 = 0."""
    log_p: Tensor = p.logits
    own = vars(getattr(p, "_categorical", p))
    if (
        "probs" in own
    ):  # a zero among given probabilities, whose logits torch holds above this; not one that underflowed
        excluded = (own["probs"] == 0) & (log_p > math.log(torch.finfo(log_p.dtype).tiny))
        log_p = torch.where(excluded, -math.inf, log_p)
    weights = q.probs
    return (weights * torch.where(weights == 0, 0.0, q.logits - log_p)).sum(-1)


def _unwrapped(fn: Any) -> tuple[Any, int, Any]:
    """The innermost law, how many of its batch dims are event dims, and the mask put on it."""
    dims, mask = 0, None
    while True:
        if isinstance(fn, torch.distributions.Independent):
            dims += fn.reinterpreted_batch_ndims
            fn = fn.base_dist
        elif isinstance(fn, dist.MaskedDistribution):
            if dims and isinstance(fn._mask, Tensor):
                return fn, dims, mask  # a mask inside an event: left as it is, for which no closed form is known
            mask = fn._mask if mask is None else mask & fn._mask
            fn = fn.base_dist
        else:
            return fn, dims, mask


def _levels(law: Any) -> Iterator[Any]:
    """A law and all that it is built on: what it wraps, and the base of a transformed law."""
    while law is not None:
        yield law
        law = getattr(law, "base_dist", None)


def _unreadable(a: Any, b: Any) -> bool:
    """Whether scales or masks stand in for those that a traced graph will compute."""
    return isinstance(a, FakeTensor) and isinstance(b, FakeTensor)


def _nan_unless_same(kl: Tensor, a: Any, b: Any) -> Tensor:
    """NaN where a graph finds two scales or masks to differ, though they were the same when it was traced."""
    return torch.where((a == b).all(), kl, math.nan) if a is not b and _unreadable(a, b) else kl


def _same(a: Any, b: Any) -> bool:
    """Whether two scales or masks are the same; of a traced graph's, which cannot be read, they are taken to be."""
    if a is b or _unreadable(a, b):
        return True
    if a is None or b is None:
        other = b if a is None else a
        return bool(torch.as_tensor(other).all()) if torch.as_tensor(other).dtype == torch.bool else False
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    try:
        return bool((a == b).all())
    except RuntimeError:  # shapes that do not broadcast
        return False


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
