"""An adapter: a `UNet2DModel` of Hugging Face's ``diffusers``, new or pretrained, behind ``network(x_t, t)``.

Two conventions differ. Theirs counts steps from 0, so that their ``timestep`` is t - 1; and a learned variance doubles their
channels, first the prediction and then v, where here it is a last axis of length 2. ``diffusers`` is an optional
dependency (the extra ``diffusers``), needed only by :meth:`DiffusersUNet.from_config`.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ppl_models.networks.denoiser import Denoiser
from ppl_models.networks.unet import image_shape


class DiffusersUNet(Denoiser):
    """``network(x_t, t)`` made of an existing ``diffusers.UNet2DModel``; see :class:`Denoiser` for the shapes.

    Args:
        unet: the model: ``unet(sample, timestep).sample``, and ``unet.config`` with ``in_channels`` and ``out_channels``.
        data_shape: (H, W) or (C, H, W); sizes that the model's levels can halve.

    Raises:
        ValueError: channels that do not fit the data; found at construction.

    Example:
        With ``UNet2DModel.from_pretrained(...)`` in place of this stand-in:

        >>> import torch
        >>> from types import SimpleNamespace
        >>> class Same(nn.Conv2d):
        ...     config = SimpleNamespace(in_channels=3, out_channels=3)
        ...     def forward(self, sample, timestep):
        ...         return SimpleNamespace(sample=super().forward(sample))
        >>> DiffusersUNet(Same(3, 3, 1), (3, 8, 8))(torch.zeros(5, 3, 8, 8), torch.tensor(1)).shape
        torch.Size([5, 3, 8, 8])
    """

    def __init__(self, unet: nn.Module, data_shape: Sequence[int]) -> None:
        c = image_shape(data_shape)[0]
        settings: Any = unet.config
        if settings.in_channels != c or settings.out_channels not in (c, 2 * c):
            raise ValueError(
                f"expected a U-Net of {c} channels in and {c} out (or {2 * c}, with a learned variance) for data of shape "
                f"{list(data_shape)}, got {settings.in_channels} in and {settings.out_channels} out"
            )
        super().__init__(data_shape, with_variance=settings.out_channels == 2 * c)
        self.unet = unet

    @classmethod
    def from_config(cls, data_shape: Sequence[int], unet: dict[str, Any]) -> DiffusersUNet:
        """With fresh weights.

        Args:
            data_shape: (H, W) or (C, H, W).
            unet: arguments of ``UNet2DModel``.

        Raises:
            ImportError: ``diffusers`` is not installed.
        """
        try:
            diffusers = importlib.import_module("diffusers")
        except ImportError as error:
            raise ImportError(
                "expected the package diffusers for a UNet2DModel, which is not installed: "
                "pip install 'ppl-models[diffusers]', or use the project's own UNet"
            ) from error
        return cls(diffusers.UNet2DModel(**unet), data_shape)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """x_t ``[*batch, *data_shape]`` and t in 1..T to the prediction."""
        batch = self.batch_shape(x_t)
        channels, height, width = image_shape(self.data_shape)
        images = self.features(x_t).reshape(-1, channels, height, width)
        timestep = t.expand(batch).reshape(-1) - 1
        out = self.unet(images, timestep).sample.reshape(-1, self.outputs, channels, height, width)
        return self.output(out.movedim(1, -1).reshape(*batch, *self.data_shape, self.outputs))

    def config(self) -> dict[str, Any]:
        """Arguments of :meth:`from_config`, JSON-able."""
        settings: Any = self.unet.config
        chosen = {key: value for key, value in dict(settings).items() if not key.startswith("_")}
        return {"data_shape": self.data_shape, "unet": _with_lists(chosen)}


def _with_lists(value: Any) -> Any:
    """Tuples, which are diffusers' own defaults and no JSON, as lists."""
    if isinstance(value, dict):
        return {key: _with_lists(each) for key, each in value.items()}
    return [_with_lists(each) for each in value] if isinstance(value, tuple | list) else value
