"""A small convolutional success classifier on the latest frames: the reward of the bundled worlds.

Success can depend on a single pixel, so there is no pooling: coordinate channels, strided convolutions and a
dense layer over all positions keep the location of objects.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wmpo_gym.reward.classifier import SuccessClassifier
from wmpo_gym.utils.layers import RowLinear


class ConvSuccessClassifier(SuccessClassifier):
    """Convolutions over the stacked frames of a window, then a small perceptron.

    Args:
        image_size: Side of the square frames in pixels, even.
        window: Frames per window.
        n_instructions: Instructions of the task.
        widths: Channels of the four convolutions; the second and the fourth halve the resolution.
        hidden: Width of the perceptron.

    Raises:
        ValueError: If the image size is odd or too small.
    """

    kind = "conv"

    def __init__(
        self,
        *,
        image_size: int = 40,
        window: int = 2,
        n_instructions: int = 1,
        widths: tuple[int, int, int, int] = (24, 32, 48, 64),
        hidden: int = 64,
    ) -> None:
        super().__init__(window, n_instructions)
        if image_size % 2 or image_size < 8:
            raise ValueError(
                f"ConvSuccessClassifier takes frames of even size, 8 pixels at least, got {image_size}."
            )
        self.image_size, self.widths, self.hidden = image_size, tuple(widths), hidden
        side = image_size // 2
        layers: list[nn.Module] = []
        channels = 3 * 4 * window + 2
        for width, stride in zip(self.widths, (1, 2, 1, 2), strict=True):
            layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(4, width), nn.SiLU()]
            channels, side = width, (side - 1) // stride + 1
        self.body = nn.Sequential(*layers)
        last = RowLinear(hidden, 2 * n_instructions)
        # The loss sees the difference of a pair's logits, the score only the second. Pairs that start as
        # opposites stay opposites under gradient descent, so that the score orders windows as the loss does.
        with torch.no_grad():
            last.weight[0::2] = -last.weight[1::2]
            last.bias[0::2] = -last.bias[1::2]
        self.head = nn.Sequential(nn.Flatten(), RowLinear(channels * side**2, hidden), nn.SiLU(), last)
        axis = torch.linspace(-1, 1, image_size // 2)
        self.coordinates: Tensor
        self.register_buffer(
            "coordinates", torch.stack(torch.meshgrid(axis, axis, indexing="ij")), persistent=False
        )

    def arguments(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build this classifier anew."""
        return {
            "image_size": self.image_size,
            "window": self.window,
            "n_instructions": self.n_instructions,
            "widths": list(self.widths),
            "hidden": self.hidden,
        }

    def preprocess(self, frames: Tensor) -> Tensor:
        """Map uint8 ``(N, H, W, 3)`` to float32 ``(N, 3, H, W)`` in [-1, 1].

        Raises:
            ValueError: If the frames have another size.
        """
        if tuple(frames.shape[1:3]) != (self.image_size, self.image_size):
            raise ValueError(
                f"This classifier was made for frames of {self.image_size} x {self.image_size} pixels, got "
                f"{frames.shape[1]} x {frames.shape[2]}."
            )
        return frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0

    def logits(self, clips: Tensor) -> Tensor:
        """Logits ``(B, 2 * n_instructions)`` of preprocessed clips ``(B, window, 3, h, w)``."""
        if len(clips) == 1 and not self.training:
            # Torch uses another kernel for a batch of one, whose sums round differently.
            return self.logits(clips.expand(2, -1, -1, -1, -1))[:1]
        x = F.pixel_unshuffle(clips.flatten(1, 2), 2)
        x = torch.cat([x, self.coordinates.expand(len(x), -1, -1, -1)], dim=1)
        return self.head(self.body(x))
