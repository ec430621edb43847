r"""The loss that trains a diffusion: one t per datum, one network call per step, whatever T.

    weights "vlb"      L_T + L_t / p_t                      unbiased for -ELBO = sum_{t=0}^T L_t        (notes 001, 003)
    weights "simple"   |eps - eps_theta(x_s, s)|^2 / (T p_t),  s = t + 1                                L_simple of notes 003
    weights "hybrid"   "vlb" + lambda "simple"

with t in 0..T-1 drawn from p (:mod:`inference.training.timesteps`), x_{t+1} from q(x_{t+1} | x_0), the KLs L_1..L_{T-1} in
closed form given x_{t+1}, and L_T, which has no parameters but belongs to the bound, added exactly. "simple" is the pair's
``auxiliary_loss``, averaged over s = 1..T; it is no bound: of a DDPM a squared error without a unit, of a D3PM
-log p(x_0 | x_s), nats.

Convention: :meth:`DiffusionLoss.terms` are always those of the unweighted bound, whatever the weights that train.

The one constraint: log p(x_0 | x_1) costs a good part of a network call, so it is evaluated only for data with t = 0. In a
traced graph, whose shapes are fixed, that is possible for stratified t alone; the other samplers evaluate it for all.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from inference.training.timesteps import SAMPLERS
from ppl_models.arguments import positive_number
from ppl_models.ddpm import DDPM
from ppl_models.diffusion import Diffusion
from ppl_models.processes.transitions import shapes_are_fixed

__all__ = ["DiffusionLoss", "DiffusionStep"]

Weights = Literal["vlb", "simple", "hybrid"]
Timesteps = Literal["uniform", "stratified", "loss_second_moment"]


class DiffusionStep(NamedTuple):
    """One network call: what is minimised, ``[B]``, and the terms of the bound at the same draws."""

    objective: Tensor
    terms: dict[str, Tensor]


class _Rows(NamedTuple):
    """Some of the data, among them all with t = 0."""

    indices: Tensor  # int64
    all_zero: bool  # whether all of them have t = 0


class DiffusionLoss(nn.Module):
    """The objective of a diffusion as a module: ``loss(x)`` is ``[B]``, to be minimised; its mean over t is what is meant.

    Ho et al. 2020 (arXiv:2006.11239), eqs. 5 and 14; lecture notes 003. ``hybrid`` with a DDPM of learned variance and
    ``auxiliary_weight=1000`` is Nichol and Dhariwal 2021 (arXiv:2102.09672), eq. 16, times 1000 and without its
    stop-gradient; with a D3PM and 0.001 to 0.01 it is Austin et al. 2021 (arXiv:2107.03006), eq. 5.

    Args:
        pair: a DDPM, a D3PM, or another diffusion; its parameters are this module's parameters.
        weights: ``"vlb"`` (nats, unbiased for -ELBO), ``"simple"`` or ``"hybrid"``.
        timesteps: how t is drawn, ``"uniform"``, ``"stratified"`` or ``"loss_second_moment"``; the same expectation.
        auxiliary_weight: lambda > 0; with ``"hybrid"`` only, and required there.

    Raises:
        TypeError: not a diffusion.
        UserWarning: "simple" with a learned variance, which it does not train.
        ValueError: an unknown weighting or sampler; a lambda that is missing, superfluous or not positive.

    Example:
        >>> from ppl_models.ddpm import DDPM
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.processes import NoiseSchedule
        >>> class Zero(nn.Module):
        ...     def forward(self, x_t, t):
        ...         return 0 * x_t
        >>> ddpm = DDPM(Zero(), NoiseSchedule.cosine(50), data_shape=(2,), likelihood=Normal())
        >>> loss, x = DiffusionLoss(ddpm), torch.randn(7, 2)
        >>> loss(x).shape, list(loss.terms(x))
        (torch.Size([7]), ['x_50', 'x_t', 'x_0'])
        >>> by_t = torch.stack([loss.term(x, torch.full((7,), t)) for t in range(51)])  # L_0 .. L_50
        >>> bool((by_t[1:] >= 0).all())
        True
    """

    def __init__(
        self,
        pair: Diffusion,
        weights: Weights = "vlb",
        timesteps: Timesteps = "stratified",
        auxiliary_weight: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(pair, Diffusion):
            raise TypeError(
                f"expected a diffusion such as DDPM, got {type(pair).__name__}: use ElboLoss for other pairs"
            )
        if weights not in get_args(Weights):
            raise ValueError(f"expected weights among {', '.join(get_args(Weights))}, got {weights!r}")
        if timesteps not in SAMPLERS:
            raise ValueError(f"expected timesteps among {', '.join(SAMPLERS)}, got {timesteps!r}")
        if (weights == "hybrid") != (auxiliary_weight is not None):
            raise ValueError(
                f"expected auxiliary_weight with weights='hybrid' and only there, got {auxiliary_weight} with {weights!r}: "
                "1000 is usual for a DDPM with learned variance, 0.001 to 0.01 for a D3PM"
            )
        if auxiliary_weight is not None:
            auxiliary_weight = positive_number("auxiliary_weight", auxiliary_weight)
        if weights == "simple" and isinstance(pair, DDPM) and pair.variance_has_own_output:
            warnings.warn(
                "weights 'simple' leave a learned variance as it starts, for they say nothing of it: take 'hybrid' or 'vlb', "
                "or variance='beta'",
                stacklevel=2,
            )
        self.pair = pair
        self.weights = weights
        self.timesteps = timesteps
        self.auxiliary_weight = auxiliary_weight
        self.sampler = SAMPLERS[timesteps](pair.num_timesteps)
        network = {id(parameter) for parameter in pair.network.parameters()}
        self._checked = False
        self._decoder_learns = any(id(parameter) not in network for parameter in pair.parameters())

    @property
    def latents(self) -> tuple[str, ...]:
        """Which of :meth:`terms` are latent (minus a rate); the others are observed."""
        last = f"x_{self.pair.num_timesteps}"
        return (last, "x_t") if self.pair.num_timesteps > 1 else (last,)

    def forward(self, x: Tensor) -> Tensor:
        """The objective of each datum of ``x`` ``[B, *data_shape]``: ``[B]``, nats with weights "vlb"."""
        self._check(x)
        t = self.sampler(len(x), x.device)
        weight = self.sampler.weight(t)
        simple = self.weights == "simple"
        bound, auxiliary = self._at(x, t, None if simple else self._rows(t), not simple, self.weights != "vlb")
        return self._objective(x, t, weight, bound, auxiliary)

    def step(self, x: Tensor) -> DiffusionStep:
        """:meth:`forward` and :meth:`terms` from the same draws and one network call, for a training loop that shows both."""
        self._check(x)
        t = self.sampler(len(x), x.device)
        weight = self.sampler.weight(t)
        bound, auxiliary = self._at(x, t, self._rows(t), True, self.weights != "vlb")
        terms = self._terms(x, t, weight, bound)
        return DiffusionStep(self._objective(x, t, weight, bound, auxiliary), terms)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """The bound's terms, ``[B]`` nats each, whatever the weights: their sum is unbiased for the ELBO.

        ``x_T`` (with its number): -L_T, exact. ``x_t``: -L_t / p_t of the t drawn, where t >= 1. ``x_0``: the same where
        t = 0. So minus the first two is a rate in expectation, and minus the last the distortion.
        """
        self._check(x)
        return self.terms_at(x, self.sampler(len(x), x.device))

    def terms_at(self, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        """:meth:`terms` for t that the sampler drew, int64 ``[B]`` in 0..T-1."""
        self._check_steps(t, x, self.pair.num_timesteps - 1)
        bound, _ = self._at(x, t, self._rows(t), True, False)
        return self._terms(x, t, self.sampler.weight(t), bound)

    def term(self, x: Tensor, t: Tensor) -> Tensor:
        """L_t of each datum at given t, ``[B]`` nats, one draw of x_{t+1}.

        Args:
            x: ``[B, *data_shape]``.
            t: int64 ``[B]``, each in 0..T.

        Raises:
            ValueError: a t outside 0..T.
            TypeError: t is not int64.
        """
        self._check(x)
        self._check_steps(t, x, self.pair.num_timesteps)
        inner = t.clamp(max=self.pair.num_timesteps - 1)
        bound, _ = self._at(x, inner, None, True, False)
        return torch.where(t == self.pair.num_timesteps, self._prior_matching(x), bound)

    def auxiliary(self, x: Tensor, t: Tensor) -> Tensor:
        """The auxiliary loss of each datum at x_{t+1}, ``[B]``; arguments as in :meth:`term`, t in 0..T-1."""
        self._check(x)
        self._check_steps(t, x, self.pair.num_timesteps - 1)
        return self._at(x, t, None, False, True)[1]

    def extra_repr(self) -> str:
        """The options, for ``print(loss)``."""
        hybrid = "" if self.auxiliary_weight is None else f", auxiliary_weight={self.auxiliary_weight}"
        return f"weights={self.weights!r}, timesteps={self.timesteps!r}{hybrid}"

    def _check(self, x: Tensor) -> None:
        """Refuses data that the pair gives no probability to, in the first batch: later ones are the caller's to keep alike.

        Shapes are looked at in every batch, for that costs nothing.
        """
        self.pair.batch_size(x)
        if x.dim() != 1 + len(self.pair.data_shape):
            raise ValueError(
                f"expected x of shape [B, {', '.join(map(str, self.pair.data_shape))}], got {list(x.shape)}: one t is drawn "
                "for each row, so keep one batch axis"
            )
        if not self._checked and not shapes_are_fixed():
            self.pair.check_data(x)
            self._checked = True

    def _check_steps(self, t: Tensor, x: Tensor, last: int) -> None:
        """Refuses all but one t in 0..last for each datum."""
        if not isinstance(t, Tensor) or t.dtype != torch.long:
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"expected t as int64 tensor of steps 0..{last}, got {got}: use torch.tensor(t)")
        if not shapes_are_fixed():
            outside = (t < 0) | (t > last)
            if bool(outside.any()):
                raise ValueError(
                    f"expected t in 0..{last}, got {int(t[outside][0])}: L_0 to L_{self.pair.num_timesteps} are the bound's "
                    "terms, and all but the last take a step of the chain"
                )
        if t.shape != x.shape[:1]:
            raise ValueError(f"expected one t for each of the {len(x)} data, got t of shape {list(t.shape)}")

    def _objective(self, x: Tensor, t: Tensor, weight: Tensor, bound: Tensor, auxiliary: Tensor) -> Tensor:
        mean = 1 / self.pair.num_timesteps  # the auxiliary loss is a mean over t, the bound a sum
        if self.weights == "simple":
            at_t = mean * auxiliary
        elif self.weights == "vlb":
            at_t = bound
        else:
            at_t = bound + self.auxiliary_weight * mean * auxiliary  # type: ignore[operator]
        objective = weight.to(at_t.dtype) * at_t
        if self.training:
            self.sampler.observe(t, at_t)
        return objective if self.weights == "simple" else self._prior_matching(x) + objective

    def _terms(self, x: Tensor, t: Tensor, weight: Tensor, bound: Tensor) -> dict[str, Tensor]:
        drawn = -weight.to(bound.dtype) * bound
        nothing = torch.zeros_like(drawn)
        terms = {f"x_{self.pair.num_timesteps}": -self._prior_matching(x)}
        if self.pair.num_timesteps > 1:
            terms["x_t"] = torch.where(t > 0, drawn, nothing)
        return terms | {"x_0": torch.where(t == 0, drawn, nothing)}

    def _prior_matching(self, x_0: Tensor) -> Tensor:
        """L_T = KL(q(x_T | x_0) || p(x_T)), ``[B]``."""
        return self.pair.process.prior_divergence(x_0)

    def _at(
        self, x_0: Tensor, t: Tensor, rows: _Rows | None, with_bound: bool, with_auxiliary: bool
    ) -> tuple[Tensor, Tensor]:
        """L_t and the auxiliary loss at one draw of x_{t+1}, t in 0..T-1; what is not asked for is zero.

        ``rows`` hold every datum with t = 0; None: all data.
        """
        pair, step = self.pair, t + 1
        x_next, made_of = pair.draw_marginal(x_0, step)
        output = pair.denoise(x_next, step)
        bound = divergence = auxiliary = torch.zeros((), device=x_0.device)
        if with_bound and with_auxiliary and pair.num_timesteps > 1:
            divergence, auxiliary = pair.step_losses(output, x_0, x_next, step, **made_of)
        elif with_auxiliary:
            auxiliary = pair.auxiliary_loss(output, x_0, x_next, step, **made_of)
        elif pair.num_timesteps > 1:
            # a harmless step where t = 0, and not taken there
            divergence = pair.step_divergence(output, x_0, x_next, step.clamp(min=2), **made_of)
        if with_bound:
            bound = self._with_reconstruction(divergence, t, output, x_0, x_next, rows)
        return bound, auxiliary

    def _with_reconstruction(
        self, divergence: Tensor, t: Tensor, output: Tensor, x_0: Tensor, x_1: Tensor, rows: _Rows | None
    ) -> Tensor:
        """``divergence``, and -log p(x_0 | x_1) in its place where t = 0: ``[B]``."""
        law = self.pair.reconstruction_law
        if rows is None:
            return torch.where(t > 0, divergence, -law(output, x_1).log_prob(x_0))
        if not len(rows.indices):  # no t = 0, and laws refuse an empty batch
            return divergence
        few_outputs, few_x_1, few_x_0 = (each.index_select(0, rows.indices) for each in (output, x_1, x_0))
        few = -law(few_outputs, few_x_1).log_prob(few_x_0)
        divergence = divergence.expand(len(x_0)).to(few.dtype)  # with T = 1 there is none
        if not rows.all_zero:
            few = torch.where(t[rows.indices] > 0, divergence[rows.indices], few)
        return divergence.index_copy(0, rows.indices, few)

    def _rows(self, t: Tensor) -> _Rows | None:
        """The data with t = 0: where a graph is traced, a fixed number that holds them; exactly those otherwise."""
        if shapes_are_fixed():
            most = self.sampler.most_of_one(len(t))
            return _Rows(t.topk(most, largest=False).indices, False) if most < len(t) else None
        rows = (t == 0).nonzero()[:, 0]
        if len(rows) or not self._decoder_learns:
            return _Rows(rows, True)
        return _Rows(rows.new_zeros(1), False)  # parameters that DDP waits for get a gradient of zero
