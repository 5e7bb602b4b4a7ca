"""Layers that the world models and the classifiers share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """A linear layer computed in float64 and rounded, so that a row does not depend on its batch.

    The kernels of a matrix product, and with them the order of its sums, change with the number of rows.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, in)``; see the class."""
        return F.linear(x.double(), self.weight.double(), self.bias.double()).float()
