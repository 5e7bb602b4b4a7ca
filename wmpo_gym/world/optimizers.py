"""Optimizers of the world model: Muon for the inner convolutions, AdamW for all other weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class KernelMuon(torch.optim.Muon):
    """Muon (https://kellerjordan.github.io/posts/muon) for convolution kernels.

    Muon makes every update of a matrix equally strong in all its directions, so that rare but necessary
    features (where the tool is and what lies there, together) are learned as quickly as those that most
    pixels ask for.

    Args:
        weights: Weights of two or more dimensions, each updated as the matrix of its first dimension against
            the others.
        learning_rate: Step size.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, weights: Sequence[Tensor], *, learning_rate: float, weight_decay: float) -> None:
        self._weights = list(weights)
        # torch's Muon takes matrices only; these share the kernels' memory.
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
    """AdamW, and Muon for the weights that a network names as its ``inner_weights()``.

    Args:
        network: Whose parameters are trained.
        learning_rate: AdamW's.
        weight_decay: Of both.
        muon: Muon's learning rate; 0 is AdamW for all weights, as published.
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
