"""The densities that annealing needs, of any pair of Pyro programs, on unconstrained latents.

The continuous latents z of one datum are mapped to a vector u in R^D by the inverses of PyTorch's ``biject_to`` of their
sites' supports. Every density carries the Jacobian,

    log q_0(u) = log q_0(z(u)) + log |dz/du|        log p(x, u) = log p(x, z(u)) + log |dz/du|,

so that its integral over u is that over z; without it, transitions in u would keep another law invariant. q_0 is the guide,
or the prior: the product of the model's latent factors. Arrays are [C, B, D]: chains, data (the plates that all sites
share, flattened) and unconstrained latents. One evaluation runs the programs once, all chains under an outer plate, if
:func:`inference.bounds.particles.make_plan` found that they allow it, and once a chain otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import sum_rightmost
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from inference.bounds.hmc import State
from inference.bounds.importance_checks import missed_by_guide
from inference.bounds.particles import Particles, Plan, Program, collect, located_draw
from inference.bounds.sites import PARTICLES, PairError, Site, bare_law, is_deterministic, sample_sites
from inference.bounds.support import ZeroOutsideSupport, in_support, opts_out, support_of
from inference.bounds.whole_densities import is_scaled

Start = Literal["guide", "prior"]


class LatentDensity:
    """log q_0(u), log p(x, u) and their gradients: ``density(u)`` is a :class:`inference.bounds.hmc.State`.

    Args:
        plan: the programs, as checked by ``make_plan``.
        start: q_0, "guide" or "prior".

    Raises:
        PairError: no latents, no plate that all sites share, a subsampled plate, or a latent that is discrete, fixed,
            scaled, masked or without a map to R^D; the message names the site.

    Example:
        >>> from inference.bounds.particles import make_plan
        >>> from ppl_models import LinearGaussian
        >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)  # the guide is the posterior
        >>> x = pair.model(size=4).detach()
        >>> density = LatentDensity(make_plan(pair.model, pair.guide, (x,), {}), "guide")
        >>> state = density(torch.randn(5, 4, 2))
        >>> bool(torch.allclose(state.log_joint - state.log_start, pair.log_evidence(x).double(), atol=1e-4))
        True
    """

    def __init__(self, plan: Plan, start: Start) -> None:
        _check(plan, start)
        self.plan = plan
        self.start = start
        observed = {name: site for name, site in plan.prototype.model.items() if site["is_observed"]}
        self.unchecked = {name for name, site in observed.items() if opts_out(site["fn"])}
        shared = [plan.nesting + dim for _, dim, _ in plan.shared]
        self.layouts = {name: _Layout.of(site, plan.nesting, shared) for name, site in _latents(plan).items()}
        self.evaluations = 0

    def draw(self, num_chains: int) -> Tensor:
        """u ~ q_0, ``[C, B, D]``.

        Raises:
            NotANumberError: a log-density is NaN at a draw; the message names site and datum.
            PairError: the guide draws values outside the model's support; the message names the site.
        """
        if self.plan.vectorized:
            return self._encode(self._particles(num_chains), num_chains)
        return torch.cat([self._encode(self._particles(None), 1) for _ in range(num_chains)])

    def encode(self, values: dict[str, Tensor]) -> Tensor:
        """u of given latents, one value a datum and site, ``[1, B, D]``."""
        trace = poutine.trace(poutine.condition(self.plan.model, data=values)).get_trace(
            *self.plan.args, **self.plan.kwargs
        )
        sites: dict[str, Site] = {name: {**trace.nodes[name], "value": values[name]} for name in self.layouts}
        return self._encode(Particles(sites, {}, 1, None), 1)

    def __call__(self, u: Tensor) -> State:
        """Evaluates both densities and their gradients at u ``[C, B, D]``; values in float64."""
        self.evaluations += 1
        with torch.enable_grad(), pyro.validation_enabled(False):  # a trajectory may step where laws refuse arguments
            u = u.detach().requires_grad_()
            parts = [u] if self.plan.vectorized else list(u.split(1))
            starts, joints = zip(*map(self._log_densities, parts), strict=True)
            log_start, log_joint = torch.cat(starts), torch.cat(joints)
            grad_start, grad_joint = (
                torch.autograd.grad(log.sum(), u, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
                for log in (log_start, log_joint)
            )
        return State(u.detach(), log_start.detach(), log_joint.detach(), grad_start, grad_joint)

    def _particles(self, count: int | None) -> Particles:
        """Draws of q_0 with the model's sites at them; under a plate unless ``count`` is None."""
        plan = self.plan
        dim = None if count is None else -plan.nesting - 1
        if self.start == "guide":
            return located_draw(self._within_support(plan.model), plan.guide, plan.args, plan.kwargs, count or 1, dim)
        model = self._within_support(plan.model)
        if dim is None:
            trace = poutine.trace(model).get_trace(*plan.args, **plan.kwargs)
        else:
            with pyro.plate(PARTICLES, count, dim=dim):
                trace = poutine.trace(model).get_trace(*plan.args, **plan.kwargs)
        return collect(trace, poutine.Trace(), count or 1, dim)

    def _within_support(self, program: Program) -> Program:
        """A program whose sites have density zero outside their support, where HMC then rejects."""
        return ZeroOutsideSupport(self.unchecked)(program)

    def _encode(self, particles: Particles, count: int) -> Tensor:
        rows = []
        for name, layout in self.layouts.items():
            site = particles.model[name]
            inside = in_support(
                site["fn"], site["value"]
            )  # first, for the inverse of an interval's map clamps what is outside
            block = biject_to(support_of(site["fn"])).inv(site["value"])
            if not bool(inside.all()) or not bool(block.isfinite().all()):
                raise PairError(
                    f"expected latents inside the model's support at site {name!r}, got a value on or outside its border: "
                    "give model and guide laws of the same support there, or start from the prior"
                )
            rows.append(layout.flatten(block, count))
        return torch.cat(rows, -1)

    def _log_densities(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log q_0 and log p(x, .) at u, ``[C, B]`` each."""
        plan, count = self.plan, u.shape[0]
        widths = [layout.width for layout in self.layouts.values()]
        blocks = {
            name: layout.unflatten(rows, plan.vectorized)
            for (name, layout), rows in zip(self.layouts.items(), u.split(widths, -1), strict=True)
        }
        latents, program = _FromUnconstrained(blocks), self._within_support(plan.model)
        if plan.vectorized:
            with latents, pyro.plate(PARTICLES, count, dim=-plan.nesting - 1):
                model = poutine.trace(program).get_trace(*plan.args, **plan.kwargs)
        else:
            with latents:
                model = poutine.trace(program).get_trace(*plan.args, **plan.kwargs)
        jacobian = sum((self._by_datum(j, count) for j in latents.log_jacobians.values()), torch.zeros(()))
        model.compute_log_prob()
        terms = {name: site for name, site in sample_sites(model).items() if not is_deterministic(site)}
        by_site = {name: self._by_datum(site["log_prob"], count) for name, site in terms.items()}
        if self.start == "prior":
            log_start = sum((log for name, log in by_site.items() if name in self.layouts), torch.zeros(()))
        else:
            replayed = poutine.replay(self._within_support(plan.guide), trace=model)
            guide = poutine.trace(replayed).get_trace(*plan.args, **plan.kwargs)
            guide.compute_log_prob()
            logs = [self._by_datum(guide.nodes[name]["log_prob"], count) for name in self.layouts]
            log_start = torch.stack(logs).sum(0)
        return log_start + jacobian, torch.stack(list(by_site.values())).sum(0) + jacobian

    def _by_datum(self, log_prob: Tensor, count: int) -> Tensor:
        """Sums over plates inside a datum, differentiably and in float64: ``[C, B]``, data in the order of the layouts."""
        sizes = {dim: size for _, dim, size in self.plan.shared}
        rank = self.plan.nesting + 1
        total = log_prob.double()
        total = total.reshape((1,) * (rank - total.dim()) + total.shape)
        total = total.expand(count, *(sizes.get(i - rank, n) for i, n in enumerate(total.shape[1:], 1)))
        inner = [i for i in range(1, rank) if i - rank not in sizes]
        return (total.sum(inner) if inner else total).reshape(count, -1)


@dataclass(frozen=True)
class _Layout:
    """How one site's unconstrained value lies in rows ``[C, B, width]``: batch dims padded to the deepest plate."""

    shape: tuple[int, ...]  # of one particle's value, as the programs hold it
    batch: tuple[int, ...]
    event: tuple[int, ...]
    order: tuple[int, ...]  # batch dims, those of the shared plates first
    num_data: int

    @classmethod
    def of(cls, site: Site, nesting: int, shared: list[int]) -> _Layout:
        block = biject_to(support_of(site["fn"])).inv(site["value"])
        own = tuple(site["fn"].batch_shape)
        batch = (1,) * (nesting - len(own)) + own
        inner = [i for i in range(nesting) if i not in shared]
        num_data = math.prod(batch[i] for i in shared)
        return cls(tuple(block.shape), batch, tuple(block.shape[len(own) :]), (*shared, *inner), num_data)

    @property
    def width(self) -> int:
        """Unconstrained numbers per datum."""
        return math.prod(self.batch) * math.prod(self.event) // self.num_data

    def flatten(self, block: Tensor, count: int) -> Tensor:
        """``[C, *batch, *event]``, or less that broadcasts to it, as rows."""
        block = block.expand(count, *self.batch, *self.event)
        events = range(1 + len(self.batch), block.dim())
        return block.permute(0, *(1 + i for i in self.order), *events).reshape(count, self.num_data, self.width)

    def unflatten(self, rows: Tensor, keep_chains: bool) -> Tensor:
        """Rows as ``[C, *batch, *event]``, or, of a single chain, as one particle's value."""
        block = rows.reshape(rows.shape[0], *(self.batch[i] for i in self.order), *self.event)
        back = [1 + self.order.index(i) for i in range(len(self.order))]
        block = block.permute(0, *back, *range(1 + len(back), block.dim()))
        return block if keep_chains else block.reshape(self.shape)


class _FromUnconstrained(Messenger):
    """Gives each latent the value z(u) by its own law's support, which may depend on latents above; notes log |dz/du|."""

    def __init__(self, blocks: dict[str, Tensor]) -> None:
        super().__init__()
        self.blocks = blocks
        self.log_jacobians: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = msg["name"]
        if name in self.blocks:
            transform = biject_to(support_of(msg["fn"]))
            value = transform(self.blocks[name])
            self.log_jacobians[name] = log_jacobian(transform, self.blocks[name], value, msg["fn"].event_dim)
            msg["value"], msg["done"] = value, True


def log_jacobian(transform: Any, u: Tensor, z: Tensor, event_dim: int) -> Tensor:
    """log |dz/du| of a site, summed over its event: of the site's batch shape."""
    return sum_rightmost(transform.log_abs_det_jacobian(u, z), event_dim - transform.codomain.event_dim)


def _latents(plan: Plan) -> dict[str, Site]:
    return {name: site for name, site in plan.prototype.model.items() if not site["is_observed"]}


def _check(plan: Plan, start: Start) -> None:
    """Refuses programs whose latents HMC cannot move, or whose densities are not those of one datum each."""
    latents = _latents(plan)
    if not latents:
        raise PairError("expected latent sites to anneal, got a model without any: its log-density is the evidence")
    if not plan.shared:
        raise PairError(
            "expected a plate that every site is in, got none: annealing estimates one evidence for each of its elements; put "
            'the sites of a datum under pyro.plate("data", len(x)), or, where all data share a latent, everything under '
            'pyro.plate("all", 1, dim=-2)'
        )
    for site in [*plan.prototype.model.values(), *plan.prototype.guide.values()]:
        if site["log_prob"].dim() > plan.nesting and not is_deterministic(site):
            raise PairError(
                f"expected every batch dimension in a plate, got shape {list(site['log_prob'].shape)} at site "
                f"{site['name']!r} with {plan.nesting} plate dims: put it into a plate, or declare it with .to_event()"
            )
        for frame in site["cond_indep_stack"]:
            if frame.full_size is not None and frame.size != frame.full_size:
                raise PairError(
                    f"expected whole plates, got {frame.size} of {frame.full_size} in plate {frame.name!r}: its subsample "
                    "changes from run to run, and so would the density; leave subsample_size out"
                )
    for name, site in latents.items():
        _check_latent(name, site)
    for name, site in plan.prototype.model.items():
        if is_scaled(site) and not is_deterministic(site):
            raise PairError(
                f"expected whole densities, got a scale at site {name!r}: powers of densities are no densities, so that their "
                "product has no evidence; remove poutine.scale"
            )
    if start == "guide":
        for name, site in plan.prototype.guide.items():
            if is_deterministic(site):
                continue
            if name not in latents or _is_fixed(site):
                raise PairError(
                    f"expected a guide with a density over the latents alone, got site {name!r} "
                    f"{'as a function of others' if name in latents else 'beside them'}: use start='prior'"
                )
            _check_weight(name, site)
        missed = missed_by_guide(plan)
        if missed:
            raise PairError(f"expected a guide with the model's support, but {missed[0]}, or start from the prior")


def _check_latent(name: str, site: Site) -> None:
    fn = site["fn"]
    if fn.support.is_discrete:
        raise PairError(
            f"expected continuous latents, got a discrete law at site {name!r}, along which the log-density has no "
            "gradient for HMC: use log_evidence, or enumerate the site"
        )
    if _is_fixed(site):
        raise PairError(f"expected latents with a density, got a Delta at site {name!r}: use pyro.deterministic there")
    _check_weight(name, site)
    try:
        biject_to(support_of(fn))
    except NotImplementedError:
        raise PairError(f"expected a support that maps to R^n, got {fn.support} at site {name!r}") from None


def _check_weight(name: str, site: Site) -> None:
    unscaled = isinstance(site["scale"], (int, float)) and site["scale"] == 1
    if not unscaled or site["mask"] is not None or isinstance(site["fn"], dist.MaskedDistribution):
        raise PairError(
            f"expected latents with their whole density, got a scale or mask at site {name!r}, under which it does not "
            "integrate to one: annealing has nothing to start from; remove poutine.scale or mask there"
        )


def _is_fixed(site: Site) -> bool:
    return isinstance(bare_law(site["fn"]), dist.Delta)
