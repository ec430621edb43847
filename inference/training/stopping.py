"""Early stopping: the epoch with the best validation bound, its weights, and when to give up.

Training ends once ``patience`` epochs in a row have not been better than the best; the best epoch's weights are then the
run's. Without patience nothing is kept and training goes on.

The one constraint: the bound is a plain ELBO on data put aside for it, on the same draws each epoch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class EarlyStopping:
    """The best epoch so far.

    Args:
        patience: epochs without a better bound before stopping, or None.

    Example:
        >>> stopping, module = EarlyStopping(patience=2), nn.Linear(1, 1)
        >>> [stopping.stops_after(epoch, elbo, module) for epoch, elbo in enumerate([-3.0, -2.0, -2.5, -2.0], start=1)]
        [False, False, False, True]
        >>> stopping.epoch
        2
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.elbo = float("-inf")
        self.epoch = 0
        self.weights: dict[str, Tensor] | None = None

    def stops_after(self, epoch: int, elbo: float, module: nn.Module) -> bool:
        """Takes an epoch in; whether it is the last.

        Args:
            epoch: its number, from 1.
            elbo: its validation bound, nats per datum.
            module: whose weights have that bound; they are copied if it is the best.
        """
        if self.patience is None:
            return False
        if elbo > self.elbo:
            self.elbo, self.epoch = elbo, epoch
            self.weights = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        return self.has_stopped(epoch)

    def has_stopped(self, epoch: int) -> bool:
        """Whether ``epoch``, the last that was taken in, was to be the last of all."""
        return self.patience is not None and epoch - self.epoch >= self.patience

    def restore(self, module: nn.Module) -> None:
        """Gives the module the best epoch's weights, where there is patience."""
        if self.weights is not None:
            module.load_state_dict(self.weights)

    def state(self) -> dict[str, Any]:
        """All that later epochs depend on."""
        return {"elbo": self.elbo, "epoch": self.epoch, "weights": self.weights}

    def load(self, state: dict[str, Any]) -> None:
        """Goes back to a state."""
        self.elbo, self.epoch, self.weights = state["elbo"], state["epoch"], state["weights"]
