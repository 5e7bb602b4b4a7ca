"""Optimizers of the world model: Muon for the inner convolutions, AdamW for all other weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class KernelMuon(torch.optim.Muon):
    """Muon (https://kellerjordan.github.io/posts/muon) for convolution kernels.

    Muon orthogonalises the update of each matrix, so that rare but necessary features (the relation of tool
    and object) are learned as quickly as those that dominate the pixel loss.

    Args:
        weights: Weights of two or more dimensions, each flattened to a matrix after its first dimension.
        learning_rate: Step size.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, weights: Sequence[Tensor], *, learning_rate: float, weight_decay: float) -> None:
        self._weights = list(weights)
        # torch's Muon only accepts matrices; these share memory with the kernels.
        self._matrices = [nn.Parameter(p.data.flatten(1)) for p in self._weights]
        super().__init__(self._matrices, lr=learning_rate, weight_decay=weight_decay)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the kernels along their gradients."""
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)


def make_optimizers(
    network: nn.Module,
    *,
    learning_rate: float,
    weight_decay: float,
    muon: float = 0.0,
) -> dict[str, Optimizer]:
    """AdamW, and Muon for the ``inner_weights()`` of a network that defines them.

    Args:
        network: The network to train.
        learning_rate: Learning rate of AdamW.
        weight_decay: Decoupled weight decay of both.
        muon: Learning rate of Muon; 0 uses AdamW for all weights, as published.
    """
    inner: list[Tensor] = getattr(network, "inner_weights", list)() if muon > 0 else []
    names = {id(p) for p in inner}
    rest = [p for p in network.parameters() if id(p) not in names and p.requires_grad]
    optimizers: dict[str, Optimizer] = {
        "adamw": torch.optim.AdamW(rest, lr=learning_rate, weight_decay=weight_decay)
    }
    if inner:
        optimizers["muon"] = KernelMuon(inner, learning_rate=muon, weight_decay=weight_decay)
    return optimizers
