"""What the machine can do at most, and how much of it a network asks for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
TRIES = 3  # the best of them counts: a peak is what was reached once


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Most floating-point operations per second that a matrix product reached here, by any kernel we use.

    Args:
        device: Where.
        dtype: In what.
    """
    import torch

    from wmpo_gym.utils.kernels import Linear

    best = 0.0
    for side in (1024, 2048) if device.type == "cpu" else (4096, 8192):
        layer = Linear(side, side).to(device, dtype)
        x = torch.randn(side, side, device=device, dtype=dtype)
        weight = layer.weight.detach()
        with torch.no_grad():
            for product in (lambda x=x, weight=weight: x @ weight, lambda x=x, layer=layer: layer(x)):
                best = max(best, 2.0 * side**3 / min(timed(product, device)[0] for _ in range(TRIES)))
    return best


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds that ``work()`` takes on a device, until it is really done, and what it returned."""
    synchronize = synchronizer(device)
    synchronize()
    began = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - began, result


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done what it was given."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def flops_of(work: Callable[[], Any], *, gradients: bool = False) -> float:
    """Floating-point operations of the products and convolutions in ``work()``, as PyTorch counts them.

    Counted on the ordinary kernels: what the fast ones spare is no work done. On a CPU PyTorch does not count
    the attention itself, 2 % of a small transformer.

    Args:
        work: What is counted.
        gradients: Whether ``work`` computes gradients.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from wmpo_gym.utils.kernels import ordinary_kernels

    with FlopCounterMode(display=False) as counter, ordinary_kernels(), torch.set_grad_enabled(gradients):
        work()
    return float(counter.get_total_flops())
