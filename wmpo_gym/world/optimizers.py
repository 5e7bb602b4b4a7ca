"""How the world model's weights are moved: Muon for the inner convolutions, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from wmpo_gym.data.optimizer_state import pack_slots, unpack_slots


class JointOptimizer:
    """AdamW, and Muon (https://kellerjordan.github.io/posts/muon) for some of the weights.

    Muon makes every update of a matrix equally strong in all its directions, so that what the network needs
    but little of the data asks for (two things at once: where the tool is and what lies there) is not left
    behind what most pixels ask for.

    Args:
        network: Whose parameters are trained.
        learning_rate: AdamW's peak.
        weight_decay: Of both.
        inner: Weights of two or more dimensions to train with Muon, each as the matrix of its first
            dimension against the others.
        muon: Muon's peak step size.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        learning_rate: float,
        weight_decay: float,
        inner: Sequence[Tensor] = (),
        muon: float = 0.0,
    ) -> None:
        self._inner = list(inner) if muon > 0 else []
        theirs = {id(p) for p in self._inner}
        rest = [p for p in network.parameters() if id(p) not in theirs and p.requires_grad]
        self._parts: dict[str, tuple[torch.optim.Optimizer, float]] = {
            "optimizer.": (torch.optim.AdamW(rest, weight_decay=weight_decay), learning_rate)
        }
        # torch's Muon takes matrices only; these share the kernels' memory.
        self._matrices = [nn.Parameter(p.data.flatten(1)) for p in self._inner]
        if self._matrices:
            self._parts["muon."] = (torch.optim.Muon(self._matrices, weight_decay=weight_decay), muon)

    def step(self, share: float) -> None:
        """Move the weights along their gradients, with ``share`` of the peak step sizes."""
        for matrix, weight in zip(self._matrices, self._inner, strict=True):
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for optimizer, peak in self._parts.values():
            for group in optimizer.param_groups:
                group["lr"] = peak * share
            optimizer.step()

    def pack(self) -> dict[str, Tensor]:
        """Moments, for a checkpoint."""
        return {k: v for name, (part, _) in self._parts.items() for k, v in pack_slots(part, name).items()}

    def unpack(self, tensors: Mapping[str, Tensor]) -> None:
        """Put :meth:`pack`'s result back; tensors of other names are left alone."""
        for name, (part, _) in self._parts.items():
            unpack_slots(part, tensors, name)
