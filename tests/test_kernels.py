"""The fast kernels give the numbers of the ordinary ones, and only where nothing is learned."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wmpo_gym.utils.kernels import Linear, lean, norm_silu, ordinary_kernels


def both(work):
    """What ``work()`` gives on the fast and on the ordinary kernels."""
    with torch.no_grad():
        fast = work()
        with ordinary_kernels():
            return fast, work()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_linear(gelu, rows):
    torch.manual_seed(0)
    layer, x = Linear(48, 40, gelu=gelu), torch.randn(2, rows, 48)
    torch.testing.assert_close(*both(lambda: layer(x)), atol=2e-6, rtol=1e-5)
    reference = nn.functional.linear(x, layer.weight, layer.bias)
    reference = nn.functional.gelu(reference, approximate="tanh") if gelu else reference
    assert torch.equal(layer(x), reference)  # where a gradient is wanted


def test_linear_without_a_bias_or_with_transposed_input():
    layer, x = Linear(16, 8), torch.randn(16, 5).T
    torch.testing.assert_close(*both(lambda: layer(x)), atol=2e-6, rtol=1e-5)
    layer.bias = None
    torch.testing.assert_close(*both(lambda: layer(x)), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("modulated", [False, True])
def test_norm_silu(layout, modulated):
    torch.manual_seed(0)
    norm = nn.GroupNorm(8, 24)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + torch.randn(5, 24, 6, 7)).contiguous(memory_format=layout)
    kept = x.clone()
    modulation = torch.randn(2, 5, 24, 1, 1) if modulated else (None, None)
    torch.testing.assert_close(*both(lambda: norm_silu(norm, x, *modulation)), atol=2e-5, rtol=1e-5)
    assert torch.equal(x, kept)


def test_a_constant_picture_has_no_variance_to_divide_by():
    fast, ordinary = both(lambda: norm_silu(nn.GroupNorm(1, 2), torch.full((1, 2, 4, 4), 1000.0)))
    assert fast.isfinite().all() and ordinary.isfinite().all()


def test_when_the_short_way_is_taken():
    x = torch.zeros(1)
    assert not lean(x)
    with torch.no_grad():
        assert lean(x) and not lean(x.bfloat16()) and not lean(torch.zeros(1, device="meta"))
        with ordinary_kernels():
            assert not lean(x)
        assert lean(x)
