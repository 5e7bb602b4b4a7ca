"""Translation of the WMPO release's weight names to those of this package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from wmpo_gym.world.networks.stdit import STDiT

DEAD_PARTS = ("cross_attn.", "y_embedder.", "fps_embedder.")
"""Unused parts of a published world model."""

_RENAMED = {
    "rope.freqs": "rope_freqs",
    "x_embedder.proj.bias": "x_embedder.bias",
    "x_embedder.proj.weight": "x_embedder.weight",  # there a 3-D convolution over one frame
}
_CAPTION_CHANNELS, _CAPTION_LENGTH = 4096, 300  # of the text encoder that the release no longer calls


def from_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor], list[str]]:
    """Translate a published state dict.

    Args:
        state: As in the release's safetensors (names of STDiT3, with ``action_embedder``).

    Returns:
        Configuration for :class:`STDiT` as far as shapes tell it, its state dict, and the names of the dead
        parts that were dropped.
    """
    dropped = sorted(name for name in state if any(part in name for part in DEAD_PARTS))
    live = {_RENAMED.get(name, name): value for name, value in state.items() if name not in dropped}
    live["x_embedder.weight"] = live["x_embedder.weight"].squeeze(2)
    hidden, channels, patch, _ = live["x_embedder.weight"].shape
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


def published_layout(network: STDiT) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published tensors that make up a network; the inverse of the above."""
    old_names = {new: old for old, new in _RENAMED.items()}
    layout = {old_names.get(name, name): tuple(v.shape) for name, v in network.state_dict().items()}
    out, channels, *patch = layout["x_embedder.proj.weight"]
    layout["x_embedder.proj.weight"] = (out, channels, 1, *patch)
    return layout


def dead_layout(network: STDiT) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the release's unused tensors, which are not in :func:`published_layout`."""
    dim, features = network.config.hidden_size, network.t_embedder.n_features
    shapes: dict[str, tuple[int, ...]] = {"y_embedder.y_embedding": (_CAPTION_LENGTH, _CAPTION_CHANNELS)}

    def linear(name: str, n_in: int, n_out: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (n_out, n_in), (n_out,)

    linear("y_embedder.y_proj.fc1", _CAPTION_CHANNELS, dim)
    linear("y_embedder.y_proj.fc2", dim, dim)
    linear("fps_embedder.mlp.0", features, dim)
    linear("fps_embedder.mlp.2", dim, dim)
    for kind in ("spatial", "temporal"):
        for i in range(network.config.depth):
            block = f"{kind}_blocks.{i}.cross_attn"
            linear(f"{block}.q_linear", dim, dim)
            linear(f"{block}.kv_linear", dim, 2 * dim)
            linear(f"{block}.proj", dim, dim)
    return shapes
