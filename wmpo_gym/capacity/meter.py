"""Counting of FLOPs and memory of a computation, on real tensors or on torch's ``meta`` device.

Memory is counted per storage as eager PyTorch allocates and frees tensors; kernel workspaces and allocator
fragmentation are not included.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """Cost of a computation.

    Attributes:
        flops: Floating-point operations of matrix products, convolutions and attention; a multiply-add counts
            as two.
        peak: Peak of the additionally allocated bytes.
        kept: Additional bytes still allocated at the end, including results.
    """

    flops: int
    peak: int
    kept: int


class Meter(TorchDispatchMode):
    """Dispatch mode that counts operations, and the bytes of tensors allocated within it.

    Args:
        known: Tensors that existed before and are not counted, nor are their views.

    Attributes:
        flops: Operations so far.
        live: Currently allocated bytes.
        peak: Maximum of allocated bytes.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.flops = self.live = self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its outputs."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def measure(
    function: Callable[[], Any], known: Iterable[Tensor] = (), autocast: torch.dtype | None = None
) -> Cost:
    """Run a function and measure its cost.

    Args:
        function: The computation, on any device; on ``meta`` it takes almost no time.
        known: Tensors that existed before.
        autocast: Data type of ``torch.autocast`` on a GPU, simulated on ``meta``.
    """
    meter = Meter(known)
    with _gpu_code_paths(autocast), meter:
        result = function()
    kept = meter.live
    del result
    return Cost(meter.flops, meter.peak, kept)


@contextmanager
def _gpu_code_paths(autocast: torch.dtype | None) -> Iterator[None]:
    """Context manager that gives ``meta`` tensors the GPU code paths for fused attention and autocast.

    Attention on ``meta`` would otherwise allocate all token pairs. Functions are replaced instead of using a
    mode, because modes are not active when a backward pass recomputes a layer.
    """
    names = ("scaled_dot_product_attention", "linear", "conv2d")
    originals = {name: getattr(F, name) for name in names}

    def cast(*tensors: Tensor | None) -> list[Any]:
        if autocast is None:
            return list(tensors)
        return [x.to(autocast) if x is not None and x.is_floating_point() else x for x in tensors]

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **kwargs: Any) -> Tensor:
        query, key, value = cast(query, key, value)
        if query.device.type != "meta":
            kwargs["attn_mask"] = attn_mask
            return originals["scaled_dot_product_attention"](query, key, value, **kwargs)
        bias = attn_mask
        if attn_mask is not None:
            bias = attn_mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        causal, scale = bool(kwargs.get("is_causal")), kwargs.get("scale")
        fused = torch.ops.aten._scaled_dot_product_efficient_attention
        return fused(query, key, value, bias, torch.is_grad_enabled(), 0.0, causal, scale=scale)[0]

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return originals["linear"](*cast(x, weight, bias))

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        return originals["conv2d"](*cast(x, weight, bias), *args, **kwargs)

    replaced: dict[str, Callable[..., Tensor]] = {"scaled_dot_product_attention": attention}
    if autocast is not None:
        replaced |= {"linear": linear, "conv2d": conv2d}
    try:
        for name, function in replaced.items():
            setattr(F, name, function)
        yield
    finally:
        for name, function in originals.items():
            setattr(F, name, function)
