"""The autoencoder family as Pyro programs (lecture notes 004, "AE").

    guide    z = f(x), a point mass             denoising: z = f(x~), x~ ~ M(x~ | x)
    model    p(x | z) = likelihood(g(z)), no prior on z, and a factor exp(-penalty) for each penalty

    bound    log p(x | z) - sum of penalties    at z = f(x)

The chain of the hierarchical VAE with q a point mass and nothing known of z. Both laws of site ``z`` are masked, so its
term is exactly zero and what is left is the notes' L_AE with its sign turned: with ``Normal(scale=sigma)`` the
reconstruction is -||x - g(f(x))||^2 / (2 sigma^2) and a constant, with ``Categorical`` it is minus the cross-entropy. It
bounds no evidence, for there is no p(x). Without data the model draws z ~ N(0, I), which nothing has taught the decoder to
expect: the notes' key limitation.

The one constraint: data are corrupted while training (``pair.train()``), afresh for each call and particle, and never in
evaluation (``pair.eval()``): a reported bound is that of the data as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppl_models.arguments import sizes, whole_count
from ppl_models.corruption import Corruption, Masking
from ppl_models.likelihoods import Likelihood, known_likelihood
from ppl_models.networks.codes import CodeEncoder
from ppl_models.networks.mlp import Activation, Decoder
from ppl_models.pair import ModelGuidePair
from ppl_models.penalties import ActivityTarget, Contraction, Penalty
from ppl_models.probing import evaluate_once, probe_decoder
from ppl_models.registry import describe

Kind = Literal["plain", "denoising", "sparse", "k-sparse", "contractive"]
KINDS = get_args(Kind)


class AutoEncoder(ModelGuidePair):
    """Autoencoder with any likelihood: ``AutoEncoder(encoder, decoder, latent_dim, likelihood)``.

    Bound(x) = log p(x | z) - sum of penalties at z = f(x), lecture notes 004: L_AE, L_DAE and "Many variants".

    - plain: nothing else;
    - denoising: a ``corruption``, see :mod:`ppl_models.corruption`;
    - sparse, contractive: ``penalties``, see :mod:`ppl_models.penalties`, each a factor site of its own;
    - k-sparse: the encoder ends in a :class:`ppl_models.networks.codes.KSparse`.

    Args:
        encoder: module f, x ``[..., *data_shape]`` -> z ``[..., latent_dim]``.
        decoder: module g, z ``[..., latent_dim]`` -> the likelihood's parameters.
        latent_dim: d, width of z.
        likelihood: decoder output -> distribution of x; see :mod:`ppl_models.likelihoods`.
        corruption: M(x~ | x), None for none.
        penalties: at most one of each kind.

    Raises:
        ValueError: encoder or decoder return arrays of another shape than the above, a k above ``latent_dim``, two
            penalties at one site, or data or codes that corruption or penalty are not defined for; found at construction
            by one pass of a single datum.
        TypeError: the encoder does not return one tensor, or a part is no corruption or penalty.

    Example:
        >>> from inference import decompose_elbo
        >>> from ppl_models.likelihoods import Normal
        >>> from ppl_models.penalties import L1
        >>> pair = AutoEncoder(nn.Linear(3, 2), nn.Linear(2, 3), 2, Normal(scale=0.5), penalties=[L1(0.1)])
        >>> d = decompose_elbo(pair.model, pair.guide, torch.zeros(4, 3), num_particles=2)
        >>> d.sites, d["z"].value.tolist()
        (('z', 'l1', 'x'), [0.0, 0.0, 0.0, 0.0])
    """

    bounds_evidence = False
    prior_loc: Tensor
    prior_scale: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        likelihood: Likelihood,
        corruption: Corruption | None = None,
        penalties: Sequence[Penalty] = (),
    ) -> None:
        latent_dim, likelihood = whole_count("latent_dim", latent_dim), known_likelihood(likelihood)
        output = probe_decoder(decoder, latent_dim)
        data_shape = likelihood.data_shape_of(output)
        likelihood(output, len(data_shape))  # refuses output that it cannot take
        super().__init__(data_shape, latent_sites=("z",))
        self.encoder = encoder
        self.decoder = decoder
        self.latent_dim = latent_dim
        self.likelihood = likelihood
        self.corruption = _checked("corruption", corruption, Corruption) if corruption is not None else None
        checked: list[Penalty] = [_checked("each penalty", penalty, Penalty) for penalty in penalties]
        self.penalties = nn.ModuleList(checked)
        reference = next(decoder.parameters(), torch.empty(0))
        self.register_buffer(
            "prior_loc", torch.zeros(latent_dim, dtype=reference.dtype, device=reference.device), False
        )
        self.register_buffer("prior_scale", torch.ones_like(self.prior_loc), False)
        self._check_parts(checked)

    @classmethod
    def preset(
        cls,
        data_shape: Sequence[int],
        likelihood: Likelihood,
        latent_dim: int = 16,
        hidden: Sequence[int] = (200, 200),
        activation: Activation = "tanh",
        kind: Kind = "plain",
        corruption: Corruption | None = None,
        penalties: Sequence[Penalty] = (),
        k: int | None = None,
        num_labels: int | None = None,
    ) -> AutoEncoder:
        """An autoencoder with MLP encoder and decoder, mirror images of each other.

        ``kind`` stands for the usual part of a variant where that is left out: "denoising" for masking a quarter of the
        entries, "sparse" for a target activity of 0.05 (weight 10), "k-sparse" for k = latent_dim / 4, "contractive" for the
        exact penalty (weight 1). With a target activity the encoder ends in a sigmoid.

        Args:
            data_shape: shape of one datum.
            likelihood: decoder output -> distribution of x.
            latent_dim: d.
            hidden: the encoder's hidden widths; the decoder has them reversed.
            activation: see :class:`ppl_models.networks.MLP`.
            kind: one of "plain", "denoising", "sparse", "k-sparse", "contractive".
            corruption: M(x~ | x).
            penalties: as for the class.
            k: number of units kept, None for all.
            num_labels: K, where encoder and decoder read a label as well; see :meth:`given`.

        Raises:
            ValueError: an unknown kind; see the class for the rest.

        Example:
            >>> from ppl_models.likelihoods import Bernoulli
            >>> AutoEncoder.preset((8, 8), Bernoulli(), latent_dim=8, hidden=(16,), kind="k-sparse").encoder.k
            2
        """
        if kind not in KINDS:
            raise ValueError(f"expected kind among {', '.join(KINDS)}, got {kind!r}")
        data_shape, hidden = sizes("data_shape", data_shape), sizes("hidden", hidden)
        latent_dim, likelihood = whole_count("latent_dim", latent_dim), known_likelihood(likelihood)
        k = None if k is None else whole_count("k", k)
        if kind == "denoising" and corruption is None:
            corruption = Masking(0.25, fill=-1.0 if likelihood.scaling == "symmetric" else 0.0)
        if kind == "sparse" and not penalties:
            penalties = [ActivityTarget(0.05, weight=10.0)]
        if kind == "contractive" and not penalties:
            penalties = [Contraction(1.0)]
        if kind == "k-sparse" and k is None:
            k = max(1, latent_dim // 4)
        bounded = any(isinstance(penalty, ActivityTarget) for penalty in penalties)
        classes, counts = likelihood.num_classes, likelihood.takes_counts
        encoder = CodeEncoder(data_shape, latent_dim, hidden, activation, classes, bounded, k, counts, num_labels)
        output_shape = [*data_shape] if likelihood.num_classes is None else [*data_shape, likelihood.num_classes]
        decoder = Decoder(latent_dim, output_shape, list(hidden)[::-1], activation, likelihood.needs_scale, num_labels)
        return cls(encoder, decoder, latent_dim, likelihood, corruption, penalties)

    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """exp(-penalties) p(x | z): sites ``z`` ``[B, d]``, one factor a penalty, and ``x`` ``[B, *data_shape]``.

        Penalties score data: without ``x`` the program has none. See the base class.
        """
        self.announce("decoder", "likelihood")
        if any(penalty.reads_encoder for penalty in self.penalties):
            self.announce("encoder")
        with pyro.plate("data", self.batch_size(x, size)):
            z = pyro.sample("z", dist.Normal(self.prior_loc, self.prior_scale).to_event(1).mask(False))
            if x is not None:
                for penalty in self.penalties:
                    pyro.factor(penalty.site, -penalty(z, x, self.encoder))
            return pyro.sample("x", self.likelihood(self.decoder(z), len(self.data_shape)), obs=x)

    def guide(self, x: Tensor) -> Tensor:
        """Point mass at f(x), in training at f(x~): site ``z`` ``[B, d]``."""
        self.announce("encoder")
        with pyro.plate("data", self.batch_size(x)):
            return pyro.sample("z", self._code(x).mask(False))

    def _code(self, x: Tensor) -> dist.Delta:
        if self.corruption is None or not self.training:
            return dist.Delta(self.encoder(x), event_dim=1)
        return _CorruptedDelta(self.encoder, self.corruption, x)

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data that the likelihood gives no probability to; see the base class."""
        self.likelihood.check(x, name)

    def config(self) -> dict[str, Any]:
        """Constructor arguments as nested descriptions; see :func:`ppl_models.registry.describe`."""
        return {
            "encoder": describe(self.encoder),
            "decoder": describe(self.decoder),
            "latent_dim": self.latent_dim,
            "likelihood": describe(self.likelihood),
            "corruption": None if self.corruption is None else describe(self.corruption),
            "penalties": [describe(penalty) for penalty in self.penalties],
        }

    def _check_parts(self, penalties: list[Penalty]) -> None:
        x = self.likelihood.example(self.data_shape, self.prior_loc.dtype, self.prior_loc.device)
        z = evaluate_once("encoder", self.encoder, x)
        if not isinstance(z, Tensor):
            raise TypeError(
                f"expected the encoder to return one tensor z, got {type(z).__name__}: an autoencoder's guide is a point, "
                "so return no scale"
            )
        if z.shape != (1, self.latent_dim):
            raise ValueError(
                f"expected the encoder's z to have shape [B, latent_dim] = [1, {self.latent_dim}] for one datum of shape "
                f"{list(self.data_shape)}, got {list(z.shape)}: match the encoder's last layer"
            )
        if self.corruption is not None:
            self.corruption.check(self.likelihood, x)
        sites = [penalty.site for penalty in penalties]
        if len(set(sites)) < len(sites):
            raise ValueError(f"expected at most one penalty of a kind, got {', '.join(sites)}: add up their weights")
        for penalty in penalties:
            penalty.check(z, x)


class _CorruptedDelta(dist.Delta):
    """Point mass at f(x~), x~ ~ M(x~ | x) drawn anew for each entry of the batch shape: particles have their own x~."""

    def __init__(self, encoder: nn.Module, corruption: Callable[[Tensor], Tensor], x: Tensor) -> None:
        self.encoder, self.corruption, self.x = encoder, corruption, x
        super().__init__(encoder(corruption(x)), event_dim=1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _CorruptedDelta:
        data_shape = self.x.shape[len(self.batch_shape) :]
        return type(self)(self.encoder, self.corruption, self.x.expand(*batch_shape, *data_shape))


def _checked(name: str, part: Any, kind: type) -> Any:
    if not isinstance(part, kind):
        raise TypeError(f"expected {name} to be a {kind.__module__}.{kind.__name__}, got {type(part).__name__}")
    return part
