"""STDiT, the published world-model network: a diffusion transformer on latents, factorised in space and time.

The computation is that of STDiT3 in the WMPO release (Open-Sora 1.2 with action conditioning, paper §3.2),
and published weights give the published numbers. What the release carries but never computes is left out:
cross-attention, caption and frame-rate embeddings, a quarter of its 1.2 B parameters.

Three properties make the context cheap. Spatial attention stays within a frame, temporal attention is
causal, and context frames are modulated by a fixed noise level and by no action. Their activations therefore
depend on nothing but the context itself, and the keys and values that predicted frames read are computed once
per chunk (:meth:`STDiT.encode_context`) instead of at every denoising step.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from wmpo_gym.utils.kernels import Linear, fast_on_cpu, lean

KeysValues = tuple[Tensor, Tensor]

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 48, "depth": 2, "num_heads": 4},
    "xl": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
"""Sizes: one for tests, and STDiT3-XL/2 of the paper (907,789,856 parameters)."""


class Attention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=1e-6)
        self.proj = Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        rotation: Tensor | None = None,
        mask: Tensor | None = None,
        past: KeysValues | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Attend within frames, or with a rotation over the frames of each place.

        Args:
            x: ``(B, T, S, dim)``: frames T, places S.
            rotation: Angles ``(T, head_dim / 2)`` of the rotary embedding for attention over T; None for
                attention over S.
            mask: bool ``(T, P + T)``, True where a query may look, or None for everywhere.
            past: Keys and values ``(B, S * heads, P, head_dim)`` of the frames before those of ``x``.

        Returns:
            ``(B, T, S, dim)``, and the keys (normalised and rotated) and values attended to.
        """
        batch, frames, places, _ = x.shape
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=3)
        q, k = rms_norm(self.q_norm, q), rms_norm(self.k_norm, k)
        if rotation is None:
            q, k, v = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            return self.proj(out.transpose(1, 2).reshape(x.shape)), (k, v)
        # Places and heads together are the heads of the attention, so that no token is moved.
        q, k = (rotate(t, rotation[:, None, None]) for t in (q, k))
        q, k, v = (t.flatten(2, 3).transpose(1, 2) for t in (q, k, v))
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape)), (k, v)


class Block(nn.Module):
    """Transformer block whose two halves are shifted, scaled and gated per frame (adaLN-single)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.scale_shift_table = nn.Parameter(torch.randn(6, dim) / dim**0.5)
        self.attn = Attention(dim, num_heads)
        self.mlp = nn.Sequential(OrderedDict(fc1=Linear(dim, hidden, gelu=True), fc2=Linear(hidden, dim)))

    def _modulation(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale and gate of the attention, then of the MLP, each ``(B, T or 1, 1, dim)``."""
        return (self.scale_shift_table + modulation).unsqueeze(3).unbind(dim=2)


class SpatialBlock(Block):
    """Spatial attention: each token attends to all tokens of its frame."""

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Tokens ``(B, T, S, dim)`` and modulation ``(B, T or 1, 6, dim)`` to tokens."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self._modulation(modulation)
        out, _ = self.attn(modulate(x, shift, scale))
        x = torch.addcmul(x, gate, out)
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(x, mlp_shift, mlp_scale)))


class TemporalBlock(Block):
    """Every token looks at the tokens of its place in its own and earlier frames."""

    def forward(
        self, x: Tensor, modulation: Tensor, rotation: Tensor, mask: Tensor, past: KeysValues | None
    ) -> tuple[Tensor, KeysValues]:
        """Like :class:`SpatialBlock`; arguments and keys and values as in :class:`Attention`."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self._modulation(modulation)
        out, keys_values = self.attn(modulate(x, shift, scale), rotation, mask, past)
        x = torch.addcmul(x, gate, out)
        return torch.addcmul(x, mlp_gate, self.mlp(modulate(x, mlp_shift, mlp_scale))), keys_values


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, then an MLP."""

    n_features = 256

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.n_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        """``(B,)`` in [0, 1000] to ``(B, dim)``; the sinusoids are always computed in float32."""
        angles = timestep.float()[:, None] * frequencies(self.n_features // 2, timestep.device)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype_of(self)))


class ActionEmbedder(nn.Module):
    """An MLP on each action, and one vector for frames that no action led to."""

    def __init__(self, action_dim: int, dim: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(action_dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))
        self.none_action = nn.Embedding(1, dim)

    def forward(self, actions: Tensor) -> Tensor:
        """``(B, K, D)`` to ``(B, K, dim)``."""
        return self.fc(actions.to(dtype_of(self)))


class FinalLayer(nn.Module):
    """Modulation by the bare time embedding, then a linear layer to the pixels of a patch."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, dim) / dim**0.5)
        self.linear = Linear(dim, out_features)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Tokens ``(B, T, S, dim)`` and time embedding ``(B, dim)`` to ``(B, T, S, out_features)``."""
        shift, scale = (self.scale_shift_table + time[:, None]).unbind(dim=1)
        return self.linear(modulate(x, shift[:, None, None], scale[:, None, None]))


class STDiT(ModelMixin, ConfigMixin):
    """The published world-model network.

    Args:
        in_channels: C, latent channels.
        hidden_size: Width of the tokens.
        depth: Pairs of a spatial and a temporal block.
        num_heads: Attention heads.
        mlp_ratio: Hidden width of the MLPs over ``hidden_size``.
        patch_size: Side of the square of latents that makes a token.
        predict_sigma: Put out twice C channels as the published weights do; the second half is unused.
        action_dim: D.
        context_frames: H.
        chunk: K.
        context_noise: Noise level in [0, 1] of the context if none is given.
        pixels_per_latent: Frame pixels per latent along a side; sets the unit of positions.
        base_size: Frame side in pixels at which positions count whole tokens.

    Raises:
        ValueError: If the width does not divide into heads and sinusoids.
    """

    _no_split_modules = ["SpatialBlock", "TemporalBlock"]

    cpu_batch = 8  # see ConvWorldModel
    other_dtypes = ("bfloat16",)

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        patch_size: int = 2,
        predict_sigma: bool = True,
        action_dim: int = 7,
        context_frames: int = 4,
        chunk: int = 8,
        context_noise: float = 0.015,
        pixels_per_latent: int = 8,
        base_size: int = 512,
    ) -> None:
        super().__init__()
        if hidden_size % 4 or hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise ValueError(
                f"hidden_size {hidden_size} must be a multiple of 4, and {num_heads} heads must divide it "
                "into parts of even size; change hidden_size or num_heads."
            )
        head_dim, n_frames = hidden_size // num_heads, context_frames + chunk
        self.x_embedder = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.action_embedder = ActionEmbedder(action_dim, hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        size = (hidden_size, num_heads, mlp_ratio)
        self.spatial_blocks = nn.ModuleList(SpatialBlock(*size) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(TemporalBlock(*size) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels * (2 if predict_sigma else 1))
        # Saved with the weights: a network trained in bfloat16 has learnt with rounded frequencies.
        self.register_buffer("rope_freqs", frequencies(head_dim // 2))
        causal = torch.ones(n_frames, n_frames, dtype=torch.bool).tril()
        self.register_buffer("causal_mask", causal, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Start as a network of spatial blocks that puts out zero; time is grown into it."""
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if name.startswith(("t_embedder.", "t_block.")):
                nn.init.normal_(module.weight, std=0.02)
            elif name == "final_layer.linear" or (
                name.startswith("temporal_blocks.") and name.endswith(("attn.proj", "mlp.fc2"))
            ):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        actions: Tensor,
        context_mask: Tensor,
        prev_action: Tensor | None = None,
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        """Velocity of all frames; any frame may be context, as in training.

        Args:
            latents: ``(B, C, H + K, h, w)``.
            timestep: ``(B,)`` in [0, 1000].
            actions: ``(B, K, D)`` in [-1, 1].
            context_mask: bool ``(B, H + K)``, True on context frames.
            prev_action: Not used: the published network knows past actions by their frames.
            context_sigma: ``(B,)`` noise level of the context in [0, 1]; None for the configured one.

        Returns:
            float32 ``(B, C, H + K, h, w)``; meaningless on context frames.

        Raises:
            ValueError: If the number of frames or the shape of the actions is not the configured one.
        """
        self._check(latents.shape[2], self.config.context_frames + self.config.chunk, actions)
        time, context = self.t_embedder(timestep), self._context_time(latents, context_sigma)
        none = self.action_embedder.none_action.weight.expand(len(actions), self.config.context_frames, -1)
        by_action = time[:, None] + torch.cat([none, self.action_embedder(actions)], dim=1)
        # Published: actions enter the spatial blocks only, and context frames know neither action nor time.
        is_context, still = context_mask[:, :, None, None], self._modulation(context[:, None])
        spatial = torch.where(is_context, still, self._modulation(by_action))
        temporal = torch.where(is_context, still, self._modulation(time[:, None]))
        tokens, _ = self._blocks(self._tokens(latents), spatial, temporal)
        return self._latents(tokens, time, latents.shape)

    def encode_context(
        self, context: Tensor, prev_action: Tensor | None = None, sigma: Tensor | None = None
    ) -> list[KeysValues]:
        """What the denoising steps of a chunk read of its context: keys and values of every temporal block.

        Args:
            context: ``(B, C, H, h, w)``.
            prev_action: Not used, see :meth:`forward`.
            sigma: ``(B,)`` noise level of the context in [0, 1]; None for the configured one.
        """
        self._check(context.shape[2], self.config.context_frames)
        still = self._modulation(self._context_time(context, sigma)[:, None])
        _, cache = self._blocks(self._tokens(context), still, still, keep=True)
        return cache

    def denoise(self, latents: Tensor, timestep: Tensor, actions: Tensor, cache: list[KeysValues]) -> Tensor:
        """Velocity ``(B, C, K, h, w)`` of predicted frames; the same numbers as :meth:`forward`.

        Args:
            latents: ``(B, C, K, h, w)``.
            timestep: ``(B,)`` in [0, 1000].
            actions: ``(B, K, D)`` in [-1, 1].
            cache: From :meth:`encode_context`.
        """
        self._check(latents.shape[2], self.config.chunk, actions)
        time = self.t_embedder(timestep)
        spatial = self._modulation(time[:, None] + self.action_embedder(actions))
        tokens, _ = self._blocks(self._tokens(latents), spatial, self._modulation(time[:, None]), cache)
        return self._latents(tokens, time, latents.shape)

    # -- parts ---------------------------------------------------------------------------------------------
    def _blocks(
        self,
        x: Tensor,
        spatial: Tensor,
        temporal: Tensor,
        past: list[KeysValues] | None = None,
        keep: bool = False,
    ) -> tuple[Tensor, list[KeysValues]]:
        """All blocks on frames that follow those of ``past``; collects keys and values to ``keep``."""
        first = 0 if past is None else past[0][0].shape[2]
        frames = slice(first, first + x.shape[1])
        rotation = torch.arange(frames.start, frames.stop, device=x.device)[:, None] * self.rope_freqs.float()
        mask, kept = self.causal_mask[frames, : frames.stop], []
        for i, spatial_block in enumerate(self.spatial_blocks):
            x = spatial_block(x, spatial)
            earlier = None if past is None else past[i]
            x, keys_values = self.temporal_blocks[i](x, temporal, rotation, mask, earlier)
            if keep:
                kept.append(keys_values)
        return x, kept

    def _modulation(self, embedding: Tensor) -> Tensor:
        """``(B, T or 1, dim)`` to ``(B, T or 1, 6, dim)``."""
        return self.t_block(embedding).unflatten(-1, (6, -1))

    def _context_time(self, like: Tensor, sigma: Tensor | None) -> Tensor:
        if sigma is None:
            sigma = torch.full((like.shape[0],), self.config.context_noise, device=like.device)
        return self.t_embedder(1000.0 * sigma)

    def _tokens(self, latents: Tensor) -> Tensor:
        """``(B, C, T, h, w)``, padded to whole patches, to tokens ``(B, T, S, dim)`` with their position."""
        p, (height, width) = self.config.patch_size, latents.shape[3:]
        frames = F.pad(latents.transpose(1, 2).flatten(0, 1), (0, -width % p, 0, -height % p))
        grid = self.x_embedder(frames.to(dtype_of(self.x_embedder)))
        scale = math.sqrt(height * width) * self.config.pixels_per_latent / self.config.base_size
        rows, columns = grid.shape[2:]
        place = position_embedding(rows, columns, self.config.hidden_size, scale, grid.device)
        return (grid.flatten(2).transpose(1, 2) + place.to(grid.dtype)).unflatten(0, (latents.shape[0], -1))

    def _latents(self, tokens: Tensor, time: Tensor, shape: torch.Size) -> Tensor:
        """Final layer and un-patchify; ``shape`` is that of the latents, to which padding is cut off."""
        p, (height, width) = self.config.patch_size, shape[3:]
        out = self.final_layer(tokens, time)
        out = out.unflatten(2, (math.ceil(height / p), -1)).unflatten(-1, (p, p, -1))
        # (B, T, rows, columns, patch row, patch column, channel) -> (B, channel, T, height, width)
        out = out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)
        return out[:, : self.config.in_channels, :, :height, :width].float()

    def _check(self, n_frames: int, expected: int, actions: Tensor | None = None) -> None:
        if n_frames != expected:
            raise ValueError(f"Expected {expected} frames of latents, got {n_frames}.")
        shape = (self.config.chunk, self.config.action_dim)
        if actions is not None and tuple(actions.shape[1:]) != shape:
            raise ValueError(
                f"actions must have shape (B, {shape[0]}, {shape[1]}), got {tuple(actions.shape)}."
            )


def dtype_of(module: nn.Module) -> torch.dtype:
    """Floating-point type a module computes in."""
    return next(module.parameters()).dtype


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm over the last dimension, then scale and shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """RMS normalisation of the last dimension; in two passes over ``x`` where :func:`lean` allows it."""
    assert norm.eps is not None
    if not lean(x):
        # Under autocast the weight is float32 and x is not, for which PyTorch has no fused kernel.
        return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.eps)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    return (x * square.add_(norm.eps).rsqrt_()).mul_(norm.weight)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding: turn each adjacent pair of ``(..., d)`` by its angle ``(..., d / 2)``."""
    cos, sin = angles.cos(), angles.sin()
    if fast_on_cpu(x):  # a product of complex numbers: one pass forwards, one backwards
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
        return torch.view_as_real(turned).flatten(-2)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(dim=-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2).to(x.dtype)


def frequencies(n: int, device: torch.device | None = None) -> Tensor:
    """``10000 ** (-j / n)`` for j = 0 .. n - 1, in float32."""
    # Times this number, a timestep of 900 makes the last bit count: rounded as published, exp of a product.
    return torch.exp(-math.log(10000.0) * torch.arange(n, device=device, dtype=torch.float32) / n)


def position_embedding(rows: int, columns: int, dim: int, scale: float, device: torch.device) -> Tensor:
    """Fixed sinusoids ``(rows * columns, dim)``; the first half tells the column, the second the row.

    Positions are those of a square grid with as many tokens, stretched to the frame and divided by ``scale``.
    """
    side = round(math.sqrt(rows * columns))

    def sinusoids(n: int) -> Tensor:
        place = torch.arange(n, device=device, dtype=torch.float32) / scale * (side / n)
        angles = place[:, None] * frequencies(dim // 4, device)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    by_column = sinusoids(columns)[None].expand(rows, -1, -1)
    by_row = sinusoids(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1)
