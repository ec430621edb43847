"""The step t as a vector: sinusoids of many wavelengths, then a small MLP.

    e(t) = [cos(w_1 t), ..., cos(w_k t), sin(w_1 t), ..., sin(w_k t)],     w_j = 10000^(-(j-1)/k)

(Vaswani et al. 2017, arXiv:1706.03762, section 3.5; Ho et al. 2020, arXiv:2006.11239, appendix B.) The shortest wavelength is
2 pi steps, so that neighbouring t differ; the longest about 60000, so that no two t up to 4000 coincide. The angles
are float64: in float32, w_j t at t = 1000 is off by up to 6e-5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_LONGEST = 10_000.0


def sinusoids(t: Tensor, num_frequencies: int) -> Tensor:
    """e(t), ``[*t.shape, 2 * num_frequencies]`` float64.

    Example:
        >>> sinusoids(torch.tensor([0]), 2)
        tensor([[1., 1., 0., 0.]], dtype=torch.float64)
    """
    exponents = torch.arange(num_frequencies, dtype=torch.float64, device=t.device) / num_frequencies
    angles = t.unsqueeze(-1) * torch.exp(-math.log(_LONGEST) * exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)


class TimeEmbedding(nn.Module):
    """t ``[*shape]`` -> ``[*shape, width]``: Linear, SiLU, Linear of the sinusoids.

    Args:
        width: length of the vector.
        num_frequencies: k, half the number of sinusoids.

    Raises:
        ValueError: a width or number below one.

    Example:
        >>> TimeEmbedding(16)(torch.tensor([[1], [1000]])).shape
        torch.Size([2, 1, 16])
    """

    def __init__(self, width: int, num_frequencies: int = 32) -> None:
        if width < 1 or num_frequencies < 1:
            raise ValueError(f"expected width and num_frequencies >= 1, got {width} and {num_frequencies}")
        super().__init__()
        self.width = width
        self.num_frequencies = num_frequencies
        self.body = nn.Sequential(nn.Linear(2 * num_frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """The vector of each step."""
        return self.body(sinusoids(t, self.num_frequencies).to(next(self.parameters()).dtype))

    def config(self) -> dict[str, object]:
        """Constructor arguments, JSON-able."""
        return {"width": self.width, "num_frequencies": self.num_frequencies}
