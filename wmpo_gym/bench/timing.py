"""Timers for functions and methods, the machine's matmul peak, and FLOP counting."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Targets = Sequence[tuple[Any, Sequence[str], str]]
"""Timed methods as (object, method names, part)."""
TRIES = 3  # the best one counts


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Peak floating-point operations per second of a matrix product, over the kernels in use.

    Args:
        device: Device to measure.
        dtype: Floating-point type of the matrices.
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
    """Seconds until ``work()`` has finished on the device, and its result."""
    synchronize = synchronizer(device)
    synchronize()
    began = time.perf_counter()
    result = work()
    synchronize()
    return time.perf_counter() - began, result


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until a device has finished its work."""
    import torch

    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def flops_of(work: Callable[[], Any], *, gradients: bool = False) -> float:
    """Floating-point operations of the matrix products and convolutions in ``work()``, counted by PyTorch.

    Counted with the ordinary kernels, so that operations the fast kernels save are included. On a CPU
    PyTorch does not count the attention itself.

    Args:
        work: The function to count.
        gradients: Whether ``work`` computes gradients.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from wmpo_gym.utils.kernels import ordinary_kernels

    with FlopCounterMode(display=False) as counter, ordinary_kernels(), torch.set_grad_enabled(gradients):
        work()
    return float(counter.get_total_flops())


def median_and_range(values: Any) -> list[float]:
    """Median, minimum and maximum."""
    return [float(np.median(values)), float(np.min(values)), float(np.max(values))]


# -- time spent in selected methods ----------------------------------------------------------------------
class Stopwatch:
    """Timer of wrapped functions; time in a nested wrapped function is not counted for the outer one.

    Args:
        synchronize: Called before the clock is read, for asynchronous devices.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0
        self._synchronize = synchronize

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under the name ``part``."""
        self.seconds.setdefault(part, 0.0)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._credit()
            self._running.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._credit()
                self._running.pop()

        return timed

    def _credit(self) -> None:
        self._synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


@contextmanager
def timed_methods(targets: Targets, watch: Stopwatch) -> Iterator[None]:
    """Context manager that times methods of objects by shadowing them on the instances.

    Args:
        targets: (object, method names, part); missing methods are ignored.
        watch: Collects the seconds.
    """
    shadowed = []
    try:
        for target, names, part in targets:
            for name in names:
                if hasattr(target, name):
                    shadowed.append((target, name, vars(target).get(name)))
                    object.__setattr__(target, name, watch.wrap(part, getattr(target, name)))
        yield
    finally:
        for target, name, own in shadowed:
            if own is None:
                object.__delattr__(target, name)
            else:
                object.__setattr__(target, name, own)
