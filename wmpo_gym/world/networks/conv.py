"""Convolutional world model in pixel space, small enough to train and run on a CPU.

It predicts the clean frames of a whole action chunk at once, each frame from the context and the actions up
to it with the same U-Net, whose weights are shared across the frames of a chunk. Two design choices speed up
training: a prediction blends the last context frame with a warped copy of it, displaced by a global shift
predicted from the actions plus a per-pixel offset, and the actions modulate every block (FiLM).
The velocity that samplers expect follows from the predicted frames, ``v = (x0_hat - x_t) / sigma``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from wmpo_gym.tasks import Task
from wmpo_gym.utils.kernels import Moments, affine_silu, in_ordinary_kernels, lean, norm_silu
from wmpo_gym.utils.layers import RowLinear
from wmpo_gym.world.proprio import ProprioModel

OWN_SHIFT_SCALE = 0.1  # per-pixel displacements are learned in these units (of half the image)
MIN_SIGMA = 0.02  # lower bound of the noise level in the division that gives the velocity


@dataclass
class ConvContext:
    """Conditioning shared by the denoising steps of a chunk.

    Attributes:
        frames: ``(B, C, H, h, w)`` context frames in [-1, 1].
        prev_action: ``(B, D)`` action that led to the last context frame (the robot responds with a lag;
            zeros at the start).
        memory: ``(B, M)`` robot state (:class:`~wmpo_gym.world.proprio.ProprioModel`); M is 0 without.
        sigma: ``(B,)`` noise level of the context in [0, 1].
    """

    frames: Tensor
    prev_action: Tensor
    memory: Tensor
    sigma: Tensor


def _pixelwise(x: Tensor) -> Tensor:
    """Images ``(N, C, h, w)`` in channels-last memory format, which makes convolutions faster."""
    return x if in_ordinary_kernels() else x.contiguous(memory_format=torch.channels_last)


def _unshuffled(clips: Tensor, patch: int) -> Tensor:
    """Frames ``(B K, C p p, h / p, w / p)`` of clips ``(B, C, K, h, w)``, as ``pixel_unshuffle``."""
    blocks = clips.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))
    return _pixelwise(blocks.permute(0, 2, 1, 4, 6, 3, 5).flatten(2, 4).flatten(0, 1))


def _for_enlarged(weight: Tensor) -> Tensor:
    """Transposed-convolution weights equal to upsampling by 2 and a 3x3 convolution."""
    wide = F.pad(weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
    rows = wide[:, :, :-1] + wide[:, :, 1:]  # each input pixel contributes to two positions per axis
    return rows[..., :-1] + rows[..., 1:]


class FiLMBlock(nn.Module):
    """Residual block of two 3x3 convolutions, modulated by the conditioning vector."""

    def __init__(self, in_channels: int, channels: int, cond_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, channels)
        self.film = RowLinear(cond_dim, 2 * channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        # Dilation has no effect on a 1x1 kernel, but selects the torch implementation whose rounding does not
        # depend on the batch size.
        self.skip = (
            nn.Conv2d(in_channels, channels, 1, dilation=2) if in_channels != channels else nn.Identity()
        )
        nn.init.zeros_(self.film.weight)
        nn.init.zeros_(self.film.bias)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """``(B, in_channels, h, w)`` and ``(B, cond_dim)`` to ``(B, channels, h, w)``."""
        return self._second_half(self.conv1(norm_silu(self.norm1, x)), cond).add_(self.skip(x))

    def _second_half(self, hidden: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond)[:, :, None, None].chunk(2, dim=1)
        return self.conv2(norm_silu(self.norm2, hidden, scale, shift))

    def enlarge(self, small: Tensor, large: Tensor, cond: Tensor) -> Tensor:
        """The block on ``small`` ``(B, c, h / 2, w / 2)`` upsampled by 2 and concatenated with ``large``.

        Operations on ``small`` alone are computed before upsampling. In particular, a 3x3 convolution of an
        image upsampled by 2 is a transposed convolution of the original, with 4 products instead of 9.
        """
        if not lean(small):
            return self(torch.cat([F.interpolate(small, scale_factor=2.0), large], dim=1), cond)
        assert isinstance(self.skip, nn.Conv2d), "two inputs are wider than the output"
        n, by_skip = small.shape[1], self.skip.weight
        moments = Moments.of(small).enlarged().beside(Moments.of(large))
        factor, summand = moments.affine(self.norm1)
        of_small = affine_silu(small, factor[:, :n], summand[:, :n])
        of_large = affine_silu(large, factor[:, n:], summand[:, n:])
        weight = self.conv1.weight
        hidden = F.conv_transpose2d(
            of_small, _for_enlarged(weight[:, :n]), self.conv1.bias, stride=2, padding=1
        )
        hidden += F.conv2d(of_large, weight[:, n:], padding=1)
        skip = F.conv2d(small, by_skip[:, :n], self.skip.bias, dilation=2)
        out = self._second_half(hidden, cond).add_(F.conv2d(large, by_skip[:, n:], dilation=2))
        out.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(skip[:, :, :, None, :, None])  # enlarged
        return out


class ConvWorldModel(ModelMixin, ConfigMixin):
    """U-Net world model on frames (the bundled world's network).

    Args:
        image_size: Side of the square frames in pixels.
        channels: Frame channels C.
        context_frames: H, the number of conditioning frames.
        chunk: K, frames predicted per call (one per action).
        action_dim: D.
        widths: Channels per resolution level; the first level has the resolution ``image_size / patch``.
        patch: Pixel-unshuffle factor of the input.
        blocks: FiLM blocks per level and direction.
        cond_dim: Width of the conditioning vector.
        detail: Channels of the last two convolutions, at full resolution.
        shift_init: Pixels (columns, rows) that action components 0 and 1 move things by, where that is known
            beforehand; only the start of what is learned.
        state_dim: P, numbers of the robot's own state that the network follows by itself (:attr:`motion`,
            trained beforehand by :func:`~wmpo_gym.world.proprio.train_proprio`) and draws by; 0 for none.
    """

    min_rows = 2
    """Rows per call from which on a row's result is the same to the bit in a batch of any size (on a CPU)."""

    cpu_batch = 32
    """Rows per call that a CPU is quickest with: more overflow its caches, fewer waste time in between."""

    @register_to_config
    def __init__(
        self,
        image_size: int = 40,
        channels: int = 3,
        context_frames: int = 2,
        chunk: int = 4,
        action_dim: int = 3,
        widths: tuple[int, ...] = (32, 64, 96),
        patch: int = 2,
        blocks: int = 1,
        cond_dim: int = 128,
        detail: int = 8,
        shift_init: tuple[float, float] = (0.0, 0.0),
        state_dim: int = 0,
    ) -> None:
        super().__init__()
        self.chunk, self.context_frames, self.channels, self.patch = chunk, context_frames, channels, patch
        # Sum of the actions so far is the displacement; given to the network beside the actions themselves.
        self.cond = nn.Sequential(
            RowLinear(2 * 16 + action_dim * (chunk + 3) + chunk + state_dim, cond_dim),
            nn.SiLU(),
            RowLinear(cond_dim, cond_dim),
        )
        self.shift = nn.Parameter(self._initial_shift(shift_init))
        self.motion = ProprioModel(image_size, channels, action_dim, state_dim) if state_dim else None
        if state_dim:
            self.state_shift = nn.Parameter(torch.zeros(2, state_dim))
        self.context_stem = nn.Conv2d(context_frames * channels * patch**2 + 2, widths[0], 3, padding=1)
        self.frame_stem = nn.Conv2d(2 * channels * patch**2, widths[0], 3, padding=1)
        self.way_stem = nn.Conv2d(2 * channels * patch**2, widths[0], 3, padding=1)
        self.way_gate = RowLinear(action_dim, 2 * widths[0])
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.ModuleList(FiLMBlock(width, width, cond_dim) for _ in range(blocks))
            if i:
                level.insert(0, nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1))
            self.down.append(level)
        for i in reversed(range(len(widths) - 1)):
            stage = nn.ModuleList([FiLMBlock(widths[i + 1] + widths[i], widths[i], cond_dim)])
            stage.extend(FiLMBlock(widths[i], widths[i], cond_dim) for _ in range(blocks - 1))
            self.up.append(stage)
        self.head_norm = nn.GroupNorm(8, widths[0])
        self.to_pixels = nn.Conv2d(widths[0], detail * patch**2, 3, padding=1)
        self.sharpen = nn.Conv2d(detail + 2 * channels, detail, 3, padding=1)
        self.head = nn.Conv2d(detail, channels + 3, 3, padding=1)  # residual, mask and displacement
        for layer in (self.head, self.way_gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    @classmethod
    def for_task(cls, task: Task, seed: int, **changes: Any) -> ConvWorldModel:
        """An untrained network that fits a task; the global generator is left alone.

        The patch grows with the picture (2 at 40 pixels, 4 at 64, 8 at 128), so that the U-Net always works
        at 16 to 24 places a side.

        Args:
            task: Gives the sizes.
            seed: Seed of the weights.
            **changes: Any other argument of the class.
        """
        sizes = {"image_size": task.image_size, "chunk": task.chunk, "action_dim": task.action_dim}
        sizes["patch"] = next(p for p in (2, 4, 8, 16, 32) if task.image_size <= 24 * p or p == 32)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls(**{**sizes, **changes})

    def _initial_shift(self, pixels: tuple[float, float]) -> Tensor:
        """Linear map ``(2, K, (K + 1) * D)`` from the actions to the (column, row) shift, in half images."""
        cfg = self.config
        shift = torch.zeros(2, cfg.chunk, cfg.chunk + 1, cfg.action_dim)
        for axis in range(min(2, cfg.action_dim)):
            for k in range(cfg.chunk):
                shift[axis, k, 1 : k + 2, axis] = pixels[axis] * 2 / cfg.image_size
        return shift.flatten(2)

    def inner_weights(self) -> list[Tensor]:
        """Convolution weights between hidden features, without the input and output layers."""
        inner = [*self.down, *self.up, self.to_pixels, self.sharpen]
        return [m.weight for part in inner for m in part.modules() if isinstance(m, nn.Conv2d)]

    # -- the published signature -----------------------------------------------------------------------------
    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        actions: Tensor,
        context_mask: Tensor,
        prev_action: Tensor | None = None,
        context_sigma: Tensor | None = None,
    ) -> Tensor:
        """Velocity of all frames.

        Args:
            latents: ``(B, C, H + K, h, w)``, clean context frames first.
            timestep: ``(B,)`` in [0, 1000]; 1000 is pure noise.
            actions: ``(B, K, D)`` in [-1, 1].
            context_mask: ``(B, H + K)`` bool, True on the H leading context frames.
            prev_action: ``(B, D)`` or None for zeros.
            context_sigma: ``(B,)`` noise level of the context in [0, 1], or None for none.

        Returns:
            ``(B, C, H + K, h, w)``; zero on the context frames.

        Raises:
            ValueError: If the context is not exactly the leading H frames.
        """
        n = self.context_frames
        if not bool(context_mask[:, :n].all()) or bool(context_mask[:, n:].any()):
            raise ValueError(
                f"ConvWorldModel takes its {n} leading frames as context; context_mask says otherwise."
            )
        cache = self.encode_context(latents[:, :, :n], prev_action, context_sigma)
        velocity = self.denoise(latents[:, :, n:], timestep, actions, cache)
        return torch.cat([torch.zeros_like(latents[:, :, :n]), velocity], dim=2)

    def encode_context(
        self, context: Tensor, prev_action: Tensor | None = None, sigma: Tensor | None = None
    ) -> ConvContext:
        """Conditioning shared by the denoising steps of one chunk.

        Args:
            context: ``(B, C, H, h, w)``.
            prev_action: ``(B, D)``, None for zeros; ``(B, D + M)`` with the robot state appended.
            sigma: ``(B,)`` or None for none.
        """
        batch, dim = context.shape[0], self.config.action_dim
        if prev_action is None:
            prev_action = context.new_zeros(batch, dim)
        memory = prev_action[:, dim:]
        if self.motion is not None and memory.shape[1] == 0:
            memory = self.motion.init_state(context[:, :, -1])
        sigma = context.new_zeros(batch) if sigma is None else sigma
        return ConvContext(context, prev_action[:, :dim], memory, sigma)

    def denoise(self, latents: Tensor, timestep: Tensor, actions: Tensor, cache: ConvContext) -> Tensor:
        """Velocity ``(B, C, K, h, w)`` of the noisy frames ``latents`` at ``timestep`` (B,)."""
        sigma = timestep / 1000.0
        clean = self.predict(latents, sigma, actions, cache)
        return (clean - latents) / sigma.clamp(min=MIN_SIGMA)[:, None, None, None, None]

    # -- the network -----------------------------------------------------------------------------------------
    def predict(self, noisy: Tensor, sigma: Tensor, actions: Tensor, cache: ConvContext) -> Tensor:
        """Clean frames ``(B, C, K, h, w)`` in about [-1, 1] from noisy ones at noise level ``sigma`` (B,)."""
        batch, channels, chunk, height, width = noisy.shape
        last = cache.frames[:, :, -1]
        states = self._states(cache.memory, actions)
        travel = states - cache.memory[:, None, : states.shape[2]]
        shift = self._shift(torch.cat([cache.prev_action[:, None], actions], dim=1), travel)[:, :, None, None]
        shifted = self._moved(last, shift)
        # Scaled down at high noise levels, so that noise does not dominate the context.
        scaled = noisy * (1 - 0.9 * sigma)[:, None, None, None, None]
        x = self.frame_stem(_unshuffled(torch.cat([scaled, shifted], dim=1), self.patch))
        x = x.unflatten(0, (batch, chunk)) + self._stem(cache.frames)[:, None]
        x = (x + self._motion_features(last, shifted, actions)).flatten(0, 1)
        features = F.pixel_shuffle(self._unet(x, self._condition(sigma, actions, states, cache)), self.patch)
        sharp = torch.cat([features, self._per_frame(last), shifted.transpose(1, 2).flatten(0, 1)], dim=1)
        out = self.head(F.silu(self.sharpen(sharp)))
        out = out.view(batch, chunk, channels + 3, height, width).transpose(1, 2)
        residual, mask, own = (
            out[:, :channels],
            torch.sigmoid(out[:, channels : channels + 1] - 1.0),
            out[:, -2:],
        )
        # Per-pixel offsets account for motion that differs from the global shift (a gripped block).
        moved = self._moved(last, shift + own.permute(0, 2, 3, 4, 1) * OWN_SHIFT_SCALE)
        return last[:, :, None] + mask * (moved - last[:, :, None]) + residual

    def _states(self, memory: Tensor, actions: Tensor) -> Tensor:
        """The robot's state at every frame ``(B, K, P)``; P is 0 without a proprioception model."""
        if self.motion is None:
            return actions[..., :0]
        return self.motion.rollout(memory, actions)[..., : self.config.state_dim]

    def _stem(self, context: Tensor) -> Tensor:
        """First convolution of the context, shared by the chunk's frames."""
        batch, _, _, height, width = context.shape
        frames = F.pixel_unshuffle(context.transpose(1, 2).flatten(1, 2), self.patch)
        return self.context_stem(
            _pixelwise(torch.cat([frames, self._coordinates(batch, height, width)], dim=1))
        )

    def _motion_features(self, last: Tensor, shifted: Tensor, actions: Tensor) -> Tensor:
        """Features of the motion up to each frame, ``(B, K, widths[0], h / p, w / p)``.

        Each step encodes the warped frames before and after it, modulated by its action; a frame receives the
        cumulative sum of its steps. This captures events between the context and the frame, such as a magnet
        that gripped an object in passing.
        """
        before = torch.cat([last[:, :, None], shifted[:, :, :-1]], dim=2)
        steps = self.way_stem(_unshuffled(torch.cat([before, shifted], dim=1), self.patch))
        scale, summand = self.way_gate(actions)[..., None, None].chunk(2, dim=2)
        steps = steps.unflatten(0, (len(actions), self.chunk)) * (1 + scale) + summand
        return steps.cumsum(dim=1)

    def _per_frame(self, x: Tensor) -> Tensor:
        """Repeat rows ``(B, ...)`` for each of the chunk's frames: ``(B K, ...)``."""
        return x[:, None].expand(-1, self.chunk, *x.shape[1:]).flatten(0, 1)

    def _shift(self, actions: Tensor, travel: Tensor | None = None) -> Tensor:
        """Displacement ``(B, K, 2)`` predicted from actions and state changes so far, in half images."""
        shift = torch.einsum("cka,ba->bkc", self.shift.double(), actions.flatten(1).double())
        if self.motion is not None and travel is not None:
            shift = shift + travel.double() @ self.state_shift.double().T
        return shift.float()

    def _moved(self, last: Tensor, shift: Tensor) -> Tensor:
        """The last frame displaced by ``shift`` ``(B, K, h | 1, w | 1, 2)``: ``(B, C, K, h, w)``."""
        height, width = last.shape[2:]
        rows = torch.linspace(-1 + 1 / height, 1 - 1 / height, height)
        cols = torch.linspace(-1 + 1 / width, 1 - 1 / width, width)
        grid = torch.stack(torch.meshgrid(rows, cols, indexing="ij")[::-1], dim=-1).to(last)
        # All K frames are sampled from the same image, so their grids are stacked along the height.
        moved = F.grid_sample(
            last, (grid - shift).flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False
        )
        return moved.unflatten(2, (self.chunk, height))

    def _condition(self, sigma: Tensor, actions: Tensor, states: Tensor, cache: ConvContext) -> Tensor:
        """Conditioning ``(B K, cond_dim)``: frame k depends on its own and earlier actions only."""
        levels = torch.stack([sigma, cache.sigma], dim=1)
        freqs = 2.0 ** torch.arange(8, device=levels.device, dtype=levels.dtype)
        angles = (levels[:, :, None] * freqs * (torch.pi / 2)).flatten(1)
        past = torch.tril(torch.ones(self.chunk, self.chunk)).to(actions)
        so_far = (past[None, :, :, None] * actions[:, None]).flatten(2)  # (B, K, K D)
        parts = [
            self._each(torch.cat([angles.sin(), angles.cos(), cache.prev_action], dim=1)),
            so_far,
            actions,
            states,
        ]
        parts += [actions.cumsum(dim=1), torch.eye(self.chunk).to(actions).expand(len(actions), -1, -1)]
        return F.silu(self.cond(torch.cat(parts, dim=2).flatten(0, 1)))

    def _each(self, x: Tensor) -> Tensor:
        return x[:, None].expand(-1, self.chunk, -1)

    def _coordinates(self, batch: int, height: int, width: int) -> Tensor:
        p = self.patch
        y = torch.linspace(-1, 1, height // p)[:, None].expand(-1, width // p)
        x = torch.linspace(-1, 1, width // p)[None, :].expand(height // p, -1)
        return torch.stack([y, x]).to(self.head.weight)[None].expand(batch, -1, -1, -1)

    def _unet(self, x: Tensor, cond: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            for layer in stage.children():
                x = layer(x, cond) if isinstance(layer, FiLMBlock) else layer(x)
            skips.append(x)
        skips.pop()
        for stage in self.up:
            first, *rest = stage.children()
            assert isinstance(first, FiLMBlock)
            x = first.enlarge(x, skips.pop(), cond)
            for layer in rest:
                x = layer(x, cond)
        return self.to_pixels(norm_silu(self.head_norm, x))
