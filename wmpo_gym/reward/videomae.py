"""The published success classifier: VideoMAE on windows of eight frames (paper §3.3)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wmpo_gym.reward.classifier import SuccessClassifier

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RENAMED = {"attention.attention.q_bias": "attention.attention.query.bias",
            "attention.attention.v_bias": "attention.attention.value.bias"}  # fmt: skip


def rename_published_keys(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of a released ``videomae_*.pth`` under today's names.

    Takes the plain state dict or the one wrapped during RL (``rm_model_state_dict``, ``module.`` prefixes),
    with the names of transformers 4 (``q_bias``, ``v_bias``) or of 5. Without the new names, a load that is
    not strict ignores the old biases.

    Args:
        state: What ``torch.load(path, weights_only=True)`` returned.
    """
    state = state.get("rm_model_state_dict", state)
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("module.")
        for old, new in _RENAMED.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


class VideoMAESuccessClassifier(SuccessClassifier):
    """Transformers' ``VideoMAEForVideoClassification`` behind the streaming interface.

    Args:
        model: Fields of ``transformers.VideoMAEConfig``; missing ones are ViT-B's. ``num_frames`` is the
            window (8 if missing).
        n_instructions: Instructions of the task; the network has two labels for each.
        image_mean: Per channel, on frames in [0, 1]; ImageNet's, as the published rollouts use.
        image_std: Per channel.
        max_windows: Windows per forward pass on an accelerator; bounds the memory.
    """

    kind = "videomae"

    def __init__(
        self,
        *,
        model: Mapping[str, Any] | None = None,
        n_instructions: int = 1,
        image_mean: tuple[float, float, float] = IMAGENET_MEAN,
        image_std: tuple[float, float, float] = IMAGENET_STD,
        max_windows: int = 64,
    ) -> None:
        try:
            from transformers import VideoMAEConfig, VideoMAEForVideoClassification
        except ImportError as error:
            raise ImportError(
                "VideoMAE classifiers need transformers: pip install 'wmpo-gym[vla]'"
            ) from error
        fields = {"num_frames": 8, **(model or {}), "num_labels": 2 * n_instructions}
        super().__init__(int(fields["num_frames"]), n_instructions)
        self.model = VideoMAEForVideoClassification(VideoMAEConfig(**fields))
        self.image_size = int(self.model.config.image_size)
        self.image_mean, self.image_std, self.max_windows = tuple(image_mean), tuple(image_std), max_windows

    @classmethod
    def from_transformers(
        cls, name_or_dir: str | Path, *, window: int = 8, n_instructions: int = 1
    ) -> VideoMAESuccessClassifier:
        """A classifier with the weights of a VideoMAE checkpoint, as published, and a new head.

        Mean and standard deviation are those of the checkpoint's image processor.

        Args:
            name_or_dir: Hub id (published: ``"MCG-NJU/videomae-base"``) or directory of a transformers model
                with safetensors weights.
            window: Frames per window; the position table is a fixed sinusoid, so any even number goes.
            n_instructions: Instructions of the task.
        """
        from transformers import VideoMAEForVideoClassification, VideoMAEImageProcessor

        model = VideoMAEForVideoClassification.from_pretrained(
            name_or_dir,
            num_frames=window,
            num_labels=2 * n_instructions,
            ignore_mismatched_sizes=True,
            use_safetensors=True,  # the other format can hold code
        )
        try:
            processor = VideoMAEImageProcessor.from_pretrained(name_or_dir)
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
        except OSError:
            mean, std = IMAGENET_MEAN, IMAGENET_STD
        fields = {k: v for k, v in model.config.to_diff_dict().items() if k not in ("id2label", "label2id")}
        classifier = cls(model=fields, n_instructions=n_instructions, image_mean=mean, image_std=std)
        classifier.model.load_state_dict(model.state_dict())
        return classifier

    def arguments(self) -> dict[str, Any]:
        """JSON-able keyword arguments that build this classifier anew."""
        skipped = ("id2label", "label2id", "architectures", "transformers_version", "dtype")
        return {
            "model": {k: v for k, v in self.model.config.to_diff_dict().items() if k not in skipped},
            "n_instructions": self.n_instructions,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
            "max_windows": self.max_windows,
        }

    def preprocess(self, frames: Tensor) -> Tensor:
        """Resize the shorter side, crop the centre, normalise: uint8 ``(N, H, W, 3)`` to ``(N, 3, h, w)``.

        Bilinear on uint8 with antialiasing, as the published image processor does.
        """
        x = frames.permute(0, 3, 1, 2)
        size, (height, width) = self.image_size, frames.shape[1:3]
        if min(height, width) != size:
            short = min(height, width)
            target = [size * height // short, size * width // short]
            x = F.interpolate(x.contiguous(), target, mode="bilinear", antialias=True, align_corners=False)
        top, left = (x.shape[2] - size) // 2, (x.shape[3] - size) // 2
        x = x[:, :, top : top + size, left : left + size].float() / 255.0
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.image_mean, self.image_std))
        return (x - mean) / std

    def logits(self, clips: Tensor) -> Tensor:
        """Logits ``(B, 2 * n_instructions)`` of preprocessed clips ``(B, window, 3, h, w)``."""
        if self.training:
            return self.model(pixel_values=clips).logits
        # One window at a time on the CPU: matrix products of other sizes round otherwise, and a row must not
        # depend on its batch. A window has hundreds of tokens, so nothing is lost.
        size = 1 if clips.device.type == "cpu" else self.max_windows
        return torch.cat([self.model(pixel_values=part).logits for part in clips.split(size)])
