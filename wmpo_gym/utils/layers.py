"""Layers that the world models and the classifiers share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """A linear layer computed in float64 and rounded, so that a row does not depend on its batch.

    The kernels of a matrix product, and with them the order of its sums, change with the number of rows.
    """

    quick = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, in)``; see the class."""
        if self.quick:
            return super().forward(x)
        return F.linear(x.double(), self.weight.double(), self.bias.double()).float()


@contextmanager
def rounded_quickly(network: nn.Module) -> Iterator[None]:
    """Compute its :class:`RowLinear` in float32 meanwhile, as quickens the training of a small network."""
    layers = [layer for layer in network.modules() if isinstance(layer, RowLinear)]
    for layer in layers:
        layer.quick = True
    try:
        yield
    finally:
        for layer in layers:
            layer.quick = False
