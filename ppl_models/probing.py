"""One trial pass of a network at construction, so that shapes that do not fit are refused before any training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppl_models.evaluation_mode import evaluating
from ppl_models.networks.labels import labelled, probe_label


def probe_decoder(decoder: nn.Module, latent_dim: int) -> Any:
    """The decoder's output for one latent of zeros, which tells the shape of a datum.

    Raises:
        ValueError: the decoder does not take a latent of that width.

    Example:
        >>> probe_decoder(nn.Linear(2, 5), latent_dim=2).shape
        torch.Size([1, 5])
    """
    reference = next(decoder.parameters(), torch.empty(0))
    return evaluate_once("decoder", decoder, torch.zeros(1, latent_dim, dtype=reference.dtype, device=reference.device))


def evaluate_once(name: str, module: nn.Module, argument: Tensor) -> Any:
    """One pass in evaluation mode (no dropout, no running statistics), restoring each submodule's mode.

    Args:
        name: what the message calls the module.
        module: a network.
        argument: one datum or one latent, as a batch of one.

    Raises:
        ValueError: the module fails on it; the message names the module, the shape and the failure.
    """
    try:
        with torch.no_grad(), evaluating(module), labelled(module, probe_label(module)):
            return module(argument)
    except RuntimeError as error:
        raise ValueError(
            f"expected the {name} to take one row of shape {list(argument.shape)}, but it fails "
            f"({' '.join(str(error).split())[:120]}): match its first layer"
        ) from error
