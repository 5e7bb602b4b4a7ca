"""Layers shared by world models and classifiers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn


class RowLinear(nn.Linear):
    """Linear layer computed in float64 and rounded to float32, so that rows do not depend on the batch size.

    The kernel of a matrix product, and thus its order of summation, depends on the number of rows.
    """

    quick = False

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(B, in)``; see the class."""
        if self.quick:
            return super().forward(x)
        return F.linear(x.double(), self.weight.double(), self.bias.double()).float()


@contextmanager
def rounded_quickly(network: nn.Module) -> Iterator[None]:
    """Context manager that computes a network's :class:`RowLinear` layers in float32, for faster training."""
    layers = [layer for layer in network.modules() if isinstance(layer, RowLinear)]
    for layer in layers:
        layer.quick = True
    try:
        yield
    finally:
        for layer in layers:
            layer.quick = False
