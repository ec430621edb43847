"""What a network knows of a label y in 0..K-1: a vector for each, added to a hidden layer.

    h <- h + V[y],      V in R^{K x width}, N(0, 1) at the start

which for a layer of an MLP is the same as to hand it y one-hot beside its input. V starts as large as the layer's own numbers:
with a V of zeros a VAE's z learns what the label says before the label does, and does not unlearn it.

A program whose networks hold such layers is one for each label, p(x, z | y) and q(z | x, y): semi-supervised learning's M2 with
y observed (Kingma et al. 2014, arXiv:1406.5298, eq. 2), conditional VAEs (Sohn et al. 2015), class-conditional diffusion
(Nichol and Dhariwal 2021, arXiv:2102.09672, section 6).

The labels are handed over beside the data and not with them, as a buffer of each layer, so that no program or network has an
argument more: :meth:`ppl_models.ModelGuidePair.given` for looking at a pair, :func:`labelled` around steps of training.

The one constraint: one label a datum, the data being the axis before the last of h (which is of length one where all data share
a row, such as an enumerated z), or one label for all. It is no layer for the channels of an image: add it to a flat embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ppl_models.arguments import whole_count
from ppl_models.networks.entries import rows_of

Module = TypeVar("Module", bound=nn.Module)


class LabelShift(nn.Module):
    """h + V[y], of h ``[..., B, width]`` or, under one label for all, ``[..., width]``: rows of features, no images.

    Args:
        num_labels: K.
        width: of h.

    Attributes:
        labels: y, int64 ``[B]``, or a scalar for all data; of shape ``[0]`` where none was given.

    Raises:
        ValueError: K or a width below one; at the call, no labels, more or fewer than data, or one outside 0..K-1.

    Example:
        >>> layer = LabelShift(num_labels=3, width=2)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 10.0], [2.0, 20.0]]))
        >>> with labelled(layer, [2, 0]):
        ...     layer(torch.zeros(2, 2)).tolist()
        [[2.0, 20.0], [0.0, 0.0]]
    """

    labels: Tensor

    def __init__(self, num_labels: int, width: int) -> None:
        super().__init__()
        num_labels, width = whole_count("num_labels", num_labels), whole_count("width", width)
        self.num_labels = num_labels
        self.weight = nn.Parameter(torch.randn(num_labels, width))
        self.register_buffer("labels", torch.empty(0, dtype=torch.int64), persistent=False)

    def forward(self, h: Tensor) -> Tensor:
        """h of each datum, moved by its label's vector."""
        if self.labels.dim() == 1:
            count = h.shape[-2] if h.dim() > 1 else 0
            if len(self.labels) == 0:
                raise ValueError(
                    f"expected labels in 0..{self.num_labels - 1} beside the data, for these networks are conditioned on "
                    "them, got none: use pair.given(y), with one for each datum or one for all"
                )
            if count not in (1, len(self.labels)):
                raise ValueError(
                    f"expected a label for each of {count} data, got {len(self.labels)} labels: give as many as data, or one "
                    "number for all of them"
                )
        return h + rows_of(self.weight, self.labels)

    def extra_repr(self) -> str:
        """The number of labels, for ``print``."""
        return f"num_labels={self.num_labels}"


def label_shift(num_labels: int | None, width: int) -> LabelShift | None:
    """The layer, or None where there are no labels.

    Example:
        >>> label_shift(None, 8) is None
        True
    """
    return None if num_labels is None else LabelShift(num_labels, width)


def stated_labels(num_labels: int | None) -> dict[str, int]:
    """What a network's description says of labels: nothing where it has none, as those written before there were any.

    Example:
        >>> stated_labels(10), stated_labels(None)
        ({'num_labels': 10}, {})
    """
    return {} if num_labels is None else {"num_labels": num_labels}


def label_layers(module: nn.Module) -> list[LabelShift]:
    """The layers in a module that want labels.

    Example:
        >>> label_layers(nn.Sequential(nn.Linear(2, 4), LabelShift(10, 4)))
        [LabelShift(num_labels=10)]
    """
    return [each for each in module.modules() if isinstance(each, LabelShift)]


def num_labels_of(module: nn.Module) -> int | None:
    """K, of how many labels a module's layers know; None where they want none.

    Raises:
        ValueError: layers that differ in it.
    """
    found = {layer.num_labels for layer in label_layers(module)}
    if len(found) > 1:
        raise ValueError(f"expected one number of labels in all networks, got {sorted(found)}: make them for the same")
    return found.pop() if found else None


def probe_label(module: nn.Module) -> int | None:
    """A label to try a network with: 0, or None where it wants none."""
    return 0 if label_layers(module) else None


@contextmanager
def labelled(module: nn.Module, y: Tensor | list[int] | int | None) -> Iterator[None]:
    """Within it the networks in ``module`` know the labels of the data that they are given; for loops of one's own.

    Args:
        module: a pair, a loss of a pair, or a network.
        y: int64 ``[B]``, each in 0..K-1, or one number for all; None: nothing is done.

    Raises:
        TypeError: labels that are no whole numbers.
        ValueError: labels of another shape or outside 0..K-1, or a module that wants none.

    Example:
        >>> from ppl_models import VAE
        >>> from ppl_models.likelihoods import Bernoulli
        >>> pair = VAE.preset((6,), Bernoulli(), latent_dim=2, hidden=(4,), num_labels=10)
        >>> for x, y in [(torch.ones(3, 6), [3, 1, 4])]:
        ...     with labelled(pair, y):  # around a step of SVI, or of a loss of the pair
        ...         pair.guide(x).shape
        torch.Size([3, 2])
    """
    if y is None:
        yield
        return
    labels = checked_labels(y, num_labels_of(module), type(module).__name__, on_cuda=False)
    pairs = [vars(each) for each in module.modules() if hasattr(each, "_labelled")]
    before = [pair.get("_labelled", False) for pair in pairs]
    try:
        for pair in pairs:
            pair["_labelled"] = True
        with _holding(label_layers(module), labels):
            yield
    finally:
        for pair, old in zip(pairs, before, strict=True):
            pair["_labelled"] = old


@contextmanager
def spread_labels(network: nn.Module, batch: Sequence[int]) -> Iterator[None]:
    """Within it a label for each row of ``batch`` flattened, whose last axis has been the data's."""
    layers = [layer for layer in label_layers(network) if layer.labels.dim() == 1 and len(layer.labels)]
    if not layers or len(batch) < 2:
        yield
        return
    refuse_other_count(layers[0].labels, batch[-1])
    with _holding(layers, layers[0].labels.expand(*batch).reshape(-1)):
        yield


@contextmanager
def _holding(layers: list[LabelShift], labels: Tensor) -> Iterator[None]:
    before = [layer.labels for layer in layers]
    try:
        for layer in layers:  # a tensor each: those that are one would count as tied
            layer.labels = labels.to(layer.weight.device, copy=True)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.labels = old


def given_labels(module: Module, y: Tensor | list[int] | int) -> Module:
    """A copy of a module whose networks know the labels ``y``: every parameter and buffer is shared with it, no module is.

    Raises:
        TypeError, ValueError: see :func:`labelled`; also networks wrapped by ``torch.compile``, which calls the original's.
    """
    labels = checked_labels(y, num_labels_of(module), type(module).__name__)
    return _copied(module, labels, {})


def refuse_other_count(labels: Tensor, count: int) -> None:
    """Raises ValueError unless there is a label for each of ``count`` data."""
    if len(labels) != count:
        raise ValueError(
            f"expected a label for each of {count} data, got {len(labels)} labels: give as many as data, or one number for all "
            "of them"
        )


def checked_labels(y: Tensor | list[int] | int, num_labels: int | None, name: str, on_cuda: bool = True) -> Tensor:
    """The labels as int64, ``[B]`` or a scalar; see :func:`labelled` for what is refused.

    Without ``on_cuda`` labels on a GPU are not read, for that would wait for it.
    """
    if num_labels is None:
        raise ValueError(
            f"expected networks that are conditioned on labels, got {name} without: make it with num_labels=K, or networks "
            "of your own with a LabelShift in them"
        )
    try:
        labels = torch.as_tensor(y)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected labels as whole numbers 0..{num_labels - 1}, got {str(y)[:40]!r}: number them"
        ) from error
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"expected labels as whole numbers 0..{num_labels - 1}, got {labels.dtype}: convert with y.long()"
        )
    if labels.dim() > 1 or labels.numel() == 0:
        raise ValueError(
            f"expected labels of shape [B], one a datum, or one number for all, got {list(labels.shape)}: flatten them"
        )
    labels = labels.long()
    if on_cuda or not labels.is_cuda:
        refuse_other_labels(labels, num_labels, "labels")
    return labels


def refuse_other_labels(labels: Tensor, num_labels: int, name: str) -> None:
    """Raises ValueError where a label lies outside 0..K-1."""
    wrong = (labels < 0) | (labels >= num_labels)
    if bool(wrong.any()):
        first = int(labels[wrong].flatten()[0])
        raise ValueError(
            f"{name}: expected whole numbers in 0..{num_labels - 1}, got {first}: number the labels so, or make the networks "
            "for as many as there are"
        )


def _copied(module: Module, labels: Tensor, done: dict[int, nn.Module]) -> Module:
    if id(module) in done:
        return done[id(module)]  # type: ignore[return-value]
    if hasattr(module, "_orig_mod") and label_layers(module):
        raise ValueError(
            "expected networks that are not wrapped by torch.compile, whose copies would call the original's: compile the loss "
            "with compile_objective, or use labelled(pair, y)"
        )
    new: Module = type(module).__new__(type(module))
    vars(new).update(vars(module))
    vars(new).update(
        _modules=dict(module._modules), _buffers=dict(module._buffers), _parameters=dict(module._parameters)
    )
    done[id(module)] = new
    for name, child in module._modules.items():
        if child is not None:
            new._modules[name] = _copied(child, labels, done)
    if isinstance(new, LabelShift):
        new.labels = labels.to(new.weight.device, copy=True)
    return new
