"""Faster CPU inference kernels of the world models, equal to PyTorch's up to rounding.

PyTorch's own layers are used when gradients are enabled, on an accelerator, and within
:func:`ordinary_kernels`, which serves as the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ordinary: ContextVar[bool] = ContextVar("ordinary_kernels", default=False)


@contextmanager
def ordinary_kernels() -> Iterator[None]:
    """Context manager in which world models use PyTorch's own layers and default memory layout."""
    token = _ordinary.set(True)
    try:
        yield
    finally:
        _ordinary.reset(token)


def in_ordinary_kernels() -> bool:
    """Whether :func:`ordinary_kernels` is active."""
    return _ordinary.get()


def fast_on_cpu(x: Tensor) -> bool:
    """Whether ``x`` is float32 on a CPU, and neither compiled nor within :func:`ordinary_kernels`."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not _ordinary.get()
    )


def lean(x: Tensor) -> bool:
    """Whether ``x`` can use the inference kernels: :func:`fast_on_cpu` with gradients disabled."""
    return fast_on_cpu(x) and not torch.is_grad_enabled()


class Linear(nn.Linear):
    """Linear layer with an optional fused GELU, computed by oneDNN in CPU inference.

    ``nn.Linear`` goes through MKL, which uses only half of an AMD processor's vector width, and needs a
    separate pass for the GELU.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        gelu: Apply a tanh-approximated GELU to the output.
    """

    def __init__(self, in_features: int, out_features: int, *, gelu: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """Apply to ``(..., in)``."""
        if lean(x) and _onednn_linear is not None:
            function, kind = ("gelu", "tanh") if self.gelu else ("none", "")
            return _onednn_linear(x, self.weight, self.bias, function, [], kind)
        out = super().forward(x)
        return F.gelu(out, approximate="tanh") if self.gelu else out


def _find_onednn_linear() -> Callable[..., Tensor] | None:
    """The operation that PyTorch's compiler calls for linear layers on a CPU; None in a build without it."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_onednn_linear = _find_onednn_linear()


@dataclass(frozen=True)
class Moments:
    """Spatial sums of images ``(N, C, h, w)``, from which group-norm statistics are computed.

    Attributes:
        sums: ``(2, N, C)``, of the values and of their squares.
        places: Number of pixels, h w.
    """

    sums: Tensor
    places: int

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """The moments of ``(N, C, h, w)``."""
        return cls(torch.stack([x.sum(dim=(2, 3)), (x * x).sum(dim=(2, 3))]), x.shape[2] * x.shape[3])

    def enlarged(self) -> Moments:
        """Moments of the same images upsampled by 2 (nearest neighbour)."""
        return Moments(4 * self.sums, 4 * self.places)

    def beside(self, other: Moments) -> Moments:
        """Moments of the channel-wise concatenation with other images of the same size."""
        return Moments(torch.cat([self.sums, other.sums], dim=2), self.places)

    def affine(
        self, norm: nn.GroupNorm, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Group norm with optional modulation ``(N, C, 1, 1)``, as factor and summand per channel."""
        by_group = self.sums.unflatten(2, (norm.num_groups, -1))
        mean, square = (by_group.mean(dim=3, keepdim=True) / self.places).unbind()
        variance = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0)
        factor = (variance + norm.eps).rsqrt_() * norm.weight.view_as(by_group[0, 0])
        summand = torch.addcmul(norm.bias.view_as(by_group[0, 0]), mean, factor, value=-1)
        factor, summand = (x.flatten(1)[:, :, None, None] for x in (factor, summand))
        if scale is None or shift is None:
            return factor, summand
        scale = 1 + scale
        return factor * scale, torch.addcmul(shift, summand, scale)


def affine_silu(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """``silu(factor * x + summand)``."""
    return F.silu(torch.addcmul(summand, x, factor), inplace=True)


def norm_silu(
    norm: nn.GroupNorm, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """``silu(norm(x) * (1 + scale) + shift)``, with optional modulation.

    PyTorch's group norm is slow in channels-last memory format, in which convolutions are fastest.

    Args:
        norm: The group norm.
        x: ``(N, C, h, w)``.
        scale: ``(N, C, 1, 1)`` or None.
        shift: ``(N, C, 1, 1)`` or None.
    """
    if lean(x):
        return affine_silu(x, *Moments.of(x).affine(norm, scale, shift))
    out = norm(x)
    if scale is not None and shift is not None:
        out = out * (1 + scale) + shift
    return F.silu(out)
