"""The contract: a generative program p(x, z_1..L) and a guide q(z_1..L | x), as one module.

A pair is two Pyro programs over the same latent sites,

    model:  p(x, z_1..L) = p(z_L) prod_{l=2..L} p(z_{l-1} | z_l) p(x | z_1)
    guide:  q(z_1..L | x) = q(z_1 | x) prod_{l=2..L} q(z_l | z_{l-1})

(lecture notes 000 and 004), for which ELBO(x) = E_q[log p(x, z) - log q(z | x)] <= log p(x). Everything else in the
project (bounds, training, samplers, plots, command line) sees a pair through this contract alone.

Conventions. One plate ``data`` at dim -1 holds the batch; all other dims are event dims. Programs also run under outer
vectorised plates, so networks accept any leading dims. Parameters are ordinary ``torch.nn.Parameter``s made in
``__init__``; Pyro's global parameter store is never used, yet ``pyro.infer.SVI`` works, because the programs announce
their parameters with :meth:`ModelGuidePair.announce`.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from pyro.distributions import constraints
from pyro.params import param_with_module_name
from pyro.poutine.runtime import am_i_wrapped, effectful
from torch import Tensor, nn

from ppl_models.arguments import sizes
from ppl_models.data_checks import refuse_other_than_tensor
from ppl_models.networks.labels import given_labels, label_layers, num_labels_of, refuse_other_count


class ModelGuidePair(nn.Module, ABC):
    """A generative program and its guide, as one ``torch.nn.Module``.

    A new system implements :meth:`model` and :meth:`guide` and calls :meth:`announce` with the modules whose
    parameters the program uses; a ``PyroModule`` may be one of them, and no second base class. All of ``inference`` then
    applies, and so do ``pyro.infer.SVI``, ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``Predictive`` and ``pyro.render_model``.

    Args:
        data_shape: shape of one datum x, without the batch.
        latent_sites: names of the latent sample sites, in the model's order (top of the chain first).

    Attributes:
        data_site: name of the observed site; a system that calls its data otherwise (a diffusion's ``x_0``) says so.
        bounds_evidence: whether there is a p(x) that the sum of terms bounds; an autoencoder, with no p(z), has none.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> class Coin(ModelGuidePair):
        ...     def __init__(self):
        ...         super().__init__(data_shape=(), latent_sites=("z",))
        ...         self.encoder = nn.Linear(1, 1)
        ...     def model(self, x=None, size=None):
        ...         with pyro.plate("data", self.batch_size(x, size)):
        ...             z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...             return pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        ...     def guide(self, x):
        ...         self.announce("encoder")
        ...         with pyro.plate("data", self.batch_size(x)):
        ...             return pyro.sample("z", dist.Normal(self.encoder(x[..., None])[..., 0], 0.7))
        >>> Coin().model(size=3).shape
        torch.Size([3])
    """

    data_site: str = "x"
    bounds_evidence: bool = True
    _unannounced: bool = False
    _labelled: bool = (
        False  # by `given` or `labelled`; to look for labels in all modules costs more than a check is worth
    )

    def __init__(self, data_shape: tuple[int, ...] | torch.Size, latent_sites: tuple[str, ...]) -> None:
        super().__init__()
        self.data_shape = torch.Size(sizes("data_shape", data_shape))
        if isinstance(latent_sites, str):
            raise TypeError(f"expected latent_sites as a tuple of names, got {latent_sites!r}: use ({latent_sites!r},)")
        self.latent_sites = tuple(latent_sites)

    @abstractmethod
    def model(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """The generative program p(x, z).

        Args:
            x: data ``[*particles, B, *data_shape]``, observed at site ``x``; None generates.
            size: how many data to generate when ``x`` is None.

        Returns:
            The value of the data site, ``[*particles, B, *data_shape]``.
        """

    @abstractmethod
    def guide(self, x: Tensor) -> Any:
        """The inference program q(z | x): the same latent sites as the model, nothing else.

        Args:
            x: data ``[*particles, B, *data_shape]``.
        """

    def check_data(self, x: Tensor, name: str = "x") -> None:
        """Refuses data outside the support of p(x | z), before any training; by default all finite data pass.

        Args:
            x: ``[N, *data_shape]``, as the programs will see them.
            name: what the message calls them.

        Raises:
            ValueError: one sentence that names the first bad index, what was expected, and the remedy.
        """

    def given(self, y: Tensor | list[int] | int) -> Self:
        """The pair at labels: programs p(x, z | y) and q(z | x, y), as a pair of their own that shares the parameters.

        For pairs whose networks are conditioned on labels (:mod:`ppl_models.networks.labels`), as presets make them with
        ``num_labels=K``. All that takes a pair or its programs takes this one: terms, evidence, samplers, traces. In a
        training loop of your own :func:`ppl_models.networks.labelled` costs less.

        Training or evaluation mode is as it is at the call, and the new pair's own from then on. Move a pair to another
        device or dtype before the call. A submodule that it also holds elsewhere, as in a dictionary, is not followed there.

        Args:
            y: int64 ``[B]``, for the B data that the programs will see, or one number for any data.

        Raises:
            ValueError: a pair without labels, labels of another shape, or one outside 0..K-1; networks wrapped by
                ``torch.compile``. At a call of the programs: data of another number than labels.
            TypeError: labels that are no whole numbers.

        Example:
            >>> from ppl_models import VAE
            >>> from ppl_models.likelihoods import Bernoulli
            >>> pair = VAE.preset((8, 8), Bernoulli(), latent_dim=4, hidden=(32,), num_labels=10)
            >>> pair.given(3).model(size=5).shape, pair.given([3, 1, 4]).model(size=3).shape
            (torch.Size([5, 8, 8]), torch.Size([3, 8, 8]))
        """
        given = given_labels(self, y)
        given._unannounced, given._labelled = False, True
        return given

    @property
    def num_labels(self) -> int | None:
        """K, how many labels the programs are conditioned on; None where they are not."""
        return num_labels_of(self)

    @property
    def labels(self) -> Tensor | None:
        """The labels that :meth:`given` was told, ``[B]`` or a scalar; None where there are none."""
        layers = label_layers(self)
        return layers[0].labels if layers and layers[0].labels.numel() else None

    def of_rows(self, rows: slice | Tensor) -> Self:
        """The pair for some of the data it was given labels of; itself where all data share one label, or have none.

        Example:
            >>> from ppl_models import VAE
            >>> from ppl_models.likelihoods import Bernoulli
            >>> pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,), num_labels=3).given([0, 2, 1])
            >>> pair.of_rows(slice(1, 3)).labels
            tensor([2, 1])
        """
        labels = self.labels
        return self if labels is None or labels.dim() == 0 else self.given(labels[rows].reshape(-1))

    def in_turn(self, count: int) -> Self:
        """The pair for ``count`` draws of its own, of the labels that it was given, one after the other and over again.

        Example:
            >>> from ppl_models import VAE
            >>> from ppl_models.likelihoods import Bernoulli
            >>> pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,), num_labels=3).given([0, 2])
            >>> pair.in_turn(5).labels.tolist(), pair.in_turn(5).model(size=5).shape
            ([0, 2, 0, 2, 0], torch.Size([5, 6]))
        """
        labels = self.labels
        if labels is None or labels.dim() == 0:
            return self
        return self.of_rows(torch.arange(count, device=labels.device) % len(labels))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Runs :meth:`model`."""
        return self.model(x, size)

    def batch_size(self, x: Tensor | None, size: int | None = None) -> int:
        """B, read from data or from ``size``.

        Raises:
            ValueError: neither or both are given, ``x`` has the wrong trailing shape or no data, or ``size`` is below one.
            TypeError: ``x`` is no tensor.

        Example:
            >>> from ppl_models.linear_gaussian import LinearGaussian
            >>> LinearGaussian.random(data_dim=3, latent_dim=2).batch_size(torch.zeros(5, 3))
            5
        """
        if x is None:
            if size is None:
                raise ValueError("expected data x to score or size=B to generate B data; got neither: pass one of them")
            if size < 1:
                raise ValueError(f"expected size >= 1, got {size}: ask for at least one datum")
            self._check_labels(size)
            return size
        refuse_other_than_tensor(x, "x")
        n = len(self.data_shape)
        if x.dim() <= n or x.shape[x.dim() - n :] != self.data_shape:
            raise ValueError(
                f"expected x of shape [B, {', '.join(map(str, self.data_shape))}], got {list(x.shape)}: "
                "reshape the data, keeping one leading batch dimension"
            )
        rows = x.shape[x.dim() - n - 1]
        if rows < 1:
            raise ValueError(f"expected at least one datum, got x of shape {list(x.shape)}: leave out the empty batch")
        if size is not None and size != rows:
            raise ValueError(f"expected size to be left out when x is given, got size={size} and {rows} rows")
        self._check_labels(rows)
        return rows

    def _check_labels(self, count: int) -> None:
        labels = self.labels if self._labelled else None
        if labels is not None and labels.dim() == 1:
            refuse_other_count(labels, count)

    def announce(self, *submodules: str) -> None:
        """Emits one Pyro ``param`` site per parameter of the named submodules (or of a bare parameter).

        This is what lets ``pyro.infer.SVI`` find the parameters and ``pyro.poutine.trace`` list them, without Pyro's
        global store: the values stay in the module. Costs nothing when no Pyro handler is active.

        Args:
            submodules: attribute names, as in ``self.announce("decoder", "likelihood")``.
        """
        if self._unannounced or not am_i_wrapped():
            return
        for name in submodules:
            member = getattr(self, name)
            if isinstance(member, Tensor):  # a parameter, or what torch.func.functional_call puts in its place
                _emit(name, member)
            else:
                for parameter_name, parameter in member.named_parameters():
                    _emit(param_with_module_name(name, parameter_name), parameter)

    @contextmanager
    def unannounced(self) -> Iterator[None]:
        """Within it the programs announce no parameters: for those who read them from the module, and want the time.

        Example:
            >>> from pyro import poutine
            >>> from ppl_models.linear_gaussian import LinearGaussian
            >>> pair = LinearGaussian.random(data_dim=3, latent_dim=2)
            >>> with pair.unannounced():
            ...     list(poutine.trace(pair.model).get_trace(size=2).param_nodes)
            []
        """
        before, self._unannounced = self._unannounced, True
        try:
            yield
        finally:
            self._unannounced = before


def _emit(name: str, parameter: Tensor) -> None:
    """One ``param`` message whose value is an alias of the parameter, as ``SVI`` expects it."""
    alias = parameter.view_as(parameter)
    alias.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]
    effectful(lambda *_, **__: alias, type="param")(name, alias, constraint=constraints.real, name=name)


def refuse_other_than_pair(value: Any) -> None:
    """Raises TypeError unless ``value`` is a pair."""
    if not isinstance(value, ModelGuidePair):
        hint = "of a model and a guide make one by subclassing ModelGuidePair"
        raise TypeError(f"expected a ModelGuidePair such as VAE.preset(...), got {type(value).__name__}: {hint}")


def refuse_other_dtype(x: Any, reference: Tensor) -> None:
    """Raises TypeError where ``x`` holds floating-point numbers of another dtype than the parameters."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != reference.dtype:
        raise TypeError(
            f"expected x in {reference.dtype}, as the parameters are, got {x.dtype}: convert with x.to({reference.dtype})"
        )
