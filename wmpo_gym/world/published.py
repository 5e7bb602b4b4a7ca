"""Weights of the WMPO release, in the names of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

DEAD_PARTS = ("cross_attn.", "y_embedder.", "fps_embedder.")
"""Parts of a published world model that take no part in its computation."""


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Translate a published state dict.

    Args:
        state: As in the release's safetensors (names of STDiT3, with ``action_embedder``).

    Returns:
        Configuration for :class:`STDiT` as far as shapes tell it, its state dict, and the names of the dead
        parts that were dropped.
    """
    dropped = sorted(name for name in state if any(part in name for part in DEAD_PARTS))
    live = {name: value for name, value in state.items() if name not in dropped}
    live["rope_freqs"] = live.pop("rope.freqs")
    live["x_embedder.bias"] = live.pop("x_embedder.proj.bias")
    patches = live.pop("x_embedder.proj.weight")  # a 3-D convolution over one frame
    live["x_embedder.weight"] = patches.squeeze(2)
    hidden, channels, _, patch, _ = patches.shape
    config = {
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": len({name.split(".")[1] for name in live if name.startswith("spatial_blocks.")}),
        "num_heads": hidden // live["spatial_blocks.0.attn.q_norm.weight"].numel(),
        "mlp_ratio": live["spatial_blocks.0.mlp.fc1.bias"].numel() / hidden,
        "patch_size": patch,
        "predict_sigma": live["final_layer.linear.bias"].numel() == 2 * channels * patch**2,
        "action_dim": live["action_embedder.fc.0.weight"].shape[1],
    }
    return config, live, dropped
